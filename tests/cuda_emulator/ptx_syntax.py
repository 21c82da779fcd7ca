# SPDX-License-Identifier: Apache-2.0
"""The syntax of PTX and how its operands read in C++: what the rules of ptx_translator.py are written in."""

import re
from collections import Counter
from dataclasses import dataclass, field

C_TYPES = {
    "pred": "bool",
    **{f"{sign}{bits}": f"std::uint{bits}_t" for sign in "ub" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": f"std::int{bits}_t" for bits in (8, 16, 32, 64)},
    "f32": "float",
    "f64": "double",
    "f16": "Half",
    "bf16": "Bfloat16",
}
REGISTER_TYPES = {**C_TYPES, "f32": "std::uint32_t", "f64": "std::uint64_t", "f16": "std::uint16_t"}
SPECIAL = {
    f"%{name}.{axis}": f"{variable}.{axis}"
    for name, variable in (
        ("tid", "threadIdx"),
        ("ctaid", "blockIdx"),
        ("ntid", "blockDim"),
        ("nctaid", "gridDim"),
    )
    for axis in "xyz"
} | {"%laneid": "lane()"}
BINARY = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^"}
COMPARE = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}


class UnknownPtxError(Exception):
    """An instruction or operand that the translator has no rule for."""


@dataclass
class Kernel:
    """One `.entry` under translation.

    Attributes:
        name: Mangled name.
        parameter: Name of its only parameter.
        shared: Offset of each shared array in the block's shared window.
        shared_size: Bytes of all of them.
        code: C++ statements.
        blocks: Opcodes of each basic block, for the dynamic instruction mix.
        place: "file:line " of the source that the next instructions come from; empty: not known.
        files: Names by number.
    """

    name: str
    parameter: str
    shared: dict[str, int] = field(default_factory=dict)
    shared_size: int = 0
    code: list[str] = field(default_factory=list)
    blocks: list[Counter[str]] = field(default_factory=list)
    place: str = ""
    files: dict[str, str] = field(default_factory=dict)

    def start_block(self) -> None:
        self.code.append(f"  COUNT_BLOCK({len(self.blocks)});")
        self.blocks.append(Counter())


def split_operands(text: str) -> list[str]:
    """Split at commas outside brackets: "{%f1, %f2}, [%rd1+8]" has two operands."""
    operands, depth, current = [], 0, ""
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            operands.append(current.strip())
            current = ""
        else:
            current += character
    return [*operands, current.strip()] if current.strip() else operands


def split_statements(body: str) -> list[str]:
    """Statements without their semicolons, labels with their colon, and lone braces of inline assembly."""
    statements, current = [], ""
    for character in body:
        if character in "{}" and not current.strip():
            statements.append(character)
            current = ""
        elif character == ";":
            statements.append(current.strip())
            current = ""
        else:
            current += character
            if character == ":" and re.fullmatch(r"\s*[$\w]+:", current):
                statements.append(current.strip())
                current = ""
    return [statement for statement in statements if statement]


def register(name: str) -> str:
    """C++ name of a PTX register."""
    return name.replace("%", "reg_").replace("$", "_").replace(".", "_")


def value(kernel: Kernel, operand: str, kind: str) -> str:
    """C++ expression of an operand, of the type that PTX calls `kind`."""
    c_type = C_TYPES[kind]
    if operand in SPECIAL:
        return f"as<{c_type}>({SPECIAL[operand]})"
    if operand.startswith("!"):
        return f"!{register(operand[1:])}"
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", operand):
        return f"as<{c_type}>(std::uint32_t{{0x{match[1]}u}})"
    if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", operand):
        return f"as<{c_type}>(std::uint64_t{{0x{match[1]}ull}})"
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", operand):
        return f"as_integer<{c_type}>({operand.rstrip('U')}ll)"
    if operand == kernel.parameter:
        return f"{c_type}{{0}}"  # addresses in the parameter space are offsets in the struct
    if operand in kernel.shared:
        return f"{c_type}{{{kernel.shared[operand]}}}"
    if operand.startswith("%") or re.fullmatch(r"\w+", operand):
        return f"as<{c_type}>({register(operand)})"
    raise UnknownPtxError(f"operand {operand!r}")


def assign(target: str, expression: str) -> str:
    """Statement that sets a register; "_" discards."""
    if target == "_":
        return f"static_cast<void>({expression});"
    return f"set({register(target)}, {expression});"


def vector(operand: str) -> list[str]:
    """Registers of "{a, b}", or the single one."""
    return [name.strip() for name in operand.strip("{}").split(",")]


def address(kernel: Kernel, operand: str, space: str) -> str:
    """C++ pointer (char*) of "[base+offset]"."""
    match = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
    if match is None:
        raise UnknownPtxError(f"address {operand!r}")
    base, offset = match[1], match[2] or "0"
    if space == "shared":
        start = str(kernel.shared[base]) if base in kernel.shared else register(base)
        return f"shared_pointer({start}, {offset})"
    return f"global_pointer({register(base)}, {offset})"


def find_space(parts: list[str]) -> str:
    found = [
        space
        for space in ("shared", "global", "param", "local")
        if space in (p.split("::")[0] for p in parts)
    ]
    if not found or found[0] == "local":
        raise UnknownPtxError(f"state space of {'.'.join(parts)}")
    return found[0]


def vector_length(parts: list[str]) -> int:
    return 4 if "v4" in parts else 2 if "v2" in parts else 1

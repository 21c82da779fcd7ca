# SPDX-License-Identifier: Apache-2.0
"""Translates the PTX that nvcc emits into C++ that runs on the emulator's fibers.

Every register is a variable of its width; every instruction becomes one statement on a helper of
runtime/ptx_runtime.h; labels become labels. What is not known is an error, never skipped. Each kernel becomes
a function registered under its mangled name, so that launches by the ordinary host code find it.
"""

import re
from collections.abc import Callable
from pathlib import Path

from ptx_syntax import (
    BINARY,
    C_TYPES,
    COMPARE,
    REGISTER_TYPES,
    Kernel,
    UnknownPtxError,
    address,
    assign,
    find_space,
    register,
    split_operands,
    split_statements,
    value,
    vector,
    vector_length,
)

# One translator per first part of an opcode: (kernel, parts of the opcode, operands) -> C++ statements.
Rule = Callable[[Kernel, list[str], list[str]], str]


def load(kernel: Kernel, parts: list[str], operands: list[str]) -> str:
    count, c_type = vector_length(parts), C_TYPES[parts[-1]]
    if find_space(parts) == "param":
        match = re.fullmatch(r"\[([%\w$]+)(?:\+(-?\d+))?\]", operands[1])
        if match is None or not (match[1].startswith("%") or match[1] == kernel.parameter):
            raise UnknownPtxError(f"parameter {operands[1]!r}")
        base = register(match[1]) if match[1].startswith("%") else "0"  # an offset, see value()
        source = f"parameter_at<{c_type}, {count}>(arguments, {base} + ({match[2] or 0}))"
    else:
        source = f"load<{c_type}, {count}>({address(kernel, operands[1], find_space(parts))})"
    sets = " ".join(assign(target, f"loaded[{i}]") for i, target in enumerate(vector(operands[0])))
    return f"{{ const auto loaded = {source}; {sets} }}"


def store(kernel: Kernel, parts: list[str], operands: list[str]) -> str:
    values = ", ".join(value(kernel, source, parts[-1]) for source in vector(operands[1]))
    return f"store<{C_TYPES[parts[-1]]}>({address(kernel, operands[0], find_space(parts))}, {values});"


def move(kernel: Kernel, parts: list[str], operands: list[str]) -> str:
    target, source = operands
    kind = parts[-1]
    if target.startswith("{"):
        half = {"b32": "b16", "b64": "b32"}[kind]
        return " ".join(
            assign(name, f"part<{C_TYPES[half]}>({value(kernel, source, kind)}, {i})")
            for i, name in enumerate(vector(target))
        )
    if source.startswith("{"):
        half = {"b32": "b16", "b64": "b32"}[kind]
        low, high = (value(kernel, name, half) for name in vector(source))
        return assign(target, f"join({low}, {high})")
    return assign(target, value(kernel, source, kind))


def arithmetic(kernel: Kernel, parts: list[str], operands: list[str]) -> str:
    name, kind = parts[0], parts[-1]
    if "sat" in parts or "ftz" in parts or "approx" in parts:
        raise UnknownPtxError(f"modifier of {'.'.join(parts)}")
    if name == "mul" and "wide" in parts:
        wide = f"{kind[0]}{2 * int(kind[1:])}"
        a, b = (f"{C_TYPES[wide]}({value(kernel, operand, kind)})" for operand in operands[1:])
        return assign(operands[0], f"{a} * {b}")
    if name == "mul" and "hi" in parts:
        a, b = (value(kernel, operand, kind) for operand in operands[1:])
        return assign(operands[0], f"multiply_high({a}, {b})")
    if kind.startswith("s"):  # two's complement wraps
        kind = f"u{kind[1:]}"
    a, b = (value(kernel, operand, kind) for operand in operands[1:])
    if kind in ("u16", "b16"):
        a = f"unsigned{{{a}}}"
    return assign(operands[0], f"as<{C_TYPES[kind]}>({C_TYPES[kind]}({a} {BINARY[name]} {b}))")


def multiply_add(kernel: Kernel, parts: list[str], operands: list[str]) -> str:
    kind = parts[-1]
    if parts[0] == "fma":
        if parts[1:] not in (["rn", "f32"], ["rn", "f64"]):
            raise UnknownPtxError(f"modifier of {'.'.join(parts)}")
        arguments = ", ".join(value(kernel, operand, kind) for operand in operands[1:])
        return assign(operands[0], f"std::fma({arguments})")
    if "wide" in parts:
        wide = f"{kind[0]}{2 * int(kind[1:])}"
        a, b = (f"{C_TYPES[wide]}({value(kernel, operand, kind)})" for operand in operands[1:3])
        return assign(operands[0], f"{a} * {b} + {value(kernel, operands[3], wide)}")
    if "lo" not in parts:
        raise UnknownPtxError(".".join(parts))
    a, b, c = (value(kernel, operand, kind.replace("s", "u")) for operand in operands[1:])
    return assign(operands[0], f"{a} * {b} + {c}")


def divide(kernel: Kernel, parts: list[str], operands: list[str]) -> str:
    a, b = (value(kernel, operand, parts[-1]) for operand in operands[1:])
    if parts[-1] == "f32" and "rn" not in parts:
        raise UnknownPtxError(".".join(parts))
    return assign(operands[0], f"{a} {'/' if parts[0] == 'div' else '%'} {b}")


def extreme(kernel: Kernel, parts: list[str], operands: list[str]) -> str:
    kind = parts[-1]
    a, b = (value(kernel, operand, kind) for operand in operands[1:])
    function = {"f": f"float_{parts[0]}<{'true' if 'NaN' in parts else 'false'}>"}.get(
        kind[0], f"std::{parts[0]}"
    )
    return assign(operands[0], f"{function}({a}, {b})")


def unary(kernel: Kernel, parts: list[str], operands: list[str]) -> str:
    a = value(kernel, operands[1], parts[-1])
    symbols = {"not": "!" if parts[-1] == "pred" else "~", "neg": "-"}
    if parts[0] in symbols:
        return assign(operands[0], f"{C_TYPES[parts[-1]]}({symbols[parts[0]]}{a})")
    return assign(operands[0], f"ptx_{parts[0]}({a})")


def shift(kernel: Kernel, parts: list[str], operands: list[str]) -> str:
    a = value(kernel, operands[1], parts[-1])
    return assign(
        operands[0],
        f"shift_{'left' if parts[0] == 'shl' else 'right'}({a}, {value(kernel, operands[2], 'u32')})",
    )


def compare(kernel: Kernel, parts: list[str], operands: list[str]) -> str:
    condition, kind = parts[1], parts[-1]
    a, b = (value(kernel, operand, kind) for operand in operands[1:3])
    unordered = kind[0] == "f" and condition.endswith("u") and len(condition) == 3
    if condition in ("num", "nan"):
        result = f"{'' if condition == 'nan' else '!'}is_unordered({a}, {b})"
    elif unordered:
        result = f"({a} {COMPARE[condition[:2]]} {b} || is_unordered({a}, {b}))"
    else:
        result = f"({a} {COMPARE[condition]} {b})"
    if len(parts) == 4 and parts[2] in ("and", "or"):
        result = f"({result} {'&&' if parts[2] == 'and' else '||'} {value(kernel, operands[3], 'pred')})"
    elif len(parts) > 3:
        raise UnknownPtxError(".".join(parts))
    return assign(operands[0], result)


def select(kernel: Kernel, parts: list[str], operands: list[str]) -> str:
    a, b = (value(kernel, operand, parts[-1]) for operand in operands[1:3])
    return assign(operands[0], f"{value(kernel, operands[3], 'pred')} ? {a} : {b}")


def convert(kernel: Kernel, parts: list[str], operands: list[str]) -> str:
    target, source = parts[-2], parts[-1]
    a = value(kernel, operands[1], "b16" if source in ("f16", "bf16") else source)
    if source in ("f16", "bf16") and target == "f32":
        function = {"f16": "__half2float(__half", "bf16": "__bfloat162float(__nv_bfloat16"}[source]
        return assign(operands[0], f"{function}{{{a}}})")
    if source == "f32" and target in ("f16", "bf16") and parts[1] == "rn":
        function = {"f16": "__float2half_rn", "bf16": "__float2bfloat16_rn"}[target]
        return assign(operands[0], f"{function}({a}).bits")
    if source == "f64" and target == "f32" and parts[1] == "rn":
        return assign(operands[0], f"static_cast<float>({a})")
    if source == "f32" and target == "s32" and parts[1] == "rzi":
        return assign(operands[0], f"truncate({a})")
    integers = source[0] in "us" and target[0] in "us"
    if integers or (source[0] in "us" and target[0] == "f" and parts[1] == "rn"):
        return assign(operands[0], f"{C_TYPES[target]}({a})")
    raise UnknownPtxError(".".join(parts))


def cast_address(kernel: Kernel, parts: list[str], operands: list[str]) -> str:
    if "global" in parts:
        return assign(operands[0], value(kernel, operands[1], "u64"))
    if "shared" not in parts:
        raise UnknownPtxError(".".join(parts))
    function = "shared_offset" if "to" in parts else "generic_address"
    return assign(operands[0], f"{function}({value(kernel, operands[1], 'u64')})")


def barrier(kernel: Kernel, parts: list[str], operands: list[str]) -> str:
    if parts[:2] == ["bar", "warp"]:
        return f"__syncwarp({value(kernel, operands[0], 'u32')});"
    if operands != ["0"]:
        raise UnknownPtxError(f"{'.'.join(parts)} {operands}")
    return "__syncthreads();"


def shuffle(kernel: Kernel, parts: list[str], operands: list[str]) -> str:
    if parts[2] not in ("bfly", "idx"):
        raise UnknownPtxError(".".join(parts))
    target, _, predicate = operands[0].partition("|")
    arguments = ", ".join(value(kernel, operand, "b32") for operand in operands[1:])
    sets = assign(target, "result.value") + (f" {assign(predicate, 'result.valid')}" if predicate else "")
    return f"{{ const auto result = shuffle_{parts[2]}({arguments}); {sets} }}"


def vote(kernel: Kernel, parts: list[str], operands: list[str]) -> str:
    if parts[2] != "ballot":
        raise UnknownPtxError(".".join(parts))
    mask, predicate = value(kernel, operands[2], "b32"), value(kernel, operands[1], "pred")
    return assign(operands[0], f"__ballot_sync({mask}, {predicate})")


def atomic(kernel: Kernel, parts: list[str], operands: list[str]) -> str:
    returns = parts[0] == "atom"
    if "add" not in parts or parts[-1] not in ("u32", "s32"):
        raise UnknownPtxError(".".join(parts))
    where, amount = operands[returns:]
    call = f"atomic_add({address(kernel, where, find_space(parts))}, {value(kernel, amount, 'u32')})"
    return assign(operands[0], call) if returns else f"{call};"


def copy_async(kernel: Kernel, parts: list[str], operands: list[str]) -> str:
    if parts[2] == "commit_group":
        return "pfnas::cuda::commit_copies();"
    if parts[2] == "wait_group":
        return f"pfnas::cuda::wait_copies_until({operands[0]});"
    if parts[2] != "cg" or operands[2] != "16":
        raise UnknownPtxError(f"{'.'.join(parts)} {operands}")
    size = f"static_cast<int>({value(kernel, operands[3], 'u32')})" if len(operands) > 3 else "16"
    target, source = address(kernel, operands[0], "shared"), address(kernel, operands[1], "global")
    return f"pfnas::cuda::copy_async_16({target}, {source}, {size});"


def load_matrix(kernel: Kernel, parts: list[str], operands: list[str]) -> str:
    """ldmatrix.sync.aligned.m8n8.x4[.trans].shared.b16"""
    registers = vector(operands[0])
    if "m8n8" not in parts or len(registers) != 4:
        raise UnknownPtxError(".".join(parts))
    function = "load_matrix_transposed" if "trans" in parts else "load_matrix"
    sets = " ".join(assign(name, f"fragment[{i}]") for i, name in enumerate(registers))
    call = f"pfnas::cuda::{function}(fragment, {address(kernel, operands[1], 'shared')});"
    return f"{{ std::uint32_t fragment[4]; {call} {sets} }}"


def multiply_matrix(kernel: Kernel, parts: list[str], operands: list[str]) -> str:
    """mma.sync.aligned.m16n8k16.row.col.f32.T.T.f32"""
    types = {"f16": "__half", "bf16": "__nv_bfloat16"}
    if parts[:7] != ["mma", "sync", "aligned", "m16n8k16", "row", "col", "f32"] or parts[7] not in types:
        raise UnknownPtxError(".".join(parts))
    lists = [
        ", ".join(value(kernel, name, kind) for name in vector(operand))
        for operand, kind in zip(operands[1:], ("b32", "b32", "f32"), strict=True)
    ]
    sets = " ".join(assign(name, f"sums[{i}]") for i, name in enumerate(vector(operands[0])))
    return (
        f"{{ const std::uint32_t a[4] = {{{lists[0]}}}, b[2] = {{{lists[1]}}};"
        f" float sums[4] = {{{lists[2]}}};"
        f" pfnas::cuda::multiply_tile<{types[parts[7]]}>(sums, a, b); {sets} }}"
    )


RULES: dict[str, Rule] = {
    "ld": load,
    "st": store,
    "mov": move,
    **dict.fromkeys(BINARY, arithmetic),
    "fma": multiply_add,
    "mad": multiply_add,
    "div": divide,
    "rem": divide,
    "min": extreme,
    "max": extreme,
    **dict.fromkeys(("not", "neg", "abs", "popc", "clz", "brev", "ex2", "rcp", "rsqrt", "sqrt"), unary),
    "shl": shift,
    "shr": shift,
    "setp": compare,
    "selp": select,
    "cvt": convert,
    "cvta": cast_address,
    "bar": barrier,
    "barrier": barrier,
    "shfl": shuffle,
    "vote": vote,
    "atom": atomic,
    "red": atomic,
    "cp": copy_async,
    "ldmatrix": load_matrix,
    "mma": multiply_matrix,
}


def declare(kernel: Kernel, statement: str) -> bool:
    """Translate a declaration; False where the statement is none."""
    if match := re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement, flags=re.DOTALL):
        names = []
        for declared in match[2].split(","):
            if many := re.fullmatch(r"\s*(%\w+)<(\d+)>\s*", declared):
                names += [f"{register(many[1])}{i}{{}}" for i in range(int(many[2]))]
            else:
                names.append(f"{register(declared.strip())}{{}}")
        kernel.code.append(f"  [[maybe_unused]] {REGISTER_TYPES[match[1]]} {', '.join(names)};")
        return True
    if match := re.fullmatch(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]", statement):
        alignment, size = int(match[1]), int(match[3])
        offset = -(-kernel.shared_size // alignment) * alignment
        if offset % (2 * alignment) == 0:
            offset += alignment  # no more aligned than declared
        kernel.shared[match[2]] = offset
        kernel.shared_size = offset + size
        return True
    if match := re.fullmatch(r"\.loc\s+(\d+)\s+(\d+)", statement):
        if match[2] != "0":  # line 0: of no line in particular
            kernel.place = f"{kernel.files.get(match[1], match[1])}:{match[2]} "
        return True
    return statement.startswith(".pragma")


def translate_statement(kernel: Kernel, statement: str) -> None:
    """Append one statement's C++ to the kernel."""
    if statement in "{}":
        kernel.code.append(f"  {statement}")
        return
    if declare(kernel, statement):
        return
    if statement.endswith(":"):
        kernel.code.append(f"{register(statement[:-1])}:;")
        kernel.start_block()
        return
    if not kernel.blocks:
        kernel.start_block()
    guard = ""
    if match := re.fullmatch(r"@(!?%\w+)\s+(.*)", statement, flags=re.DOTALL):
        guard, statement = f"if ({value(kernel, match[1], 'pred')}) ", match[2]
    opcode, _, rest = statement.partition(" ") if " " in statement else (statement.split()[0], "", "")
    opcode, _, more = opcode.partition("\t")
    parts, operands = opcode.split("."), split_operands(f"{more} {rest}")
    kernel.blocks[-1][kernel.place + opcode] += 1
    if parts[0] in ("ret", "exit"):
        kernel.code.append(f"  {guard}return;")
    elif parts[0] == "bra":
        kernel.code.append(f"  {guard}goto {register(operands[0])};")
    elif parts[0] in RULES:
        kernel.code.append(f"  {guard}{RULES[parts[0]](kernel, parts, operands)}")
    else:
        raise UnknownPtxError(statement)
    if guard and parts[0] in ("bra", "ret", "exit"):
        kernel.start_block()


def translate_kernel(name: str, parameters: str, body: str, files: dict[str, str]) -> Kernel:
    """Translate one `.entry`."""
    declared = re.findall(r"\.param[^,]*?([\w$]+)\[\d+\]", parameters)
    if len(declared) != 1:
        raise UnknownPtxError(f"{name}: kernels take one struct, this one has {len(declared)} parameters")
    kernel = Kernel(name, declared[0], files=files)
    for statement in split_statements(body):
        try:
            translate_statement(kernel, statement)
        except (UnknownPtxError, KeyError, ValueError) as error:
            raise UnknownPtxError(f"{name}: {statement!r}: {error}") from error
    return kernel


def emit(kernel: Kernel, number: int) -> str:
    """C++ source of a translated kernel."""
    counts = [
        f'  counts["{opcode}"] += {times} * counters_{number}[{i}];'
        for i, block in enumerate(kernel.blocks)
        for opcode, times in sorted(block.items())
    ]
    return "\n".join(
        [
            f"// {kernel.name}",
            f"static std::uint64_t counters_{number}[{max(1, len(kernel.blocks))}];",
            f"static void kernel_{number}([[maybe_unused]] const void* arguments) {{",
            "  static char shared_key;",
            f"  [[maybe_unused]] std::uint64_t* const counters = counters_{number};",
            f"  enter_kernel(&shared_key, {kernel.shared_size});",
            *kernel.code,
            "}",
            f"static void report_{number}(std::map<std::string, std::uint64_t>& counts) {{",
            *counts,
            f"  for (auto& counter : counters_{number}) counter = 0;",
            "}",
            f"static const PtxRegistration registration_{number}("
            f'"{kernel.name}", kernel_{number}, report_{number});',
            "",
        ]
    )


def translate(ptx: str, pattern: str = "") -> str:
    """Translate a PTX module.

    Args:
        ptx: As `nvcc -ptx` writes it; with `-lineinfo`, counted opcodes have "file:line " before them.
        pattern: Regular expression that a kernel's mangled name must contain; others are left out.

    Returns:
        C++ source on top of runtime/ptx_runtime.h.

    Raises:
        UnknownPtxError: Something has no rule, or no kernel matches.
    """
    ptx = re.sub(r"//[^\n]*", "", ptx)
    files = {number: Path(name).name for number, name in re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', ptx)}
    ptx = re.sub(r"(\.loc\s+\d+\s+\d+)[^\n]*", r"\1;", ptx)
    sources = []
    for match in re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", ptx):
        if not re.search(pattern, match[1]):
            continue
        depth, end = 1, match.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(ptx[end], 0)
            end += 1
        kernel = translate_kernel(match[1], match[2], ptx[match.end() : end - 1], files)
        sources.append(emit(kernel, len(sources)))
    if not sources:
        raise UnknownPtxError(f"no kernel matches {pattern!r}")
    head = '#include "ptx_runtime.h"\n\nnamespace cuda_emulator::ptx {\n\n'
    return head + "\n".join(sources) + "\n}  // namespace cuda_emulator::ptx\n"

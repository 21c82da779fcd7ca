# SPDX-License-Identifier: Apache-2.0
"""What nvcc makes of the kernels: PTX to translate, and the resources that ptxas reports."""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from emulator_build import CSRC, OBJECTS, RUNTIME, _digest, compile_object
from ptx_translator import translate

FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-I{CSRC}")
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)


@dataclass(frozen=True)
class Resources:
    """Of one kernel on one architecture."""

    registers: int
    shared_bytes: int
    spill_bytes: int
    stack_bytes: int


def _cached(source: Path, arguments: tuple[str, ...], suffix: str) -> tuple[Path, bool]:
    key = hashlib.sha256("\0".join([*arguments, str(source), _digest(source)]).encode()).hexdigest()[:20]
    OBJECTS.mkdir(parents=True, exist_ok=True)
    target = OBJECTS / f"{source.stem}-{key}{suffix}"
    return target, target.exists()


def compile_ptx(source: Path, architecture: int, *, lines: bool = False) -> Path:
    """The PTX that nvcc emits for one architecture, on request with the lines of the source."""
    arguments = ("nvcc", *FLAGS, f"-I{source.parent}", f"-arch=compute_{architecture}", "-ptx")
    arguments += ("-lineinfo",) * lines
    target, exists = _cached(source, arguments, f".sm_{architecture}.ptx")
    if not exists:
        unfinished = target.with_suffix(f".{os.getpid()}.ptx")
        subprocess.run([*arguments, str(source), "-o", str(unfinished)], check=True)
        unfinished.replace(target)
    return target


def translated_object(source: Path, architecture: int, pattern: str = "", *, lines: bool = False) -> Path:
    """Objects with the kernels of a file, from PTX: nvcc, translator, then g++."""
    ptx = compile_ptx(source, architecture, lines=lines)
    text = translate(ptx.read_text(), pattern)
    digest = hashlib.sha256(text.encode()).hexdigest()[:20]
    translated = OBJECTS / f"{source.stem}-{digest}.sm_{architecture}.translated.cpp"
    if not translated.exists():
        translated.write_text(text)
    return compile_object(
        translated, ("-O1", "-Wno-unused-label", "-Wno-unused-but-set-variable", f"-I{RUNTIME}")
    )


def cubin_command(source: Path, architecture: int) -> tuple[str, ...]:
    """Compiles to machine code and reports resources; source and output are still to be named."""
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    return ("nvcc", *FLAGS, f"-I{source.parent}", target, "-cubin", "-Xptxas=-v")


def _cubin_and_log(source: Path, architecture: int) -> tuple[Path, Path]:
    arguments = cubin_command(source, architecture)
    log, exists = _cached(source, arguments, f".sm_{architecture}.log")
    cubin = log.with_suffix(".cubin")
    if not exists:
        unfinished = log.with_suffix(f".{os.getpid()}.cubin")
        done = subprocess.run(
            [*arguments, str(source), "-o", str(unfinished)], check=True, capture_output=True, text=True
        )
        unfinished.replace(cubin)
        log.write_text(done.stderr)
    return cubin, log


def compiled(source: Path, architecture: int) -> Path:
    """Machine code of a file's kernels."""
    return _cubin_and_log(source, architecture)[0]


@cache
def disassembler_path() -> str | None:
    """A PATH with cuobjdump and nvdisasm: this process's, or that of the copies in triton; None: none."""
    found = importlib.util.find_spec("triton")
    bundled = Path(found.origin).parent / "backends" / "nvidia" / "bin" if found and found.origin else Path()
    for path in (os.environ["PATH"], str(bundled)):
        if all(shutil.which(tool, path=path) for tool in ("cuobjdump", "nvdisasm")):
            return path + os.pathsep + os.environ["PATH"]
    return None


def disassemble(source: Path, architecture: int) -> dict[str, set[str]]:
    """Opcodes of every kernel of a file, by mangled name; needs `disassembler_path`."""
    command = ["cuobjdump", "-sass", str(compiled(source, architecture))]
    environment = {**os.environ, "PATH": disassembler_path() or os.environ["PATH"]}
    tool = shutil.which(command[0], path=environment["PATH"]) or command[0]
    done = subprocess.run([tool, *command[1:]], check=True, capture_output=True, text=True, env=environment)
    text = done.stdout
    kernels: dict[str, set[str]] = {}
    for part in text.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9]+)", body, flags=re.MULTILINE)
        kernels[name.strip()] = set(opcodes)
    return kernels


@cache
def resources(source: Path, architecture: int) -> dict[str, Resources]:
    """Registers, shared memory and spills of every kernel of a file, by mangled name."""
    return parse_resources(_cubin_and_log(source, architecture)[1].read_text())


def parse_resources(log: str) -> dict[str, Resources]:
    """The same from what ptxas has printed."""
    found = {}
    entry = re.compile(
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores,"
        r" (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)",
        flags=re.DOTALL,
    )
    for name, stack, stores, loads, registers, rest in entry.findall(log):
        shared = re.search(r"(\d+) bytes smem", rest)
        shared_bytes = int(shared[1]) if shared else 0
        found[name] = Resources(int(registers), shared_bytes, int(stores) + int(loads), int(stack))
    return found

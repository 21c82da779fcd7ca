# SPDX-License-Identifier: Apache-2.0
"""Builds Python modules that hold CUDA kernels compiled for the emulator. Objects are kept under build/."""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
HERE = Path(__file__).resolve().parent
RUNTIME = HERE / "runtime"
OBJECTS = ROOT / "build" / "cuda_emulator"

BINDINGS = (
    CSRC / "common" / "check.cpp",
    CSRC / "bindings" / "tensor_arg.cpp",
    CSRC / "bindings" / "cuda_arg.cpp",
    *sorted((CSRC / "bindings").glob("*_cuda.cpp")),
    RUNTIME / "ops.cpp",
)
KERNELS = tuple(sorted((CSRC / "kernels").glob("*/*_cuda.cu")))
EMULATOR = (
    RUNTIME / "async_copy.cpp",
    RUNTIME / "fiber.cpp",
    RUNTIME / "scheduler.cpp",
    RUNTIME / "ptx_registry.cpp",
    RUNTIME / "device_runtime.cpp",
    RUNTIME / "symbols.cpp",
)


@dataclass(frozen=True)
class Variant:
    """One way to compile kernels and emulator.

    Attributes:
        name: Part of the module's name.
        kernel_flags: For files with kernels.
        emulator_flags: For the emulator.
        link_flags: For the module.
        tracer: The file with the access hooks, or the one that stands in for it.
    """

    name: str
    kernel_flags: tuple[str, ...] = ("-O2",)
    emulator_flags: tuple[str, ...] = ("-O2",)
    link_flags: tuple[str, ...] = ()
    tracer: str = "no_tracer.cpp"


PLAIN = Variant("plain")
SANITIZED = Variant(
    "sanitized",
    kernel_flags=("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize=pointer-overflow"),
    emulator_flags=("-O1", "-g1", "-fsanitize=address"),
    link_flags=("-fsanitize=address,undefined",),
)
TRACED = Variant(
    "traced",
    kernel_flags=(
        "-O1",
        "-g1",
        "-fsanitize=thread",
        "--param=tsan-instrument-func-entry-exit=0",
        "-DCUDA_EMULATOR_TRACED",
    ),
    emulator_flags=("-O2", "-DCUDA_EMULATOR_TRACED"),
    tracer="tracer.cpp",
)


@cache
def compiler() -> str | None:
    """The C++ compiler; None where there is none or the emulator does not run on this machine."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return None
    return shutil.which("g++")


@cache
def _include_flags() -> tuple[str, ...]:
    import pybind11

    folders = (CSRC, RUNTIME)
    system = (pybind11.get_include(), sysconfig.get_paths()["include"])
    return (*(f"-I{folder}" for folder in folders), *(f"-isystem{folder}" for folder in system))


def _included(source: Path, seen: dict[Path, bytes]) -> None:
    """Collects the contents of a file and of all headers of ours that it reaches."""
    if source in seen:
        return
    seen[source] = source.read_bytes()
    for name in re.findall(rb'^\s*#\s*include\s*"([^"]+)"', seen[source], flags=re.MULTILINE):
        for folder in (source.parent, CSRC, RUNTIME):
            if (folder / name.decode()).is_file():
                _included(folder / name.decode(), seen)
                break


def _digest(source: Path) -> str:
    seen: dict[Path, bytes] = {}
    _included(source, seen)
    return hashlib.sha256(b"\0".join(seen[path] for path in sorted(seen))).hexdigest()


def compile_object(source: Path, flags: Sequence[str]) -> Path:
    """Compile one file, unless the same source, headers and flags have been compiled before."""
    command = [
        str(compiler()),
        "-std=c++20",
        "-fPIC",
        "-fno-gnu-unique",  # modules of several builds live in one process
        "-march=native",
        "-ffp-contract=off",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-Wno-psabi",
        "-Wno-tsan",
        "-DPFNAS_EMULATED_CUDA",
        *flags,
        *_include_flags(),
    ]
    key = hashlib.sha256("\0".join([*command, str(source), _digest(source)]).encode()).hexdigest()[:20]
    target = OBJECTS / f"{source.stem}-{key}.o"
    if not target.exists():
        OBJECTS.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(f".{os.getpid()}.o")
        subprocess.run([*command, "-x", "c++", "-c", str(source), "-o", str(unfinished)], check=True)
        unfinished.replace(target)
    return target


def build_module(
    variant: Variant,
    *,
    kernels: Sequence[Path] = KERNELS,
    bindings: Sequence[Path] = BINDINGS,
    kernel_flags: Sequence[str] = (),
    extra_objects: Sequence[Path] = (),
    name: str = "",
) -> Path:
    """Link a module.

    Args:
        variant: How to compile.
        kernels: Files with kernels, compiled with the variant's flags.
        bindings: Other files, compiled once for all variants.
        kernel_flags: More flags for the kernels, such as a planted bug.
        extra_objects: Translated PTX.
        name: Distinguishes modules of one variant.

    Returns:
        The shared library.
    """
    module = f"_emulated_{variant.name}{name}"
    objects = [compile_object(source, (*variant.kernel_flags, *kernel_flags)) for source in kernels]
    objects += [compile_object(source, variant.emulator_flags) for source in EMULATOR]
    objects += [compile_object(RUNTIME / variant.tracer, ("-O2", "-DCUDA_EMULATOR_TRACED"))]
    objects += [compile_object(source, ("-O1", "-fvisibility=hidden")) for source in bindings]
    define = (f"-DPFNAS_MODULE_NAME={module}", "-O1", "-fvisibility=hidden")
    objects += [compile_object(RUNTIME / "module.cpp", define), *extra_objects]
    key = hashlib.sha256("\0".join([*map(str, objects), *variant.link_flags]).encode()).hexdigest()[:20]
    target = OBJECTS / key / f"{module}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(f".{os.getpid()}.so")
        subprocess.run(
            [
                str(compiler()),
                "-shared",
                *map(str, objects),
                *variant.link_flags,
                "-ldl",
                "-o",
                str(unfinished),
            ],
            check=True,
        )
        unfinished.replace(target)
    return target


def sanitizer_environment() -> dict[str, str]:
    """Of a Python that loads a module of the variant SANITIZED: the first report ends it.

    Python and torch keep memory until the end of the process, so leaks are not looked for.
    """
    libraries = [
        subprocess.run(
            [str(compiler()), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
    }


def load_module(path: Path) -> ModuleType:
    """Import a module from its shared library."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

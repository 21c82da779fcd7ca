# SPDX-License-Identifier: Apache-2.0
"""The C++ side by itself: kernels from plain C++, and the rules that keep the layers and the tiers apart."""

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cuh", ".cu"))
KERNELS = sorted(CSRC.glob("kernels/*/*_cpu.cpp"))


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), flags=re.MULTILINE)


def test_kernels_know_neither_python_nor_torch() -> None:
    kernels = [path for path in SOURCES if CSRC / "kernels" in path.parents]
    assert kernels
    for path in kernels:
        for header in includes(path):
            assert not re.search(r"pybind11|Python\.h|torch|ATen|c10|dlpack|tensor_view|bindings/", header), (
                f"{path.relative_to(ROOT)} includes {header}"
            )


def test_nothing_includes_torch() -> None:
    for path in SOURCES:
        assert not any(re.match(r"(torch|ATen|c10)/", header) for header in includes(path)), path.relative_to(
            ROOT
        )


def test_threads_only_through_parallel_h() -> None:
    for path in SOURCES:
        if path.name not in ("parallel.h", "module.cpp"):
            assert "omp" not in re.sub(r"[a-z]omp|omp[a-z]", "", path.read_text()), path.relative_to(ROOT)


def test_files_stay_readable() -> None:
    for path in SOURCES:
        lines = path.read_text().splitlines()
        assert len(lines) < 500, path.relative_to(ROOT)
        assert lines[0] == "// SPDX-License-Identifier: Apache-2.0", path.relative_to(ROOT)


def cpu_runs_avx2() -> bool:
    info = Path("/proc/cpuinfo")
    return (
        info.exists() and re.search(r"^flags.*\bavx2\b.*", info.read_text(), flags=re.MULTILINE) is not None
    )


@pytest.fixture(scope="module")
def sixteen_lanes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the kernels as for AVX-512 (16 lanes, 32 registers), compiled for what this CPU can run."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler on the PATH")
    folder = tmp_path_factory.mktemp("sixteen_lanes")
    flags = [
        "-std=c++17",
        "-O1",
        "-ffp-contract=fast",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-psabi",
        "-fopenmp",
    ]
    if cpu_runs_avx2():
        flags += ["-mavx2", "-mfma"]
    flags += ["-DPFNAS_TIER=portable", "-DPFNAS_LANES=16", "-DPFNAS_REGISTERS=32", f"-I{CSRC}"]
    sources = [
        *KERNELS,
        ROOT / "tests" / "csrc" / "test_kernels.cpp",
        *sorted((CSRC / "common").glob("*.cpp")),
    ]

    def compile_one(source: Path) -> None:
        subprocess.run([compiler, *flags, "-c", source, "-o", folder / f"{source.stem}.o"], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(compile_one, sources))
    subprocess.run([compiler, "-fopenmp", *folder.glob("*.o"), "-o", folder / "test_kernels"], check=True)
    return folder


def test_sixteen_lane_kernels(sixteen_lanes: Path) -> None:
    done = subprocess.run([sixteen_lanes / "test_kernels"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.parent.name)
def test_tiers_share_no_inline_code(kernel: Path, sixteen_lanes: Path) -> None:
    """The linker merges a function that two tiers emit: the slow tier could then run the fast tier's code."""
    nm = shutil.which("nm")
    if nm is None or platform.system() != "Linux":
        pytest.skip("needs nm on Linux")
    listing = subprocess.run(
        [nm, "-C", sixteen_lanes / f"{kernel.stem}.o"], capture_output=True, text=True, check=True
    ).stdout
    weak = re.findall(r"^\S+ [WVu] (.*)$", listing, flags=re.MULTILINE)
    assert weak  # the register tiles are templates
    shared = [
        symbol for symbol in weak if "pfnas::portable::" not in symbol and not symbol.startswith("DW.ref")
    ]
    assert not shared

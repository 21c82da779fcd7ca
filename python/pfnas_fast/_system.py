# SPDX-License-Identifier: Apache-2.0
"""What this installation is made of: versions, CPU tiers, OpenMP runtimes, CUDA, and what to do next."""

import platform
import re
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from pfnas_fast.ops._library import _C

__all__ = [
    "SystemReport",
    "cpu_isa",
    "force_cpu_isa",
    "openmp_runtimes",
    "supported_cpu_isas",
    "system_report",
]

_PACKAGES = ("pfnas_fast", "torch", "torchvision", "numpy", "pycocotools")


def cpu_isa() -> str:
    """Name the instruction-set tier that compiled ops run with.

    Returns:
        "portable", "avx2" or "avx512": the forced one, else the best compiled one that this CPU runs.

    Example:
        >>> from pfnas_fast._system import cpu_isa
        >>> cpu_isa() in ("portable", "avx2", "avx512")
        True
    """
    return _C.cpu_isa()


def supported_cpu_isas() -> tuple[str, ...]:
    """Name the tiers that are compiled in and that this CPU runs, slowest first."""
    return tuple(_C.supported_isas())


def force_cpu_isa(tier: str | None) -> None:
    """Make compiled ops of this process use one tier, for tests and comparisons.

    Args:
        tier: One of `supported_cpu_isas()`, or None to go back to the best one.

    Raises:
        InputError: The tier is unknown, not compiled in, or not supported by this CPU.
    """
    _C.force_cpu_isa(tier)


def openmp_runtimes() -> tuple[str, ...]:
    """List the OpenMP runtime libraries mapped into this process, by real path (Linux; empty elsewhere)."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return ()
    paths = set(re.findall(r"\s(/\S*lib(?:gomp|iomp5|omp)\b[^\s/]*)$", maps.read_text(), flags=re.MULTILINE))
    return tuple(sorted({str(Path(path).resolve()) for path in paths}))


@dataclass(frozen=True)
class SystemReport:
    """What `pfnas checks` prints."""

    versions: dict[str, str]
    """Version of Python, the package and what it stands on; "missing" where a package is not installed."""
    machine: str
    compiler: str
    compiled_isas: tuple[str, ...]
    supported_isas: tuple[str, ...]
    active_isa: str
    openmp: tuple[str, ...]
    num_threads: int
    cuda_built: bool
    cuda_visible: bool
    advice: tuple[str, ...]
    """What to do about anything that is missing or slow, one sentence each; empty when all is well."""

    @property
    def ok(self) -> bool:
        """True where there is nothing to advise."""
        return not self.advice

    def rows(self) -> list[tuple[str, str]]:
        """The report as (label, value) pairs in the order they are printed."""
        return [
            *self.versions.items(),
            ("machine", self.machine),
            ("compiler", self.compiler),
            ("compiled ISA", ", ".join(self.compiled_isas)),
            ("active ISA", self.active_isa),
            ("OpenMP", ", ".join(self.openmp) or "unknown"),
            ("threads", str(self.num_threads)),
            ("CUDA kernels built", "yes" if self.cuda_built else "no"),
            ("CUDA visible", "yes" if self.cuda_visible else "no"),
        ]


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "missing"
    if versions["pfnas_fast"] == "missing":  # imported from a source tree
        import pfnas_fast

        versions["pfnas_fast"] = f"{pfnas_fast.__version__} (source tree)"
    return versions


def _advice(versions: dict[str, str], openmp: tuple[str, ...], cuda_visible: bool) -> tuple[str, ...]:
    advice = [f"pip install {name}" for name, version in versions.items() if version == "missing"]
    if sys.platform == "linux" and len(openmp) > 1:
        advice.append(
            "Two OpenMP runtimes are loaded, so torch.set_num_threads does not reach every loop: use a torch"
            " wheel from PyPI (2.13 or newer), or set OMP_NUM_THREADS before starting Python."
        )
    best = _C.supported_isas()[-1]
    if _C.cpu_isa() != best:
        advice.append(f"A slower tier is forced: force_cpu_isa(None) goes back to {best}.")
    if cuda_visible and not _C.cuda_built:
        advice.append(
            "A CUDA device is visible, but this build has CPU kernels only: use backend='reference' on it."
        )
    return tuple(advice)


def system_report() -> SystemReport:
    """Look at this process and machine; changes nothing and runs no kernel.

    Example:
        >>> from pfnas_fast._system import system_report
        >>> system_report().active_isa in system_report().compiled_isas
        True
    """
    versions = _versions()
    openmp = openmp_runtimes()
    cuda_visible = torch.cuda.is_available()
    return SystemReport(
        versions=versions,
        machine=f"{platform.system()} {platform.machine()}",
        compiler=_C.compiler,
        compiled_isas=tuple(_C.compiled_isas()),
        supported_isas=supported_cpu_isas(),
        active_isa=cpu_isa(),
        openmp=openmp,
        num_threads=torch.get_num_threads(),
        cuda_built=_C.cuda_built,
        cuda_visible=cuda_visible,
        advice=_advice(versions, openmp, cuda_visible),
    )

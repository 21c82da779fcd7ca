# SPDX-License-Identifier: Apache-2.0
"""The sample kernels with planted bugs: how to build and call them. Without torch: ASan sees the buffers.

``python samples.py MODULE BUG`` runs one kernel once in whatever build MODULE is.
"""

import ctypes
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from emulator_build import HERE, Variant, build_module, load_module

SOURCE = HERE / "samples" / "samples.cu"

BUGS = {
    "none": 0,
    "no barrier before overwrite": 1,
    "bank conflict": 2,
    "shared out of bounds": 3,
    "no barrier between warps": 4,
    "partial shuffle": 5,
    "plain add across blocks": 6,
    "one group too few": 7,
    "global off by one": 8,
    "misaligned vector": 9,
    "uninitialised shared": 10,
}
KERNELS = {
    "tile_multiply": ("no barrier before overwrite", "bank conflict"),
    "block_sum": (
        "shared out of bounds",
        "no barrier between warps",
        "partial shuffle",
        "plain add across blocks",
        "uninitialised shared",
    ),
    "staged_scale": ("one group too few", "global off by one", "misaligned vector"),
}


def build(variant: Variant, **more: Any) -> Path:
    """A module with the samples."""
    more = {"name": "_samples", **more}
    return build_module(variant, kernels=[SOURCE], bindings=[SOURCE.parent / "bindings.cpp"], **more)


@dataclass
class Buffer:
    """float32 numbers in memory of their own, aligned as cudaMalloc aligns."""

    memory: Any

    @property
    def address(self) -> int:
        return ctypes.addressof(self.memory)

    @property
    def size(self) -> int:
        return ctypes.sizeof(self.memory)


def filled(count: int, make: Callable[[], float]) -> Buffer:
    """Allocated by the C library, which ASan watches; never freed, the process is short."""
    alignment = 256
    address = ctypes.c_void_p()
    failed = ctypes.CDLL(None).posix_memalign(
        ctypes.byref(address), ctypes.c_size_t(alignment), ctypes.c_size_t(4 * count)
    )
    assert not failed
    assert address.value is not None
    memory = (ctypes.c_float * count).from_address(address.value)
    memory[:] = [make() for _ in range(count)]
    return Buffer(memory)


@dataclass
class Outcome:
    """One call of a sample."""

    buffers: dict[str, Buffer]
    launch: Callable[[], None]
    error: Callable[[], float]
    """Largest difference from what was expected, NaN where a result is NaN."""


def largest_difference(actual: Any, expected: Sequence[float]) -> float:
    differences = [abs(a - b) for a, b in zip(actual, expected, strict=True)]
    return float("nan") if any(d != d for d in differences) else max(differences)


def prepare(module: ModuleType, kernel: str, bug: int) -> Outcome:
    """Fresh inputs, NaN outputs."""
    rng = random.Random(0)

    def uniform() -> float:
        return rng.randint(-8, 8) / 4  # sums of their products are exact

    def nan() -> float:
        return float("nan")

    if kernel == "tile_multiply":
        n = 64
        a, b, c = filled(n * n, uniform), filled(n * n, uniform), filled(n * n, nan)
        expected = [
            sum(a.memory[i * n + k] * b.memory[k * n + j] for k in range(n))
            for i in range(n)
            for j in range(n)
        ]
        return Outcome(
            {"a": a, "b": b, "c": c},
            lambda: module.tile_multiply(a.address, b.address, c.address, n, bug),
            lambda: largest_difference(c.memory, expected),
        )
    if kernel == "block_sum":
        count, blocks = 5000, 4
        x, partial, total = filled(count, uniform), filled(blocks, nan), filled(1, lambda: 0.0)
        return Outcome(
            {"x": x, "partial": partial, "total": total},
            lambda: module.block_sum(x.address, partial.address, total.address, count, blocks, bug),
            lambda: largest_difference([sum(partial.memory)], [sum(x.memory)]),
        )
    count = 1024
    x, y = filled(count, uniform), filled(count, nan)
    return Outcome(
        {"x": x, "y": y},
        lambda: module.staged_scale(x.address, y.address, count, bug),
        lambda: largest_difference(y.memory, [2 * value for value in x.memory]),
    )


def kernel_of(bug: str) -> str:
    return next(kernel for kernel, bugs in KERNELS.items() if bug in bugs)


if __name__ == "__main__":
    outcome = prepare(load_module(Path(sys.argv[1])), kernel_of(sys.argv[2]), BUGS[sys.argv[2]])
    outcome.launch()
    sys.exit(0 if outcome.error() == 0 else 3)

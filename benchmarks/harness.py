# SPDX-License-Identifier: Apache-2.0
"""Timing two implementations against each other on a noisy machine: pinned, interleaved, ratios from one run.

Import this (and call `prepare_process`) before torch: the allocator reads its environment only once.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Comparison", "Row", "compare", "on_one_thread", "prepare_process"]


@dataclass(frozen=True)
class Row:
    """One comparison. A ratio above 1 means that ours is better."""

    name: str
    baseline: str
    unit: str
    ours: float
    theirs: float
    ratio_min: float
    ratio_median: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """Two callables that do the same work."""

    name: str
    ours: Callable[[], object]
    theirs: Callable[[], object]
    check: Callable[[], None]
    """Raises where the two do not compute the same; called once, before any timing."""
    baseline: str = "torch"
    theirs_scale: float = 1.0
    """Multiplies the times of the baseline, which does 1 / theirs_scale of the work (the suite says why)."""


@dataclass(frozen=True)
class Effort:
    """How long to time one comparison."""

    min_blocks: int = 5
    calls_per_block: int = 5
    seconds: float = 1.5


def prepare_process(cpu: int | None = None, *, threads: int = 1) -> None:
    """Pin this process and give torch's allocator huge pages. Must run before torch is imported.

    Without huge pages an eager op on a tensor above 32 MB spends most of its time in page faults: no
    fair baseline.

    Args:
        cpu: Logical CPU to pin to; None: the last one this process may use. Ignored for more than one thread.
        threads: OpenMP threads of both sides.
    """
    import sys

    if "torch" in sys.modules:
        raise RuntimeError(
            "prepare_process: torch is already imported, its allocator would ignore the setting"
        )
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if threads == 1 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0)) if cpu is None else cpu})
    import torch

    torch.set_num_threads(threads)


def on_one_thread(call: Callable[[], object]) -> Callable[[], object]:
    """`call` with one OpenMP thread, the baseline of the rows ``threads/...``."""
    import torch

    count = torch.get_num_threads()

    def single() -> object:
        torch.set_num_threads(1)
        try:
            return call()
        finally:
            torch.set_num_threads(count)

    return single


def _block(call: Callable[[], object], count: int, times: list[float]) -> None:
    call()  # untimed: the other side has just evicted this one's data from the caches
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)


def compare(comparison: Comparison, effort: Effort = Effort()) -> Row:
    """Check that both sides do equal work, then time them in alternating blocks within this process."""
    comparison.check()
    ours: list[float] = []
    theirs: list[float] = []
    start = time.perf_counter()
    blocks = 0
    while blocks < effort.min_blocks or time.perf_counter() - start < effort.seconds:
        _block(comparison.ours, effort.calls_per_block, ours)
        _block(comparison.theirs, effort.calls_per_block, theirs)
        blocks += 1
    scale = comparison.theirs_scale
    return Row(
        name=comparison.name,
        baseline=comparison.baseline,
        unit="ms",
        ours=round(min(ours) * 1e3, 4),
        theirs=round(min(theirs) * scale * 1e3, 4),
        ratio_min=round(min(theirs) * scale / min(ours), 3),
        ratio_median=round(statistics.median(theirs) * scale / statistics.median(ours), 3),
    )

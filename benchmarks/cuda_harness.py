# SPDX-License-Identifier: Apache-2.0
"""Timing on a GPU: CUDA events, a cold second-level cache for every call, both sides in alternating blocks.

Not imported by the CPU suites: the GPU's clocks are its own, and so are the rules of fair timing.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from harness import Effort, Row

__all__ = ["CudaComparison", "EventTimer", "compare_on_gpu", "missing"]

Timer = Callable[[Callable[[], object]], float]
"""Runs a call once and returns its milliseconds."""


@dataclass(frozen=True)
class CudaComparison:
    """Ours against several baselines that do the same work."""

    name: str
    ours: Callable[[], object]
    check: Callable[[Callable[[], object]], None]
    """Raises where a baseline does not compute the same as ours; called before it is timed."""
    baselines: dict[str, Callable[[], object]] = field(default_factory=dict)


class EventTimer:
    """Milliseconds between two events on the current stream around one call, the L2 cache cold.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(4 * cache_bytes, dtype=torch.uint8, device=device)
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call: Callable[[], object]) -> float:
        self._flush.zero_()
        self._begin.record()
        call()
        self._end.record()
        self._end.synchronize()
        return self._begin.elapsed_time(self._end)


def missing() -> str | None:
    """What keeps this process from comparing on a GPU; None: nothing."""
    from pfnas_fast.ops._library import _C

    if not _C.cuda_built:
        return "this build of pfnas_fast has no CUDA kernels; reinstall with -C cmake.define.PFNAS_CUDA=ON"
    if _C.cuda_device_count() == 0 or not torch.cuda.is_available():
        return "no CUDA device was found (no driver, no GPU, or a torch without CUDA)"
    return None


def compare_on_gpu(comparison: CudaComparison, timer: Timer, effort: Effort) -> Iterator[Row]:
    """Check equal work, warm up (cuDNN's search and torch.compile happen here), then time in blocks.

    Args:
        comparison: What to compare.
        timer: Usually an `EventTimer`.
        effort: Blocks and calls per block; its seconds are not used.

    Yields:
        One row per baseline.
    """
    for baseline, theirs in comparison.baselines.items():
        comparison.check(theirs)
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(max(effort.min_blocks, 1)):
            for side, call in zip(times, (comparison.ours, theirs), strict=True):
                call()
                side.extend(timer(call) for _ in range(effort.calls_per_block))
        ours, other = times
        yield Row(
            name=comparison.name,
            baseline=baseline,
            unit="ms",
            ours=round(min(ours), 4),
            theirs=round(min(other), 4),
            ratio_min=round(min(other) / min(ours), 3),
            ratio_median=round(statistics.median(other) / statistics.median(ours), 3),
        )

# SPDX-License-Identifier: Apache-2.0
"""What the access tracer saw in one or more launches."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

SECTOR = 32  # bytes


def sectors_of(pixels: Iterable[int], channels: range, *, row: int, item: int) -> int:
    """Sectors of some channels of some pixels of a channels_last tensor: what a block must touch.

    Args:
        pixels: Numbers of pixels.
        channels: Neighbouring ones.
        row: Channels of the tensor.
        item: Bytes of a number.
    """
    sectors: set[int] = set()
    for pixel in pixels:
        begin = (pixel * row + channels.start) * item
        end = (pixel * row + channels.stop) * item - 1
        sectors.update(range(begin // SECTOR, end // SECTOR + 1))
    return len(sectors)


def tiles(count: int, size: int) -> list[range]:
    """0 .. count - 1 in parts of a size, the last one perhaps smaller."""
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


@dataclass(frozen=True)
class Site:
    """One load or store in the source.

    Attributes:
        place: "file:line < file:line", inlined helpers followed to the kernel.
        space: "global" or "shared".
        kind: "load" or "store".
        size: Bytes per lane.
        requests: Times a warp passed it.
        lanes: Lanes that took part, over all requests.
        units: 32-byte sectors (global) or wavefronts (shared) that the requests needed.
        ideal_units: The same had the lanes' bytes been adjacent.
    """

    place: str
    space: str
    kind: str
    size: int
    requests: int
    lanes: int
    units: int
    ideal_units: int


@dataclass(frozen=True)
class BufferUse:
    """32-byte sectors of one buffer: touched at all, and summed over blocks of what each touched."""

    name: str
    read_footprint: int
    write_footprint: int
    block_reads: int
    block_writes: int


@dataclass(frozen=True)
class Trace:
    """All findings."""

    sites: tuple[Site, ...]
    races: tuple[str, ...]
    out_of_bounds: tuple[str, ...]
    buffers: dict[str, BufferUse]

    @property
    def clean(self) -> bool:
        return not self.races and not self.out_of_bounds

    def units_per_request(self, space: str, kind: str, place: str = "") -> float:
        """Sectors or wavefronts per request over the sites whose place contains a text."""
        sites = [s for s in self.sites if s.space == space and s.kind == kind and place in s.place]
        return sum(s.units for s in sites) / sum(s.requests for s in sites)

    def useful_share(self, kind: str) -> float:
        """Global memory: the sectors that the lanes' bytes would fill, over those that they touch."""
        sites = [s for s in self.sites if s.space == "global" and s.kind == kind]
        return sum(s.ideal_units for s in sites) / sum(s.units for s in sites)

    def conflicts(self) -> float:
        """Wavefronts of shared memory over the least possible: 1 is free of bank conflicts."""
        sites = [s for s in self.sites if s.space == "shared"]
        return sum(s.units for s in sites) / max(1, sum(s.ideal_units for s in sites))


def trace(module: Any, buffers: Mapping[str, tuple[int, int]], run: Callable[[], Any]) -> Trace:
    """Run with the tracer on.

    Args:
        module: A traced build.
        buffers: Address and bytes of every buffer that kernels may touch.
        run: Launches kernels.
    """
    module.trace_begin()
    for name, (address, size) in buffers.items():
        module.trace_buffer(name, address, size)
    try:
        run()
    finally:
        raw = json.loads(module.trace_end())
    return Trace(
        tuple(Site(**site) for site in raw["sites"]),
        tuple(raw["races"]),
        tuple(raw["out_of_bounds"]),
        {buffer["name"]: BufferUse(**buffer) for buffer in raw["buffers"]},
    )

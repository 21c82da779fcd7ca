# SPDX-License-Identifier: Apache-2.0
"""Exact dynamic programming over an additive cost: how much of the space costs what, and drawing from any
part of it.

Costs are rounded down to whole buckets per choice. A suffix table holds, for each block and number of buckets
left, the mass of all ways to finish the path; walking the tables forward draws a path from the measure
restricted to a bucket. The only rounding that matters, which bucket a path falls in, is bounded by
`Grid.residual`; `BudgetSampler` corrects it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pfnas_fast.errors import InputError
from pfnas_fast.space.costs import CostModel, additive_range, gather_sum
from pfnas_fast.space.population import resolution_index
from pfnas_fast.space.space import Space

MEASURES = ("genes", "paths")
_CHUNK = 1 << 14  # levels added at a time, so that the output stays in the first-level cache


@dataclass(frozen=True, eq=False)
class AdditiveCost:
    """Any cost that is a sum over blocks, for example a latency table.

    Attributes:
        space: The space.
        table: [num_resolutions, num_slots - 1, max_code + 1] float64, cost of each choice; code 0 costs 0.
        constant: [num_resolutions] float64, the cost of everything static.
        unit: Table entries per reported unit: 1e6 if the table counts MACs and budgets are in millions.
        name: What messages call the cost.

    Raises:
        ValueError: The table does not fit the space, or has negative or non-finite entries.

    Example:
        >>> import numpy as np
        >>> from pfnas_fast.space import AdditiveCost, CostModel, load_space
        >>> model = CostModel(load_space("tiny"), num_classes=3)
        >>> latency_us = AdditiveCost(model.space, np.round(model.macs_table / 1e4), np.full(3, 90.0))
        >>> latency_us.range(128)[0] > 90
        True
    """

    space: Space
    table: NDArray[np.float64]
    constant: NDArray[np.float64]
    unit: float = 1.0
    name: str = "cost"

    def __post_init__(self) -> None:
        shape = (len(self.space.resolutions), self.space.num_blocks, max(self.space.slot_sizes[:-1]) + 1)
        if self.table.shape != shape or self.constant.shape != shape[:1]:
            raise InputError(
                f"AdditiveCost: expected shapes {shape} and {shape[:1]} for table and constant, got "
                f"{self.table.shape} and {self.constant.shape}"
            )
        if not np.isfinite(self.table).all() or (self.table < 0).any() or self.table[:, :, 0].any():
            raise InputError("AdditiveCost: expected finite costs >= 0, and 0 at code 0, for table")
        if not np.isfinite(self.constant).all():
            raise InputError("AdditiveCost: expected finite costs for constant")

    @classmethod
    def macs(cls, model: CostModel) -> AdditiveCost:
        """The MACs of a cost model, in millions."""
        return cls(model.space, model.macs_table, model.macs_constant, 1e6, "million MACs")

    def of(self, population: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Cost of each row of a valid population, [num_paths] float64, in the reported unit."""
        return gather_sum(population, self.table, self.constant) / self.unit

    def range(self, resolution: int | None = None) -> tuple[float, float]:
        """Smallest and largest cost, in the reported unit, at one resolution or (None) over all."""
        rows = range(len(self.constant))
        if resolution is not None:
            index = resolution_index(self.space, resolution, "range")
            rows = range(index, index + 1)
        bounds = [additive_range(self.space, self.table[r], float(self.constant[r])) for r in rows]
        return min(low for low, _ in bounds) / self.unit, max(high for _, high in bounds) / self.unit


def common_step(space: Space, table: NDArray[np.float64]) -> float | None:
    """Largest whole number that divides every cost of a [num_blocks, num_codes] table, or None."""
    values = np.concatenate([table[b, 1 : n + 1] for b, n in enumerate(space.slot_sizes[:-1])])
    if (values != np.rint(values)).any() or values.max(initial=0) >= 2**53:
        return None
    return float(math.gcd(*(int(v) for v in values))) or None


@dataclass(frozen=True, eq=False)
class Grid:
    """The costs of one resolution, rounded down to whole buckets, and a measure over paths.

    Attributes:
        space: The space.
        table: [num_blocks, max_code + 1] float64, in table units.
        constant: Cost of everything static.
        step: Width of a bucket, table units.
        measure: "genes": each stage's depth uniform, then each active gene uniform (total mass 1); "paths":
            every path has mass 1.
    """

    space: Space
    table: NDArray[np.float64]
    constant: float
    step: float
    measure: str

    @cached_property
    def buckets(self) -> NDArray[np.int64]:
        """[num_blocks, max_code + 1] int64: floor(cost / step) of each choice."""
        return np.floor(self.table / self.step).astype(np.int64)

    @cached_property
    def residual(self) -> tuple[float, float]:
        """Bounds of (cost of a path - constant - step * its buckets); (0, 0) on the costs' common step."""
        return additive_range(self.space, self.table - self.step * self.buckets, 0.0)

    @cached_property
    def depth_weights(self) -> list[tuple[list[float], list[float]]]:
        """Per stage, masses of stopping and of going on after p = 0, 1, ... blocks."""
        weights = []
        for stage in self.space.stages:
            positions = range(stage.depths[-1] + 1)
            if self.measure == "paths":
                stop = [float(p in stage.depths) for p in positions]
                go_on = [1.0] * len(positions)
            else:
                # Chance of stopping at p given that the depth is at least p.
                stop = [(p in stage.depths) / sum(d >= p for d in stage.depths) for p in positions]
                go_on = [1.0 - s for s in stop]
            weights.append((stop, go_on))
        return weights

    def choice_weight(self, block: int) -> float:
        """Mass of each of a block's choices."""
        return 1.0 if self.measure == "paths" else 1.0 / self.space.slot_sizes[block]

    def suffix_masses(self, *, keep: bool) -> tuple[NDArray[np.float64], list[NDArray[np.float64]], list]:
        """Masses of all ways to finish a path, by the buckets they use.

        Args:
            keep: Whether to keep every block's tables (for drawing) or only the whole path's.

        Returns:
            (total, after_choice, after_stop). total: [num_buckets], mass of the paths that use q buckets.
            after_choice[b]: mass of finishing once block b is chosen. after_stop[b]: mass of the stages after
            block b's stage. Both lists are empty unless `keep`.
        """
        after_choice: list[NDArray[np.float64]] = [np.ones(0)] * (self.space.num_blocks if keep else 0)
        after_stop = list(after_choice)
        rest = np.ones(1)
        stages = list(zip(self.space.stage_slices, self.depth_weights, strict=True))
        for slots, (stop, go_on) in reversed(stages):
            mass = stop[-1] * rest
            for position in reversed(range(slots.stop - slots.start)):
                block = slots.start + position
                if keep:
                    after_choice[block], after_stop[block] = mass, rest
                weight = go_on[position] * self.choice_weight(block)
                codes = self.buckets[block, 1 : self.space.slot_sizes[block] + 1]
                mass = _shifted_sum(mass, codes, weight, rest, stop[position])
            rest = mass
        return rest, after_choice, after_stop

    @cached_property
    def total(self) -> NDArray[np.float64]:
        """[num_buckets] float64, mass of the paths that use q buckets."""
        return self.suffix_masses(keep=False)[0]


def _shifted_sum(
    mass: NDArray[np.float64],
    shifts: NDArray[np.int64],
    weight: float,
    base: NDArray[np.float64],
    base_weight: float,
) -> NDArray[np.float64]:
    """base_weight * base + weight * sum of `mass` moved up by each shift, chunk by chunk."""
    values, counts = np.unique(shifts, return_counts=True)
    result = np.zeros(max(len(base), len(mass) + int(values[-1])))
    if base_weight:
        np.multiply(base, base_weight, out=result[: len(base)])
    mass = weight * mass
    for start in range(0, len(result), _CHUNK):
        stop = min(start + _CHUNK, len(result))
        for shift, count in zip(values.tolist(), counts.tolist(), strict=True):
            low, high = max(start, shift), min(stop, shift + len(mass))
            if low < high:
                part = mass[low - shift : high - shift]
                result[low:high] += part if count == 1 else count * part
    return result


class Walker:
    """Draws paths from a grid's measure, given the buckets they may use.

    Args:
        grid: The grid.

    Attributes:
        grid: The grid.
        cumulative: [num_buckets + 1] float64, mass below each bucket.
        cumulative_down: [num_buckets + 1] float64, mass at and above each bucket (precise at the expensive
            end).
        pad: Zeros before the first bucket of `tables`.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        total, after_choice, after_stop = grid.suffix_masses(keep=True)
        self.cumulative = np.concatenate([[0.0], np.cumsum(total)])
        self.cumulative_down = np.concatenate([np.cumsum(total[::-1])[::-1], [0.0]])
        self.pad = int(grid.buckets.max())
        length = len(total) + self.pad
        # Zeros around each table stand for 'cannot be finished', so that no index needs a check.
        self._after_choice = [_padded(a, self.pad, length) for a in after_choice]
        self._after_stop = [_padded(a, 0, len(total)) for a in after_stop]

    def tables(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The walk's tables, as the compiled twin of `draw` reads them.

        Returns:
            (after_choice [num_blocks, pad + num_buckets + pad or so], mass of finishing once a block is
            chosen, at index pad + buckets left; after_stop [num_blocks, num_buckets], mass of the stages
            after the block's).
        """
        return np.stack(self._after_choice), np.stack(self._after_stop)

    def bucket_range(
        self, low: NDArray[np.float64], high: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First and one-past-last bucket that may hold a path with cost in [low, high] (table units)."""
        grid = self.grid
        first = np.floor((low - grid.constant - grid.residual[1]) / grid.step)
        last = np.ceil((high - grid.constant - grid.residual[0]) / grid.step)
        size = len(self.cumulative) - 1
        return np.clip(first, 0, size).astype(np.int64), np.clip(last + 1, 0, size).astype(np.int64)

    def surely(self, low: float, high: float) -> bool:
        """Whether some bucket that lies inside [low, high] (table units) altogether holds a path."""
        grid = self.grid
        first = math.ceil((low - grid.constant - grid.residual[0]) / grid.step + 1e-6)
        last = math.floor((high - grid.constant - grid.residual[1]) / grid.step - 1e-6)
        return bool((np.diff(self.cumulative[max(first, 0) : max(last + 2, 0)]) > 0).any())

    def mass(self, first: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.float64]:
        """Mass of the buckets first <= q < end."""
        upper = self._is_upper(first)
        up = self.cumulative[end] - self.cumulative[first]
        down = self.cumulative_down[first] - self.cumulative_down[end]
        return np.where(upper, down, up)

    def _is_upper(self, first: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Where sums from above lose less to cancellation than sums from below."""
        return self.cumulative[first] > self.cumulative_down[first]

    def draw(
        self, rng: np.random.Generator, first: NDArray[np.int64], end: NDArray[np.int64]
    ) -> NDArray[np.uint8]:
        """Draw one path for each row from the measure restricted to the buckets first <= q < end (mass > 0).

        Returns:
            [num_rows, num_blocks] uint8 codes (no resolution slot).
        """
        left = self._draw_buckets(rng, first, end)
        space = self.grid.space
        codes = np.zeros((len(left), space.num_blocks), np.uint8)
        for slots, (stop, go_on) in zip(space.stage_slices, self.grid.depth_weights, strict=True):
            active = np.arange(len(left))
            for position, block in enumerate(range(slots.start, slots.stop)):
                if not len(active):
                    break
                choice = self._draw_choice(rng, block, left[active], stop[position], go_on[position])
                codes[active, block] = choice
                left[active] -= self.grid.buckets[block, choice]
                active = active[choice != 0]
        return codes

    def _draw_buckets(
        self, rng: np.random.Generator, first: NDArray[np.int64], end: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        u = rng.random(len(first))
        low, high = self.cumulative[first], self.cumulative[end]
        up = np.searchsorted(self.cumulative, _between(low, high, u), side="right") - 1
        low, high = self.cumulative_down[end], self.cumulative_down[first]
        reverse = self.cumulative_down[::-1]
        down = len(reverse) - 1 - np.searchsorted(reverse, _between(low, high, u), side="right")
        return np.clip(np.where(self._is_upper(first), down, up), first, end - 1)

    def _draw_choice(
        self, rng: np.random.Generator, block: int, left: NDArray[np.int64], stop: float, go_on: float
    ) -> NDArray[np.int64]:
        """A code for each row, 0 = stop here."""
        grid, size = self.grid, self.grid.space.slot_sizes[block]
        weights = np.empty((size + 1, len(left)))
        weights[0] = stop * self._after_stop[block][left]
        scale = go_on * grid.choice_weight(block)
        start = left + self.pad
        for code in range(1, size + 1):
            weights[code] = scale * self._after_choice[block][start - grid.buckets[block, code]]
        np.cumsum(weights, axis=0, out=weights)
        u = _between(np.zeros(len(left)), weights[-1], rng.random(len(left)))
        return (weights > u).argmax(axis=0)


def _between(
    low: NDArray[np.float64], high: NDArray[np.float64], u: NDArray[np.float64]
) -> NDArray[np.float64]:
    """low + u * (high - low), kept below `high` whatever the rounding, so that what is drawn has mass."""
    return np.minimum(low + u * (high - low), np.nextafter(high, low))


def _padded(array: NDArray[np.float64], before: int, length: int) -> NDArray[np.float64]:
    """`array` after `before` zeros, with zeros up to `length` in total."""
    result = np.zeros(length)
    result[before : before + len(array)] = array
    return result

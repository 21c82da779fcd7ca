# SPDX-License-Identifier: Apache-2.0
"""Drawing paths of a given budget, exactly and at once, instead of drawing until one fits."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pfnas_fast.errors import InputError
from pfnas_fast.space.additive import MEASURES, AdditiveCost, Grid, Walker, common_step
from pfnas_fast.space.costs import CostModel
from pfnas_fast.space.population import resolution_index

_MAX_EXACT_LEVELS = 1 << 24  # costs on a common grid of at most this many levels are counted exactly
_BRACKET_LEVELS = 1 << 22  # else masses are bracketed with this many buckets
_MAX_BUCKETS = 1 << 17  # of the tables for drawing; narrow windows get finer tables, up to this
_MAX_ROUNDS = 400


class BudgetSampler:
    """Draws paths whose cost lies in a window, from exact dynamic programming over blocks.

    Paths follow the measure conditioned on the window: a bucketed draw is kept iff its true cost is in the
    window, so rounding costs a few redrawn rows (`acceptance`) and no exactness.

    Args:
        cost: A `CostModel` (its MACs in millions) or any `AdditiveCost`.
        num_buckets: Cost buckets between the cheapest and the dearest path of a resolution, >= 16.
        measure: "genes" (Once-for-All's: depth uniform, then each active gene) or "paths" (each path alike).

    Attributes:
        cost: The `AdditiveCost` in use.
        num_drawn, num_accepted: Rows drawn and kept so far.

    Raises:
        ValueError: Unknown measure, or too few buckets.

    Example:
        >>> import numpy as np
        >>> from pfnas_fast.space import BudgetSampler, CostModel, load_space
        >>> cost = CostModel(load_space("tiny"), num_classes=3)
        >>> macs = cost.macs_m(BudgetSampler(cost).sample(np.random.default_rng(0), 100, 11.9, 12.1))
        >>> bool((macs >= 11.9).all() and (macs <= 12.1).all())
        True
    """

    def __init__(
        self, cost: CostModel | AdditiveCost, num_buckets: int = 8192, *, measure: str = "genes"
    ) -> None:
        if measure not in MEASURES:
            raise InputError(f"BudgetSampler: expected one of {MEASURES} for measure, got {measure!r}")
        if num_buckets < 16:
            raise InputError(f"BudgetSampler: expected at least 16 for num_buckets, got {num_buckets}")
        self.cost = cost if isinstance(cost, AdditiveCost) else AdditiveCost.macs(cost)
        self.space = self.cost.space
        self.num_buckets = num_buckets
        self.measure = measure
        self.num_drawn = 0
        self.num_accepted = 0
        self._walkers: dict[tuple[int, int], Walker] = {}
        self._grids: dict[tuple[int, str], Grid] = {}

    @property
    def acceptance(self) -> float:
        """Share of drawn rows that were in their window, so far (1.0 before the first draw)."""
        return self.num_accepted / self.num_drawn if self.num_drawn else 1.0

    # How much is there --------------------------------------------------------------------------------------

    def bracket(
        self, low_m: float, high_m: float, resolution: int, *, measure: str | None = None
    ) -> tuple[float, float]:
        """Lower and upper bound of the mass of the paths with cost in [low_m, high_m] at one resolution.

        The bounds are equal, hence exact, where all costs are whole multiples of a common step and span at
        most 2^24 of them; else they enclose the few paths whose bucket straddles an end of the window. The
        first call at a resolution counts the space: milliseconds for `tiny`, seconds for `ofa_mbv3_w1.0`, of
        which it then keeps one array (about 1.3 * 8 bytes a level). Drawing does not need it.
        """
        _check_window(low_m, high_m)
        grid = self._counting_grid(self._index(resolution), measure or self.measure)
        # In reported units and by the same division as `AdditiveCost.of`, so that ends are in or out alike.
        values = _Levels(grid, self.cost.unit)
        inner = values.slice(low_m, high_m, grid.residual)
        outer = values.slice(low_m, high_m, (grid.residual[1], grid.residual[0]))
        return float(grid.total[inner].sum()), float(grid.total[outer].sum())

    def probability(self, low_m: float, high_m: float, resolution: int | None = None) -> float:
        """Chance that a path drawn from the gene measure costs low_m to high_m (both included).

        Args:
            low_m: Lower end, in the cost's unit (millions of MACs).
            high_m: Upper end.
            resolution: Longest side, px; None draws it uniformly first.

        Returns:
            The probability; exact or the middle of `bracket`.

        Raises:
            ValueError: Bad window or resolution.
        """
        chosen = self.space.resolutions if resolution is None else [resolution]
        masses = [sum(self.bracket(low_m, high_m, r, measure="genes")) / 2 for r in chosen]
        return sum(masses) / len(masses)

    def num_paths(self, low_m: float, high_m: float, resolution: int | None = None) -> float:
        """Number of different paths that cost low_m to high_m, both included.

        Args:
            low_m: Lower end, in the cost's unit (millions of MACs).
            high_m: Upper end.
            resolution: Longest side, px; None sums over all resolutions.

        Returns:
            The count as a float (spaces exceed 64 bits); exact to rounding, or the middle of `bracket`.
        """
        chosen = self.space.resolutions if resolution is None else [resolution]
        return sum(sum(self.bracket(low_m, high_m, r, measure="paths")) / 2 for r in chosen)

    def feasible(self, low_m: float, high_m: float) -> list[int]:
        """Resolutions at which some path costs low_m to high_m.

        A window so narrow that bucket bounds cannot decide is searched by drawing.
        """
        _check_window(low_m, high_m)
        return [r for r in self.space.resolutions if self._has_path(low_m, high_m, r)]

    # Drawing ------------------------------------------------------------------------------------------------

    def sample(
        self, rng: np.random.Generator, n: int, low_m: float, high_m: float, resolution: int | None = None
    ) -> NDArray[np.uint8]:
        """Draw paths that cost low_m to high_m (both included).

        Args:
            rng: Source of randomness.
            n: Number of paths, >= 0.
            low_m: Lower end, in the cost's unit (millions of MACs).
            high_m: Upper end.
            resolution: Longest side, px; None draws it uniformly among the feasible ones.

        Returns:
            [n, num_slots] uint8.

        Raises:
            ValueError: No path is in the window; the text gives the feasible range.
        """
        _check_window(low_m, high_m)
        if resolution is None:
            choices = [self._index(r) for r in self.feasible(low_m, high_m)]
        else:
            choices = [self._index(resolution)] if self._has_path(low_m, high_m, resolution) else []
        if not choices:
            raise InputError(self._refusal(low_m, high_m, resolution))
        index = np.array(choices)[rng.integers(0, len(choices), n)]
        population, missing = self._draw(rng, index, np.full(n, low_m), np.full(n, high_m))
        if len(missing):
            raise InputError(
                f"sample: expected a wider window, got {low_m:g} to {high_m:g} {self.cost.name}, "
                f"in which {len(missing)} of {n} rows were not found"
            )
        return population

    def sample_log_uniform(
        self,
        rng: np.random.Generator,
        n: int,
        low_m: float | None = None,
        high_m: float | None = None,
        *,
        window: float = 0.02,
    ) -> NDArray[np.uint8]:
        """Draw paths that cover the budgets evenly in log cost and, at each budget, the resolutions evenly.

        For each path: a target cost, log-uniform in [low_m, high_m]; a resolution, uniform among those with a
        path in the window; a path in the window target * (1 +- window / 2), clipped to [low_m, high_m].
        Targets without any path in their window (gaps of very small spaces) are drawn again.

        Args:
            rng: Source of randomness.
            n: Number of paths, >= 0.
            low_m: Lower end of the targets; None is the cheapest path's cost.
            high_m: Upper end of the targets; None is the dearest path's cost.
            window: Relative width, 0 < window < 1.

        Returns:
            [n, num_slots] uint8.

        Raises:
            ValueError: Bad window, or no path between low_m and high_m.
        """
        smallest, largest = self.cost.range()
        low = smallest if low_m is None else max(low_m, smallest)
        high = largest if high_m is None else min(high_m, largest)
        if not 0 < window < 1:
            raise InputError(f"sample_log_uniform: expected 0 < window < 1, got {window!r}")
        if not low <= high or not self.feasible(low, high):
            raise InputError(
                self._refusal(low if low_m is None else low_m, high if high_m is None else high_m, None)
            )
        population = np.empty((n, self.space.num_slots), np.uint8)
        missing = np.arange(n)
        for _ in range(_MAX_ROUNDS):
            target = np.exp(rng.uniform(math.log(low), math.log(high), len(missing)))
            lows = np.maximum(target * (1 - window / 2), low)
            highs = np.minimum(target * (1 + window / 2), high)
            index, possible = self._draw_resolutions(rng, lows, highs)
            rows, failed = self._draw(rng, index[possible], lows[possible], highs[possible], max_rounds=64)
            drawn = np.delete(np.flatnonzero(possible), failed)
            population[missing[drawn]] = np.delete(rows, failed, axis=0)
            missing = np.delete(missing, drawn)
            if not len(missing):
                return population
        raise InputError(f"sample_log_uniform: expected a wider window for this space, got {window:g}")

    def walker(self, resolution: int, *, width: float = math.inf) -> Walker:
        """The tables behind drawing at one resolution, for the compiled twin (`pfnas_fast.ops.SearchSpace`).

        Args:
            resolution: Longest side, px.
            width: Narrowest window to be drawn from, in the cost's unit; narrow ones get finer buckets.
        """
        return self._walker(self._index(resolution), width * self.cost.unit)

    # Inside -------------------------------------------------------------------------------------------------

    def _index(self, resolution: int) -> int:
        return resolution_index(self.space, resolution, "BudgetSampler")

    def _refusal(self, low_m: float, high_m: float, resolution: int | None) -> str:
        low, high = self.cost.range(resolution)
        where = "" if resolution is None else f" at {resolution} px"
        return (
            f"{self.space.name}: expected a window that holds a path, within {low:.6g} to {high:.6g} "
            f"{self.cost.name}{where}, got {low_m:g} to {high_m:g}"
        )

    def _counting_grid(self, index: int, measure: str) -> Grid:
        """The finest affordable grid: the costs' own common step, or a fixed number of buckets."""
        if (index, measure) not in self._grids:
            table, low, high = self._span(index)
            step = common_step(self.space, table)
            if step is None or (high - low) / step > _MAX_EXACT_LEVELS:
                step = (high - low) / _BRACKET_LEVELS or 1.0
            constant = float(self.cost.constant[index])
            self._grids[index, measure] = Grid(self.space, table, constant, step, measure)
        return self._grids[index, measure]

    def _span(self, index: int) -> tuple[NDArray[np.float64], float, float]:
        low, high = self.cost.range(self.space.resolutions[index])
        return self.cost.table[index], low * self.cost.unit, high * self.cost.unit

    def _walker(self, index: int, width: float) -> Walker:
        """Tables for drawing, fine enough that windows of this width (table units) keep most draws."""
        table, low, high = self._span(index)
        num_buckets = self.num_buckets
        while num_buckets < _MAX_BUCKETS and width < self.space.num_blocks * (high - low) / num_buckets:
            num_buckets = min(4 * num_buckets, _MAX_BUCKETS)
        if (index, num_buckets) not in self._walkers:
            step = (high - low) / num_buckets or 1.0
            own = common_step(self.space, table)
            step = own if own is not None and own > step else step
            grid = Grid(self.space, table, float(self.cost.constant[index]), step, self.measure)
            self._walkers[index, num_buckets] = Walker(grid)
        return self._walkers[index, num_buckets]

    def _has_path(self, low_m: float, high_m: float, resolution: int) -> bool:
        index = self._index(resolution)
        low, high = self.cost.range(resolution)
        if high_m < low or low_m > high:
            return False
        if low_m <= low or high_m >= high:
            return True  # the cheapest or the dearest path itself
        if self._walker(index, math.inf).surely(low_m * self.cost.unit, high_m * self.cost.unit):
            return True
        inner, outer = self.bracket(low_m, high_m, resolution)
        if inner > 0 or outer == 0:
            return inner > 0
        rng = np.random.default_rng(0)
        tries = np.full(4096, index), np.full(4096, low_m), np.full(4096, high_m)
        return len(self._draw(rng, *tries, max_rounds=4)[1]) < 4096

    def _draw_resolutions(
        self, rng: np.random.Generator, lows: NDArray[np.float64], highs: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """A resolution index for each window, uniform among those that may hold a path; where one does."""
        possible = np.empty((len(lows), len(self.space.resolutions)), bool)
        unit = self.cost.unit
        for index, resolution in enumerate(self.space.resolutions):
            low, high = self.cost.range(resolution)
            possible[:, index] = (highs >= low) & (lows <= high)
            if possible[:, index].any():
                walker = self._walker(index, math.inf)
                first, end = walker.bucket_range(lows * unit, highs * unit)
                possible[:, index] &= walker.mass(first, end) > 0
        counts = possible.sum(axis=1)
        rank = np.floor(rng.random(len(lows)) * counts).astype(np.int64)
        index = (np.cumsum(possible, axis=1) > rank[:, None]).argmax(axis=1)
        return index, counts > 0

    def _draw(
        self,
        rng: np.random.Generator,
        index: NDArray[np.int64],
        lows: NDArray[np.float64],
        highs: NDArray[np.float64],
        *,
        max_rounds: int = _MAX_ROUNDS,
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Draw a path for each row's resolution index and window (reported unit) until all fit.

        Returns:
            The population, and the rows for which none was found in `max_rounds` rounds.
        """
        population = np.zeros((len(index), self.space.num_slots), np.uint8)
        population[:, -1] = 1 + index
        missing: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
        unit = self.cost.unit
        for i in np.unique(index).tolist():
            rows = np.flatnonzero(index == i)
            walker = self._walker(i, float((highs[rows] - lows[rows]).min()) * unit)
            first, end = walker.bucket_range(lows * unit, highs * unit)
            possible = walker.mass(first[rows], end[rows]) > 0
            missing.append(rows[~possible])
            rows = rows[possible]
            for _ in range(max_rounds):
                if not len(rows):
                    break
                population[rows, :-1] = walker.draw(rng, first[rows], end[rows])
                values = self.cost.of(population[rows])
                good = (values >= lows[rows]) & (values <= highs[rows])
                self.num_drawn += len(rows)
                self.num_accepted += int(good.sum())
                rows = rows[~good]
            missing.append(rows)
        return population, np.sort(np.concatenate(missing))


class _Levels:
    """The cost of each level of a grid, and the levels inside a window."""

    def __init__(self, grid: Grid, unit: float) -> None:
        self.grid, self.unit = grid, unit

    def _value(self, level: int, residual: float) -> float:
        return (self.grid.constant + self.grid.step * level + residual) / self.unit

    def slice(self, low: float, high: float, residual: tuple[float, float]) -> slice:
        """Levels q with value(q) + residual[0] >= low and value(q) + residual[1] <= high."""
        size = len(self.grid.total)
        first = self._near((low * self.unit - self.grid.constant - residual[0]) / self.grid.step)
        while first > 0 and self._value(first - 1, residual[0]) >= low:
            first -= 1
        while first < size and self._value(first, residual[0]) < low:
            first += 1
        end = self._near((high * self.unit - self.grid.constant - residual[1]) / self.grid.step)
        while end > 0 and self._value(end - 1, residual[1]) > high:
            end -= 1
        while end < size and self._value(end, residual[1]) <= high:
            end += 1
        return slice(first, max(first, end))

    def _near(self, level: float) -> int:
        """A level at or just below a real one, inside the grid."""
        return int(min(max(level, 0.0), float(len(self.grid.total))))


def _check_window(low_m: float, high_m: float) -> None:
    if not (math.isfinite(low_m) and math.isfinite(high_m) and low_m <= high_m):
        raise InputError(f"BudgetSampler: expected finite low_m <= high_m, got {low_m!r} and {high_m!r}")

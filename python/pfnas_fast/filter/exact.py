# SPDX-License-Identifier: Apache-2.0
"""Exact draws by cost through the compiled engine: what samplers and searches use instead of rejection."""

from __future__ import annotations

import numpy as np

from pfnas_fast.errors import InputError
from pfnas_fast.ops import SearchSpace
from pfnas_fast.space import AdditiveCost, BudgetSampler, CostModel

__all__ = ["ExactSampler"]


class ExactSampler:
    """`BudgetSampler` with its draws made by compiled code: the same distribution, other random numbers.

    Args:
        cost: A `CostModel` (its MACs in millions) or any `AdditiveCost`.
        window: Narrowest relative window that will be drawn from; sets how fine the tables are.
        measure: As `BudgetSampler`.

    Attributes:
        budgets: The `BudgetSampler` behind it, for feasible ranges and sizes.
        engine: The `SearchSpace`.

    Example:
        >>> import numpy as np
        >>> from pfnas_fast.filter import ExactSampler
        >>> from pfnas_fast.space import CostModel, load_space
        >>> cost = CostModel(load_space("tiny"), num_classes=3)
        >>> macs_m = cost.macs_m(ExactSampler(cost).sample(np.random.default_rng(0), 100, 11.9, 12.1))
        >>> bool((macs_m >= 11.9).all() and (macs_m <= 12.1).all())
        True
    """

    def __init__(
        self, cost: CostModel | AdditiveCost, *, window: float = 0.02, measure: str = "genes"
    ) -> None:
        if not 0 < window < 1:
            raise InputError(f"ExactSampler: expected 0 < window < 1, got {window!r}")
        self.budgets = BudgetSampler(cost, measure=measure)
        self.cost = self.budgets.cost
        self.window = window
        space = self.cost.space
        self.engine = SearchSpace(space, self.cost)
        width = max(self.cost.range()[0] * window, 0.0)
        self.engine.use_walks([self.budgets.walker(r, width=width) for r in space.resolutions])

    def sample(
        self, rng: np.random.Generator, n: int, low_m: float, high_m: float, resolution: int | None = None
    ) -> np.ndarray:
        """Draw paths that cost low_m to high_m; arguments, result and refusals as `BudgetSampler.sample`."""
        self.budgets.sample(rng, 0, low_m, high_m, resolution)  # refuses what it would refuse
        chosen = self.budgets.feasible(low_m, high_m) if resolution is None else [resolution]
        population, missing = self.engine.draw(n, low_m, high_m, seed=_seed(rng), resolutions=chosen)
        if missing:
            raise InputError(
                f"sample: expected a wider window, got {low_m:g} to {high_m:g} {self.cost.name}, "
                f"in which {missing} of {n} rows were not found"
            )
        return population

    def sample_log_uniform(
        self, rng: np.random.Generator, n: int, low_m: float | None = None, high_m: float | None = None
    ) -> np.ndarray:
        """Draw paths that cover the budgets evenly in log cost, as `BudgetSampler.sample_log_uniform` does.

        Args:
            rng: Source of the seed.
            n: Number of paths.
            low_m: Lower end of the targets; None is the cheapest path's cost.
            high_m: Upper end; None is the dearest path's.

        Returns:
            uint8 [n, num_slots].

        Raises:
            InputError: no path between low_m and high_m, or the window is too narrow for the space.
        """
        smallest, largest = self.cost.range()
        low = smallest if low_m is None else max(low_m, smallest)
        high = largest if high_m is None else min(high_m, largest)
        if low_m is not None or high_m is not None:
            self.budgets.sample_log_uniform(rng, 0, low_m, high_m, window=self.window)
        population, missing = self.engine.draw(n, low, high, seed=_seed(rng), window=self.window)
        if missing:
            raise InputError(
                f"sample_log_uniform: expected a wider window for this space, got {self.window:g}"
            )
        return population


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(0, 2**64, dtype=np.uint64))

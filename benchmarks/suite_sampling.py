# SPDX-License-Identifier: Apache-2.0
"""Drawing paths of a given cost against drawing until one fits; ofa_mbv3_w1.0 at 320 px, whole-detector MACs.

Ours: `SearchSpace.draw`, tables ready, 4,096 paths a call. Theirs: uniform populations of 8,192 paths from
    the gene measure and their exact costs, both vectorised (numpy and the compiled cost op). Its time is
    scaled to the 4,096 paths that ours draws, by the exact probability of the window.
mid: a window around the median with probability about 1e-4; both are measured: theirs is 40,960 draws, of
which about 4 are in the window (checked over 20 such rounds).
low, high: the cheapest and the dearest 1 % of the range. Nobody can wait for rejection there: its time per
    path is that of a draw divided by the window's probability, which the dynamic programming gives exactly.
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from harness import Comparison

from pfnas_fast.ops import CostTable, SearchSpace, path_cost
from pfnas_fast.space import AdditiveCost, BudgetSampler, CostModel, load_space, uniform_population

__all__ = ["comparisons"]

RESOLUTION, OURS, CHUNK, ROUNDS = 320, 4096, 8192, 5


class Setting:
    """The space, its cost, and both samplers."""

    def __init__(self) -> None:
        self.cost = CostModel(load_space("ofa_mbv3_w1.0"), num_classes=20)
        self.budgets = BudgetSampler(self.cost)
        self.table = CostTable(self.cost.macs_table, self.cost.macs_constant, 1e6)
        self.rng = np.random.default_rng(0)
        self.calls = 0

    def macs_m(self) -> np.ndarray:
        """One rejection chunk: draw and cost."""
        population = uniform_population(self.cost.space, self.rng, CHUNK, resolution=RESOLUTION)
        return path_cost(population, self.table).numpy()

    def window(self, name: str) -> tuple[float, float]:
        low, high = self.cost.range_m(RESOLUTION)
        if name == "low":
            return low, low + 0.01 * (high - low)
        if name == "high":
            return high - 0.01 * (high - low), high
        middle = float(np.median(self.macs_m()))
        width = 1e-4 * (high - low)
        for _ in range(20):
            probability = self.budgets.probability(middle - width, middle + width, RESOLUTION)
            if abs(probability / 1e-4 - 1) < 0.02:
                break
            width *= 1e-4 / probability
        return middle - width, middle + width


def sampling(name: str) -> Comparison:
    """One window."""
    setting = Setting()
    low, high = setting.window(name)
    probability = setting.budgets.probability(low, high, RESOLUTION)
    search = SearchSpace(setting.cost.space, AdditiveCost.macs(setting.cost))
    search.use_walks([setting.budgets.walker(r, width=high - low) for r in setting.cost.space.resolutions])

    def ours() -> np.ndarray:
        setting.calls += 1
        return search.draw(OURS, low, high, seed=setting.calls, resolutions=[RESOLUTION])[0]

    def reject() -> int:
        chunks = (setting.macs_m() for _ in range(ROUNDS))
        return sum(int(((macs_m >= low) & (macs_m <= high)).sum()) for macs_m in chunks)

    def check() -> None:
        macs_m = setting.cost.macs_m(ours())
        assert ((macs_m >= low) & (macs_m <= high)).all(), "a path is outside the window"
        if name == "mid":
            expected = 20 * ROUNDS * CHUNK * probability
            found = sum(reject() for _ in range(20))
            assert abs(found - expected) < 5 * expected**0.5, f"rejection found {found}, not {expected:.0f}"

    if name == "mid":
        scale = OURS / (ROUNDS * CHUNK * probability)
        return Comparison("sampling/mid", ours, reject, check, "rejection", scale)
    scale = OURS / (CHUNK * probability)
    return Comparison(f"sampling/{name}", ours, setting.macs_m, check, "rejection", scale)


def comparisons() -> Iterator[tuple[str, Callable[[], Comparison]]]:
    """Every row's name with the function that prepares it."""
    for name in ("mid", "low", "high"):
        yield f"sampling/{name}", partial(sampling, name)

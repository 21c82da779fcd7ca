# SPDX-License-Identifier: Apache-2.0
"""Drawing paths of a given cost against drawing until one fits; ofa_mbv3_w1.0 at 320 px, whole-detector MACs.

Ours: `SearchSpace.draw`, tables ready, 4,096 paths a call. Theirs: uniform populations of 8,192 paths from
    the gene measure and their exact costs, both vectorised (numpy and the compiled cost op). Its time is
    scaled to the 4,096 paths that ours draws, by the exact probability of the window.
mid: a window around the median with probability about 1e-4; both are measured: theirs is 40,960 draws, of
which about 4 are in the window (checked over 20 such rounds).
low, high: the cheapest and the dearest 1 % of the range. Nobody can wait for rejection there: its time per
    path is that of a draw divided by the window's probability, which the dynamic programming gives exactly.
decisions: accept or reject 2^14 paths, as training does: costs, the score of a whole filter (5 networks and 2
    processes, 100 labels), the threshold interpolated in log MACs. Ours: `BudgetThresholds.accept` on a uint8
    population. Theirs: the same filter in torch, float32, all first layers folded into one embedding_bag, in
    the fastest of three batch sizes; its indices are ready and its costs are one gather and a sum.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from harness import Comparison
from torch import Tensor

from pfnas_fast.filter import BudgetThresholds, ExactSampler, PathFilter
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


class TorchDecisions:
    """A fitted filter and its thresholds in plain torch: what `BudgetThresholds.accept` computes."""

    def __init__(self, flt: PathFilter, thresholds: BudgetThresholds, population: np.ndarray) -> None:
        ranker, cost = flt.budget_ranker(), thresholds.cost
        tables = ranker.ranker.tables
        assert tables.networks is not None
        assert tables.kernels is not None
        assert tables.linear is not None
        self.net: Any = tables.networks  # with every optional part: networks and processes know the budget
        self.kernel: Any = tables.kernels
        self.linear: Any = (tables.linear_offset, tables.linear_budget)
        self.curve: Any = tables.curve
        self.tables, self.log_mean, self.log_scale = tables, ranker.log_mean, ranker.log_scale
        parts = (tables.networks.table.flatten(1), tables.kernels.table.flatten(1), tables.linear)
        self.widths = [part.shape[1] for part in parts]
        self.first = torch.cat(parts, dim=1).contiguous()
        self.knots, self.values = thresholds.knots, thresholds.values
        codes = torch.from_numpy(population).long()
        self.index = codes + torch.arange(tables.num_slots) * tables.num_codes
        resolution = codes[:, -1:] - 1
        macs = torch.from_numpy(np.asarray(cost.macs_table, np.float64))  # [R, blocks, codes]
        self.macs, self.constant = macs.flatten(), torch.tensor(cost.macs_constant, dtype=torch.float64)
        self.macs_index = (resolution * macs.shape[1] + torch.arange(macs.shape[1])) * macs.shape[2]
        self.macs_index, self.resolution = self.macs_index + codes[:, :-1], resolution[:, 0]

    @torch.inference_mode()
    def __call__(self, batch: int) -> Tensor:
        rows = range(0, len(self.index), batch)
        return torch.cat([self._accept(slice(start, start + batch)) for start in rows])

    def _accept(self, rows: slice) -> Tensor:
        net, kernel = self.net, self.kernel
        macs = self.macs[self.macs_index[rows]].sum(1) + self.constant[self.resolution[rows]]
        log_macs = (macs / 1e6).log()
        z = ((log_macs - self.log_mean) / self.log_scale).float()
        sums = F.embedding_bag(self.index[rows], self.first, mode="sum").split(self.widths, dim=1)
        hidden = torch.addr(sums[0] + net.offset.flatten(), z, net.budget.flatten()).relu_()
        hidden = hidden.view(len(z), *net.offset.shape).transpose(0, 1)
        for weight, bias in net.dense:
            hidden = torch.baddbmm(bias.unsqueeze(1), hidden, weight).relu_()
        members = [torch.bmm(hidden, net.head.unsqueeze(2)).squeeze(2).t()]
        exponent = torch.addr(sums[1] + kernel.offset.flatten(), z, kernel.budget.flatten())
        exponent = torch.addr(exponent, z * z, kernel.budget_square.flatten()).exp_()
        members.append((exponent.view(len(z), *kernel.head.shape) * kernel.head).sum(2))
        linear = torch.addr(sums[2] + self.linear[0], z, self.linear[1])
        scores = (torch.cat(members, dim=1) + linear) @ self.tables.weights
        low, high = self.tables.curve_range
        place = (z - low) * ((len(self.curve) - 1) / (high - low))
        left = place.long()
        scores += torch.lerp(self.curve[left], self.curve[left + 1], place - left)
        limit = torch.from_numpy(np.interp(log_macs.numpy(), self.knots, self.values))
        return scores.double() >= limit


def decisions() -> Comparison:
    """Accept or reject."""
    cost = CostModel(load_space("ofa_mbv3_w1.0"), num_classes=20)
    sampler, rng = ExactSampler(cost), np.random.default_rng(0)
    labelled, population = sampler.sample_log_uniform(rng, 100), sampler.sample_log_uniform(rng, 1 << 14)
    macs_m = cost.macs_m(labelled)
    labels = np.log(macs_m) + 0.1 * (labelled[:, 3] == 2) - 0.1 * (labelled[:, 5] == 1)
    flt = PathFilter(cost.space, cost=cost, network_share=0.5).fit(labelled, labels, macs_m)
    thresholds = BudgetThresholds(flt, cost, keep=0.3, per_bin=2000)
    torch_side = TorchDecisions(flt, thresholds, population)
    batch = min(
        (256, 1024, 4096), key=lambda size: min(_seconds(partial(torch_side, size)) for _ in range(3))
    )

    def check() -> None:
        differ = (thresholds.accept(population) != torch_side(batch).numpy()).mean()
        assert differ < 1e-3, f"{differ:.2%} of the decisions differ"

    return Comparison(
        "sampling/decisions", partial(thresholds.accept, population), partial(torch_side, batch), check
    )


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def comparisons() -> Iterator[tuple[str, Callable[[], Comparison]]]:
    """Every row's name with the function that prepares it."""
    for name in ("mid", "low", "high"):
        yield f"sampling/{name}", partial(sampling, name)
    yield "sampling/decisions", decisions

# SPDX-License-Identifier: Apache-2.0
"""The pruned space: a path stays iff its score reaches the threshold of its budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from pfnas_fast.errors import InputError

__all__ = ["BudgetThresholds", "PathScorer"]


class PathScorer(Protocol):
    """What ranks paths: `PathFilter` and its rivals."""

    def score(self, paths: Any, macs_m: Any = None, /) -> np.ndarray:
        """Scores float [n]; larger is better among paths of similar MACs."""
        ...


def _bin_line(log_macs: np.ndarray, scores: np.ndarray, centre: float, keep: float) -> tuple[float, float]:
    """Threshold at the bin's centre and its slope: the quantile of what the bin's own trend leaves over."""
    offset = log_macs - centre
    spread = float(((offset - offset.mean()) ** 2).sum())
    slope = float(((offset - offset.mean()) * scores).sum()) / spread if spread > 1e-12 else 0.0
    return float(np.quantile(scores - slope * offset, 1.0 - keep)), slope


def score_tau(first: PathScorer, second: PathScorer, population: np.ndarray, macs_m: np.ndarray) -> float:
    """Kendall's tau of two scores, on at most 2,000 of the paths.

    Args:
        first, second: What ranks.
        population: uint8 [n, num_slots].
        macs_m: [n].
    """
    rows = np.linspace(0, len(population) - 1, min(len(population), 2000)).astype(np.int64)
    a, b = (scorer.score(population[rows], macs_m[rows]) for scorer in (first, second))
    agree = np.sign(a[:, None] - a[None, :]) * np.sign(b[:, None] - b[None, :])
    return float(agree.sum()) / max(len(rows) * (len(rows) - 1), 1)


class BudgetThresholds:
    """Thresholds t(budget): the (1 - keep) quantile of the score among paths of that budget.

    Paths are drawn by `sampler` over its whole range of budgets; bins have equal width in log MACs. Inside a
    bin the quantile is taken along the bin's own trend of score over log MACs (else its cheap end would be
    pruned away); between bin centres t is linear in log MACs, and beyond the outer centres it follows the
    outer bins' trend.

    Args:
        scorer: A fitted filter.
        cost: `CostModel`.
        sampler: Bound sampler of the unpruned space, spread over budgets (`Balanced`); None draws them so.
        keep: Share of the paths that stay at each budget, in (0, 1].
        num_bins: Bins over the range of budgets.
        per_bin: Paths drawn per bin, on average.
        seed: Of the draw.

    Raises:
        InputError: keep outside (0, 1], or num_bins or per_bin < 1.
    """

    def __init__(
        self,
        scorer: PathScorer,
        cost: Any,
        sampler: Any = None,
        *,
        keep: float = 0.3,
        num_bins: int = 8,
        per_bin: int = 10_000,
        seed: int = 0,
    ) -> None:
        if not 0.0 < keep <= 1.0:
            raise InputError(f"BudgetThresholds: expected 0 < keep <= 1, got {keep}")
        if num_bins < 1 or per_bin < 1:
            raise InputError(
                f"BudgetThresholds: expected num_bins and per_bin >= 1, got {num_bins} and {per_bin}"
            )
        self.scorer = scorer
        self.cost = cost
        self.keep = keep
        self.knots, self.values = np.zeros(1), np.full(1, -np.inf)
        self.acceptance: list[float | None] = []
        if sampler is None:
            from pfnas_fast.filter.samplers import Balanced

            sampler = Balanced(cost.space).bind(cost)
        self.calibrate(sampler, num_bins=num_bins, per_bin=per_bin, seed=seed)

    def calibrate(self, sampler: Any, *, num_bins: int, per_bin: int, seed: int) -> None:
        """Draw paths, set the thresholds, and measure the acceptance per bin on a second draw."""
        rng = np.random.default_rng([seed, 0x7E5])
        macs_m, scores = self._draw(sampler, rng, num_bins * per_bin)
        log_macs = np.log(macs_m)
        edges = np.linspace(log_macs.min(), log_macs.max(), num_bins + 1)
        place = np.clip(np.searchsorted(edges, log_macs, side="right") - 1, 0, num_bins - 1)
        lines = []
        for index in range(num_bins):
            rows = place == index
            if rows.any():
                centre = float(edges[index] + edges[index + 1]) / 2
                lines.append((centre, *_bin_line(log_macs[rows], scores[rows], centre, self.keep)))
        first, last = lines[0], lines[-1]
        knots = [(edges[0], first[1] + first[2] * (edges[0] - first[0])), *[line[:2] for line in lines]]
        knots.append((edges[-1], last[1] + last[2] * (edges[-1] - last[0])))
        self.knots = np.array([knot for knot, _ in knots])
        self.values = np.array([value for _, value in knots])
        macs_m, scores = self._draw(sampler, rng, num_bins * min(per_bin, 2000))
        place = np.clip(np.searchsorted(edges, np.log(macs_m), side="right") - 1, 0, num_bins - 1)
        accepted = scores >= self.threshold(macs_m)
        self.acceptance = [
            float(accepted[place == index].mean()) if (place == index).any() else None
            for index in range(num_bins)
        ]

    def _draw(self, sampler: Any, rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        macs_m, scores = np.empty(n), np.empty(n)
        for start in range(0, n, 1 << 16):
            stop = min(start + (1 << 16), n)
            population = sampler.sample(rng, stop - start)
            macs_m[start:stop] = self.cost.macs_m(population)
            scores[start:stop] = self.scorer.score(population, macs_m[start:stop])
        return macs_m, scores

    def threshold(self, macs_m: Any) -> np.ndarray:
        """t at each budget.

        Args:
            macs_m: [n], millions of MACs.

        Returns:
            float64 [n].
        """
        return np.interp(np.log(np.asarray(macs_m, np.float64)), self.knots, self.values)

    def accept(self, population: np.ndarray, macs_m: Any = None) -> np.ndarray:
        """Which paths the pruned space keeps.

        Args:
            population: uint8 [n, num_slots].
            macs_m: [n]; None = computed.

        Returns:
            bool [n].
        """
        macs_m = self.cost.macs_m(population) if macs_m is None else macs_m
        return self.scorer.score(population, macs_m) >= self.threshold(macs_m)

    def drift(self, other: BudgetThresholds, population: np.ndarray) -> dict[str, float]:
        """How far another filter's pruned space differs from this one on the same paths.

        Returns:
            ``kept_by_both``: share of this space's paths that `other` keeps too (its keep rate if they were
            unrelated); ``score_tau``: Kendall's tau of the two scores (at most 2,000 of the paths).
        """
        macs_m = self.cost.macs_m(population)
        own, their = self.accept(population, macs_m), other.accept(population, macs_m)
        return {
            "kept_by_both": float(their[own].mean()) if own.any() else 0.0,
            "score_tau": score_tau(self.scorer, other.scorer, population, macs_m),
        }

    def state_dict(self) -> dict[str, Any]:
        """Knots (log MACs), values, keep and acceptance as plain data; the filter is saved by itself."""
        return {
            "knots": self.knots.tolist(),
            "values": self.values.tolist(),
            "keep": self.keep,
            "acceptance": list(self.acceptance),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], scorer: PathScorer, cost: Any) -> BudgetThresholds:
        """Rebuild thresholds without drawing again."""
        self = cls.__new__(cls)
        self.scorer, self.cost, self.keep = scorer, cost, float(state["keep"])
        self.knots, self.values = np.array(state["knots"]), np.array(state["values"])
        self.acceptance = list(state["acceptance"])
        return self

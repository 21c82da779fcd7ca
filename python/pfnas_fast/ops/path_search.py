# SPDX-License-Identifier: Apache-2.0
"""Drawing, evolving and flooding whole populations inside the compiled module; Python never touches a path.

Call path: `SearchSpace` packs a space, an additive cost and (for drawing) the dynamic programming tables of a
`BudgetSampler` once -> `draw`, `evolve`, `flood` -> _C. Every path has its own counter-based random stream,
so results depend on the seed alone, not on threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pfnas_fast.errors import InputError
from pfnas_fast.ops._library import _C
from pfnas_fast.ops.path_score import PackedRanker
from pfnas_fast.ops.path_score_int8 import Int8Ranker

__all__ = ["BudgetRanker", "Flood", "SearchSpace"]


@dataclass(frozen=True)
class BudgetRanker:
    """A packed ranker with the normalisation of its budget: ``z = (log cost - log_mean) / log_scale``.

    Attributes:
        ranker: The ranker.
        log_mean: Subtracted from the natural log of the cost.
        log_scale: Divides it afterwards.
    """

    ranker: PackedRanker
    log_mean: float = 0.0
    log_scale: float = 1.0


@dataclass(frozen=True)
class Flood:
    """What a flood found.

    Attributes:
        codes: uint8 [k, num_slots], distinct, best first.
        scores: float64 [k].
        costs: float64 [k].
        num_accepted: Draws that the thresholds accept.
        num_exact: Draws scored exactly: all of them without a sift.
        acceptance: Share of walks through the tables that were in their window.
    """

    codes: np.ndarray
    scores: np.ndarray
    costs: np.ndarray
    num_accepted: int
    num_exact: int
    acceptance: float


class SearchSpace:
    """A space and an additive cost, packed.

    Args:
        space: A `pfnas_fast.space.Space`.
        cost: An `AdditiveCost` of it.

    Attributes:
        space, cost: As given.
        num_drawn: Walks of the last `draw`; n / num_drawn of them were in their window.

    Raises:
        InputError: more than 256 slots or 64 resolutions.

    Example:
        >>> import numpy as np
        >>> from pfnas_fast.ops import SearchSpace
        >>> from pfnas_fast.space import AdditiveCost, BudgetSampler, CostModel, load_space
        >>> model = CostModel(load_space("tiny"), num_classes=3)
        >>> search = SearchSpace(model.space, AdditiveCost.macs(model))
        >>> search.use_walks([BudgetSampler(model).walker(r) for r in model.space.resolutions])
        >>> codes, missing = search.draw(1000, 11.9, 12.1, seed=0)
        >>> missing, bool((np.abs(model.macs_m(codes) - 12.0) <= 0.1).all())
        (0, True)
    """

    def __init__(self, space: Any, cost: Any) -> None:
        if space.num_slots > 256 or len(space.resolutions) > 64:
            raise InputError(
                f"SearchSpace: expected at most 256 slots and 64 resolutions for space, got "
                f"{space.num_slots} and {len(space.resolutions)}"
            )
        self.space, self.cost = space, cost
        starts = [0, *(where.stop for where in space.stage_slices)]
        depths = [depth for stage in space.stages for depth in stage.depths]
        self._fields = {
            "num_slots": space.num_slots,
            "num_stages": len(space.stages),
            "num_depths": len(depths),
            "num_resolutions": len(space.resolutions),
            "num_codes": cost.table.shape[2],
            "stage_start": torch.tensor(starts, dtype=torch.int32),
            "depth_start": torch.tensor(
                np.cumsum([0, *(len(stage.depths) for stage in space.stages)]), dtype=torch.int32
            ),
            "depths": torch.tensor(depths, dtype=torch.int32),
            "slot_sizes": torch.tensor(space.slot_sizes, dtype=torch.int32),
            "table": torch.tensor(cost.table, dtype=torch.float64),
            "constant": torch.tensor(cost.constant, dtype=torch.float64),
            "unit": float(cost.unit),
        }
        self._handle = _C.SearchSpace(self._fields)
        self._walks: list[dict[str, Any]] = []
        self.num_drawn = 0

    @property
    def fields(self) -> dict[str, Any]:
        """The space and its cost as the kernels read them, tensors and numbers by name."""
        return self._fields

    @property
    def walk_fields(self) -> list[dict[str, Any]]:
        """The walk tables, one dictionary per resolution; empty before `use_walks`."""
        return self._walks

    def use_walks(self, walkers: list[Any]) -> None:
        """Draw by these tables from now on: one `Walker` per resolution, in order."""
        self._walks = [self._walk(index, walker) for index, walker in enumerate(walkers)]
        self._handle.set_walks(self._walks)

    def _walk(self, index: int, walker: Any) -> dict[str, Any]:
        grid = walker.grid
        low, high = self.cost.range(self.space.resolutions[index])
        stop = [s for slots, (stops, _) in self._weights(grid) for s in stops[: slots.stop - slots.start]]
        go_on = [
            g * grid.choice_weight(slots.start + position)
            for slots, (_, goes) in self._weights(grid)
            for position, g in enumerate(goes[: slots.stop - slots.start])
        ]
        after_choice, after_stop = walker.tables()
        return {
            "num_buckets": len(walker.cumulative) - 1,
            "pad": walker.pad,
            "choice_length": after_choice.shape[1],
            "step": float(grid.step),
            "constant": float(grid.constant),
            "residual_low": float(grid.residual[0]),
            "residual_high": float(grid.residual[1]),
            "low": low,
            "high": high,
            "cumulative": torch.from_numpy(walker.cumulative),
            "cumulative_down": torch.from_numpy(np.ascontiguousarray(walker.cumulative_down)),
            "after_choice": torch.from_numpy(after_choice),
            "after_stop": torch.from_numpy(after_stop),
            "buckets": torch.from_numpy(np.ascontiguousarray(grid.buckets)),
            "stop": torch.tensor(stop, dtype=torch.float64),
            "go_on": torch.tensor(go_on, dtype=torch.float64),
        }

    def _weights(self, grid: Any) -> list[tuple[slice, tuple[list[float], list[float]]]]:
        return list(zip(self.space.stage_slices, grid.depth_weights, strict=True))

    def _mask(self, resolutions: Sequence[int] | None) -> int:
        if resolutions is None:
            return 2**64 - 1
        return sum(1 << self.space.resolutions.index(r) for r in resolutions)

    def draw(
        self,
        n: int,
        low: float,
        high: float,
        *,
        seed: int,
        window: float = 0.0,
        resolutions: Sequence[int] | None = None,
        first_index: int = 0,
    ) -> tuple[np.ndarray, int]:
        """Draw paths by their cost, exactly (see `BudgetSampler`, which has the slow twin of this).

        Args:
            n: Number of paths.
            low: Lower end of the costs, in the cost's unit.
            high: Upper end, inclusive.
            seed: 0 .. 2^64 - 1.
            window: 0: the measure restricted to [low, high]. Else, for each path, a target that is
                log-uniform there and a path within target * (1 +- window / 2).
            resolutions: Longest sides, px, to draw from; None: all. Uniform among those that may have a
                path in the window, as far as buckets can tell; give those of `BudgetSampler.feasible` where
                they cannot.
            first_index: Path i is a function of seed, first_index + i and the other arguments.

        Returns:
            (uint8 [n, num_slots], number of rows for which no path was found; these are zero).
        """
        codes = torch.empty(n, self.space.num_slots, dtype=torch.uint8)
        if n == 0:
            return codes.numpy(), 0
        self.num_drawn, missing = _C.draw_paths(
            self._handle, seed, first_index, low, high, window, self._mask(resolutions), codes
        )
        return codes.numpy(), missing

    def evolve(
        self,
        scorer: BudgetRanker,
        initial: np.ndarray,
        low: float,
        high: float,
        *,
        seed: int,
        top_k: int,
        population: int = 100,
        iterations: int = 500,
        num_parents: int = 25,
        num_mutants: int = 50,
        gene_probability: float = 0.1,
        patience: int | None = None,
        repair_attempts: int = 24,
        resolution: int | None = None,
        thresholds: tuple[np.ndarray, np.ndarray] | None = None,
        judge: BudgetRanker | None = None,
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Once-for-All's evolution in one cost window.

        Args:
            scorer: What is maximised.
            initial: uint8 [n, num_slots], feasible paths of the space.
            low: Window of the cost.
            high: Its upper end, inclusive.
            seed: 0 .. 2^64 - 1.
            top_k: Distinct paths wanted.
            population: Children per generation; those that cannot be repaired to the window are dropped.
            iterations: Generations after the initial one.
            num_parents: Best distinct paths that breed and survive.
            num_mutants: Children that mutate; the others are crossed.
            gene_probability: Of redrawing one gene in a mutation.
            patience: Generations without a change among the best after which to stop; None: never.
            repair_attempts: Changes proposed per child.
            resolution: Longest side, px, that children keep to; None: free. `initial` must keep to it too.
            thresholds: (log costs ascending, scores): paths below breed last and are returned last.
            judge: Whose scores `thresholds` mean; None: the scorer's.

        Returns:
            (uint8 [k, num_slots] distinct, k <= top_k, accepted paths first, best first; scores float64 [k];
            number of paths scored).
        """
        codes = torch.zeros(top_k, self.space.num_slots, dtype=torch.uint8)
        scores = torch.zeros(top_k, dtype=torch.float64)
        found, scored = _C.evolve_paths(
            self._handle,
            {
                **_scorer_fields(scorer, thresholds),
                "judge": None if judge is None else judge.ranker.handle,
                "judge_log_mean": 0.0 if judge is None else judge.log_mean,
                "judge_log_scale": 1.0 if judge is None else judge.log_scale,
                "seed": seed,
                "low": low,
                "high": high,
                "resolution": -1 if resolution is None else self.space.resolutions.index(resolution),
                "population": population,
                "iterations": iterations,
                "num_parents": num_parents,
                "num_mutants": num_mutants,
                "patience": -1 if patience is None else patience,
                "repair_attempts": repair_attempts,
                "gene_probability": gene_probability,
                "top_k": top_k,
                "initial": torch.from_numpy(np.array(initial, np.uint8, order="C", copy=True)),
                "codes": codes,
                "scores": scores,
            },
        )
        return codes.numpy()[:found].copy(), scores.numpy()[:found].copy(), scored

    def flood(
        self,
        scorer: BudgetRanker,
        n: int,
        low: float,
        high: float,
        *,
        seed: int,
        top_k: int,
        window: float = 0.0,
        resolutions: Sequence[int] | None = None,
        thresholds: tuple[np.ndarray, np.ndarray] | None = None,
        sift: Int8Ranker | None = None,
    ) -> Flood:
        """Draw `n` paths as `draw` does, score them, keep the best distinct ones; memory does not grow.

        Args:
            scorer: What is maximised.
            n: Number of draws, tens of millions if wanted.
            low, high, seed, window, resolutions: See `draw`.
            top_k: Distinct paths wanted.
            thresholds: (log costs ascending, scores): paths below are left out.
            sift: The scorer's own ranker in 8-bit integers: only paths that it cannot rule out are scored
                exactly. The result is the same.

        Returns:
            The best, and counts.

        Raises:
            InputError: `sift` is of another ranker, or the window leaves the budgets its error bound holds
                for.
        """
        if sift is not None:
            self._check_sift(sift, scorer, low, high)
        codes = torch.zeros(top_k, self.space.num_slots, dtype=torch.uint8)
        scores, costs = torch.zeros(top_k, dtype=torch.float64), torch.zeros(top_k, dtype=torch.float64)
        found, drawn, missing, accepted, exact = _C.flood_paths(
            self._handle,
            {
                **_scorer_fields(scorer, thresholds),
                "seed": seed,
                "low": low,
                "high": high,
                "window": window,
                "resolutions": self._mask(resolutions),
                "num_paths": n,
                "top_k": top_k,
                "codes": codes,
                "scores": scores,
                "costs": costs,
                "sift": None if sift is None else sift.handle,
                "sift_eps": 0.0 if sift is None else sift.eps,
            },
        )
        return Flood(
            codes.numpy()[:found].copy(),
            scores.numpy()[:found].copy(),
            costs.numpy()[:found].copy(),
            accepted,
            exact,
            (n - missing) / drawn if drawn else 1.0,
        )

    def _check_sift(self, sift: Int8Ranker, scorer: BudgetRanker, low: float, high: float) -> None:
        if sift.tables is not scorer.ranker.tables:
            raise InputError("SearchSpace.flood: expected the scorer's own tables for sift, got others")
        smallest, largest = self.cost.range()
        ends = np.log([max(low, smallest), min(max(high, smallest), largest)])
        z_low, z_high = (ends - scorer.log_mean) / scorer.log_scale
        if z_low < sift.z_range[0] or z_high > sift.z_range[1]:
            raise InputError(
                f"SearchSpace.flood: expected budgets within z {sift.z_range[0]:g} to {sift.z_range[1]:g}, "
                f"for which sift was built, got {z_low:g} to {z_high:g}"
            )


def _scorer_fields(scorer: BudgetRanker, thresholds: tuple[np.ndarray, np.ndarray] | None) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "model": scorer.ranker.handle,
        "log_mean": scorer.log_mean,
        "log_scale": scorer.log_scale,
        "num_knots": 0,
    }
    if thresholds is not None:
        knots, values = (torch.from_numpy(np.array(part, np.float64)) for part in thresholds)
        fields |= {"num_knots": len(knots), "knots": knots, "values": values}
    return fields

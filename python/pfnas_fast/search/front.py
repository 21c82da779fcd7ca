# SPDX-License-Identifier: Apache-2.0
"""From a trained supernet and a filter to a front of detectors: predicted candidates, then real AP."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pfnas_fast.data import DetectionDataset
from pfnas_fast.detection import DetectionSupernet, Detector
from pfnas_fast.errors import InputError
from pfnas_fast.filter import BudgetThresholds, PathFilter
from pfnas_fast.run.folder import Run
from pfnas_fast.search.evolution import EvolutionConfig, search_candidates
from pfnas_fast.search.pareto import pareto_front
from pfnas_fast.space import Path
from pfnas_fast.train.engine import Progress, stream_id
from pfnas_fast.train.evaluate import PathEvaluator
from pfnas_fast.train.labelling import label_paths


@dataclass(frozen=True)
class FrontMember:
    """One searched path.

    Attributes:
        path: The path.
        macs_m: MACs of the whole detector, millions.
        params_m: Its parameters, millions.
        ap, ap50: COCO AP and AP50 on the images that the search selected by.
        export: Call it for the stand-alone detector of this path, BN set.
    """

    path: Path
    macs_m: float
    params_m: float
    ap: float
    ap50: float
    export: Callable[[], Detector]

    def to_json(self) -> dict[str, Any]:
        """The entry of `pareto.json`."""
        numbers = {"macs_m": self.macs_m, "params_m": self.params_m, "ap": self.ap, "ap50": self.ap50}
        return {"path": self.path.to_json(), **{key: round(value, 6) for key, value in numbers.items()}}


@dataclass(frozen=True)
class Front:
    """Searched paths, none of which another beats in both MACs and AP; cheapest first.

    Attributes:
        members: The front.
        num_candidates: Paths whose AP was measured to find it.
        macs_t: MACs executed for that, 10^12.
    """

    members: tuple[FrontMember, ...]
    num_candidates: int
    macs_t: float

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[FrontMember]:
        return iter(self.members)

    def at(self, *, macs_m: float) -> FrontMember:
        """The best member within a budget.

        Args:
            macs_m: Budget, millions of MACs of the whole detector.

        Raises:
            InputError: no member is that cheap (names the cheapest).
        """
        affordable = [member for member in self.members if member.macs_m <= macs_m]
        if not affordable:
            raise InputError(
                f"Front.at: expected at least {self.members[0].macs_m:.4g} for macs_m, got {macs_m!r}"
            )
        return affordable[-1]


def search(
    net: DetectionSupernet,
    flt: PathFilter,
    *,
    budgets_macs_m: Sequence[float],
    select: DetectionDataset,
    calib: DetectionDataset | None = None,
    pruned: BudgetThresholds | None = None,
    candidates_per_budget: int = 6,
    resolution: int | None = None,
    config: EvolutionConfig | None = None,
    class_names: Sequence[str] | None = None,
    run: Run | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Front:
    """Search every budget by the filter's score, then measure the best candidates.

    Args:
        net: Trained supernet.
        flt: Fitted filter.
        budgets_macs_m: Upper bounds on MACs of the whole detector, millions.
        select: Images that decide between candidates; neither trained on nor labelled with.
        calib: Images for BatchNorm; default: those that came with `select`.
        pruned: Keep the search inside the pruned space.
        candidates_per_budget: Paths measured per budget.
        resolution: Search at this longest side only, px; None = all.
        config: Size of the evolution, and of the flood before it (each flood is logged where there is a
            `run`).
        class_names: Names stored in exported detectors; default: those of `select`.
        run: Measurements go to its `candidates.csv`, and an interrupted search goes on after the last.
        seed: Start of all randomness, where no `run` gives one.
        progress: Called after each measured path.

    Returns:
        The front over all measured paths.

    Raises:
        InputError: a budget outside the space (names the feasible range).

    Source:
        Evolution as in Once-for-All, arXiv:1908.09791, sec. 3.4; the budget-conditioned score after DetOFA,
        arXiv:2303.13121.

    Example:
        >>> import pfnas_fast as pf
        >>> data = pf.load_detection("digits")
        >>> net = pf.DetectionSupernet(pf.load_space("tiny"), num_classes=10, backend="reference")
        >>> paths = pf.uniform_population(net.space, np.random.default_rng(0), 32)
        >>> macs_m = net.cost.macs_m(paths)
        >>> flt = pf.PathFilter(net.space, cost=net.cost, num_members=1).fit(paths, macs_m, macs_m)
        >>> few = data.select.subset(range(8))
        >>> front = pf.search(net, flt, budgets_macs_m=[10], select=few, calib=few, candidates_per_budget=1)
        >>> len(front.at(macs_m=10).export().class_names)
        10
    """
    seed = run.seed if run is not None else seed
    rng = np.random.default_rng([seed, stream_id("search")])
    found = search_candidates(
        flt,
        net.cost,
        budgets_macs_m,
        rng=rng,
        top_k=candidates_per_budget,
        pruned=pruned,
        resolution=resolution,
        config=config,
        on_flood=None if run is None else lambda note: run.log("flood", **note),
    )
    paths = list(
        dict.fromkeys(path for population in found.values() for path in net.space.decode(population))
    )
    measured = label_paths(
        net, select, paths=paths, calib=calib, run=run, seed=seed, stage="candidates", progress=progress
    )
    evaluator = PathEvaluator(net, select, calib=calib)
    names = list(class_names if class_names is not None else select.class_names)
    params_m = net.cost.params_m(paths)

    def exporter(path: Path) -> Callable[[], Detector]:
        return lambda: net.extract(path, evaluator.statistics(path), class_names=names)

    members = [
        FrontMember(
            paths[i],
            float(measured.macs_m[i]),
            float(params_m[i]),
            float(measured.ap[i]),
            float(measured.values["ap50"][i]),
            exporter(paths[i]),
        )
        for i in pareto_front(measured.macs_m, measured.ap).tolist()
    ]
    return Front(tuple(members), len(paths), measured.macs_t)

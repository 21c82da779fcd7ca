# SPDX-License-Identifier: Apache-2.0
"""Search per budget: exact samples at the budget, then Once-for-All's evolution, all on uint8 populations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pfnas_fast.errors import InputError
from pfnas_fast.filter import ExactSampler, PathFilter
from pfnas_fast.ops import Flood, SearchSpace
from pfnas_fast.search.genes import GeneOperators, unique_rows
from pfnas_fast.space import AdditiveCost

__all__ = ["EvolutionConfig", "evolve", "search_candidates"]

_FLOOD_KEPT = 20  # times the population: what a flood hands on to the evolution


@dataclass(frozen=True)
class EvolutionConfig:
    """Once-for-All's evolution, after a first look at many exact samples.

    Attributes:
        num_initial: Samples at the budget, the best `population` of which start the evolution.
        population: Paths per generation.
        iterations: Generations.
        parent_fraction: Best share that becomes parents and survives.
        mutation_fraction: Share of the children that mutate; the others are crossed.
        gene_probability: Of redrawing one gene in a mutation.
        patience: Generations without a change among the best after which a budget is done; None = never.
        slack: The search at budget B stays within [(1 - slack) B, B].
        num_flood: Exact samples per budget that are scored by compiled code, tens of millions if wanted; the
            best distinct ones (accepted by the pruned space, where there is one) start the evolution too.
            0 = none.
    """

    num_initial: int = 2000
    population: int = 100
    iterations: int = 100
    parent_fraction: float = 0.25
    mutation_fraction: float = 0.5
    gene_probability: float = 0.1
    patience: int | None = 25
    slack: float = 0.15
    num_flood: int = 0

    def __post_init__(self) -> None:
        for name in ("parent_fraction", "mutation_fraction", "gene_probability", "slack"):
            value = getattr(self, name)
            if not 0.0 < value <= 1.0:
                raise InputError(f"EvolutionConfig: expected 0 < {name} <= 1, got {value}")
        if self.num_flood < 0:
            raise InputError(f"EvolutionConfig: expected num_flood >= 0, got {self.num_flood}")
        if self.population < 2 or self.num_initial < 2 or self.iterations < 0:
            raise InputError(
                "EvolutionConfig: expected population >= 2, num_initial >= 2 and iterations >= 0, got "
                f"{self.population}, {self.num_initial}, {self.iterations}"
            )


class _Archive:
    """The best distinct paths of those added so far."""

    def __init__(self, size: int, num_slots: int) -> None:
        self.size = size
        self.population = np.zeros((0, num_slots), np.uint8)
        self.scores = np.zeros(0)

    def add(self, population: np.ndarray, scores: np.ndarray) -> bool:
        """Merge; tells whether the archive changed."""
        merged = np.concatenate([self.population, population])
        values = np.concatenate([self.scores, scores])
        keep = unique_rows(merged)
        keep = keep[np.argsort(-values[keep], kind="stable")][: self.size]
        changed = len(keep) != len(self.population) or bool((keep >= len(self.population)).any())
        self.population, self.scores = merged[keep], values[keep]
        return changed


def _children(
    rng: np.random.Generator,
    operators: GeneOperators,
    parents: np.ndarray,
    count: int,
    config: EvolutionConfig,
) -> np.ndarray:
    num_mutants = round(config.mutation_fraction * count)
    mutants = operators.mutate(
        rng, parents[rng.integers(0, len(parents), num_mutants)], config.gene_probability
    )
    mothers, fathers = rng.integers(0, len(parents), (2, count - num_mutants))
    return np.concatenate([mutants, operators.cross(rng, parents[mothers], parents[fathers])])


def evolve(
    scorer: Any,
    cost: Any,
    initial: np.ndarray,
    low_m: float,
    high_m: float,
    *,
    rng: np.random.Generator,
    top_k: int,
    pruned: Any = None,
    resolution: int | None = None,
    config: EvolutionConfig | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Search one MACs window.

    Args:
        scorer: Fitted filter: ``score(population, macs_m)``.
        cost: `CostModel`.
        initial: uint8 [n, num_slots], feasible paths to start from.
        low_m: Window, millions of MACs.
        high_m: Its upper bound, inclusive.
        rng: Source of randomness.
        top_k: Distinct paths wanted.
        pruned: `BudgetThresholds`, judged by the filter they were calibrated with (`pruned.scorer`), which
            may be another than `scorer`. What they accept breeds first and is returned first; the best
            rejected paths only fill up to `top_k`, so that every strategy gets as many evaluations.
        resolution: Keep to this longest side, px; None = the resolution is a gene like the others.
        config: Sizes and rates.

    A `PathFilter` is searched by compiled code (`pfnas_fast.ops.SearchSpace.evolve`), any other ranker by the
    vectorised operators of this package: the same method, other random numbers.

    Returns:
        (uint8 [k, num_slots] distinct, k <= top_k; their scores float64 [k]): accepted paths, best first,
        then rejected ones, best first.

    Source:
        Once-for-All (arXiv:1908.09791), sec. 3.4 and its published search settings.
    """
    config = config or EvolutionConfig()
    if all(_is_compiled(ranker) for ranker in (scorer, *(() if pruned is None else (pruned.scorer,)))):
        return _evolve_compiled(scorer, cost, initial, low_m, high_m, rng, top_k, pruned, resolution, config)
    operators = GeneOperators(cost)
    inside, outside = _Archive(top_k, initial.shape[1]), _Archive(top_k, initial.shape[1])
    num_parents = max(2, round(config.parent_fraction * config.population))
    current, macs_m, idle = initial, cost.macs_m(initial), 0
    parents, parent_fitness = current[:0], np.zeros(0)
    for generation in range(config.iterations + 1):
        scores = np.asarray(scorer.score(current, macs_m), np.float64)
        margin = _margin(pruned, scorer, current, macs_m, scores)
        accepted = margin >= 0
        changed = inside.add(current[accepted], scores[accepted])
        changed |= outside.add(current[~accepted], scores[~accepted])
        # Rejected paths rank below all accepted ones, by how little they miss.
        fitness = np.where(accepted, scores, -1e9 + margin)
        pool, values = np.concatenate([parents, current]), np.concatenate([parent_fitness, fitness])
        keep = unique_rows(pool)
        keep = keep[np.argsort(-values[keep], kind="stable")][:num_parents]
        parents, parent_fitness = pool[keep], values[keep]
        idle = 0 if changed else idle + 1
        if generation == config.iterations or (config.patience is not None and idle >= config.patience):
            break
        children = _children(rng, operators, parents, config.population, config)
        current, macs_m = operators.repair(rng, children, low_m, high_m)
        feasible = (macs_m >= low_m) & (macs_m <= high_m)
        if resolution is not None:
            feasible &= current[:, -1] == 1 + cost.space.resolutions.index(resolution)
        current, macs_m = current[feasible], macs_m[feasible]
    population = np.concatenate([inside.population, outside.population])[:top_k]
    return population, np.concatenate([inside.scores, outside.scores])[:top_k]


def _is_compiled(ranker: Any) -> bool:
    return isinstance(ranker, PathFilter) and ranker.condition != "film"


def _evolve_compiled(
    scorer: PathFilter,
    cost: Any,
    initial: np.ndarray,
    low_m: float,
    high_m: float,
    rng: np.random.Generator,
    top_k: int,
    pruned: Any,
    resolution: int | None,
    config: EvolutionConfig,
) -> tuple[np.ndarray, np.ndarray]:
    """The same search without Python in its loop, for filters that the engine can score."""
    space = SearchSpace(cost.space, AdditiveCost.macs(cost))
    codes, scores, _ = space.evolve(
        scorer.budget_ranker(),
        initial,
        low_m,
        high_m,
        seed=int(rng.integers(0, 2**64, dtype=np.uint64)),
        top_k=top_k,
        population=config.population,
        iterations=config.iterations,
        num_parents=max(2, round(config.parent_fraction * config.population)),
        num_mutants=round(config.mutation_fraction * config.population),
        gene_probability=config.gene_probability,
        patience=config.patience,
        resolution=resolution,
        thresholds=None if pruned is None else (pruned.knots, pruned.values),
        judge=None if pruned is None or pruned.scorer is scorer else pruned.scorer.budget_ranker(),
    )
    return codes, scores


def _margin(
    pruned: Any, scorer: Any, population: np.ndarray, macs_m: np.ndarray, scores: np.ndarray
) -> np.ndarray:
    """Score above the threshold of the pruned space, on the scale of its own filter; float64 [n]."""
    if pruned is None:
        return np.zeros(len(scores))
    if pruned.scorer is not scorer:
        scores = np.asarray(pruned.scorer.score(population, macs_m), np.float64)
    return scores - pruned.threshold(macs_m)


def search_candidates(
    flt: Any,
    cost: Any,
    budgets_macs_m: Sequence[float],
    *,
    rng: np.random.Generator,
    top_k: int = 8,
    pruned: Any = None,
    resolution: int | None = None,
    config: EvolutionConfig | None = None,
    on_flood: Callable[[dict[str, Any]], None] | None = None,
) -> dict[float, np.ndarray]:
    """The most promising paths per budget, to be evaluated for real.

    Args:
        flt: Fitted filter.
        cost: `CostModel`.
        budgets_macs_m: Upper bounds on whole-detector MACs, millions.
        rng: Source of randomness.
        top_k: Candidates per budget.
        pruned: `BudgetThresholds` of the pruned space, or None for the whole space; where it accepts fewer
            than `top_k` paths, the best rejected ones follow them.
        resolution: Search at this longest side only, px.
        config: Sizes and rates.
        on_flood: Called after each budget that was flooded, with ``budget_m``, ``num_drawn``,
            ``num_accepted`` (draws inside a pruned space that `flt` itself judges; all, where it does not),
            ``num_kept`` (distinct paths handed on), ``best_score`` (None: nothing kept) and ``num_chosen``
            (candidates among those handed on).

    Returns:
        Per budget a uint8 population [k, num_slots], k <= top_k, distinct, best predicted first (accepted
        paths before rejected ones), every path within [(1 - slack) B, B] MACs (or the cheapest paths there
        are, where that window is empty).

    Raises:
        InputError: a budget outside the space (names the feasible range), or top_k < 1, or a flood with a
            ranker that compiled code does not know (only a `PathFilter` that is not "film" is).

    Example:
        >>> import numpy as np
        >>> from pfnas_fast.filter import PathFilter
        >>> from pfnas_fast.space import CostModel, load_space, uniform_population
        >>> space = load_space("tiny")
        >>> cost = CostModel(space, num_classes=3)
        >>> paths = uniform_population(space, np.random.default_rng(0), 64)
        >>> macs_m = cost.macs_m(paths)
        >>> flt = PathFilter(space, cost=cost, num_members=2).fit(paths, np.log(macs_m), macs_m)
        >>> found = search_candidates(flt, cost, [12.0], rng=np.random.default_rng(0), top_k=3)
        >>> bool((cost.macs_m(found[12.0]) <= 12.0).all())
        True
    """
    if top_k < 1:
        raise InputError(f"search_candidates: expected top_k >= 1, got {top_k}")
    config = config or EvolutionConfig()
    for budget in budgets_macs_m:
        cost.check_budget_m(budget)
        low = cost.range_m(resolution)[0]
        if budget < low:
            raise InputError(
                f"search_candidates: expected budgets_macs_m >= {low:.6g} at resolution {resolution}, "
                f"got {budget:g}"
            )
    rankers = (flt, *(() if pruned is None else (pruned.scorer,)))
    if config.num_flood and not all(_is_compiled(ranker) for ranker in rankers):
        raise InputError(
            "search_candidates: expected a PathFilter (condition other than 'film') for flt and pruned where "
            f"num_flood > 0, got {' and '.join(type(ranker).__name__ for ranker in rankers)}"
        )
    sampler = ExactSampler(cost)
    found: dict[float, np.ndarray] = {}
    for budget in budgets_macs_m:
        low = (1.0 - config.slack) * budget
        smallest, largest = cost.range_m(resolution)
        low = min(low, largest * (1.0 - config.slack))
        if not sampler.budgets.feasible(low, budget):
            low = smallest
        initial = sampler.sample(rng, config.num_initial, low, budget, resolution)
        flood = None
        if config.num_flood:
            chosen = sampler.budgets.feasible(low, budget) if resolution is None else [resolution]
            flood = _flood(flt, sampler.engine, low, budget, rng, chosen, pruned, config)
            initial = np.concatenate([initial, flood.codes])
        population, _ = evolve(
            flt,
            cost,
            initial,
            low,
            budget,
            rng=rng,
            top_k=top_k,
            pruned=pruned,
            resolution=resolution,
            config=config,
        )
        found[budget] = population
        if flood is not None and on_flood is not None:
            on_flood(_describe_flood(flood, budget, population, config.num_flood))
    return found


def _flood(
    flt: PathFilter,
    space: SearchSpace,
    low_m: float,
    high_m: float,
    rng: np.random.Generator,
    resolutions: Sequence[int],
    pruned: Any,
    config: EvolutionConfig,
) -> Flood:
    """The best distinct draws in a window. Where the pruned space has a filter of its own, the flood keeps
    the best of the whole window and `evolve` tells which of them are inside."""
    own = None if pruned is None or pruned.scorer is not flt else pruned
    return space.flood(
        flt.budget_ranker(),
        config.num_flood,
        low_m,
        high_m,
        seed=int(rng.integers(0, 2**64, dtype=np.uint64)),
        top_k=_FLOOD_KEPT * config.population,
        resolutions=resolutions,
        thresholds=None if own is None else (own.knots, own.values),
    )


def _describe_flood(flood: Flood, budget_m: float, found: np.ndarray, num_drawn: int) -> dict[str, Any]:
    drawn = {row.tobytes() for row in flood.codes}
    return {
        "budget_m": budget_m,
        "num_drawn": num_drawn,
        "num_accepted": flood.num_accepted,
        "num_kept": len(flood.codes),
        "best_score": float(flood.scores[0]) if len(flood.scores) else None,
        "num_chosen": sum(row.tobytes() in drawn for row in np.ascontiguousarray(found)),
    }

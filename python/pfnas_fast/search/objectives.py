# SPDX-License-Identifier: Apache-2.0
"""Search for several objectives at once: a high score, few MACs, low latency or any other additive costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pfnas_fast.errors import InputError
from pfnas_fast.filter import ExactSampler
from pfnas_fast.ops import CostTable, path_cost
from pfnas_fast.search.genes import GeneOperators, unique_rows
from pfnas_fast.space import AdditiveCost

__all__ = ["ObjectiveFront", "non_dominated_ranks", "search_objectives"]


@dataclass(frozen=True)
class ObjectiveFront:
    """Paths none of which is beaten in every objective by another that was seen.

    Attributes:
        codes: uint8 [k, num_slots], distinct, ascending in MACs.
        scores: float64 [k], predicted, larger is better.
        costs: float64 [k, 1 + num_costs], MACs in millions, then the other costs in their own units.
    """

    codes: np.ndarray
    scores: np.ndarray
    costs: np.ndarray


def non_dominated_ranks(objectives: np.ndarray) -> np.ndarray:
    """Front of each row: 0 = beaten by none, 1 = beaten by rows of front 0 only, ...

    Args:
        objectives: [n, m], smaller is better, finite. A row is beaten by another that is nowhere larger and
            somewhere smaller.

    Returns:
        int64 [n].

    Source:
        Deb et al., NSGA-II (IEEE Transactions on Evolutionary Computation 6, 2002), sec. III-A.

    Example:
        >>> import numpy as np
        >>> non_dominated_ranks(np.array([[1.0, 2.0], [2.0, 1.0], [2.0, 2.0]])).tolist()
        [0, 0, 1]
    """
    n = len(objectives)
    no_larger, smaller = np.ones((n, n), bool), np.zeros((n, n), bool)
    for column in objectives.T:
        no_larger &= column[:, None] <= column
        smaller |= column[:, None] < column
    beats = no_larger & smaller
    waiting = beats.sum(0)
    ranks, rank = np.full(n, -1, np.int64), 0
    while (ranks < 0).any():
        front = (ranks < 0) & (waiting == 0)
        ranks[front] = rank
        waiting = waiting - beats[front].sum(0)
        rank += 1
    return ranks


def _crowding(objectives: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """How lonely each row is in its own front: summed gaps to its neighbours, infinite at the ends."""
    lonely = np.zeros(len(objectives))
    for rank in range(int(ranks.max(initial=-1)) + 1):
        rows = np.flatnonzero(ranks == rank)
        for column in objectives[rows].T:
            order = np.argsort(column, kind="stable")
            values, place = column[order], rows[order]
            width = max(float(values[-1] - values[0]), 1e-300)
            lonely[place[[0, -1]]] = np.inf
            lonely[place[1:-1]] += (values[2:] - values[:-2]) / width
    return lonely


def _select(objectives: np.ndarray, size: int) -> np.ndarray:
    """The `size` best rows: by front, then the lonelier first; best first."""
    ranks = non_dominated_ranks(objectives)
    return np.lexsort((-_crowding(objectives, ranks), ranks))[:size]


def search_objectives(
    flt: Any,
    cost: Any,
    costs: Sequence[AdditiveCost] = (),
    *,
    rng: np.random.Generator,
    low_m: float | None = None,
    high_m: float | None = None,
    population: int = 200,
    iterations: int = 50,
    gene_probability: float = 0.1,
) -> ObjectiveFront:
    """Evolve a front of (score, MACs, further costs) by NSGA-II; all work is on whole uint8 populations.

    Scores are comparable between paths of similar MACs; along the front they are only as good as the
    filter's global ranking (see its report).

    Args:
        flt: Fitted filter: ``score(population, macs_m)``.
        cost: `CostModel`, gives the MACs.
        costs: Further objectives to keep small, for example a latency table.
        rng: Source of randomness.
        low_m: Least MACs, millions; None = the space's.
        high_m: Most MACs; None = the space's.
        population: Survivors per generation, >= 4.
        iterations: Generations.
        gene_probability: Of redrawing one gene in a mutation.

    Returns:
        The first front of the last survivors.

    Raises:
        InputError: population < 4, iterations < 0, a cost of another space, or no path between low_m and
            high_m.

    Source:
        Deb et al., NSGA-II (IEEE Transactions on Evolutionary Computation 6, 2002).

    Example:
        >>> import numpy as np
        >>> from pfnas_fast.filter import PathFilter
        >>> from pfnas_fast.space import CostModel, load_space, uniform_population
        >>> cost = CostModel(load_space("tiny"), num_classes=3)
        >>> paths = uniform_population(cost.space, np.random.default_rng(0), 64)
        >>> macs_m = cost.macs_m(paths)
        >>> flt = PathFilter(cost.space, cost=cost, num_members=2).fit(paths, np.log(macs_m), macs_m)
        >>> front = search_objectives(flt, cost, rng=np.random.default_rng(0), population=20, iterations=3)
        >>> front.costs.shape == (len(front.codes), 1)
        True
    """
    if population < 4 or iterations < 0:
        raise InputError(
            f"search_objectives: expected population >= 4 and iterations >= 0, got {population}, {iterations}"
        )
    for other in costs:
        if other.space != cost.space:
            raise InputError(
                f"search_objectives: expected costs of space {cost.space.name!r}, got one of "
                f"{other.space.name!r}"
            )
    smallest, largest = cost.range_m()
    low, high = smallest if low_m is None else low_m, largest if high_m is None else high_m
    tables = [CostTable(other.table, other.constant, other.unit) for other in costs]
    operators = GeneOperators(cost)

    def judge(codes: np.ndarray) -> np.ndarray:
        macs_m = cost.macs_m(codes)
        scores = np.asarray(flt.score(codes, macs_m), np.float64)
        return np.stack([-scores, macs_m, *(path_cost(codes, t).numpy() for t in tables)], axis=1)

    def distinct(codes: np.ndarray) -> np.ndarray:
        return codes[unique_rows(codes)]

    codes = distinct(ExactSampler(cost).sample_log_uniform(rng, 2 * population, low, high))
    macs_m = cost.macs_m(codes)
    codes = codes[(macs_m >= low) & (macs_m <= high)]
    objectives = judge(codes)
    for _ in range(iterations):
        keep = _select(objectives, population)
        codes, objectives = codes[keep], objectives[keep]
        # Binary tournaments: the survivors are sorted, so the smaller of two places wins.
        parents = codes[rng.integers(0, len(codes), (2, 2, population)).min(0)]
        children = operators.mutate(rng, operators.cross(rng, *parents), gene_probability)
        children, macs_m = operators.repair(rng, children, low, high)
        codes = distinct(np.concatenate([codes, children[(macs_m >= low) & (macs_m <= high)]]))
        objectives = judge(codes)
    front = np.flatnonzero(non_dominated_ranks(objectives) == 0)
    front = front[np.argsort(objectives[front, 1], kind="stable")]
    return ObjectiveFront(codes[front], -objectives[front, 0], objectives[front, 1:])

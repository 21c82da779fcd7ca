# SPDX-License-Identifier: Apache-2.0
"""Several objectives at once: fronts as a slow definition has them, and a search that beats random draws."""

import itertools

import numpy as np
import pytest

from pfnas_fast.errors import InputError
from pfnas_fast.search import hypervolume, non_dominated_ranks, search_objectives
from pfnas_fast.space import AdditiveCost, CostModel, load_space, uniform_population


class Additive:
    """A filter that knows the truth: every choice has its own worth."""

    def __init__(self, space) -> None:
        rng = np.random.default_rng(3)
        self.worth = rng.normal(size=(space.num_slots, max(space.slot_sizes) + 1))
        self.worth[:, 0] = 0.0

    def score(self, population, macs_m):
        return self.worth[np.arange(population.shape[1]), population].sum(1) + np.log(macs_m)


@pytest.fixture(scope="module")
def cost() -> CostModel:
    return CostModel(load_space("tiny"), num_classes=3)


@pytest.fixture(scope="module")
def latency(cost) -> AdditiveCost:
    """Not a function of the MACs: kernels cost differently."""
    rng = np.random.default_rng(4)
    table = rng.uniform(1.0, 9.0, cost.macs_table.shape) * (cost.macs_table > 0)
    return AdditiveCost(cost.space, table, np.full(len(cost.space.resolutions), 2.0), name="ms")


def beaten(a, b) -> bool:
    return bool((b <= a).all() and (b < a).any())


@pytest.mark.parametrize("num_objectives", [1, 2, 3])
def test_ranks_are_those_of_the_definition(num_objectives):
    points = np.random.default_rng(num_objectives).integers(0, 5, (60, num_objectives)).astype(float)
    want, left, rank = np.full(60, -1), set(range(60)), 0
    while left:
        front = {i for i in left if not any(beaten(points[i], points[j]) for j in left)}
        for i in front:
            want[i] = rank
        left, rank = left - front, rank + 1
    assert (non_dominated_ranks(points) == want).all()


def test_no_member_of_the_front_is_beaten_and_costs_are_right(cost, latency):
    flt = Additive(cost.space)
    front = search_objectives(flt, cost, [latency], rng=np.random.default_rng(0), population=60, iterations=8)
    points = np.column_stack([-front.scores, front.costs])
    assert not any(beaten(a, b) for a, b in itertools.permutations(points, 2))
    assert len(np.unique(front.codes, axis=0)) == len(front.codes) > 10
    assert np.allclose(front.costs[:, 0], cost.macs_m(front.codes))
    assert np.allclose(front.costs[:, 1], latency.of(front.codes))
    assert np.allclose(front.scores, flt.score(front.codes, front.costs[:, 0]))
    assert (np.diff(front.costs[:, 0]) >= 0).all()


def test_better_than_as_many_random_paths(cost):
    flt = Additive(cost.space)
    rng = np.random.default_rng(1)
    front = search_objectives(flt, cost, rng=rng, population=60, iterations=25)
    random = uniform_population(cost.space, rng, 60 * 26)
    macs_m = cost.macs_m(random)
    corner = (macs_m.max(), min(flt.score(random, macs_m).min(), front.scores.min()))
    ours = hypervolume(front.costs[:, 0], front.scores, reference=corner)
    assert ours > 1.05 * hypervolume(macs_m, flt.score(random, macs_m), reference=corner)


def test_stays_in_its_window_and_repeats_itself(cost):
    flt = Additive(cost.space)
    settings = {"low_m": 9.0, "high_m": 12.0, "population": 30, "iterations": 5}
    a, b = (search_objectives(flt, cost, rng=np.random.default_rng(2), **settings) for _ in range(2))
    assert (a.codes == b.codes).all()
    assert a.costs.min() >= 9.0
    assert a.costs.max() <= 12.0


def test_bad_requests_are_refused(cost):
    flt, rng = Additive(cost.space), np.random.default_rng(0)
    with pytest.raises(InputError, match="population >= 4"):
        search_objectives(flt, cost, rng=rng, population=3)
    other = CostModel(load_space("ofa_mbv3_w1.0"), num_classes=3)
    with pytest.raises(InputError, match="expected costs of space 'tiny'"):
        search_objectives(flt, cost, [AdditiveCost.macs(other)], rng=rng)
    with pytest.raises(InputError):
        search_objectives(flt, cost, rng=rng, low_m=1e6, high_m=2e6)

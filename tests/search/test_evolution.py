# SPDX-License-Identifier: Apache-2.0
"""Candidates per budget: feasible, near the budget, distinct, best first, reproducible."""

from typing import Any

import numpy as np
import pytest

from pfnas_fast.errors import InputError
from pfnas_fast.filter import BudgetThresholds, PathFilter
from pfnas_fast.search import EvolutionConfig, search_candidates
from pfnas_fast.search.evolution import evolve
from pfnas_fast.search.genes import GeneOperators, unique_rows
from pfnas_fast.space import BudgetSampler, CostModel, load_space, uniform_population

QUICK = EvolutionConfig(num_initial=200, population=40, iterations=15)


class Additive:
    """A known worth per (slot, code): what the search should maximise."""

    def __init__(self, space, seed=0):
        self.worth = np.random.default_rng(seed).normal(size=(space.num_slots, max(space.slot_sizes) + 1))
        self.worth[:, 0] = 0.0

    def score(self, population, macs_m=None):
        return self.worth[np.arange(population.shape[1]), population].sum(1)


@pytest.fixture(scope="module")
def cost():
    return CostModel(load_space("tiny"), num_classes=3)


@pytest.fixture(scope="module")
def scorer(cost):
    return Additive(cost.space)


def test_mutants_and_children_are_paths_of_the_space(cost):
    rng = np.random.default_rng(0)
    parents = uniform_population(cost.space, rng, 400)
    operators = GeneOperators(cost)
    mutants = operators.mutate(rng, parents, 0.3)
    children = operators.cross(rng, parents[:200], parents[200:])
    cost.space.check_population(mutants)
    cost.space.check_population(children)
    assert (mutants != parents).any(axis=1).mean() > 0.9
    assert (operators.mutate(rng, parents, 0.0) == parents).all()


def test_children_only_hold_genes_of_their_parents(cost):
    rng = np.random.default_rng(1)
    parents = uniform_population(cost.space, rng, 400)
    mothers, fathers = parents[:200], parents[200:]
    children = GeneOperators(cost).cross(rng, mothers, fathers)
    assert ((children == mothers) | (children == fathers) | (children == 0)).all()
    assert (GeneOperators(cost).cross(rng, mothers, mothers) == mothers).all()


def test_repair_reaches_the_window_and_leaves_feasible_paths_alone(cost):
    rng = np.random.default_rng(2)
    population = uniform_population(cost.space, rng, 200)
    repaired, macs_m = GeneOperators(cost).repair(rng, population, 10.0, 12.0)
    cost.space.check_population(repaired)
    assert (macs_m == cost.macs_m(repaired)).all()
    inside = (macs_m >= 10.0) & (macs_m <= 12.0)
    assert inside.mean() > 0.9
    before = cost.macs_m(population)
    untouched = (before >= 10.0) & (before <= 12.0)
    assert (repaired[untouched] == population[untouched]).all()


def test_candidates_are_feasible_distinct_and_sorted(cost, scorer):
    budgets = [4.2, 8.0, 20.0, 45.0]
    found = search_candidates(scorer, cost, budgets, rng=np.random.default_rng(0), top_k=6, config=QUICK)
    assert list(found) == budgets
    for budget, population in found.items():
        macs_m = cost.macs_m(population)
        cost.space.check_population(population)
        assert 1 <= len(population) <= 6
        assert (macs_m <= budget).all()
        assert (macs_m >= 0.85 * budget).all()
        assert len(unique_rows(population)) == len(population)
        assert (np.diff(scorer.score(population)) <= 0).all()


def test_search_beats_as_many_random_paths_of_the_budget(cost, scorer):
    rng = np.random.default_rng(0)
    found = search_candidates(scorer, cost, [12.0], rng=rng, top_k=1, config=QUICK)[12.0]
    random = BudgetSampler(cost).sample(rng, 200 + 15 * 40, 0.85 * 12.0, 12.0)
    assert scorer.score(found)[0] > scorer.score(random).max()


def test_same_generator_same_candidates(cost, scorer):
    runs = [
        search_candidates(scorer, cost, [9.0], rng=np.random.default_rng(5), config=QUICK)[9.0]
        for _ in range(2)
    ]
    assert (runs[0] == runs[1]).all()


def test_pruned_space_bounds_the_search(cost, scorer):
    class Odd:
        def __init__(self):
            self.scorer = scorer

        def threshold(self, macs_m):
            return np.full(len(macs_m), 0.5)

    found = search_candidates(scorer, cost, [12.0], rng=np.random.default_rng(0), pruned=Odd(), config=QUICK)[
        12.0
    ]
    assert (scorer.score(found) >= 0.5).all()


class Pruned:
    """Accepts what a filter of its own scores at `level` or more."""

    def __init__(self, scorer, level):
        self.scorer, self.level = scorer, level

    def threshold(self, macs_m):
        return np.full(len(macs_m), self.level)


def test_the_pruned_space_is_judged_by_its_own_filter(cost, scorer):
    other = Additive(cost.space, seed=1)
    pruned = Pruned(other, 3.0)
    found = search_candidates(scorer, cost, [12.0], rng=np.random.default_rng(0), pruned=pruned, config=QUICK)
    assert (other.score(found[12.0]) >= 3.0).all()
    assert (np.diff(scorer.score(found[12.0])) <= 0).all()
    free = search_candidates(scorer, cost, [12.0], rng=np.random.default_rng(0), config=QUICK)
    assert (other.score(free[12.0]) < 3.0).any()


def test_rejected_paths_fill_up(cost, scorer):
    initial = BudgetSampler(cost).sample(np.random.default_rng(0), 200, 10.0, 12.0)
    other = Additive(cost.space, seed=1)
    level = float(np.sort(other.score(initial[unique_rows(initial)]))[-3])  # three are accepted
    found, scores = evolve(
        scorer,
        cost,
        initial,
        10.0,
        12.0,
        rng=np.random.default_rng(0),
        top_k=8,
        pruned=Pruned(other, level),
        config=EvolutionConfig(iterations=0),
    )
    assert (other.score(found) >= level).tolist() == [True] * 3 + [False] * 5
    rejected = initial[other.score(initial) < level]
    assert scores[3] == scorer.score(rejected).max()
    assert (np.diff(scores[:3]) <= 0).all()
    assert (np.diff(scores[3:]) <= 0).all()
    assert len(unique_rows(found)) == 8


def test_one_resolution_only(cost, scorer):
    smallest = cost.space.resolutions[0]
    found = search_candidates(
        scorer, cost, [8.0], rng=np.random.default_rng(0), resolution=smallest, config=QUICK
    )
    assert (found[8.0][:, -1] == 1).all()
    with pytest.raises(InputError, match=f"at resolution {cost.space.resolutions[-1]}"):
        search_candidates(
            scorer, cost, [4.2], rng=np.random.default_rng(0), resolution=cost.space.resolutions[-1]
        )


@pytest.mark.parametrize("budget", [0.5, 1e6, float("nan")])
def test_budget_outside_the_space_is_refused_with_the_range(cost, scorer, budget):
    with pytest.raises(InputError, match=r"expected 3\.9.* to 49\."):
        search_candidates(scorer, cost, [budget], rng=np.random.default_rng(0))


def test_the_smallest_budget_finds_the_smallest_path(cost, scorer):
    low, high = cost.range_m()
    found = search_candidates(scorer, cost, [low, high], rng=np.random.default_rng(0), config=QUICK)
    assert cost.macs_m(found[low]).tolist() == [pytest.approx(low)]
    assert len(found[high])


@pytest.mark.parametrize("field", ["parent_fraction", "mutation_fraction", "gene_probability", "slack"])
def test_bad_rates_are_refused(field):
    with pytest.raises(InputError, match=field):
        EvolutionConfig(**dict[str, Any]({field: 0.0}))


def test_bad_top_k_is_refused(cost, scorer):
    with pytest.raises(InputError, match="top_k"):
        search_candidates(scorer, cost, [8.0], rng=np.random.default_rng(0), top_k=0)


@pytest.fixture(scope="module")
def flt(cost):
    paths = uniform_population(cost.space, np.random.default_rng(5), 64)
    macs_m = cost.macs_m(paths)
    worth = Additive(cost.space).score(paths)
    return PathFilter(cost.space, cost=cost, num_members=1, network_share=0.0).fit(paths, worth, macs_m)


@pytest.mark.parametrize("judge", ["none", "own", "another"])
def test_a_flood_starts_the_evolution(cost, flt, judge):
    pruned = None
    if judge != "none":
        other = flt if judge == "own" else flt.clone().fit(*_labels(cost, seed=6))
        pruned = BudgetThresholds(other, cost, keep=0.5, per_bin=200)
    notes: list[dict[str, Any]] = []

    def search(num_flood, iterations):
        return search_candidates(
            flt,
            cost,
            [15.0],
            rng=np.random.default_rng(0),
            top_k=5,
            pruned=pruned,
            config=EvolutionConfig(num_initial=2, iterations=iterations, num_flood=num_flood),
            on_flood=notes.append,
        )[15.0]

    flooded, bare = search(20_000, 0), search(0, 0)
    assert len(notes) == 1
    note = notes[0]
    assert (note["budget_m"], note["num_drawn"]) == (15.0, 20_000)
    # Two other samples take part, so all but two of the best must have come from the flood.
    assert note["num_chosen"] >= 3
    assert (0.2 < note["num_accepted"] / 20_000 < 0.8) == (judge == "own")
    macs_m = cost.macs_m(flooded)
    assert ((macs_m <= 15.0) & (macs_m >= 0.85 * 15.0)).all()
    assert len(bare) <= 2
    assert flt.score(flooded).mean() > flt.score(bare).mean()
    if judge == "none":  # the best of the flood are the best of what was drawn
        assert flt.score(flooded)[0] >= note["best_score"] - 1e-5
    if pruned is not None:
        assert pruned.accept(flooded).all()
    assert (search(20_000, 0) == flooded).all()
    evolved = flt.score(search(20_000, 30))
    assert evolved[0] >= flt.score(flooded)[0] - 1e-5


def _labels(cost, seed):
    paths = uniform_population(cost.space, np.random.default_rng(seed), 64)
    return paths, Additive(cost.space, seed).score(paths), cost.macs_m(paths)


def test_a_flood_of_another_ranker_is_refused(cost, scorer):
    with pytest.raises(InputError, match=r"expected a PathFilter .* num_flood > 0, got Additive"):
        search_candidates(
            scorer, cost, [15.0], rng=np.random.default_rng(0), config=EvolutionConfig(num_flood=10)
        )
    with pytest.raises(InputError, match="num_flood >= 0, got -1"):
        EvolutionConfig(num_flood=-1)

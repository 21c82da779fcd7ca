# SPDX-License-Identifier: Apache-2.0
"""Samplers and thresholds: right distribution, exact resume, clear refusals."""

from typing import Any

import numpy as np
import pytest

from pfnas_fast.errors import InputError
from pfnas_fast.filter import Balanced, BestUp, BudgetThresholds, Filtered, RandomPrune, Uniform
from pfnas_fast.space import CostModel, load_space

NOBODY: Any = None


class Additive:
    """A known worth per (slot, code), plus a trend over MACs that thresholds must not confuse with it."""

    def __init__(self, cost, trend=2.0, seed=0):
        space = cost.space
        self.cost, self.trend = cost, trend
        self.worth = np.random.default_rng(seed).normal(size=(space.num_slots, max(space.slot_sizes) + 1))

    def score(self, population, macs_m=None):
        macs_m = self.cost.macs_m(population) if macs_m is None else macs_m
        worth = self.worth[np.arange(population.shape[1]), population].sum(1)
        return worth + self.trend * np.log(macs_m)


@pytest.fixture(scope="module")
def cost():
    return CostModel(load_space("tiny"), num_classes=3)


@pytest.fixture(scope="module")
def space(cost):
    return cost.space


@pytest.fixture(scope="module")
def samplers(cost, space) -> Any:
    scorer = Additive(cost)
    built = {
        "uniform": Uniform(space),
        "balanced": Balanced(space),
        "filtered": Filtered(space, scorer, keep=0.3, epsilon=0.1, per_bin=2000),
        "random_prune": RandomPrune(space, 0.3, 0),
        "best_up": BestUp(space, scorer, 3),
    }
    return {name: sampler.bind(cost) for name, sampler in built.items()}


def accepted_by(sampler) -> Any:
    return sampler.thresholds.accept


NAMES = ["uniform", "balanced", "filtered", "random_prune", "best_up"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [0, 1, 2, 100])
def test_draws_paths_of_the_space(samplers, space, name, n):
    population = samplers[name].sample(np.random.default_rng(0), n)
    assert population.shape == (n, space.num_slots)
    space.check_population(population)


@pytest.mark.parametrize("name", NAMES)
def test_depends_on_the_generator_alone(samplers, name):
    first = samplers[name].sample(np.random.default_rng(3), 5)
    samplers[name].sample(np.random.default_rng(9), 17)
    assert (samplers[name].sample(np.random.default_rng(3), 5) == first).all()


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_the_same_in_any_order_and_after_a_restart(samplers, cost, name):
    steps = [0, 1, 63, 64, 200]
    forward = [samplers[name].population_for_step(7, step, 2) for step in steps]
    backward = [samplers[name].population_for_step(7, step, 2) for step in reversed(steps)]
    assert all((a == b).all() for a, b in zip(forward, reversed(backward), strict=True))
    other = [samplers[name].population_for_step(8, step, 2) for step in steps]
    assert any((a != b).any() for a, b in zip(forward, other, strict=True))
    assert len(np.unique(np.concatenate(forward), axis=0)) > 5


def test_a_returned_step_may_be_changed_by_the_caller(samplers):
    first = samplers["balanced"].population_for_step(0, 5, 2)
    kept = first.copy()
    first[:] = 0
    assert (samplers["balanced"].population_for_step(0, 5, 2) == kept).all()


@pytest.mark.parametrize("name", ["balanced", "filtered", "random_prune", "best_up"])
def test_budgets_stay_log_uniform(samplers, cost, name):
    macs_m = cost.macs_m(samplers[name].sample(np.random.default_rng(0), 4000))
    low, high = np.log(cost.range_m())
    place = np.sort((np.log(macs_m) - low) / (high - low))
    distance = np.abs(place - (np.arange(4000) + 0.5) / 4000).max()  # Kolmogorov-Smirnov
    assert distance < 0.05


def test_uniform_is_not_spread_over_budgets(samplers, cost):
    macs_m = cost.macs_m(samplers["uniform"].sample(np.random.default_rng(0), 4000))
    low, high = np.log(cost.range_m())
    place = np.sort((np.log(macs_m) - low) / (high - low))
    assert np.abs(place - (np.arange(4000) + 0.5) / 4000).max() > 0.1


def test_filtered_keeps_only_accepted_paths_without_exploration(cost, space):
    sampler = Filtered(space, Additive(cost), keep=0.3, epsilon=0.0, per_bin=2000).bind(cost)
    population = sampler.sample(np.random.default_rng(0), 1000)
    assert accepted_by(sampler)(population).all()


def test_exploration_takes_its_share_and_decays(cost, space):
    sampler = Filtered(space, Additive(cost), keep=0.2, epsilon=1.0, decay_steps=100, per_bin=2000).bind(cost)
    early = np.concatenate([sampler.population_for_step(0, step, 20) for step in range(20)])
    late = np.concatenate([sampler.population_for_step(0, step, 20) for step in range(120, 140)])
    assert accepted_by(sampler)(early).mean() < 0.5
    assert accepted_by(sampler)(late).all()
    assert sampler.epsilon_at(50) == pytest.approx(0.5)
    assert sampler.epsilon_at(1000) == 0.0


def test_thresholds_keep_the_asked_share_in_every_bin_despite_the_trend(cost, space):
    thresholds = BudgetThresholds(Additive(cost, trend=8.0), cost, keep=0.3, per_bin=4000)
    assert len(thresholds.acceptance) == 8
    assert all(share is not None and abs(share - 0.3) < 0.08 for share in thresholds.acceptance)
    population = Balanced(space).bind(cost).sample(np.random.default_rng(99), 4000)
    assert abs(thresholds.accept(population).mean() - 0.3) < 0.03


def test_thresholds_prefer_better_paths(cost, space):
    scorer = Additive(cost, trend=0.0)
    thresholds = BudgetThresholds(scorer, cost, keep=0.25, per_bin=2000)
    population = Balanced(space).bind(cost).sample(np.random.default_rng(1), 3000)
    kept = thresholds.accept(population)
    assert scorer.score(population[kept]).mean() > scorer.score(population[~kept]).mean() + 1.0


def test_thresholds_survive_saving(cost, space):
    scorer = Additive(cost)
    thresholds = BudgetThresholds(scorer, cost, keep=0.3, per_bin=500)
    again = BudgetThresholds.from_state_dict(thresholds.state_dict(), scorer, cost)
    population = Balanced(space).bind(cost).sample(np.random.default_rng(1), 500)
    assert (again.accept(population) == thresholds.accept(population)).all()


def test_keep_everything(cost, space):
    thresholds = BudgetThresholds(Additive(cost), cost, keep=1.0, per_bin=2000)
    population = Balanced(space).bind(cost).sample(np.random.default_rng(1), 1000)
    assert thresholds.accept(population).mean() > 0.98


def test_drift_is_none_for_the_same_filter_and_large_for_another(cost, space):
    sampler = Filtered(space, Additive(cost), keep=0.3, per_bin=2000).bind(cost)
    same = sampler.refresh(Additive(cost))
    assert same == {"kept_by_both": 1.0, "score_tau": pytest.approx(1.0, abs=1e-3)}
    other = sampler.refresh(Additive(cost, seed=5, trend=0.0))
    assert other["kept_by_both"] < 0.7


def test_random_prune_is_a_fixed_subset_of_the_asked_size(cost, space):
    sampler = RandomPrune(space, 0.3, 1).bind(cost)
    population = Balanced(space).bind(cost).sample(np.random.default_rng(0), 4000)
    verdict = sampler._accept(population)
    assert abs(verdict.mean() - 0.3) < 0.03
    assert sampler._accept(sampler.sample(np.random.default_rng(2), 500)).all()
    assert (RandomPrune(space, 0.3, 2).bind(cost)._accept(population) != verdict).any()


def test_best_up_is_better_than_balanced_at_the_same_budgets(samplers, cost):
    scorer = Additive(cost, trend=0.0)
    best = BestUp(cost.space, scorer, 4).bind(cost).sample(np.random.default_rng(0), 1000)
    plain = samplers["balanced"].sample(np.random.default_rng(0), 1000)
    assert scorer.score(best).mean() > scorer.score(plain).mean() + 1.0


def test_unbound_samplers_are_refused(space):
    for sampler in (Balanced(space), RandomPrune(space), Filtered(space, NOBODY), BestUp(space, NOBODY)):
        with pytest.raises(InputError, match="call bind"):
            sampler.sample(np.random.default_rng(0), 2)


def test_cost_of_another_space_is_refused(cost):
    other = load_space("ofa_mbv3_w1.0")
    with pytest.raises(InputError, match=r"Balanced.bind: expected a cost model of space 'ofa_mbv3_w1.0'"):
        Balanced(other).bind(cost)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda space: Filtered(space, NOBODY, epsilon=1.5), "epsilon"),
        (lambda space: Filtered(space, NOBODY, keep=0.0), "keep"),
        (lambda space: RandomPrune(space, 0.0), "keep"),
        (lambda space: BestUp(space, NOBODY, 0), "num_candidates"),
    ],
)
def test_bad_settings_are_refused(space, build, name):
    with pytest.raises(InputError, match=name):
        build(space)


def test_bad_thresholds_are_refused(cost):
    with pytest.raises(InputError, match="keep"):
        BudgetThresholds(Additive(cost), cost, keep=0.0)
    with pytest.raises(InputError, match="num_bins"):
        BudgetThresholds(Additive(cost), cost, num_bins=0)

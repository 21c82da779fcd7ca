# SPDX-License-Identifier: Apache-2.0
"""The filter through the compiled engine: the same scores as its parts, search and draws that use it."""

import resource

import numpy as np
import pytest
import torch

from pfnas_fast.errors import InputError
from pfnas_fast.filter import BudgetThresholds, ExactSampler, Filtered, PathFilter, RankerConfig
from pfnas_fast.filter.kernel import KernelScorer
from pfnas_fast.filter.network import LookupScorer
from pfnas_fast.search import EvolutionConfig, search_candidates
from pfnas_fast.space import AdditiveCost, CostModel, load_space, uniform_population


@pytest.fixture(scope="module")
def cost():
    return CostModel(load_space("tiny"), num_classes=3)


def fit(cost, **settings):
    paths = uniform_population(cost.space, np.random.default_rng(0), 80)
    macs_m = cost.macs_m(paths)
    worth = np.random.default_rng(1).normal(size=(cost.space.num_slots, max(cost.space.slot_sizes) + 1))
    labels = np.log(macs_m) + 0.1 * worth[np.arange(paths.shape[1]), paths].sum(1)
    return PathFilter(cost.space, cost=cost, num_members=2, **settings).fit(paths, labels, macs_m)


@pytest.fixture(scope="module")
def flt(cost):
    return fit(cost)


def by_parts(flt, paths, macs_m):
    """The score as the folded parts themselves give it, in torch."""
    norm, design = flt._norm, flt.encoding.design()
    mean, scale = norm["score_mean"], norm["score_scale"]
    has_budget = flt.condition != "none"
    z = flt._normalised(np.log(macs_m)).float() if has_budget else None
    codes, rows = torch.from_numpy(flt.encoding.codes(paths)), []
    if flt.parts.network is not None:
        count = flt.num_members
        networks = LookupScorer.fold(
            flt.parts.network,
            torch.from_numpy(design),
            norm["feature_mean"],
            mean[:count],
            scale[:count],
            input_scale=flt.config.input_scale,
            has_budget=has_budget,
        )
        rows.append(networks.members(codes, z))
    first = len(mean) - len(flt.parts.kernels)
    for index, model in enumerate(flt.parts.kernels, start=first):
        kernel = KernelScorer.fold(
            model, design, norm["feature_mean"], float(mean[index]), float(scale[index])
        )
        rows.append(kernel.score(codes, z).unsqueeze(0))
    members = torch.cat(rows)
    score = flt._weights @ members
    return score, (flt._weights @ (members - score) ** 2).sqrt()


@pytest.mark.parametrize("condition", ["concat", "none"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_scores_equal_those_of_the_parts(cost, condition, share):
    flt = fit(cost, condition=condition, network_share=share)
    paths = uniform_population(cost.space, np.random.default_rng(2), 300)
    macs_m = cost.macs_m(paths)
    score, spread = flt.score_with_spread(paths, macs_m)
    want, want_spread = by_parts(flt, paths, macs_m)
    assert np.allclose(score, want, atol=2e-4)
    assert np.allclose(spread, want_spread, atol=4e-4)
    assert (score == flt.score(paths, macs_m)).all()
    assert (score == flt.score(paths)).all()  # MACs by its own cost model


def test_ten_million_paths_in_bounded_memory(cost):
    """Beside the population (a byte a gene) less than another byte a gene and a constant."""
    few = uniform_population(cost.space, np.random.default_rng(2), 1000)
    flt = fit(cost, network_share=1.0, config=RankerConfig(hidden=(16, 16), num_steps=20))
    paths = np.tile(few, (10_000, 1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scores = flt.score(paths)
    grown_bytes = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert scores.shape == (10_000_000,)
    assert grown_bytes < paths.size + 32e6
    assert (scores.reshape(-1, 1000) == flt.score(few)).all()


def test_chunks_refuse_what_the_whole_would(flt, cost):
    paths = np.tile(uniform_population(cost.space, np.random.default_rng(2), 1000), (300, 1))
    with pytest.raises(InputError, match=r"expected shape \[300000\] for macs_m, got \[299999\]"):
        flt.score(paths, np.ones(299_999))
    with pytest.raises(InputError, match="macs_m > 0"):
        flt.score(paths, np.r_[np.ones(299_999), 0.0])


def test_search_goes_through_the_engine_and_respects_everything(flt, cost):
    pruned = BudgetThresholds(flt, cost, keep=0.3, per_bin=500)
    config = EvolutionConfig(num_initial=300, population=40, iterations=15)
    runs = [
        search_candidates(
            flt,
            cost,
            [9.0, 14.0],
            rng=np.random.default_rng(3),
            top_k=6,
            pruned=pruned,
            resolution=160,
            config=config,
        )
        for _ in range(2)
    ]
    for budget, population in runs[0].items():
        macs_m = cost.macs_m(population)
        assert (population == runs[1][budget]).all()
        assert len(np.unique(population, axis=0)) == len(population) == 6
        assert ((macs_m <= budget) & (macs_m >= 0.85 * budget)).all()
        assert (population[:, -1] == 2).all()
        assert pruned.accept(population).all()
        assert (np.diff(flt.score(population)) <= 1e-6).all()
        random = ExactSampler(cost).sample(np.random.default_rng(0), 300, 0.85 * budget, budget, 160)
        assert flt.score(population)[0] > flt.score(random).max()


def test_a_judge_of_its_own_decides_what_is_accepted(flt, cost):
    other = fit(cost, network_share=1.0)
    pruned = BudgetThresholds(other, cost, keep=0.3, per_bin=500)
    config = EvolutionConfig(num_initial=300, population=40, iterations=10)
    found = search_candidates(
        flt, cost, [10.0], rng=np.random.default_rng(3), top_k=6, pruned=pruned, config=config
    )[10.0]
    assert pruned.accept(found).all()


def test_exact_draws_refuse_what_is_impossible(cost):
    sampler = ExactSampler(cost)
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="expected a window that holds a path, within"):
        sampler.sample(rng, 3, 900.0, 1000.0)
    with pytest.raises(InputError, match="expected a window that holds a path, within"):
        sampler.sample_log_uniform(rng, 3, 900.0, 1000.0)
    with pytest.raises(InputError, match="ExactSampler: expected 0 < window < 1"):
        ExactSampler(cost, window=0.0)
    assert sampler.sample(rng, 0, 9.0, 10.0).shape == (0, cost.space.num_slots)
    assert cost.macs_m(sampler.sample_log_uniform(rng, 200, 9.0, 12.0)).max() <= 12.0


def test_exact_draws_work_with_any_additive_cost(cost):
    rng = np.random.default_rng(0)
    table = rng.random(cost.macs_table.shape) * (np.arange(cost.macs_table.shape[2]) > 0)
    latency = AdditiveCost(cost.space, table, np.array([1.0, 1.5, 2.0]), name="ms")
    low, high = latency.range()
    population = ExactSampler(latency).sample(rng, 500, 0.4 * low + 0.6 * high, 0.3 * low + 0.7 * high)
    values = latency.of(population)
    assert ((values >= 0.4 * low + 0.6 * high) & (values <= 0.3 * low + 0.7 * high)).all()


def test_online_decisions_are_those_of_the_thresholds(flt, cost):
    sampler = Filtered(cost.space, flt, keep=0.3, epsilon=0.0, per_bin=1000).bind(cost)
    population = sampler.sample(np.random.default_rng(0), 200)
    assert sampler.thresholds is not None
    assert sampler.thresholds.accept(population).all()


def test_an_unfitted_filter_has_no_ranker(cost):
    with pytest.raises(InputError, match="expected a fitted filter"):
        PathFilter(cost.space).budget_ranker()

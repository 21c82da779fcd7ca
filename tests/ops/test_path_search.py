# SPDX-License-Identifier: Apache-2.0
"""Drawing, evolving and flooding in compiled code: distribution, windows, determinism, the best found."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from pfnas_fast.ops import BudgetRanker, NetworkTables, PackedRanker, RankerTables, SearchSpace, path_score
from pfnas_fast.space import AdditiveCost, BudgetSampler, CostModel, load_space, uniform_population
from pfnas_fast.space.space import Space


@pytest.fixture(scope="module")
def model():
    return CostModel(load_space("tiny"), num_classes=3)


def pack(model, width=0.02, measure="genes"):
    search = SearchSpace(model.space, AdditiveCost.macs(model))
    sampler = BudgetSampler(model, measure=measure)
    narrowest = model.range_m()[0] * width
    search.use_walks([sampler.walker(r, width=narrowest) for r in model.space.resolutions])
    return search


@pytest.fixture(scope="module")
def search(model):
    return pack(model)


@pytest.fixture(scope="module")
def scorer(model):
    """A ranker with interactions and a budget input."""
    g = torch.Generator().manual_seed(3)
    space = model.space
    codes = max(space.slot_sizes) + 1
    rows = space.num_slots * codes
    networks = NetworkTables(
        torch.randn(rows, 1, 16, generator=g),
        torch.randn(1, 16, generator=g),
        torch.randn(1, 16, generator=g),
        (),
        torch.randn(1, 16, generator=g),
    )
    tables = RankerTables(space.num_slots, codes, torch.ones(1), networks)
    return BudgetRanker(PackedRanker(tables), log_mean=2.0, log_scale=0.7)


def scores_of(scorer, model, codes):
    z = ((np.log(model.macs_m(codes)) - scorer.log_mean) / scorer.log_scale).astype(np.float32)
    return path_score(scorer.ranker, codes, torch.from_numpy(z)).numpy()


SMALL = {
    "name": "small",
    "stem": {"channels": 8, "activation": "hswish"},
    "first_block": None,
    "stages": [
        {"stride": 2, "activation": "relu", "se": False, "depths": [1, 2], "kernel_sizes": [3, 5]}
        | {"out_channels": 16, "expand_ratios": [2, 3]},
        {"stride": 2, "activation": "hswish", "se": True, "depths": [1, 2], "kernel_sizes": [3, 5]}
        | {"out_channels": 24, "expand_ratios": [2]},
    ],
    "taps": [0, 1],
    "head": {"channels": 16, "num_convs": 1},
    "tail": {"feature_channels": 32, "hidden_channels": 32, "dropout": 0.0},
    "resolutions": [32, 48],
    "aspect": [4, 3],
    "classification_resolutions": [32],
}


def every_path(space):
    """All 120 subnets at both resolutions, found by drawing far more than there are."""
    return np.unique(uniform_population(space, np.random.default_rng(0), 60_000), axis=0)


def chances(space, codes):
    """Of each path under the gene measure, its resolution given."""
    sizes = np.array(space.slot_sizes[:-1])
    depths = np.prod([len(stage.depths) for stage in space.stages])
    return 1.0 / depths / np.where(codes[:, :-1] > 0, sizes, 1).prod(1)


@pytest.mark.parametrize("measure", ["genes", "paths"])
@pytest.mark.parametrize("ends", [(0.0, 1.0), (0.3, 0.6), (0.0, 0.05), (0.9, 1.0)])
def test_draws_follow_the_measure_inside_the_window(measure, ends):
    space = Space.from_dict(SMALL)
    cost = CostModel(space, num_classes=3)
    paths = every_path(space)
    assert len(paths) == 2 * space.num_paths
    paths = paths[paths[:, -1] == 1]
    values = cost.macs_m(paths)
    low, high = np.quantile(values, ends[0]), np.quantile(values, ends[1])
    codes, missing = pack(cost, measure=measure).draw(40_000, low, high, seed=5, resolutions=[32])
    assert missing == 0
    drawn, counts = np.unique(codes, axis=0, return_counts=True)
    inside = paths[(values >= low) & (values <= high)]
    assert (drawn == inside).all()
    share = chances(space, inside) if measure == "genes" else np.ones(len(inside))
    if len(inside) > 1:
        assert stats.chisquare(counts, share / share.sum() * counts.sum()).pvalue > 1e-4


def test_a_fractional_cost_is_drawn_exactly_too():
    space = Space.from_dict(SMALL)
    rng = np.random.default_rng(0)
    table = rng.random((2, space.num_blocks, max(space.slot_sizes[:-1]) + 1))
    table[:, :, 0] = 0.0
    cost = AdditiveCost(space, table, np.array([1.0, 2.0]))
    search, sampler = (
        SearchSpace(space, cost),
        BudgetSampler(cost, 64),
    )  # coarse buckets: many draws are redrawn
    search.use_walks([sampler.walker(r) for r in space.resolutions])
    paths = every_path(space)
    paths = paths[paths[:, -1] == 2]
    values = cost.of(paths)
    low, high = np.quantile(values, 0.4), np.quantile(values, 0.55)
    codes, _ = search.draw(20_000, low, high, seed=1, resolutions=[48])
    inside = paths[(values >= low) & (values <= high)]
    drawn, counts = np.unique(codes, axis=0, return_counts=True)
    assert (drawn == inside).all()
    share = chances(space, inside)
    assert stats.chisquare(counts, share / share.sum() * counts.sum()).pvalue > 1e-4
    assert search.num_drawn > 20_000


def test_log_uniform_draws_agree_with_the_slow_twin(model, search):
    low, high = model.range_m()
    codes, missing = search.draw(20_000, low, high, seed=0, window=0.02)
    assert missing == 0
    model.space.check_population(codes)
    twin = BudgetSampler(model).sample_log_uniform(np.random.default_rng(0), 20_000)
    for ours, theirs in (
        (np.log(model.macs_m(codes)), np.log(model.macs_m(twin))),
        ((codes != 0).sum(1), (twin != 0).sum(1)),
    ):
        same: Any = stats.ks_2samp(ours, theirs)
        assert same.pvalue > 1e-4
    tables = [np.bincount(c[:, -1], minlength=4)[1:] for c in (codes, twin)]
    independent: Any = stats.chi2_contingency(tables)
    assert independent.pvalue > 1e-4


def test_a_path_depends_on_seed_and_index_alone(search, num_threads):
    whole, _ = search.draw(3000, 9.0, 12.0, seed=7)
    part, _ = search.draw(500, 9.0, 12.0, seed=7, first_index=1000)
    assert (part == whole[1000:1500]).all()
    assert (search.draw(3000, 9.0, 12.0, seed=8)[0] != whole).any()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert (search.draw(3000, 9.0, 12.0, seed=7)[0] == whole).all()


def test_an_impossible_window_reports_missing_rows_and_ends(model, search):
    low, high = model.range_m()
    codes, missing = search.draw(10, high * 1.5, high * 2.0, seed=0)
    assert missing == 10
    assert not codes.any()
    assert search.draw(0, low, high, seed=0)[0].shape == (0, model.space.num_slots)


def test_the_cheapest_and_the_dearest_path_can_be_drawn(model, search):
    low, high = model.range_m()
    cheapest, _ = search.draw(3, low, low, seed=0)
    dearest, _ = search.draw(3, high, high, seed=0)
    assert (cheapest == model.space.encode([model.space.min_path()])).all()
    assert (dearest == model.space.encode([model.space.max_path()])).all()


def test_flood_keeps_what_sorting_all_draws_would(tier, model, search, scorer, num_threads):
    codes, _ = search.draw(30_000, 9.0, 12.0, seed=4)
    scores = scores_of(scorer, model, codes)
    distinct, first = np.unique(codes, axis=0, return_index=True)
    best = np.argsort(-scores[first], kind="stable")[:50]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found = search.flood(scorer, 30_000, 9.0, 12.0, seed=4, top_k=50)
        assert (found.scores == scores[first][best]).all()
        assert (found.codes == distinct[best]).all()
        assert (found.costs == model.macs_m(found.codes)).all()
        assert found.num_accepted == 30_000


def test_flood_obeys_thresholds(model, search, scorer):
    codes, _ = search.draw(20_000, 5.0, 30.0, seed=4, window=0.02)
    scores, log_macs = scores_of(scorer, model, codes), np.log(model.macs_m(codes))
    knots, values = np.log([4.0, 8.0, 40.0]), np.array([0.5, 2.0, -1.0])
    accepted = scores >= np.interp(log_macs, knots, values)
    found = search.flood(
        scorer, 20_000, 5.0, 30.0, seed=4, window=0.02, top_k=10_000, thresholds=(knots, values)
    )
    assert found.num_accepted == accepted.sum()
    assert len(found.codes) == min(10_000, len(np.unique(codes[accepted], axis=0)))


def test_flood_of_fewer_paths_than_asked(model, search, scorer):
    low, _ = model.range_m()
    found = search.flood(scorer, 5000, low, low, seed=0, top_k=8)
    assert len(found.codes) == 1
    assert search.flood(scorer, 0, 9.0, 12.0, seed=0, top_k=8).codes.shape == (0, model.space.num_slots)


def start(search, low, high, n=200):
    return search.draw(n, low, high, seed=11)[0]


def test_evolution_beats_as_many_random_paths(tier, model, search, scorer):
    initial = start(search, 10.2, 12.0)
    codes, scores, scored = search.evolve(
        scorer, initial, 10.2, 12.0, seed=1, top_k=5, population=60, iterations=40
    )
    model.space.check_population(codes)
    macs_m = model.macs_m(codes)
    assert ((macs_m >= 10.2) & (macs_m <= 12.0)).all()
    assert len(np.unique(codes, axis=0)) == len(codes) == 5
    assert (np.diff(scores) <= 0).all()
    assert np.allclose(scores, scores_of(scorer, model, codes), atol=1e-6)
    assert 200 < scored <= 200 + 40 * 60
    assert scores[0] > search.flood(scorer, scored, 10.2, 12.0, seed=9, top_k=1).scores[0]


def test_evolution_is_the_same_for_any_number_of_threads(search, scorer, num_threads):
    initial, found = start(search, 10.2, 12.0), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(search.evolve(scorer, initial, 10.2, 12.0, seed=3, top_k=4, iterations=20))
    assert (found[0][0] == found[1][0]).all()
    other = search.evolve(scorer, initial, 10.2, 12.0, seed=4, top_k=4, iterations=3)
    again = search.evolve(scorer, initial, 10.2, 12.0, seed=5, top_k=4, iterations=3)
    assert other[0].shape == again[0].shape
    assert (other[0] != again[0]).any()


def test_evolution_keeps_to_its_resolution(model, search, scorer):
    initial, _ = search.draw(100, 9.0, 12.0, seed=0, resolutions=[160])
    codes, _, _ = search.evolve(
        scorer, initial, 9.0, 12.0, seed=1, top_k=20, population=40, iterations=10, resolution=160
    )
    assert (codes[:, -1] == 2).all()


def test_accepted_paths_come_first(model, search, scorer):
    initial = start(search, 10.2, 12.0, 400)
    limit = float(np.quantile(scores_of(scorer, model, initial), 0.9))
    thresholds = (np.array([0.0]), np.array([limit]))
    judge = BudgetRanker(PackedRanker(scorer.ranker.tables), scorer.log_mean, scorer.log_scale)
    for other in (None, judge):
        codes, scores, _ = search.evolve(
            scorer,
            initial,
            10.2,
            12.0,
            seed=1,
            top_k=300,
            population=40,
            iterations=0,
            thresholds=thresholds,
            judge=other,
        )
        accepted = scores >= limit
        assert 0 < accepted.sum() < len(codes)
        assert accepted[: accepted.sum()].all()  # accepted ones first, best first
        assert (np.diff(scores[accepted]) <= 0).all()
        assert (np.diff(scores[~accepted]) <= 0).all()


def test_patience_and_no_iterations_end_early(search, scorer):
    initial = start(search, 10.2, 12.0)
    assert search.evolve(scorer, initial, 10.2, 12.0, seed=1, top_k=3, iterations=0)[2] == 200
    patient = search.evolve(scorer, initial, 10.2, 12.0, seed=1, top_k=1, iterations=2000, patience=5)
    assert patient[2] < 200 + 2000 * 100


def test_nan_scores_are_never_the_best(search, scorer):
    net = scorer.ranker.tables.networks
    table = net.table.clone()
    table[1] = torch.nan  # whatever path has code 1 in slot 0
    broken = RankerTables(
        scorer.ranker.tables.num_slots,
        scorer.ranker.tables.num_codes,
        torch.ones(1),
        NetworkTables(table, net.offset, net.budget, (), net.head),
    )
    ranker = BudgetRanker(PackedRanker(broken), scorer.log_mean, scorer.log_scale)
    found = search.flood(ranker, 5000, 9.0, 12.0, seed=0, top_k=100)
    assert len(found.codes) == 100
    assert np.isfinite(found.scores).all()
    assert (found.codes[:, 0] != 1).all()

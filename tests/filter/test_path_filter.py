# SPDX-License-Identifier: Apache-2.0
"""The path filter: learns, scores in any form of input, saves, and refuses what it cannot do."""

import io

import numpy as np
import pytest
import torch

from pfnas_fast.errors import InputError
from pfnas_fast.filter import PathFilter, RankerConfig
from pfnas_fast.filter.encoding import GeneEncoding
from pfnas_fast.filter.metrics import cost_bins, tau_within_groups
from pfnas_fast.filter.rivals import RIVALS, MacsOnly, Rival
from pfnas_fast.space import CostModel, load_space, uniform_population

QUICK = RankerConfig(hidden=(16, 8), num_steps=60)
CHOICES = [3, 2, 4, 3, 3, 2]


def table(n, seed=0, noise=0.0):
    """Paths of a made-up table, worth that genes add and multiply, and MACs that only some genes cost."""
    rng = np.random.default_rng(seed)
    paths = np.stack([rng.integers(0, size, n) for size in CHOICES], axis=1)
    macs_m = 2.0 + paths @ np.array([4.0, 2.0, 1.0, 0.0, 0.5, 0.0])
    worth = np.log(macs_m) + 0.3 * paths[:, 3] - 0.2 * paths[:, 4] + 0.4 * (paths[:, 0] == 1) * paths[:, 5]
    return paths, worth + noise * rng.normal(size=n), macs_m


def quick(**settings):
    settings = {"num_members": 2, "config": QUICK, "bandwidths": (None,)} | settings
    return PathFilter(num_choices=CHOICES, **settings)


@pytest.fixture(scope="module")
def fitted():
    return quick().fit(*table(120))


@pytest.fixture(scope="module")
def cost():
    return CostModel(load_space("tiny"), num_classes=3)


@pytest.mark.parametrize("condition", ["concat", "film", "none"])
def test_ranks_unseen_paths_inside_bins_far_better_than_macs(condition):
    share = 1.0 if condition == "film" else None
    flt = quick(condition=condition, network_share=share).fit(*table(120, noise=0.05))
    paths, worth, macs_m = table(600, seed=1)
    bins = cost_bins(macs_m, 6)
    assert tau_within_groups(flt.score(paths, macs_m), worth, bins) > (0.6 if condition == "film" else 0.75)
    assert tau_within_groups(macs_m, worth, bins) < 0.4


def test_same_seed_same_bits_other_seed_other_scores(fitted):
    paths, worth, macs_m = table(120)
    again = quick().fit(paths, worth, macs_m).score(paths, macs_m)
    assert (again == fitted.score(paths, macs_m)).all()
    assert (quick().fit(paths, worth, macs_m, seed=1).score(paths, macs_m) != again).any()


def test_a_chunk_border_changes_nothing(fitted):
    paths, _, macs_m = table(40_000, seed=2)
    whole = fitted.score(paths, macs_m)
    assert whole.dtype == np.float32
    assert np.allclose(
        whole[20_000:20_050], fitted.score(paths[20_000:20_050], macs_m[20_000:20_050]), atol=1e-5
    )
    assert fitted.score(paths[:0], macs_m[:0]).shape == (0,)


def test_spread_is_the_members_disagreement(fitted):
    paths, _, macs_m = table(50, seed=3)
    mean, spread = fitted.score_with_spread(paths, macs_m)
    assert (mean == fitted.score(paths, macs_m)).all()
    assert (spread > 0).all()


def test_absent_genes_are_accepted():
    paths, worth, macs_m = table(60)
    paths[::3, 4] = -1
    assert np.isfinite(quick().fit(paths, worth, macs_m).score(paths, macs_m)).all()


def test_space_takes_paths_and_populations_alike(cost):
    population = uniform_population(cost.space, np.random.default_rng(0), 60)
    macs_m = cost.macs_m(population)
    flt = PathFilter(cost.space, cost=cost, num_members=2, config=QUICK, bandwidths=(None,))
    flt.fit(cost.space.decode(population), np.log(macs_m), macs_m)
    scores = flt.score(population)
    assert (flt.score(cost.space.decode(population)) == scores).all()
    assert (flt.score(population, macs_m) == scores).all()
    assert np.corrcoef(scores, np.log(macs_m))[0, 1] > 0.9


def test_state_survives_a_weights_only_file(fitted):
    paths, _, macs_m = table(50, seed=4)
    file = io.BytesIO()
    torch.save(fitted.state_dict(), file)
    file.seek(0)
    again = quick().load_state_dict(torch.load(file, weights_only=True))
    assert (again.score(paths, macs_m) == fitted.score(paths, macs_m)).all()
    assert again.state_dict().keys() == fitted.state_dict().keys()


def test_state_of_another_space_is_refused(fitted):
    with pytest.raises(InputError, match="load_state_dict: expected choices"):
        PathFilter(num_choices=[2, 2]).load_state_dict(fitted.state_dict())


def test_clone_is_unfitted_and_alike(fitted):
    with pytest.raises(InputError, match="expected a fitted filter"):
        fitted.clone().score(*table(5)[::2])
    paths, worth, macs_m = table(120)
    assert (
        fitted.clone().fit(paths, worth, macs_m).score(paths, macs_m) == fitted.score(paths, macs_m)
    ).all()


def test_duplicates_count_once_with_their_mean_label():
    paths, worth, macs_m = table(60)
    paths, first = np.unique(paths, axis=0, return_index=True)
    worth, macs_m = worth[first], macs_m[first]
    twice = [np.concatenate([paths, paths]), np.concatenate([worth - 0.1, worth + 0.1]), np.tile(macs_m, 2)]
    a, b = quick().fit(paths, worth, macs_m), quick().fit(*twice)
    assert np.allclose(a.score(paths, macs_m), b.score(paths, macs_m), atol=1e-4)


@pytest.mark.parametrize("shape", ["scalar", "paths", "pairs"])
def test_label_noise_softens_the_ranking(shape):
    paths, worth, macs_m = table(80, noise=0.5)
    n = len(paths)
    sd = {"scalar": 0.5, "paths": np.full(n, 0.5), "pairs": np.full((n, n), 0.5 * 2**0.5)}[shape]
    noisy = quick().fit(paths, worth, macs_m, label_sd=sd)
    unseen, truth, unseen_macs = table(500, seed=1)
    bins = cost_bins(unseen_macs, 6)
    assert tau_within_groups(noisy.score(unseen, unseen_macs), truth, bins) > 0.3
    assert (noisy.score(paths, macs_m) != quick().fit(paths, worth, macs_m).score(paths, macs_m)).any()


def test_one_cost_for_all_paths_is_no_obstacle():
    paths, worth, _ = table(60)
    flt = quick().fit(paths, worth, np.full(60, 5.0))
    assert np.isfinite(flt.score(paths, np.full(60, 5.0))).all()


def test_two_paths_are_enough():
    paths = np.array([[0] * 6, [1] * 6])
    flt = quick().fit(paths, [0.1, 0.9], [5.0, 5.0])
    scores = flt.score(paths, [5.0, 5.0])
    assert scores[1] > scores[0]


def test_film_is_its_formula_and_survives_saving():
    flt = quick(condition="film", network_share=1.0).fit(*table(80))
    paths, _, macs_m = table(30, seed=5)
    assert flt.parts is not None
    network = flt.parts.network
    assert network is not None
    network.double()
    assert network.film is not None
    codes, z = flt.normalised_inputs(paths, macs_m)
    x = (flt.encoding.features(codes) - flt.feature_mean().numpy()) * flt.config.input_scale
    z = z.float().double().numpy()[:, None] * flt.config.input_scale
    scale, shift = network.film.detach().numpy()
    total = 0.0
    for e in range(flt.num_members):
        weights = {name: value[e].numpy() for name, value in network.state_dict().items() if name != "film"}
        hidden = x @ weights["weight_1"][:-1] + weights["bias_1"]
        hidden = np.maximum((1 + scale[e] * z) * hidden + shift[e] * z, 0)
        hidden = np.maximum(hidden @ weights["weight_2"] + weights["bias_2"], 0)
        member = (hidden @ weights["weight_3"] + np.c_[x, z] @ weights["skip"])[:, 0]
        total += (member - float(flt._norm["score_mean"][e])) / float(flt._norm["score_scale"][e])
    network.float()
    assert np.abs(scale).max() > 0.01
    assert np.allclose(flt.score(paths, macs_m), total / flt.num_members, atol=1e-4)
    again = quick(condition="film", network_share=1.0).load_state_dict(flt.state_dict())
    assert (again.score(paths, macs_m) == flt.score(paths, macs_m)).all()
    with pytest.raises(InputError, match="budget_ranker"):
        flt.budget_ranker()


def test_a_warm_start_stays_near_where_a_fresh_one_goes_elsewhere():
    paths, worth, macs_m = table(120)
    flt = quick(network_share=1.0).fit(paths, worth, macs_m)
    moved = worth + 0.02 * np.random.default_rng(1).normal(size=len(worth))
    before = flt.score(paths, macs_m)
    fresh = quick(network_share=1.0).fit(paths, moved, macs_m, seed=1).score(paths, macs_m)
    warm = flt.fit(paths, moved, macs_m, seed=1, warm_start=True).score(paths, macs_m)
    assert np.abs(warm - before).mean() < np.abs(fresh - before).mean()
    bins = cost_bins(macs_m, 6)
    assert tau_within_groups(warm, worth, bins) > tau_within_groups(before, worth, bins) - 0.02
    first = quick(network_share=1.0).fit(paths, worth, macs_m, warm_start=True).score(paths, macs_m)
    assert (first == before).all()


# What it refuses, and how it says so


def fit_with(**changes):
    paths, worth, macs_m = table(20)
    arguments = {"paths": paths, "labels": worth, "macs_m": macs_m} | changes
    quick().fit(**arguments)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"labels": np.r_[np.nan, np.ones(19)]}, "expected finite numbers for labels, got nan in row 0"),
        ({"macs_m": np.r_[np.ones(19), np.inf]}, "expected finite numbers for macs_m, got inf in row 19"),
        ({"macs_m": np.zeros(20)}, "expected macs_m > 0"),
        ({"labels": np.ones(19)}, r"expected shape \[20\] .* for labels, got \[19\]"),
        ({"labels": np.full(20, 0.5)}, "expected labels that differ"),
        (
            {"paths": np.zeros((20, 6), int)},
            r"expected at least 2 distinct labelled paths .* got 1 \(of 20 rows\)",
        ),
        ({"paths": np.zeros((20, 5), int)}, r"expected shape \[n, 6\] for paths"),
        ({"paths": np.full((20, 6), 2)}, "expected -1..1 for gene 1 of paths, got 2 in row 0"),
        ({"label_sd": -1.0}, "label_sd"),
        ({"label_sd": np.ones(3)}, "label_sd"),
        ({"paths": np.zeros((0, 6), int), "labels": [], "macs_m": []}, "at least 2 distinct"),
        ({"paths": np.zeros((1, 6), int), "labels": [1.0], "macs_m": [1.0]}, "at least 2 distinct"),
    ],
)
def test_bad_labels_are_refused(changes, text):
    with pytest.raises(InputError, match=text):
        fit_with(**changes)


def test_paths_that_are_no_integers_are_a_type_error():
    with pytest.raises(TypeError, match="integer array for paths, got dtype float64"):
        fit_with(paths=np.zeros((20, 6)))


def test_a_space_with_one_choice_has_nothing_to_rank():
    with pytest.raises(InputError, match="at least 2 distinct"):
        PathFilter(num_choices=[1, 1]).fit(np.zeros((5, 2), int), np.arange(5.0), np.ones(5))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "neither"),
        ({"num_choices": []}, "1..254 choices"),
        ({"num_choices": [0, 2]}, "1..254 choices"),
        ({"num_choices": [2], "condition": "film?"}, "condition"),
        ({"num_choices": [2], "condition": "film"}, "network_share=1 for condition"),
        ({"num_choices": [2], "num_members": 0}, "num_members"),
        ({"num_choices": [2], "bandwidths": ()}, "bandwidths"),
        ({"num_choices": [2], "bandwidths": (0.0,)}, "bandwidths"),
    ],
)
def test_bad_settings_are_refused(arguments, text):
    with pytest.raises(InputError, match=text):
        PathFilter(**arguments)


def test_space_and_choices_together_are_refused(cost):
    with pytest.raises(InputError, match="both"):
        PathFilter(cost.space, num_choices=[2])


def test_score_without_any_macs_is_refused(fitted):
    with pytest.raises(InputError, match="expected macs_m, or a filter built with cost"):
        fitted.score(table(5)[0])
    with pytest.raises(InputError, match=r"expected shape \[5\] for macs_m"):
        fitted.score(table(5)[0], np.ones(4))
    with pytest.raises(InputError, match="macs_m > 0"):
        fitted.score(table(5)[0], np.zeros(5))


# Encoding and rivals


def test_factored_features_tell_kernel_from_expand_ratio(cost):
    encoding = GeneEncoding.of(cost.space)
    population = uniform_population(cost.space, np.random.default_rng(0), 50)
    features = encoding.features(population)
    for row, path in enumerate(cost.space.decode(population)):
        column = 0
        for block, kernel, expand in zip(
            cost.space.blocks, path.kernel_sizes, path.expand_ratios, strict=True
        ):
            for choices, value in ((block.kernel_sizes, kernel), (block.expand_ratios, expand)):
                if len(choices) > 1:
                    assert features[row, column : column + len(choices)].tolist() == [
                        c == value for c in choices
                    ]
                    column += len(choices)
        resolution = [r == path.resolution for r in cost.space.resolutions]
        assert features[row, column:].tolist() == resolution


@pytest.mark.parametrize("name", RIVALS)
def test_rivals_share_the_interface(name):
    rival = Rival(name, num_choices=CHOICES).fit(*table(100))
    paths, worth, macs_m = table(300, seed=1)
    assert tau_within_groups(rival.score(paths, macs_m), worth, cost_bins(macs_m, 6)) > 0.5
    with pytest.raises(InputError, match="finite"):
        rival.clone().fit(paths, np.full(300, np.nan), macs_m)


def test_macs_only_ranks_by_macs():
    paths, _, macs_m = table(20)
    assert (
        np.argsort(MacsOnly().score(paths, macs_m)) == np.argsort(np.log(macs_m).astype(np.float32))
    ).all()


def test_unknown_rival_is_refused():
    with pytest.raises(InputError, match="ridge"):
        Rival("svm", num_choices=[2])

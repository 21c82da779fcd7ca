# SPDX-License-Identifier: Apache-2.0
"""8-bit scores stay within their proven bound, on every tier, and sifting with them loses nothing."""

import copy
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_path_score import make

from pfnas_fast.errors import InputError
from pfnas_fast.ops import (
    BudgetRanker,
    Int8Ranker,
    NetworkTables,
    PackedRanker,
    RankerTables,
    SearchSpace,
    best_paths,
    path_score,
    path_score_int8,
    reference,
)
from pfnas_fast.space import AdditiveCost, BudgetSampler, CostModel, load_space

Z_RANGE = (-2.0, 3.0)


def network(
    widths=(128, 64), *, num_slots=9, num_codes=6, budget=True, linear=True, seed=0, scale=1.0
) -> Any:
    g = torch.Generator().manual_seed(seed)
    rows, (first, second) = num_slots * num_codes, widths

    def normal(*shape, size=1.0):
        return torch.randn(*shape, generator=g) * size

    dense = ((normal(1, first, second, size=(2.0 / first) ** 0.5), normal(1, second, size=0.3)),)
    net = NetworkTables(
        normal(rows, 1, first, size=scale * num_slots**-0.5),
        normal(1, first, size=0.5),
        normal(1, first, size=0.5) if budget else None,
        dense,
        normal(1, second, size=second**-0.5),
    )
    return RankerTables(
        num_slots,
        num_codes,
        torch.tensor([0.7]),
        net,
        linear=normal(rows, 1, size=0.3) if linear else None,
        linear_offset=normal(1) if linear else None,
        linear_budget=normal(1) if linear and budget else None,
    )


def paths(tables, n, seed=1) -> Any:
    rng = np.random.default_rng([seed, n])
    codes = rng.integers(0, tables.num_codes, (n, tables.num_slots)).astype(np.uint8)
    z = torch.from_numpy(rng.uniform(*Z_RANGE, n).astype(np.float32))
    return codes, z if tables.needs_budget else None


@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize(
    ("widths", "settings"),
    [
        ((128, 64), {}),
        ((128, 64), {"num_slots": 21, "num_codes": 10}),
        ((37, 5), {"num_slots": 4, "num_codes": 3}),
        ((300, 130), {"budget": False}),
        ((64, 64), {"linear": False, "scale": 20.0}),
        ((129, 65), {"num_slots": 1, "num_codes": 200}),
    ],
)
def test_never_further_off_than_proven(tier, widths, settings, vnni):
    tables = network(widths, **settings)
    ranker = Int8Ranker(tables, Z_RANGE)
    codes, z = paths(tables, 1000)
    want, _ = reference.path_score(tables, torch.from_numpy(codes), z)
    for layout in (codes, np.asfortranarray(codes)):
        error = (path_score_int8(ranker, layout, z, allow_vnni=vnni).double() - want).abs()
        assert float(error.max()) <= ranker.eps
        assert float(error.mean()) < 0.05 * float(want.std())  # and usually far less


def test_the_bound_holds_for_the_worst_path_too():
    """Small enough to score every path and many budgets: the bound is one for all of them."""
    tables = network((16, 8), num_slots=3, num_codes=4)
    codes = np.stack(np.meshgrid(*[np.arange(4)] * 3), -1).reshape(-1, 3).astype(np.uint8)
    ranker = Int8Ranker(tables, Z_RANGE)
    for z in np.linspace(*Z_RANGE, 41, dtype=np.float32):
        budgets = torch.full((len(codes),), float(z))
        want, _ = reference.path_score(tables, torch.from_numpy(codes), budgets)
        assert float((path_score_int8(ranker, codes, budgets) - want).abs().max()) <= ranker.eps


def test_tiers_agree(tier):
    tables = network()
    ranker = Int8Ranker(tables, Z_RANGE)
    codes, z = paths(tables, 500)
    plain = path_score_int8(ranker, codes, z, allow_vnni=False)
    assert torch.allclose(path_score_int8(ranker, codes, z), plain, atol=1e-5)
    with_torch = path_score(PackedRanker(tables), codes, z)
    assert float((plain - with_torch).abs().max()) <= ranker.eps


@pytest.mark.parametrize("n", [0, 1, 23, 24, 25, 800])
def test_any_number_of_paths_and_threads(tier, num_threads, n):
    tables = network()
    ranker = Int8Ranker(tables, Z_RANGE)
    codes, z = paths(tables, 800)
    torch.set_num_threads(1)
    whole = path_score_int8(ranker, codes, z)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(path_score_int8(ranker, codes[:n], z[:n]), whole[:n])


@pytest.mark.parametrize("k", [1, 10, 300])
def test_the_best_are_those_of_float32(tier, k):
    tables = network(num_slots=21, num_codes=10)
    exact, sift = PackedRanker(tables), Int8Ranker(tables, Z_RANGE)
    codes, z = paths(tables, 20_000)
    scores = path_score(exact, codes, z)
    want = torch.sort(scores, descending=True, stable=True)
    index, found, num_exact = best_paths(exact, sift, codes, z, k)
    assert torch.equal(index, want.indices[:k])
    assert torch.equal(found, want.values[:k])
    assert k <= num_exact <= 20_000


def test_all_paths_alike_are_all_kept():
    tables = network()
    codes = np.ones((50, tables.num_slots), np.uint8)
    z = torch.zeros(50)
    index, _, num_exact = best_paths(PackedRanker(tables), Int8Ranker(tables, Z_RANGE), codes, z, 5)
    assert index.tolist() == [0, 1, 2, 3, 4]
    assert num_exact == 50


def test_a_sifted_flood_finds_the_same(tier):
    model = CostModel(load_space("tiny"), num_classes=3)
    space = model.space
    search = SearchSpace(space, AdditiveCost.macs(model))
    search.use_walks([BudgetSampler(model).walker(r) for r in space.resolutions])
    tables = network(num_slots=space.num_slots, num_codes=max(space.slot_sizes) + 1)
    scorer = BudgetRanker(PackedRanker(tables), log_mean=2.3, log_scale=0.6)
    sift = Int8Ranker(tables, (-2.0, 3.0))
    for thresholds in (None, (np.array([0.0]), np.array([0.5]))):
        settings = {"seed": 2, "top_k": 40, "thresholds": thresholds}
        plain = search.flood(scorer, 40_000, 9.0, 12.0, **settings)
        sifted = search.flood(scorer, 40_000, 9.0, 12.0, sift=sift, **settings)
        assert (plain.codes == sifted.codes).all()
        assert (plain.scores == sifted.scores).all()
        assert plain.num_accepted == sifted.num_accepted
        assert sifted.num_exact <= plain.num_exact
    with pytest.raises(InputError, match="expected budgets within z"):
        search.flood(scorer, 10, 9.0, 12.0, seed=0, top_k=1, sift=Int8Ranker(tables, (0.0, 0.1)))
    other = network(num_slots=space.num_slots, num_codes=max(space.slot_sizes) + 1, seed=5)
    with pytest.raises(InputError, match="expected the scorer's own tables"):
        search.flood(scorer, 10, 9.0, 12.0, seed=0, top_k=1, sift=Int8Ranker(other))


def test_survives_copying_and_pickling():
    tables = network()
    codes, z = paths(tables, 10)
    ranker = Int8Ranker(tables, Z_RANGE)
    for other in (copy.deepcopy(ranker), pickle.loads(pickle.dumps(ranker))):
        assert other.eps == ranker.eps
        assert torch.equal(path_score_int8(other, codes, z), path_score_int8(ranker, codes, z))


def test_what_cannot_be_quantised_is_refused():
    tables = network()
    broken = replace(tables.networks, head=tables.networks.head * torch.nan)
    with pytest.raises(InputError, match="expected finite weights"):
        Int8Ranker(replace(tables, networks=broken))
    with pytest.raises(InputError, match="expected one network with one dense layer"):
        Int8Ranker(make("ensemble"))
    with pytest.raises(InputError, match="expected one network with one dense layer"):
        Int8Ranker(make("kernels"))
    with pytest.raises(InputError, match="without a budget curve"):
        Int8Ranker(make("small"))
    with pytest.raises(InputError, match="expected low <= high for z_range"):
        Int8Ranker(tables, (1.0, 0.0))


def test_bad_input_is_refused():
    tables = network()
    ranker = Int8Ranker(tables, Z_RANGE)
    codes, z = paths(tables, 5)
    with pytest.raises(InputError, match="path_score_int8: expected codes below 6 for codes, got 9"):
        path_score_int8(ranker, np.full_like(codes, 9), z)
    with pytest.raises(InputError, match="path_score_int8: expected -2 to 3 for z"):
        path_score_int8(ranker, codes, z + 10)
    with pytest.raises(InputError, match=r"path_score_int8: expected shape \[5\] for z, got None"):
        path_score_int8(ranker, codes)
    with pytest.raises(TypeError, match="path_score_int8: expected float32 for z"):
        path_score_int8(ranker, codes, z.double())
    with pytest.raises(InputError, match="best_paths: expected 1 to 5 for k, got 6"):
        best_paths(PackedRanker(tables), ranker, codes, z, 6)

# SPDX-License-Identifier: Apache-2.0
"""path_score against its float64 twin: every tier, every shape of ranker, both memory layouts."""

import copy
import itertools
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from pfnas_fast.errors import InputError
from pfnas_fast.ops import KernelTables, NetworkTables, PackedRanker, RankerTables, path_score, reference

# hidden widths of the networks (first, dense...), members; labelled paths of the kernels, members
SHAPES = {
    "small": ((128, 64), 1, 0, 0),
    "ensemble": ((64, 64), 5, 0, 0),
    "blend": ((64, 64), 3, 100, 2),
    "kernels": ((), 0, 130, 2),
    "one layer": ((40,), 2, 0, 0),
    "ragged": ((37, 23, 5), 2, 7, 1),
    "ofa": ((400, 400, 400), 1, 0, 0),
    "deep": ((20, 80, 16, 33), 1, 0, 0),
    "many members": ((8, 8), 19, 3, 1),
    "narrow": ((9, 32), 2, 0, 0),  # fewer inputs than look-ups between its products
    "three halves": ((130, 64), 1, 0, 0),
    "wide out": ((70, 160), 2, 5, 1),
}


def make(name, *, budget=True, linear=True, num_slots=6, num_codes=5, seed=0) -> Any:
    widths, members, labelled, kernels = SHAPES[name]
    g = torch.Generator().manual_seed(seed)
    rows = num_slots * num_codes

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=g) * scale

    networks = kernel_tables = None
    if members:
        dense = tuple(
            (normal(members, a, b, scale=a**-0.5), normal(members, b, scale=0.1))
            for a, b in itertools.pairwise(widths)
        )
        networks = NetworkTables(
            normal(rows, members, widths[0], scale=num_slots**-0.5),
            normal(members, widths[0], scale=0.3),
            normal(members, widths[0]) if budget else None,
            dense,
            normal(members, widths[-1], scale=widths[-1] ** -0.5),
        )
    if kernels:
        kernel_tables = KernelTables(
            normal(rows, kernels, labelled, scale=0.3) - 0.3,
            normal(kernels, labelled, scale=0.3),
            normal(kernels, labelled, scale=0.3) if budget else None,
            -normal(kernels, labelled, scale=0.3).abs() if budget else None,
            normal(kernels, labelled, scale=labelled**-0.5),
        )
    total = members + kernels
    return RankerTables(
        num_slots,
        num_codes,
        torch.rand(total, generator=g),
        networks,
        kernel_tables,
        normal(rows, total, scale=0.3) if linear else None,
        normal(total) if linear else None,
        normal(total) if linear and budget else None,
        normal(33) if budget else None,
        (-1.5, 2.0),
    )


def paths(tables, n, seed=1) -> Any:
    rng = np.random.default_rng([seed, n])
    codes = rng.integers(0, tables.num_codes, (n, tables.num_slots)).astype(np.uint8)
    z = torch.from_numpy(rng.normal(size=n).astype(np.float32))
    return codes, z if tables.needs_budget else None


def assert_scores(tables, codes, z):
    scores, each = path_score(PackedRanker(tables), codes, z, members=True)
    want, want_each = reference.path_score(tables, torch.from_numpy(np.ascontiguousarray(codes)), z)
    for got, expected in ((scores, want), (each, want_each)):
        assert got.shape == expected.shape
        scale = float(expected.abs().max()) if expected.numel() else 1.0
        assert torch.allclose(got.double(), expected, rtol=0.0, atol=5e-6 * max(scale, 1.0))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("budget", [True, False])
def test_equals_the_twin(tier, name, budget):
    tables = make(name, budget=budget)
    codes, z = paths(tables, 133)
    assert_scores(tables, codes, z)
    assert_scores(tables, np.asfortranarray(codes), z)


@pytest.mark.parametrize("n", [0, 1, 59, 60, 61, 481])
def test_any_number_of_paths(tier, n):
    tables = make("blend", linear=False)
    assert_scores(tables, *paths(tables, n))


@pytest.mark.parametrize(("num_slots", "num_codes"), [(1, 2), (21, 10), (3, 120)])
def test_any_space(tier, num_slots, num_codes):
    tables = make("small", num_slots=num_slots, num_codes=num_codes)
    assert_scores(tables, *paths(tables, 100))


def test_a_path_scores_the_same_wherever_it_stands(tier):
    tables = make("blend")
    codes, z = paths(tables, 200)
    ranker = PackedRanker(tables)
    whole = path_score(ranker, codes, z)
    assert torch.equal(path_score(ranker, codes[7:130], z[7:130]), whole[7:130])
    assert torch.equal(path_score(ranker, codes[::-1].copy(), z.flip(0)), whole.flip(0))


def test_same_bits_for_any_number_of_threads(tier, num_threads):
    tables = make("ensemble")
    codes, z = paths(tables, 5000)
    ranker, results = PackedRanker(tables), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(path_score(ranker, codes, z))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", ["small", "kernels", "blend"])
def test_nan_comes_through(tier, name):
    tables = make(name)
    codes, z = paths(tables, 70)
    z[3] = torch.nan
    scores = path_score(PackedRanker(tables), codes, z)
    assert torch.isnan(scores).nonzero().flatten().tolist() == [3]


def test_large_exponents_are_clamped_not_wrapped(tier):
    tables = make("kernels", linear=False)
    codes, z = paths(tables, 64)
    kernels = tables.kernels
    shifted = KernelTables(
        kernels.table, kernels.offset - 400.0, kernels.budget, kernels.budget_square, kernels.head
    )
    scores = path_score(PackedRanker(RankerTables(6, 5, tables.weights, kernels=shifted)), codes, z)
    assert float(scores.abs().max()) < 1e-30


def test_survives_copying_and_pickling():
    tables = make("blend")
    codes, z = paths(tables, 10)
    ranker = PackedRanker(tables)
    for other in (copy.deepcopy(ranker), pickle.loads(pickle.dumps(ranker))):
        assert torch.equal(path_score(other, codes, z), path_score(ranker, codes, z))


def test_bad_input_is_refused():
    tables = make("small")
    ranker = PackedRanker(tables)
    codes, z = paths(tables, 5)
    with pytest.raises(InputError, match=r"path_score: expected shape \[n, 6\] for codes, got \[5, 5\]"):
        path_score(ranker, codes[:, :5], z)
    with pytest.raises(InputError, match="path_score: expected codes below 5 for codes, got 9"):
        path_score(ranker, np.full_like(codes, 9), z)
    with pytest.raises(InputError, match=r"path_score: expected shape \[5\] for z, got None"):
        path_score(ranker, codes)
    with pytest.raises(TypeError, match="path_score: expected float32 for z"):
        path_score(ranker, codes, z.double())
    with pytest.raises(TypeError, match="path_score: expected uint8 for codes"):
        path_score(ranker, codes.astype(np.int32), z)
    with pytest.raises(InputError, match=r"path_score: expected shape \[1\] for weights, got \[2\]"):
        PackedRanker(RankerTables(6, 5, torch.ones(2), tables.networks))
    with pytest.raises(InputError, match="path_score: expected networks or kernels"):
        PackedRanker(RankerTables(6, 5, torch.ones(0)))

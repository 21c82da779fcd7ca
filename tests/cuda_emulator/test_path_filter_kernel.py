# SPDX-License-Identifier: Apache-2.0
"""The CUDA path filter, emulated: the CPU engine's draws to the bit, scores, thresholds and best paths."""

from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from emulator_build import CSRC, PLAIN, build_module, load_module

from pfnas_fast.errors import InputError
from pfnas_fast.ops import (
    BudgetRanker,
    KernelTables,
    NetworkTables,
    PackedRanker,
    RankerTables,
    SearchSpace,
    path_filter,
    reference,
)
from pfnas_fast.ops.path_filter import CudaPathFilter
from pfnas_fast.space import AdditiveCost, BudgetSampler, CostModel, Space, load_space

SOURCE = CSRC / "kernels" / "path_filter" / "path_filter_cuda.cu"


def description(preset: str) -> Space:
    """A preset; "many": the tiny space with more codes per block than the kernel keeps in registers."""
    if preset != "many":
        return load_space(preset)
    fields = load_space("tiny").to_dict()
    for stage in fields["stages"]:
        stage["expand_ratios"] = [2, 3, 4, 5, 6]
    return Space.from_dict(fields)


@cache
def space(preset: str) -> SearchSpace:
    model = CostModel(description(preset), num_classes=3)
    search = SearchSpace(model.space, AdditiveCost.macs(model))
    sampler = BudgetSampler(model)
    search.use_walks([sampler.walker(resolution) for resolution in model.space.resolutions])
    return search


def windows(search: SearchSpace) -> list[tuple[float, float]]:
    """A wide one, a narrow one, and one at the upper end."""
    ranges = [search.cost.range(resolution) for resolution in search.space.resolutions]
    low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
    middle = (low * high) ** 0.5
    return [(low, high), (middle * 0.99, middle * 1.01), (0.9 * high, high)]


def ranker(search: SearchSpace, kind: str) -> BudgetRanker:
    """Random tables; "full" has every part that the formula of a score knows, "wide" layers for the kernel of
    16 paths at a time."""
    if kind == "wide":
        return small_network(search, (160, 130))
    g = torch.Generator().manual_seed(7)
    slots, codes = search.space.num_slots, search.cost.table.shape[2]
    rows = slots * codes

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=g) * scale

    dense = tuple(
        (random(2, a, b, scale=a**-0.5), random(2, b))
        for a, b in (((40, 24), (24, 17)) if kind == "full" else ())
    )
    networks = NetworkTables(
        random(rows, 2, 40, scale=0.3),
        random(2, 40),
        random(2, 40) if kind == "full" else None,
        dense,
        random(2, 17 if dense else 40, scale=0.2),
    )
    parts: dict[str, Any] = {"networks": networks, "weights": random(2)}
    if kind == "full":
        parts["kernels"] = KernelTables(
            random(rows, 1, 70, scale=0.1),
            random(1, 70) - 2,
            random(1, 70),
            -random(1, 70).abs(),
            random(1, 70),
        )
        parts |= {"linear": random(rows, 3), "linear_offset": random(3), "linear_budget": random(3)}
        parts |= {"weights": random(3), "curve": random(9), "curve_range": (-1.5, 2.0)}
    return BudgetRanker(PackedRanker(RankerTables(slots, codes, **parts)), 2.0, 0.7)


def small_network(search: SearchSpace, widths: tuple[int, int] = (128, 64)) -> BudgetRanker:
    """The usual ranker: one network with the budget as an input."""
    g = torch.Generator().manual_seed(8)
    slots, codes = search.space.num_slots, search.cost.table.shape[2]
    first, second = widths
    networks = NetworkTables(
        torch.randn(slots * codes, 1, first, generator=g) * slots**-0.5,
        torch.randn(1, first, generator=g),
        torch.randn(1, first, generator=g),
        ((torch.randn(1, first, second, generator=g) * first**-0.5, torch.randn(1, second, generator=g)),),
        torch.randn(1, second, generator=g) * second**-0.5,
    )
    return BudgetRanker(PackedRanker(RankerTables(slots, codes, torch.ones(1), networks)), 5.0, 0.5)


def on_emulator(module: ModuleType, search: SearchSpace, scorer: BudgetRanker) -> CudaPathFilter:
    return CudaPathFilter(search, scorer, device=torch.device("cpu"), module=module)


@pytest.mark.parametrize("preset", ["tiny", "ofa_mbv3_w1.0", "many"])
def test_draws_are_the_engines_to_the_bit(preset: str, ordered: ModuleType, seed: int) -> None:
    """Philox words, double arithmetic and all: codes, costs, and the number of walks."""
    search = space(preset)
    ours = on_emulator(ordered, search, ranker(search, "plain"))
    for index, (low, high) in enumerate(windows(search)):
        of_window = 2**40 * seed + index
        found, codes, scores = ours.run(600, low, high, seed=of_window, top_k=8, everything=True)
        expected, missing = search.draw(600, low, high, seed=of_window)
        assert missing == 0
        assert np.array_equal(codes, expected)
        assert found.acceptance == 600 / search.num_drawn
        assert not np.isnan(scores).any()
        assert np.array_equal(found.costs, search.cost.of(found.codes))


@pytest.mark.parametrize("kind", ["plain", "full", "wide"])
def test_scores(kind: str, ordered: ModuleType, seed: int) -> None:
    """Against the float64 twin; the same bits in every order of threads."""
    search = space("tiny")
    scorer = ranker(search, kind)
    low, high = windows(search)[0]
    ours = on_emulator(ordered, search, scorer)
    _, codes, scores = ours.run(300, low, high, seed=seed, top_k=1, everything=True)
    z = torch.from_numpy(
        ((np.log(search.cost.of(codes)) - scorer.log_mean) / scorer.log_scale).astype(np.float32)
    )
    tables = scorer.ranker.tables
    expected = reference.path_score(tables, torch.from_numpy(codes), None if kind == "plain" else z)[
        0
    ].numpy()
    assert np.abs(scores - expected).max() <= 2e-5 * max(1.0, np.abs(expected).max())
    assert np.abs(expected).max() > 0.1
    ordered.set_order("forward")
    assert np.array_equal(scores, ours.run(300, low, high, seed=seed, top_k=1, everything=True)[2])


def best_of(codes: np.ndarray, scores: np.ndarray, threshold: float, k: int) -> list[tuple[float, bytes]]:
    """Slow and obvious: distinct paths that reach the threshold, best first, smaller codes first."""
    rows = {(-float(s), c.tobytes()) for c, s in zip(codes, scores, strict=True) if s >= threshold}
    return sorted(rows)[:k]


@pytest.mark.parametrize("k", [1, 8, 32])
def test_best_distinct_paths(k: int, ordered: ModuleType, seed: int) -> None:
    """Of three blocks, whatever the order of threads and blocks; the tiny space repeats paths."""
    search = space("tiny")
    ours = on_emulator(ordered, search, ranker(search, "plain"))
    low, high = windows(search)[1]
    _, codes, scores = ours.run(700, low, high, seed=seed, top_k=k, everything=True)
    threshold = float(np.quantile(scores, 0.9))
    found = ours.run(700, low, high, seed=seed, top_k=k, threshold=threshold)
    expected = best_of(codes, scores, threshold, k)
    assert [(-s, c.tobytes()) for c, s in zip(found.codes, found.scores, strict=True)] == expected
    assert found.num_accepted == int((scores >= np.float32(threshold)).sum())


def test_same_paths_as_the_engines_flood(plain: ModuleType) -> None:
    """Scores differ by rounding only, so the same paths come out where scores are apart."""
    search = space("ofa_mbv3_w1.0")
    scorer = ranker(search, "full")
    found = [
        on_emulator(plain, search, scorer).run(600, low, high, seed=i, top_k=8)
        for i, (low, high) in enumerate(windows(search))
    ]
    engine = path_filter(search, scorer, windows(search), 600, seed=0, top_k=8)
    for ours, theirs in zip(found, engine, strict=True):
        assert np.array_equal(ours.codes, theirs.codes)
        assert np.array_equal(ours.costs, theirs.costs)
        assert np.allclose(ours.scores, theirs.scores, rtol=1e-6, atol=1e-4)


def test_nothing_in_the_window(plain: ModuleType) -> None:
    search = space("tiny")
    found = on_emulator(plain, search, ranker(search, "plain")).run(300, 1e6, 2e6, seed=0, top_k=4)
    assert len(found.codes) == 0
    assert found.num_accepted == 0


def test_nan_scores_are_never_kept(plain: ModuleType) -> None:
    search = space("tiny")
    scorer = ranker(search, "plain")
    networks = scorer.ranker.tables.networks
    assert networks is not None
    networks.offset[0, 5] = float("nan")
    broken = BudgetRanker(PackedRanker(scorer.ranker.tables))
    found = on_emulator(plain, search, broken).run(300, *windows(search)[0], seed=0, top_k=4)
    assert len(found.codes) == 0


def test_mistakes_are_named(plain: ModuleType) -> None:
    search = space("tiny")
    scorer = ranker(search, "plain")
    with pytest.raises(InputError, match="expected 1 to 32 for top_k, got 33"):
        on_emulator(plain, search, scorer).run(10, 1, 2, seed=0, top_k=33)
    with pytest.raises(InputError, match="expected walk tables"):
        on_emulator(plain, SearchSpace(search.space, search.cost), scorer)
    with pytest.raises(InputError, match="expected 1 thresholds, got 2"):
        path_filter(search, scorer, [(1, 2)], 10, seed=0, top_k=1, thresholds=[0.0, 1.0])
    with pytest.raises(NotImplementedError, match="path_filter: expected cpu"):
        path_filter(search, scorer, [(1, 2)], 10, seed=0, top_k=1, device="meta")


@pytest.mark.parametrize("architecture", [80, pytest.param(90, marks=pytest.mark.tier2)])
def test_translated_ptx(architecture: int, plain: ModuleType, nvcc: str) -> None:
    """What nvcc made of it: the same codes, the same scores, bit for bit."""
    from cuda_compiler import translated_object

    ptx = translated_object(SOURCE, architecture)
    module = load_module(build_module(PLAIN, extra_objects=[ptx], name=f"_filter_sm{architecture}"))
    for preset, kind in (("tiny", "wide"), ("ofa_mbv3_w1.0", "full"), ("many", "full")):
        search = space(preset)
        scorer = ranker(search, kind)
        for low, high in windows(search):
            a = on_emulator(plain, search, scorer).run(300, low, high, seed=5, top_k=8, everything=True)
            b = on_emulator(module, search, scorer).run(300, low, high, seed=5, top_k=8, everything=True)
            assert np.array_equal(a[1], b[1])
            assert np.array_equal(a[2], b[2])
            assert np.array_equal(a[0].codes, b[0].codes)
    ran = {name for name in module.translated_kernels() if "filter_paths" in name}
    assert len(ran) == 2  # 32 and 16 paths at a time

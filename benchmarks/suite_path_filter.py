# SPDX-License-Identifier: Apache-2.0
"""Scoring paths against torch, one thread.

fp32: 21 slots of 10 codes and a budget -> 128 -> 64 -> 1, relu, 2^14 paths. Ours: uint8 codes as a
    structure of arrays (the engine's own layout), normalised budgets ready, codes unchecked. Theirs: the
    best of embedding_bag with the first layer folded into it (indices ready, int64 or int32), eager and
    through torch.compile, each in batches of 1,024 to 16,384; which one ran is printed on stderr.
int8: the same with `path_score_int8`. The check also holds the scores to their proven bound.
int8_top: the best 256 of 2^17 paths, ours by `best_paths` (8-bit sift, exact scores of what is left),
    torch's by all scores and `topk`; the same paths.
ofa_size: Once-for-All's accuracy predictor, 127 inputs -> 400 -> 400 -> 400 -> 1, 2^12 paths. Theirs: three
    `F.linear` on ready-made float features (their making is not timed). Ours: from codes, 21 slots.
"""

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from harness import Comparison
from torch import Tensor

from pfnas_fast.ops import (
    Int8Ranker,
    NetworkTables,
    PackedRanker,
    RankerTables,
    best_paths,
    path_score,
    path_score_int8,
)

__all__ = ["comparisons"]

NUM_SLOTS, NUM_CODES = 21, 10


def random_network(widths: tuple[int, ...], *, budget: bool, num_codes: int = NUM_CODES) -> RankerTables:
    """A network with weights of the usual size."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=g) * scale

    dense = tuple(
        (normal(1, a, b, scale=(2.0 / a) ** 0.5), normal(1, b, scale=0.1))
        for a, b in itertools.pairwise(widths)
    )
    networks = NetworkTables(
        normal(NUM_SLOTS * num_codes, 1, widths[0], scale=NUM_SLOTS**-0.5),
        normal(1, widths[0], scale=0.1),
        normal(1, widths[0], scale=0.3) if budget else None,
        dense,
        normal(1, widths[-1], scale=widths[-1] ** -0.5),
    )
    return RankerTables(NUM_SLOTS, num_codes, torch.ones(1), networks)


def _best_of(candidates: dict[str, Callable[[], Tensor]]) -> tuple[str, Callable[[], Tensor]]:
    times = {}
    for name, call in candidates.items():
        call()
        times[name] = min(_seconds(call) for _ in range(5))
    best = min(times, key=lambda name: times[name])
    return best, candidates[best]


def _seconds(call: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _torch_candidates(tables: RankerTables, codes: Tensor, z: Tensor) -> dict[str, Callable[[], Tensor]]:
    net = tables.networks
    assert net is not None
    assert net.budget is not None
    rows = net.table[:, 0].contiguous()
    offset, budget, head = net.offset[0], net.budget[0], net.head[0]
    weights = [(weight[0].t().contiguous(), bias[0]) for weight, bias in net.dense]

    def forward(index: Tensor, z: Tensor) -> Tensor:
        hidden = F.embedding_bag(index, rows, mode="sum") + offset
        hidden = torch.addr(hidden, z, budget).relu_()
        for weight, bias in weights:
            hidden = F.linear(hidden, weight, bias).relu_()
        return hidden @ head

    compiled = torch.compile(forward, dynamic=False)
    candidates = {}
    for dtype in (torch.int64, torch.int32):
        index = codes.to(dtype) + (torch.arange(NUM_SLOTS) * NUM_CODES).to(dtype)
        for batch in (1024, 4096, 16384):
            parts = list(zip(index.split(batch), z.split(batch), strict=True))
            for kind, function in (("eager", forward), ("compiled", compiled)):
                if kind == "compiled" and dtype == torch.int32:
                    continue
                name = f"{kind} embedding_bag, {str(dtype).removeprefix('torch.')}, batches of {batch}"
                candidates[name] = partial(_in_batches, function, parts)
    return candidates


@torch.inference_mode()
def _in_batches(function: Callable[[Tensor, Tensor], Tensor], parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.cat([function(index, z) for index, z in parts])


def _assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert float((ours - theirs).abs().max()) <= 1e-4 * float(theirs.abs().max()), "the two sides differ"


def _population(num_paths: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    codes = torch.randint(0, NUM_CODES, (num_paths, NUM_SLOTS), generator=g)
    return codes, torch.randn(num_paths, generator=g).clamp(-4.0, 4.0)


def small_filter(name: str) -> Comparison:
    """The small filter in float32 or 8-bit integers."""
    tables = random_network((128, 64), budget=True)
    codes, z = _population(1 << 14)
    best, theirs = _best_of(_torch_candidates(tables, codes, z))
    print(f"path_filter/{name}: best of torch is {best}", file=sys.stderr)
    small = codes.to(torch.uint8).t().contiguous().t()
    exact, sift = PackedRanker(tables), Int8Ranker(tables)

    def ours() -> Tensor:
        if name == "fp32":
            return path_score(exact, small, z, trusted=True)
        return path_score_int8(sift, small, z, trusted=True)

    def check() -> None:
        if name == "fp32":
            _assert_same(ours(), theirs())
        else:
            assert float((ours() - theirs()).abs().max()) <= sift.eps, "further off than proven"

    return Comparison(f"path_filter/{name}", ours, theirs, check)


def int8_top() -> Comparison:
    """The best of many."""
    tables = random_network((128, 64), budget=True)
    codes, z = _population(1 << 17)
    best, scores = _best_of(_torch_candidates(tables, codes, z))
    print(f"path_filter/int8_top: best of torch is {best}", file=sys.stderr)
    small = codes.to(torch.uint8).t().contiguous().t()
    exact, sift = PackedRanker(tables), Int8Ranker(tables)
    count = best_paths(exact, sift, small, z, 256)[2]
    print(f"path_filter/int8_top: eps {sift.eps:.3f}, {count} paths scored exactly", file=sys.stderr)

    def ours() -> Tensor:
        return best_paths(exact, sift, small, z, 256)[0]

    def theirs() -> Tensor:
        return torch.topk(scores(), 256).indices

    def check() -> None:
        want = torch.topk(path_score(exact, small, z), 256).values
        assert torch.equal(path_score(exact, small[ours()], z[ours()]), want), "not the best paths"

    return Comparison("path_filter/int8_top", ours, theirs, check)


def ofa_size() -> Comparison:
    """Once-for-All's predictor: 127 inputs, of which 6 or 7 per slot."""
    num_features = 127
    tables = random_network((400, 400, 400), budget=False)
    net = tables.networks
    assert net is not None
    g = torch.Generator().manual_seed(2)
    first = torch.randn(num_features, 400, generator=g) * num_features**-0.5
    design = (torch.rand(NUM_SLOTS * NUM_CODES, num_features, generator=g) < 0.05).float()
    networks = NetworkTables((design @ first).unsqueeze(1), net.offset, None, net.dense, net.head)
    tables = RankerTables(NUM_SLOTS, NUM_CODES, tables.weights, networks)
    codes, _ = _population(1 << 12)
    features = design[codes + torch.arange(NUM_SLOTS) * NUM_CODES].sum(1)  # [n, 127]
    layers = [(first.t().contiguous(), net.offset[0])]
    layers += [(weight[0].t().contiguous(), bias[0]) for weight, bias in net.dense]
    head = net.head[0].unsqueeze(0)

    def forward(x: Tensor) -> Tensor:
        for weight, bias in layers:
            x = F.linear(x, weight, bias).relu_()
        return F.linear(x, head).squeeze(1)

    @torch.inference_mode()
    def in_batches(parts: list[Tensor]) -> Tensor:
        return torch.cat([forward(part) for part in parts])

    candidates = {
        f"batches of {batch}": partial(in_batches, list(features.split(batch))) for batch in (256, 1024, 4096)
    }
    name, theirs = _best_of(candidates)
    print(f"path_filter/ofa_size: best of torch is {name}", file=sys.stderr)
    ranker, small = PackedRanker(tables), codes.to(torch.uint8)

    def ours() -> Tensor:
        return path_score(ranker, small, trusted=True)

    return Comparison("path_filter/ofa_size", ours, theirs, lambda: _assert_same(ours(), theirs()))


def comparisons() -> Iterator[tuple[str, Callable[[], Comparison]]]:
    """Every row's name with the function that prepares it."""
    for name in ("fp32", "int8"):
        yield f"path_filter/{name}", partial(small_filter, name)
    yield "path_filter/int8_top", int8_top
    yield "path_filter/ofa_size", ofa_size

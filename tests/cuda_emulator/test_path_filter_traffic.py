# SPDX-License-Identifier: Apache-2.0
"""Memory traffic of the CUDA path filter: races, bytes, coalescing, bank conflicts."""

from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from draw_model import DrawModel
from test_path_filter_kernel import on_emulator, ranker, small_network, space, windows
from traces import SECTOR, Trace, trace

from pfnas_fast.ops import BudgetRanker, SearchSpace

NUM_PATHS, TOP_K, SEED = 300, 4, 0  # two blocks


class Case(NamedTuple):
    """A space and a ranker."""

    preset: str
    ranker: str


class Pinned(NamedTuple):
    """As counted.

    Attributes:
        draw_loads: Sectors per request of the draws: every lane walks tables of its own.
        score_loads: Sectors per request of the scores: 16 where 32 lanes load four columns each; small where
            half a warp loads the same.
        stores: Sectors per request, to the lists of the best.
        conflicts: Wavefronts of shared memory over the least possible.
    """

    draw_loads: float
    score_loads: float
    stores: float
    conflicts: float


PINNED = {
    Case("tiny", "plain"): Pinned(7.52, 11.24, 1.13, 1.0),
    Case("tiny", "full"): Pinned(7.52, 8.94, 1.13, 1.0),
    Case("tiny", "wide"): Pinned(7.52, 16.0, 1.13, 1.0),
    Case("ofa_mbv3_w1.0", "small"): Pinned(8.83, 14.06, 1.17, 1.0),
}
SLACK = 1.02
DRAW_TABLES = (
    "cumulative",
    "cumulative_down",
    "after_choice",
    "after_stop",
    "steps",
    "stop",
    "go_on",
    "table",
    "walks",
    "possible",
    "slot_sizes",
    "constant",
)


def problem(case: Case) -> tuple[SearchSpace, BudgetRanker]:
    search = space(case.preset)
    return search, small_network(search) if case.ranker == "small" else ranker(search, case.ranker)


def traced_run(module: ModuleType, case: Case) -> tuple[Trace, dict[str, Any]]:
    """What the tracer saw, and the fields of the call."""
    search, scorer = problem(case)
    seen: dict[str, Any] = {}
    launch = module.path_filter_cuda

    def watched(fields: dict[str, Any]) -> None:
        tensors = {name: t for name, t in fields.items() if isinstance(t, torch.Tensor)}
        buffers = {n: (t.data_ptr(), t.numel() * t.element_size()) for n, t in tensors.items()}
        seen["trace"] = trace(module, buffers, lambda: launch(fields))
        seen["fields"] = fields

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "path_filter_cuda", watched)
        on_emulator(module, search, scorer).run(NUM_PATHS, *windows(search)[1], seed=SEED, top_k=TOP_K)
    return seen["trace"], seen["fields"]


def sectors(tensor: torch.Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // SECTOR)


def rows_per_block(case: Case, fields: dict[str, Any]) -> list[set[int]]:
    """Rows of the first layer's table that the paths of each block look up, from the engine's draws."""
    search, _ = problem(case)
    codes = search.draw(NUM_PATHS, *windows(search)[1], seed=SEED)[0].astype(np.int64)
    first, slot, second, stride = fields["lookups"].long().numpy().T
    rows = first + codes[:, slot] + stride * codes[:, second]  # [paths, lookups]
    size = fields["paths_per_block"]
    return [set(np.unique(rows[i : i + size]).tolist()) for i in range(0, NUM_PATHS, size)]


def draw_sectors_per_block(case: Case, fields: dict[str, Any]) -> dict[str, list[set[int]]]:
    """Sectors of each table of the draws that the paths of each block must read, by the model of a draw."""
    search, _ = problem(case)
    expected = search.draw(NUM_PATHS, *windows(search)[1], seed=SEED)[0].tolist()
    model, size = DrawModel(fields), fields["paths_per_block"]
    found = {name: [set[int]() for _ in range(0, NUM_PATHS, size)] for name in DRAW_TABLES}
    for path in range(NUM_PATHS):
        codes, reads = model.draw(path)
        assert codes == expected[path]
        for name, numbers in reads.items():
            item = fields[name].element_size()
            found[name][path // size].update(number * item // SECTOR for number in numbers)
    return found


@pytest.mark.parametrize("case", PINNED, ids=lambda c: f"{c.preset}-{c.ranker}")
def test_traffic(case: Case, traced: ModuleType) -> None:
    found, fields = traced_run(traced, case)
    assert found.clean, (found.races, found.out_of_bounds)
    use, pinned = found.buffers, PINNED[case]
    blocks = rows_per_block(case, fields)

    # Nothing per path is written: the lists of the best, and counts.
    written = {name for name, buffer in use.items() if buffer.write_footprint}
    assert written == {"codes", "scores", "costs", "counts"}
    for name in written:
        assert use[name].write_footprint <= 1.15 * sectors(fields[name]) + 1
        assert use[name].block_writes <= 1.1 * sectors(fields[name]) + len(blocks)

    # The first layer: rows that a block's paths have, once. Dense layers: once per block.
    table = fields["score_table"]  # [panels, rows, columns of a panel]
    row_sectors = table.shape[0] * table.shape[2] * table.element_size() // SECTOR
    predicted = row_sectors * sum(map(len, blocks))
    assert 0.9 * predicted <= use["score_table"].block_reads <= 1.1 * predicted
    assert use["score_table"].read_footprint <= 1.15 * row_sectors * len(set.union(*blocks))
    for name in fields:
        if name.startswith(("dense_", "bias_", "head", "offset", "budget", "kernel_head")):
            assert use[name].read_footprint <= 1.15 * sectors(fields[name]), name
            assert use[name].block_reads <= 1.1 * len(blocks) * sectors(fields[name]), name

    # The draws' tables: what a draw reads by its definition; steps come four at a time.
    for name, per_block in draw_sectors_per_block(case, fields).items():
        assert use[name].read_footprint <= 1.15 * len(set.union(*per_block)), name
        least = sum(map(len, per_block))
        assert 0.9 * least <= use[name].block_reads <= 1.1 * least, name

    draw_loads = found.units_per_request("global", "load", "cuda_draw.cuh")
    score_loads = found.units_per_request("global", "load", "cuda_score.cuh")
    stores = found.units_per_request("global", "store")
    counted = Pinned(draw_loads, score_loads, stores, found.conflicts())
    assert all(a <= b * SLACK for a, b in zip(counted, pinned, strict=True)), counted

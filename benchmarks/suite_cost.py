# SPDX-License-Identifier: Apache-2.0
"""Additive cost of a population against torch's gather and sum: 20 blocks of 9 choices (or none), 2^16 paths.

Ours: codes unchecked, 32-bit sums, float32 out, from the engine's own populations (uint8, a structure of
arrays). Theirs: the fastest of torch's ways to gather and sum; which one ran is printed on stderr.
population: torch from populations as torch code keeps them, one row of int64 indices per path, [n, 20], made
    beforehand: nothing is converted while the clock runs.
same_layout: both from the same uint8 structure of arrays; torch converts it to indices, then gathers along
    contiguous slots. The stricter baseline, for who would re-lay populations for torch's sake.
ready: as `same_layout`, but torch gets its int64 indices [20, n] made beforehand: it reads no population.
mixed: four resolutions at random; torch as in `ready`, on a table of 40 columns.
rows: both from the uint8 array [n, 21]; ours checks every code.
"""

import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from harness import Comparison
from torch import Tensor

from pfnas_fast.ops import CostTable, path_cost

__all__ = ["comparisons"]

NUM_PATHS, NUM_BLOCKS, NUM_CODES = 1 << 16, 20, 10


def population(name: str) -> Comparison:
    """One row of the suite."""
    num_resolutions = 4 if name == "mixed" else 1
    g = torch.Generator().manual_seed(0)
    table = torch.randint(1, 3000, (num_resolutions, NUM_BLOCKS, NUM_CODES), generator=g).double() * 1e3
    table[..., 0] = 0.0
    constant = torch.full((num_resolutions,), 5e6, dtype=torch.float64)
    codes = torch.randint(0, NUM_CODES, (NUM_BLOCKS + 1, NUM_PATHS), generator=g)
    codes[-1] = torch.randint(1, num_resolutions + 1, (NUM_PATHS,), generator=g)
    packed = CostTable(table.numpy(), constant.numpy(), 1e6)
    # Padded: slots a power of two apart would share their cache sets.
    arrays = torch.empty(NUM_BLOCKS + 1, NUM_PATHS + 192, dtype=torch.uint8)[:, :NUM_PATHS].copy_(codes)
    rows = arrays.t().contiguous()  # [n, slots]
    ours_codes = rows if name == "rows" else arrays.t()
    flat = (table / 1e6).float().transpose(0, 1).reshape(NUM_BLOCKS, -1).contiguous()
    ready = (codes[:-1] + NUM_CODES * (codes[-1] - 1)).contiguous()  # int64 [B, n]

    def ours() -> Tensor:
        return path_cost(ours_codes, packed, dtype=torch.float32, trusted=name != "rows")

    if name == "population":
        theirs = _fastest(_row_candidates(flat, ready.t().contiguous()))
        return Comparison("cost/population", ours, theirs, lambda: _assert_same(ours(), theirs()))

    def theirs() -> Tensor:
        if name == "rows":
            return flat.t().gather(0, rows[:, :-1].long()).sum(1) + 5.0
        if name == "same_layout":
            return flat.gather(1, arrays[:-1].long()).sum(0) + 5.0
        return flat.gather(1, ready).sum(0) + 5.0

    return Comparison(f"cost/{name}", ours, theirs, lambda: _assert_same(ours(), theirs()))


def _assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert float((ours - theirs).abs().max()) < 1e-4, "the two sides differ"


def _row_candidates(flat: Tensor, index: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Ways to sum a table [B, codes] at indices [n, B]."""
    columns, slots = flat.t().contiguous(), torch.arange(NUM_BLOCKS)
    weights, bags = flat.reshape(-1, 1), index + slots * NUM_CODES
    return {
        "gather": lambda: columns.gather(0, index).sum(1) + 5.0,
        "advanced indexing": lambda: flat[slots, index].sum(1) + 5.0,
        "embedding_bag": lambda: F.embedding_bag(bags, weights, mode="sum").squeeze(1) + 5.0,
        "take": lambda: flat.take(bags).sum(1) + 5.0,
    }


def _fastest(candidates: dict[str, Callable[[], Tensor]]) -> Callable[[], Tensor]:
    times = {}
    for name, call in candidates.items():
        call()
        times[name] = min(_seconds(call) for _ in range(5))
    best = min(times, key=lambda name: times[name])
    print(f"cost/population: best of torch is {best}", file=sys.stderr)
    return candidates[best]


def _seconds(call: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def comparisons() -> Iterator[tuple[str, Callable[[], Comparison]]]:
    """Every row's name with the function that prepares it."""
    for name in ("population", "same_layout", "ready", "mixed", "rows"):
        yield f"cost/{name}", partial(population, name)

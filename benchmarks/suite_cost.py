# SPDX-License-Identifier: Apache-2.0
"""Additive cost of a population against torch's gather and sum: 20 blocks of 9 choices (or none), 2^16 paths.

Ours: codes unchecked, 32-bit sums, float32 out. Theirs: the faster of torch's ways to gather and sum.
population: both from the same uint8 structure of arrays.
ready: as `population`, but torch gets its codes as int64 indices, made beforehand: it reads no population.
mixed: four resolutions at random; torch as in `ready`, on a table of 40 columns.
rows: both from the array [n, 21]; ours checks every code.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
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
    arrays = codes.to(torch.uint8)  # [slots, n]
    rows = arrays.t().contiguous()  # [n, slots]
    ours_codes = rows if name == "rows" else arrays.t()
    flat = (table / 1e6).float().transpose(0, 1).reshape(NUM_BLOCKS, -1).contiguous()
    ready = (codes[:-1] + NUM_CODES * (codes[-1] - 1)).contiguous()  # int64 [B, n]

    def ours() -> Tensor:
        return path_cost(ours_codes, packed, dtype=torch.float32, trusted=name != "rows")

    def theirs() -> Tensor:
        if name == "rows":
            return flat.t().gather(0, rows[:, :-1].long()).sum(1) + 5.0
        if name == "population":
            return flat.gather(1, arrays[:-1].long()).sum(0) + 5.0
        return flat.gather(1, ready).sum(0) + 5.0

    def check() -> None:
        assert float((ours() - theirs()).abs().max()) < 1e-4, "the two sides differ"

    return Comparison(f"cost/{name}", ours, theirs, check)


def comparisons() -> Iterator[tuple[str, Callable[[], Comparison]]]:
    """Every row's name with the function that prepares it."""
    for name in ("population", "ready", "mixed", "rows"):
        yield f"cost/{name}", partial(population, name)

# SPDX-License-Identifier: Apache-2.0
"""One draw of the path filter in plain Python: its codes, and the numbers that it must read.

Written from the definition of a draw (a bucket of the window by its cumulative sums; then block by block a
code by the weights of what is left to spend; again where the exact cost misses the window), it predicts
traffic and knows nothing of threads, vectors or caches.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

import numpy as np
import torch

PURPOSE = 0xD2A7  # the fourth word of a counter: words for draws
WORD = (1 << 32) - 1

Reads = dict[str, set[int]]  # table -> flat indices of its numbers


def philox_words(seed: int, index: int, purpose: int) -> Iterator[int]:
    """The 32-bit words of one stream (Philox4x32-10, Salmon et al., SC 2011)."""
    for block in count():
        c = [index & WORD, index >> 32, block, purpose]
        keys = [seed & WORD, seed >> 32]
        for _ in range(10):
            a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(b >> 32) ^ c[1] ^ keys[0], b & WORD, (a >> 32) ^ c[3] ^ keys[1], a & WORD]
            keys = [(keys[0] + 0x9E3779B9) & WORD, (keys[1] + 0xBB67AE85) & WORD]
        yield from c


def uniforms(words: Iterator[int]) -> Iterator[float]:
    """Doubles in [0, 1), two words each."""
    while True:
        high = next(words)
        yield ((high << 21) ^ (next(words) >> 11)) * 2.0**-53


def between(low: float, high: float, u: float) -> float:
    """low + u (high - low), below `high` where that is possible."""
    return min(low + u * (high - low), float(np.nextafter(high, -np.inf)) if high > low else high)


class DrawModel:
    """Draws with the tables of one call of ``path_filter_cuda``.

    Args:
        fields: Tensors and settings of the call, by name.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._numbers = {n: f for n, f in fields.items() if not isinstance(f, torch.Tensor)}
        self._tables = {n: f.flatten().tolist() for n, f in fields.items() if isinstance(f, torch.Tensor)}
        self._step_row: int = fields["steps"].shape[-1]
        self._reads: Reads = defaultdict(set)

    def draw(self, index: int) -> tuple[list[int], Reads]:
        """Path `index` of the call: its codes, and what was read for it."""
        n, self._reads = self._numbers, defaultdict(set)
        words = philox_words(n["seed"], n["first_index"] + index, PURPOSE)
        chance = uniforms(words)
        chosen = (next(words) * n["num_possible"]) >> 32
        resolution, first, end, upper = (int(self._read("possible", 4 * chosen + i)) for i in range(4))
        walk = [int(self._read("walks", 6 * resolution + i)) for i in range(6)]
        while True:
            bucket = self._bucket(walk[3], first, end, bool(upper), next(chance))
            codes, cost = self._walk(resolution, walk, bucket, chance)
            if n["low"] <= cost <= n["high"]:
                return [*codes, 1 + resolution], self._reads

    def _read(self, table: str, at: int) -> float:
        self._reads[table].add(at)
        return self._tables[table][at]

    def _bucket(self, begin: int, first: int, end: int, upper: bool, u: float) -> int:
        """By bisection of the cumulative sums, which fall where they are taken from above."""
        name = "cumulative_down" if upper else "cumulative"
        ends = [self._read(name, begin + i) for i in (first, end)]
        at = between(min(ends), max(ends), u)

        def passed(i: int) -> bool:
            value = self._read(name, begin + i)
            return value <= at if upper else value > at

        found = bisect_left(range(end + 1), True, lo=first, key=passed)
        return min(max(found - 1, first), end - 1)

    def _walk(
        self, resolution: int, walk: list[int], left: int, chance: Iterator[float]
    ) -> tuple[list[int], float]:
        blocks, num_codes = self._numbers["num_slots"] - 1, self._numbers["num_codes"]
        cost, is_open, codes = self._read("constant", resolution), False, []
        for block in range(blocks):
            row = resolution * blocks + block
            is_open = is_open or bool(self._numbers["first_blocks"] >> block & 1)
            code = 0
            if is_open:
                code, step = self._choose(walk, block, row, left, next(chance))
                left += step
                is_open = code != 0
            codes.append(code)
            cost += self._read("table", row * num_codes + code)
        return codes, cost / self._numbers["unit"]

    def _choose(self, walk: list[int], block: int, row: int, left: int, u: float) -> tuple[int, int]:
        """A code, 0 = stop here, and what it adds to the buckets left (0 at most)."""
        num_buckets, pad, choice_length, _, after_choice, after_stop = walk
        size = int(self._read("slot_sizes", block))
        scale, stop = self._read("go_on", row), self._read("stop", row)
        sums = [stop * self._read("after_stop", after_stop + block * num_buckets + left)]
        steps = [int(self._read("steps", row * self._step_row + i)) for i in range(size)]
        begin = after_choice + block * choice_length + pad + left
        for step in steps:
            sums.append(sums[-1] + scale * self._read("after_choice", begin + step))
        at = between(0.0, sums[-1], u)
        code = sum(below <= at for below in sums[:-1])
        return code, steps[code - 1] if code else 0

# SPDX-License-Identifier: Apache-2.0
"""Least times of the CUDA kernels from what the harness counts: ``python tests/cuda_emulator/roofline.py``.

Prints the tables of docs/gpu.md; ``depthwise``, ``pointwise`` or ``path_filter`` as an argument: one of them.

Bytes are exact (every tensor once per pass). Arithmetic and instructions are counted by running the PTX of
sm_80, whole batch. A kernel cannot be faster than its bytes at the card's memory rate, its arithmetic at the
peak of the units that do it, or its instructions at four warp instructions per clock and multiprocessor. PTX
stands in for machine instructions here. No time in these tables was measured on a GPU.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).parent))
import test_depthwise as depthwise
import test_path_filter_kernel as path_filter
import test_pointwise as pointwise
import test_pointwise_gradients as pointwise_gradients
from cuda_compiler import translated_object
from emulated_ops import emulated_ops
from emulator_build import CSRC, PLAIN, build_module, load_module

BATCH, ITEM = 128, 2  # images; bytes of a bfloat16


@dataclass(frozen=True)
class Card:
    """Data-sheet rates per second; products with their sums count once.

    Attributes:
        name: Of the card.
        num_bytes: Memory.
        float32: On the ordinary units.
        float64: The same.
        tensor_core: bfloat16 in, float32 sums.
        instructions: Of threads: 128 per clock and multiprocessor.
    """

    name: str
    num_bytes: float
    float32: float
    float64: float
    tensor_core: float
    instructions: float


CARDS = (
    Card("A100 80 GB", 2.04e12, 9.75e12, 4.85e12, 156e12, 19.5e12),
    Card("H100 SXM", 3.35e12, 33.45e12, 16.7e12, 494.5e12, 33.45e12),
    Card("RTX 4090", 1.01e12, 41.3e12, 0.645e12, 82.5e12, 41.3e12),
)


class Work(NamedTuple):
    """What one call does, by PTX opcode and thread."""

    opcodes: Counter[str]

    @property
    def instructions(self) -> int:
        return self.opcodes.total()

    @property
    def float32(self) -> int:
        return self.opcodes["fma.rn.f32"]

    @property
    def float64(self) -> int:
        """Additions, products, comparisons and divisions, a division as one."""
        return sum(n for opcode, n in self.opcodes.items() if opcode.endswith(".f64") and _computes(opcode))

    @property
    def tensor_core(self) -> int:
        """Products of mma.sync m16n8k16, 2048 per warp."""
        return 64 * sum(n for opcode, n in self.opcodes.items() if opcode.startswith("mma.sync"))


def _computes(opcode: str) -> bool:
    return opcode.split(".")[0] in ("add", "sub", "mul", "fma", "div", "setp", "min", "max")


def count(module: ModuleType, call: Callable[..., object], *arguments: object, **options: object) -> Work:
    """Run a call on translated PTX."""
    module.instruction_counts()  # empties the counters
    with emulated_ops(module):
        call(*arguments, **options)
    return Work(Counter(module.instruction_counts()))


def translated(op: str, pattern: str, *, lines: bool = False) -> ModuleType:
    """A module whose kernels of one op come from PTX of sm_80; `lines`: counted by line of the source."""
    source = CSRC / "kernels" / op / f"{op}_cuda.cu"
    ptx = translated_object(source, 80, pattern, lines=lines)
    return load_module(build_module(PLAIN, extra_objects=[ptx], name=f"_roofline_{op}"))


def row(label: str, moved: float, eager: float, work: Work) -> str:
    """Bytes, arithmetic and instructions in microseconds per card."""
    times = [
        f"{moved / card.num_bytes * 1e6:.0f}, "
        f"{(work.float32 / card.float32 + work.tensor_core / card.tensor_core) * 1e6:.0f}, "
        f"{work.instructions / card.instructions * 1e6:.0f}"
        for card in CARDS
    ]
    return f"| {label} | {moved / 1e6:.0f} | {eager / 1e6:.0f} | {' | '.join(times)} |"


def head(columns: str) -> list[str]:
    names = " | ".join(card.name for card in CARDS)
    return [f"| {columns} | {names} |", "|---" * (columns.count("|") + 1 + len(CARDS)) + "|"]


DEPTHWISE = (
    ("forward", 3, 56, 96),
    ("forward", 5, 56, 96),
    ("forward", 7, 56, 96),
    ("gradients", 3, 56, 96),
    ("gradients", 7, 56, 96),
    ("forward", 5, 28, 240),
    ("forward", 7, 14, 672),
    ("gradients", 7, 14, 672),
)


def depthwise_rows() -> Iterator[str]:
    """Forward moves x and y; gradients read grad_y twice and x, and write grad_x. So does eager torch."""
    yield from head("op | MB | eager MB")
    module = translated("dynamic_depthwise_conv", r"__nv_bfloat16|fold_splits")
    ops = torch.ops.pfnas_fast
    for what, kernel_size, size, channels in DEPTHWISE:
        call = depthwise.Call(BATCH, channels, size, size, kernel_size, 1, dtype=torch.bfloat16)
        x, *filters, grad_y = depthwise.inputs(call)
        if what == "forward":
            work = count(module, ops.dynamic_depthwise_conv, x, *filters, kernel_size, 1)
        else:
            backward = ops.dynamic_depthwise_conv_backward
            work = count(module, backward, grad_y, x, *filters, kernel_size, 1, True, True)
        moved = x.numel() * ITEM * (2 if what == "forward" else 4)
        yield row(f"{what} k{kernel_size} {size}x{size}x{channels}", moved, moved, work)


POINTWISE = (
    ("forward, BN, activation", 24, 96, 56),
    ("forward, BN, activation", 112, 672, 14),
    ("forward, BN", 672, 112, 14),
    ("both gradients", 24, 96, 56),
    ("both gradients", 112, 672, 14),
)


def pointwise_rows() -> Iterator[str]:
    """With normalisation and activation fused y moves once; in eager torch each reads and writes it again."""
    yield from head("op | MB | eager MB")
    module = translated("dynamic_pointwise_conv", "")
    for what, inputs, outputs, size in POINTWISE:
        pixels = BATCH * size * size
        x_bytes, y_bytes = pixels * inputs * ITEM, pixels * outputs * ITEM
        if what == "both gradients":
            call = pointwise_gradients.Call(BATCH, inputs, size, size, outputs, dtype=torch.bfloat16)
            operands = pointwise_gradients.inputs(call)
            work = count(module, pointwise_gradients.run, operands)
            moved = eager = 2 * x_bytes + 2 * y_bytes  # grad_y twice, x, grad_x
        else:
            activation = 2 if "activation" in what else 0
            call = pointwise.Call(
                BATCH, inputs, size, size, outputs, dtype=torch.bfloat16, activation=activation
            )
            arguments = {**pointwise.inputs(call), "residual": None}
            work = count(module, pointwise.run, arguments, call)
            moved = x_bytes + y_bytes
            eager = moved + 2 * y_bytes * (2 if activation else 1)
        yield row(f"{what} {inputs}-{outputs} {size}x{size}", moved, eager, work)


@contextmanager
def one_block() -> Iterator[None]:
    """All paths of a call in one block: as in large calls, few of them enter its list of the best."""
    with patch.object(import_module("pfnas_fast.ops.path_filter"), "_WANTED_BLOCKS", 1):
        yield


def path_filter_rows() -> Iterator[str]:
    """G paths/s by float64, float32 and instructions; last, what eager torch's bytes allow, scores alone.

    Ours reads nothing but tables, which stay in caches.
    """
    yield from head("ranker | float64, float32 and all instructions per path | eager bytes per path")
    module = translated("path_filter", "")
    search = path_filter.space("ofa_mbv3_w1.0")
    num_paths, slots, widths = 4096, search.space.num_slots, (128, 64)
    scorer = path_filter.small_network(search, widths)
    low, high = path_filter.windows(search)[1]
    ours = path_filter.on_emulator(module, search, scorer)
    with one_block():
        work = count(module, ours.run, num_paths, low, high, seed=0, top_k=32)
    # int64 indices; the first layer's sums written by embedding_bag, then read and written with the offset,
    # the budget and relu, and read; the second layer written, read and written with relu, read; the score.
    eager = slots * 8 + 4 * (widths[0] * 8 + widths[1] * 4 + 1)
    giga = num_paths / 1e9
    limits = " | ".join(
        f"{card.float64 * giga / work.float64:.2f}, {card.float32 * giga / work.float32:.2f},"
        f" {card.instructions * giga / work.instructions:.2f}; {card.num_bytes / eager / 1e9:.2f}"
        for card in CARDS
    )
    counts = ", ".join(f"{n / num_paths:.0f}" for n in (work.float64, work.float32, work.instructions))
    yield f"| {slots} slots, 128-64-1 | {counts} | {eager} | {limits} |"


TABLES: dict[str, Callable[[], Iterator[str]]] = {
    "depthwise": depthwise_rows,
    "pointwise": pointwise_rows,
    "path_filter": path_filter_rows,
}


def main() -> None:
    """Print Markdown tables."""
    for name in sys.argv[1:] or TABLES:
        print(f"\n{name}\n")
        for line in TABLES[name]():
            print(line, flush=True)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Least times of the CUDA kernels from what the harness counts: ``python tests/cuda_emulator/roofline.py``.

Bytes are exact (every tensor once). Instructions are counted by running the PTX of sm_80 on one image. A
kernel cannot be faster than its bytes at the card's memory rate, nor than its instructions at four warp
instructions per clock and multiprocessor, which is the rate behind the card's peak of float32
multiply-adds. No time in this table was measured on a GPU.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent))
from cuda_compiler import translated_object
from emulated_ops import emulated_ops
from emulator_build import CSRC, PLAIN, build_module, load_module
from test_depthwise import Call, inputs

SOURCE = CSRC / "kernels" / "dynamic_depthwise_conv" / "dynamic_depthwise_conv_cuda.cu"
BATCH = 128


@dataclass(frozen=True)
class Card:
    """Data-sheet rates.

    Attributes:
        name: Of the card.
        bytes_per_s: Memory.
        fmas_per_s: float32 multiply-adds on the ordinary units; also thread instructions.
    """

    name: str
    bytes_per_s: float
    fmas_per_s: float


CARDS = (
    Card("A100 80 GB", 2.04e12, 19.5e12 / 2),
    Card("H100 SXM", 3.35e12, 66.9e12 / 2),
    Card("RTX 4090", 1.01e12, 82.6e12 / 2),
)


class Map(NamedTuple):
    """Channels and size of a square map."""

    channels: int
    size: int


MAPS = (Map(96, 56), Map(240, 28), Map(672, 14))


def instructions(module: ModuleType, call: Call, backward: bool) -> Counter[str]:
    """Thread instructions of one call, by PTX opcode."""
    x, *filters, grad_y = inputs(call)
    module.instruction_counts()
    with emulated_ops(module):
        if backward:
            torch.ops.pfnas_fast.dynamic_depthwise_conv_backward(
                grad_y, x, *filters, call.kernel_size, call.stride, True, True
            )
        else:
            torch.ops.pfnas_fast.dynamic_depthwise_conv(x, *filters, call.kernel_size, call.stride)
    return Counter(module.instruction_counts())


def main() -> None:
    """Print a Markdown table."""
    ptx = translated_object(SOURCE, 80, r"__nv_bfloat16|fold_splits")
    module = load_module(build_module(PLAIN, extra_objects=[ptx], name="_roofline"))
    names = " | ".join(f"{card.name} (bytes, issue) us" for card in CARDS)
    print(f"| op, bf16, N = {BATCH} | MB | fma share | {names} |")
    print("|---|---|---|" + "---|" * len(CARDS))
    for channels, size in MAPS:
        for kernel_size in (3, 5, 7):
            for backward in (False, True):
                call = Call(1, channels, size, size, kernel_size, 1, dtype=torch.bfloat16)
                counts = instructions(module, call, backward)
                total = sum(counts.values()) * BATCH
                share = counts["fma.rn.f32"] / sum(counts.values())
                tensor = BATCH * channels * size * size * 2
                moved = tensor * (4 if backward else 2)  # grad_y twice, x, grad_x; or x, y
                times = " | ".join(
                    f"{moved / card.bytes_per_s * 1e6:.0f}, {total / card.fmas_per_s * 1e6:.0f}"
                    for card in CARDS
                )
                what = "gradients" if backward else "forward"
                label = f"{what} k{kernel_size} {size}x{size}x{channels}"
                print(f"| {label} | {moved / 1e6:.0f} | {share:.0%} | {times} |", flush=True)


if __name__ == "__main__":
    main()

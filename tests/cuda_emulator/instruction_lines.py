# SPDX-License-Identifier: Apache-2.0
"""Which lines of the kernels cost the instructions: ``python tests/cuda_emulator/instruction_lines.py``.

Runs the usual ranker's path filter, or what else is named on the command line, on PTX of sm_80 that knows its
source lines, and prints executed instructions per unit of work: by file and line, most first, and by opcode.
"""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import roofline
import test_depthwise as depthwise
import test_path_filter_kernel as path_filter
import test_pointwise as pointwise

MOST = 45  # lines printed


def filter_paths() -> tuple[Counter[str], float]:
    """Per path."""
    module = roofline.translated("path_filter", "", lines=True)
    search = path_filter.space("ofa_mbv3_w1.0")
    ours = path_filter.on_emulator(module, search, path_filter.small_network(search))
    num_paths = 2048
    low, high = path_filter.windows(search)[1]
    with roofline.one_block():
        work = roofline.count(module, ours.run, num_paths, low, high, seed=0, top_k=32)
    return work.opcodes, num_paths


def depthwise_gradients(kernel_size: int = 7) -> tuple[Counter[str], float]:
    """Per product of both gradients, 56x56x96."""
    module = roofline.translated("dynamic_depthwise_conv", r"__nv_bfloat16|fold_splits", lines=True)
    call = depthwise.Call(8, 96, 56, 56, kernel_size, 1, dtype=torch.bfloat16)
    x, *filters, grad_y = depthwise.inputs(call)
    backward = torch.ops.pfnas_fast.dynamic_depthwise_conv_backward
    work = roofline.count(module, backward, grad_y, x, *filters, kernel_size, 1, True, True)
    return work.opcodes, 2.0 * x.numel() * kernel_size**2


def pointwise_forward() -> tuple[Counter[str], float]:
    """Per output, 24-96, 56x56, normalisation and activation fused."""
    module = roofline.translated("dynamic_pointwise_conv", "", lines=True)
    call = pointwise.Call(8, 24, 56, 56, 96, dtype=torch.bfloat16, activation=2)
    arguments = {**pointwise.inputs(call), "residual": None}
    work = roofline.count(module, pointwise.run, arguments, call)
    return work.opcodes, 8.0 * 56 * 56 * 96


CALLS: dict[str, Callable[[], tuple[Counter[str], float]]] = {
    "path_filter": filter_paths,
    "depthwise_gradients": depthwise_gradients,
    "pointwise": pointwise_forward,
}


def main() -> None:
    """Print, per call, instructions by file, line and opcode."""
    for name in sys.argv[1:] or ["path_filter"]:
        counts, units = CALLS[name]()
        files: Counter[str] = Counter()
        lines: Counter[str] = Counter()
        mixes: dict[str, Counter[str]] = {}
        for key, times in counts.items():
            place, _, opcode = key.rpartition(" ")
            files[place.rpartition(":")[0]] += times
            lines[place] += times
            mixes.setdefault(place, Counter())[opcode] += times
        print(f"{name}: {counts.total() / units:.2f} instructions per unit")
        for file, times in files.most_common():
            print(f"  {times / units:10.2f} {file}")
        for place, times in lines.most_common(MOST):
            mix = ", ".join(f"{n / units:.2f} {opcode}" for opcode, n in mixes[place].most_common(6))
            print(f"  {times / units:10.2f} {place}: {mix}")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Memory traffic of dynamic_depthwise_conv's CUDA kernels: races, bytes, coalescing, bank conflicts."""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from emulated_ops import emulated_ops
from test_depthwise import Call, inputs
from torch import Tensor
from traces import SECTOR, Trace, sectors_of, tiles, trace

CALLS = [
    Call(1, 24, 28, 28, 5, 1, dtype=torch.bfloat16),
    Call(1, 40, 20, 20, 3, 1, dtype=torch.bfloat16),
    Call(1, 72, 20, 20, 5, 2, dtype=torch.bfloat16),
    Call(2, 96, 14, 14, 7, 1, dtype=torch.float32),
    Call(1, 120, 10, 10, 7, 2, dtype=torch.float16),
    Call(1, 17, 9, 11, 3, 2, dtype=torch.float32),
]
# Sectors per request of the convolution's loads and stores, as counted. A warp is 32 channel pairs of
# neighbouring strips, four pixels apart: 2 x 32 x the storage's bytes / 32 were the pixels whole sectors, and
# more where a pixel begins inside one (48 bytes at C = 24: 2 sectors for 1.5).
PINNED = {
    "1x24x28x28k5s1": (5.08, 5.47),
    "1x40x20x20k3s1": (4.47, 4.76),
    "1x72x20x20k5s2": (4.14, 4.04),
    "2x96x14x14k7s1": (7.33, 7.13),
    "1x120x10x10k7s2": (5.26, 4.32),
    "1x17x9x11k3s2": (3.84, 4.33),
}
SLACK = 1.02  # of the pinned numbers: compilers differ in how they share out the loads of the taps


def name_of(call: Call) -> str:
    return f"{call.n}x{call.c}x{call.h}x{call.w}k{call.kernel_size}s{call.stride}"


@pytest.fixture
def watched(traced: ModuleType) -> Iterator[ModuleType]:
    with emulated_ops(traced):
        yield traced


def buffers(tensors: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
    return {name: (t.data_ptr(), t.numel() * t.element_size()) for name, t in tensors.items()}


def forward(module: ModuleType, call: Call) -> Trace:
    x, weight, matrix_5, matrix_3, grad_y = inputs(call)
    y = torch.empty_like(grad_y)
    count = module.dynamic_depthwise_conv_cuda_workspace(x.shape, call.kernel_size, 7, call.stride, False)
    workspace = torch.empty(count)
    named = {"x": x, "weight": weight, "m5": matrix_5, "m3": matrix_3, "y": y, "workspace": workspace}
    return trace(
        module,
        buffers(named),
        lambda: module.dynamic_depthwise_conv_cuda_forward(
            x, weight, matrix_5, matrix_3, call.kernel_size, call.stride, workspace, y
        ),
    )


def backward(module: ModuleType, call: Call) -> Trace:
    x, weight, matrix_5, matrix_3, grad_y = inputs(call)
    count = module.dynamic_depthwise_conv_cuda_workspace(x.shape, call.kernel_size, 7, call.stride, True)
    named = {
        "grad_y": grad_y,
        "x": x,
        "weight": weight,
        "m5": matrix_5,
        "m3": matrix_3,
        "workspace": torch.empty(count),
        "grad_x": torch.empty_like(x),
        "grad_weight": torch.zeros_like(weight),
        "grad_m5": torch.zeros_like(matrix_5),
        "grad_m3": torch.zeros_like(matrix_3),
    }
    order = ("workspace", "grad_x", "grad_weight", "grad_m5", "grad_m3")
    return trace(
        module,
        buffers(named),
        lambda: module.dynamic_depthwise_conv_cuda_backward(
            grad_y, x, weight, matrix_5, matrix_3, call.kernel_size, call.stride, *(named[n] for n in order)
        ),
    )


class Map(NamedTuple):
    """Height and width."""

    height: int
    width: int


Reach = Callable[[int, int], tuple[int, int]]  # first and last output position -> of the inputs they need


def convolve_block_reads(
    module: ModuleType, call: Call, source: Map, target: Map, step: int, reach: Reach
) -> int:
    """Sectors of the source in the receptive field of each block's part of the target, summed over blocks."""
    plan = module.dynamic_depthwise_conv_cuda_plan(call.n, call.c, target.height, target.width, step)
    strip_width = 4
    num_strips = call.n * plan["bands"] * plan["strips_per_row"]
    total = 0
    for strips in tiles(num_strips, plan["strips"]):
        pixels = set()
        for strip in strips:
            band, column = divmod(strip, plan["strips_per_row"])
            image, band = divmod(band, plan["bands"])
            end = min((band + 1) * plan["band_rows"], target.height)
            top, bottom = reach(band * plan["band_rows"], end - 1)
            left, right = reach(column * strip_width, (column + 1) * strip_width - 1)
            for row in range(max(0, top), min(source.height - 1, bottom) + 1):
                first = (image * source.height + row) * source.width
                pixels.update(range(first + max(0, left), first + min(source.width - 1, right) + 1))
        total += sum(
            sectors_of(pixels, channels, row=call.c, item=item_of(call))
            for channels in tiles(call.c, 2 * plan["pairs"])
        )
    return total


def forward_block_reads(module: ModuleType, call: Call) -> int:
    """Of x."""
    half, (x, y) = call.kernel_size // 2, maps(call)
    return convolve_block_reads(
        module, call, x, y, 1, lambda a, b: (a * call.stride - half, b * call.stride + half)
    )


def input_gradient_block_reads(module: ModuleType, call: Call) -> int:
    """Of grad_y: input position i has a part in the outputs o with |i - stride * o| <= kernel_size / 2."""
    half, (x, y) = call.kernel_size // 2, maps(call)
    return convolve_block_reads(
        module,
        call,
        y,
        x,
        call.stride,
        lambda a, b: (-(-(a - half) // call.stride), (b + half) // call.stride),
    )


def filter_gradient_block_reads(module: ModuleType, call: Call) -> tuple[int, int]:
    """Of x and grad_y: whole rows of grad_y, dealt to blocks, and the rows of x that their taps meet."""
    plan = module.dynamic_depthwise_conv_cuda_filter_plan(
        (call.n, call.c, call.h, call.w), call.kernel_size, call.stride
    )
    x, y = maps(call)
    half = call.kernel_size // 2
    total_x = total_y = 0
    for rows in tiles(call.n * y.height, plan["rows_per_split"]):
        in_rows = set()
        for row in rows:
            image, out_row = divmod(row, y.height)
            reached = range(out_row * call.stride - half, out_row * call.stride + half + 1)
            in_rows.update(image * x.height + r for r in reached if 0 <= r < x.height)
        for channels in tiles(call.c, 2 * plan["pairs"]):
            for count_of, some, width in (("x", in_rows, x.width), ("y", rows, y.width)):
                pixels = (row * width + column for row in some for column in range(width))
                count = sectors_of(pixels, channels, row=call.c, item=item_of(call))
                total_x, total_y = (
                    (total_x + count, total_y) if count_of == "x" else (total_x, total_y + count)
                )
    return total_x, total_y


def item_of(call: Call) -> int:
    return torch.empty(0, dtype=call.dtype).element_size()


def maps(call: Call) -> tuple[Map, Map]:
    """Of x and y."""
    return Map(call.h, call.w), Map(-(-call.h // call.stride), -(-call.w // call.stride))


def minimum(*tensor_sizes: int, item: int) -> float:
    return sum(size * item / SECTOR for size in tensor_sizes)


@pytest.mark.parametrize("call", CALLS, ids=name_of)
def test_forward_traffic(call: Call, watched: ModuleType) -> None:
    found = forward(watched, call)
    assert found.clean, (found.races, found.out_of_bounds)
    x, y = found.buffers["x"], found.buffers["y"]
    item = torch.empty(0, dtype=call.dtype).element_size()
    out = -(-call.h // call.stride) * -(-call.w // call.stride) * call.n * call.c
    least = minimum(call.n * call.c * call.h * call.w, out, item=item)
    assert x.read_footprint + y.write_footprint <= 1.15 * least + 2
    predicted = forward_block_reads(watched, call)
    assert predicted * 0.9 <= x.block_reads <= predicted * 1.1
    assert y.block_writes <= 1.1 * minimum(out, item=item) + 2 * 64
    assert found.conflicts() == 1
    loads, stores = PINNED[name_of(call)]
    assert found.units_per_request("global", "load", "cuda_convolve.cuh") <= loads * SLACK
    assert found.units_per_request("global", "store", "cuda_convolve.cuh") <= stores * SLACK


@pytest.mark.parametrize("call", CALLS, ids=name_of)
def test_backward_traffic(call: Call, watched: ModuleType) -> None:
    """Without a race (no atomics), in bounds, and every tensor from memory once per pass over it."""
    found = backward(watched, call)
    assert found.clean, (found.races, found.out_of_bounds)
    item = torch.empty(0, dtype=call.dtype).element_size()
    size = call.n * call.c * call.h * call.w
    out = -(-call.h // call.stride) * -(-call.w // call.stride) * call.n * call.c
    x, grad_y, grad_x = (found.buffers[name] for name in ("x", "grad_y", "grad_x"))
    assert x.read_footprint <= 1.15 * minimum(size, item=item) + 2
    assert grad_y.read_footprint <= 1.15 * minimum(out, item=item) + 2
    assert grad_x.write_footprint <= 1.15 * minimum(size, item=item) + 2
    predicted_x, predicted_grad_y = filter_gradient_block_reads(watched, call)
    predicted_grad_y += input_gradient_block_reads(watched, call)
    assert predicted_x * 0.9 <= x.block_reads <= predicted_x * 1.1
    assert predicted_grad_y * 0.9 <= grad_y.block_reads <= predicted_grad_y * 1.1
    assert grad_x.block_writes <= 1.1 * minimum(size, item=item) + 2 * 64
    assert found.conflicts() <= 1.01  # the fold of the filter gradient, where C / 2 is not a multiple of 16

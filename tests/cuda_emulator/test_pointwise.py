# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of dynamic_pointwise_conv, emulated: storage types, orders, ragged widths, traffic."""

import math
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from emulated_ops import emulated_ops
from emulator_build import CSRC, PLAIN, build_module, load_module
from torch import Tensor
from traces import SECTOR, sectors_of, tiles, trace

from pfnas_fast.ops import pack_pointwise_weight, reference

SOURCE = CSRC / "kernels" / "dynamic_pointwise_conv" / "dynamic_pointwise_conv_cuda.cu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = (None, "relu", "hswish")


class Call(NamedTuple):
    """One call of the op."""

    n: int
    c: int
    h: int
    w: int
    out: int
    spare_in: int = 0
    dtype: torch.dtype = torch.float32
    activation: int = 0


CALLS = [
    Call(1, 1, 1, 1, 1),
    Call(1, 3, 2, 7, 9, spare_in=5, activation=1),
    Call(2, 24, 9, 13, 72, spare_in=8, activation=2),
    Call(1, 40, 10, 14, 120),
    Call(1, 7, 3, 5, 97, activation=1),
    Call(3, 112, 7, 7, 33, activation=2),
    Call(1, 72, 5, 30, 200, spare_in=24),
]


def inputs(call: Call, seed: int = 0) -> dict[str, Any]:
    """x, panels, scale, shift, residual: all present, x and residual channels_last."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(call.out + 60, call.c + call.spare_in, 1, 1, generator=g) / call.c**0.5
    dense = {"memory_format": torch.channels_last}
    return {
        "x": torch.randn(call.n, call.c, call.h, call.w, generator=g).to(call.dtype).contiguous(**dense),
        "panels": pack_pointwise_weight(weight).to(call.dtype),
        "scale": torch.rand(call.out, generator=g) + 0.5,
        "shift": torch.randn(call.out, generator=g),
        "residual": torch.randn(call.n, call.out, call.h, call.w, generator=g)
        .to(call.dtype)
        .contiguous(**dense),
    }


def run(arguments: dict[str, Any], call: Call) -> Tensor:
    return torch.ops.pfnas_fast.dynamic_pointwise_conv(*arguments.values(), call.out, call.activation)


def assert_close(y: Tensor, arguments: dict[str, Any], call: Call) -> None:
    """float32 sums, rounded once to the storage type."""
    wide = {name: t.double() for name, t in arguments.items()}
    expected = reference.dynamic_pointwise_conv(
        **wide, out_channels=call.out, activation=ACTIVATIONS[call.activation]
    )
    assert y.dtype == call.dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    allowed = 4 * torch.finfo(torch.float32).eps * (1 + (call.c + 3) ** 0.5 / 4)
    bound = allowed * float(expected.abs().max()) + 2.0**-25
    if call.dtype != torch.float32:
        bound = bound + torch.finfo(call.dtype).eps / 2 * expected.abs()
    error = (y.double() - expected).abs()
    assert bool((error <= bound).all()), f"{call}: {float((error - bound).max()):.2e} too far"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("call", CALLS, ids=lambda c: "x".join(map(str, c[:6])))
def test_every_order(call: Call, dtype: torch.dtype, ordered: ModuleType, seed: int) -> None:
    call = call._replace(dtype=dtype)
    arguments = inputs(call, seed)
    assert_close(run(arguments, call), arguments, call)


@pytest.mark.parametrize("call", CALLS, ids=lambda c: "x".join(map(str, c[:6])))
def test_older_devices_compute_halves_without_tensor_cores(call: Call, emulated: ModuleType) -> None:
    emulated.set_compute_capability(75)
    call = call._replace(dtype=torch.float16)
    arguments = inputs(call)
    assert_close(run(arguments, call), arguments, call)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_every_width_is_a_prefix(dtype: torch.dtype, emulated: ModuleType) -> None:
    call = Call(1, 24, 5, 5, 144, dtype=dtype)
    arguments = {**inputs(call), "scale": None, "shift": None, "residual": None}
    full = run(arguments, call)
    for width in (1, 8, 47, 48, 96, 97, 143):
        assert torch.equal(run(arguments, call._replace(out=width)), full[:, :width])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_nan_stays_in_its_pixel(dtype: torch.dtype, emulated: ModuleType) -> None:
    call = Call(1, 40, 6, 6, 50, dtype=dtype, activation=1)
    arguments = inputs(call)
    arguments["x"][0, 39, 2, 3] = math.nan
    hit = torch.zeros(1, 50, 6, 6, dtype=torch.bool)
    hit[:, :, 2, 3] = True
    assert torch.equal(run(arguments, call).isnan(), hit)


def test_rows_that_begin_anywhere(emulated: ModuleType) -> None:
    """A view into a larger buffer need not begin at a 16-byte boundary; vector loads would fail there."""
    for dtype in DTYPES:
        call = Call(1, 24, 5, 7, 72, dtype=dtype)
        arguments = inputs(call)
        expected = run(arguments, call)
        for name in ("x", "residual", "scale", "shift"):
            tensor = arguments[name]
            moved = tensor.new_empty(tensor.numel() + 1)[1:].as_strided(tensor.shape, tensor.stride())
            assert torch.equal(run({**arguments, name: moved.copy_(tensor)}, call), expected), name


TRAFFIC = [
    Call(1, 24, 14, 20, 96, dtype=torch.bfloat16),
    Call(1, 112, 9, 15, 200, dtype=torch.bfloat16),
    Call(1, 40, 10, 20, 120, dtype=torch.float32),
]
# Share of the touched sectors that the requests of loads and stores use, at least; counted.
PINNED = {96: (1.0, 1.0), 200: (0.96, 0.86), 120: (0.78, 1.0)}


@pytest.mark.parametrize("call", TRAFFIC, ids=lambda c: "x".join(map(str, c[:5])))
def test_traffic(call: Call, traced: ModuleType) -> None:
    """No race, in bounds, free of bank conflicts; x once per tile of 96 outputs, y once."""
    arguments = inputs(call)
    y = torch.empty_like(arguments["residual"])
    named = {**arguments, "y": y}
    found = trace(
        traced,
        {name: (t.data_ptr(), t.numel() * t.element_size()) for name, t in named.items()},
        lambda: traced.dynamic_pointwise_conv_cuda_forward(*arguments.values(), call.activation, y),
    )
    assert found.clean, (found.races, found.out_of_bounds)
    assert found.conflicts() == 1
    item = y.element_size()
    pixels = call.n * call.h * call.w
    least = [math.ceil(pixels * channels * item / SECTOR) for channels in (call.c, call.out)]
    x, out, residual = (found.buffers[name] for name in ("x", "y", "residual"))
    assert x.read_footprint + out.write_footprint <= 1.15 * sum(least)
    # A block has 128 pixels and 96 outputs: it needs all inputs of its pixels, and 96 columns of panels.
    of_x = of_y = 0
    for some in tiles(pixels, 128):
        for outputs in tiles(call.out, 96):
            of_x += sectors_of(some, range(call.c), row=call.c, item=item)
            of_y += sectors_of(some, outputs, row=call.out, item=item)
    assert 0.9 * of_x <= x.block_reads <= 1.1 * of_x
    assert 0.9 * of_y <= out.block_writes <= 1.1 * of_y
    assert 0.9 * of_y <= residual.block_reads <= 1.1 * of_y
    panels = found.buffers["panels"]
    columns = math.ceil(call.out / 48) * 48
    assert panels.read_footprint <= 1.15 * columns * call.c * item / SECTOR
    assert panels.block_reads <= 1.1 * math.ceil(pixels / 128) * columns * call.c * item / SECTOR
    loads, stores = PINNED[call.out]
    assert found.useful_share("load") >= loads
    assert found.useful_share("store") >= stores


@pytest.mark.parametrize("architecture", [80, pytest.param(90, marks=pytest.mark.tier2)])
def test_translated_ptx(architecture: int, plain: ModuleType, nvcc: str) -> None:
    """What nvcc made of all kernels, cp.async, ldmatrix and mma.sync included: the same bits as the source.

    The emulated mma sums in one order; a GPU's own order and rounding are not proven.
    """
    from cuda_compiler import translated_object
    from test_pointwise_gradients import CALLS as GRADIENTS
    from test_pointwise_gradients import inputs as operands
    from test_pointwise_gradients import moments
    from test_pointwise_gradients import run as gradients

    ptx = translated_object(SOURCE, architecture)
    module = load_module(build_module(PLAIN, extra_objects=[ptx], name=f"_pointwise_sm{architecture}"))

    def same_bits(compute: Callable[[], tuple[Tensor, ...]], call: object) -> None:
        with emulated_ops(plain):
            expected = compute()
        with emulated_ops(module):
            actual = compute()
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)), call

    for dtype in DTYPES:
        for call in CALLS:
            call = call._replace(dtype=dtype)
            arguments = inputs(call, seed=3)
            same_bits(lambda a=arguments, c=call: (run(a, c),), call)
        for gradient in GRADIENTS:
            given = operands(gradient._replace(dtype=dtype), seed=3)
            same_bits(lambda o=given: gradients(o), gradient)
            same_bits(lambda o=given, n=gradient.out: moments(o, n), gradient)
    counts = module.instruction_counts()
    assert any(opcode.startswith("mma.sync") and count > 0 for opcode, count in counts.items())
    assert any(opcode.startswith("ldmatrix") and count > 0 for opcode, count in counts.items())

    call = TRAFFIC[0]  # bfloat16: four outputs leave in one store, which the compiler had split
    same_bits(lambda: (run(inputs(call), call),), call)
    counts = module.instruction_counts()
    stores = {opcode: n for opcode, n in counts.items() if opcode.startswith("st.global") and n > 0}
    assert sum(stores.values()) == call.n * call.h * call.w * call.out // 4, stores
    ran = set(module.translated_kernels())
    assert {"Lb0", "Lb1"} <= {match[0] for name in ran for match in re.finditer("Lb[01]", name)}
    for kernel in ("panel_gradient_simt", "panel_gradient_tensor_core", "fold_panels", "fold_moments"):
        assert any(kernel in name for name in ran), kernel

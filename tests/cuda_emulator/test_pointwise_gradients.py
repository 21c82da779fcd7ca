# SPDX-License-Identifier: Apache-2.0
"""Gradients and moments of dynamic_pointwise_conv's CUDA kernels, emulated."""

import itertools
import math
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from emulated_ops import ORDERS, SEEDS, emulated_ops
from torch import Tensor
from traces import SECTOR, Trace, sectors_of, tiles, trace

from pfnas_fast.ops import pack_pointwise_weight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
names = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


class Call(NamedTuple):
    """One call of the op."""

    n: int
    c: int
    h: int
    w: int
    out: int
    spare_in: int = 0
    dtype: torch.dtype = torch.float32


CALLS = [
    Call(1, 1, 1, 1, 1),
    Call(1, 3, 2, 7, 9, spare_in=5),
    Call(2, 24, 9, 13, 72, spare_in=8),
    Call(1, 40, 10, 14, 120),
    Call(1, 7, 3, 5, 97),
    Call(3, 112, 7, 7, 33),
    Call(3, 65, 15, 30, 104, spare_in=24),  # 1350 pixels: three splits of the panels' gradient
]


class Operands(NamedTuple):
    """x and grad_y channels_last."""

    x: Tensor
    panels: Tensor
    grad_y: Tensor


class Results(NamedTuple):
    """Both gradients."""

    grad_x: Tensor
    grad_panels: Tensor


def inputs(call: Call, seed: int = 0) -> Operands:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(call.out + 60, call.c + call.spare_in, 1, 1, generator=g) / call.c**0.5
    x = torch.randn(call.n, call.c, call.h, call.w, generator=g).to(call.dtype)
    grad_y = torch.randn(call.n, call.out, call.h, call.w, generator=g).to(call.dtype)
    dense = {"memory_format": torch.channels_last}
    return Operands(
        x.contiguous(**dense), pack_pointwise_weight(weight).to(call.dtype), grad_y.contiguous(**dense)
    )


def run(operands: Operands) -> Results:
    x, panels, grad_y = operands
    return Results(*torch.ops.pfnas_fast.dynamic_pointwise_conv_backward(grad_y, x, panels, True, True))


def moments(operands: Operands, out_channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and variance."""
    return torch.ops.pfnas_fast.dynamic_pointwise_conv_moments(operands.x, operands.panels, out_channels)


def product(x: Tensor, panels: Tensor, out_channels: int) -> Tensor:
    """The plain op; its public function takes 16-bit tensors on CUDA devices only."""
    return torch.ops.pfnas_fast.dynamic_pointwise_conv(x, panels, None, None, None, out_channels, 0)


def expected(operands: Operands) -> Results:
    """float64: matrices of pixels, and a scatter into zero panels."""
    x, panels, grad_y = (t.double() for t in operands)
    rows = panels.transpose(1, 2).flatten(0, 1)  # [48 P, I_max]
    weight = rows[: grad_y.shape[1], : x.shape[1]]
    grad_rows = torch.zeros_like(rows)
    grad_rows[: grad_y.shape[1], : x.shape[1]] = torch.einsum("nohw,nihw->oi", grad_y, x)
    grad_panels = grad_rows.unflatten(0, (-1, 48)).transpose(1, 2)
    return Results(torch.einsum("nohw,oi->nihw", grad_y, weight), grad_panels)


def assert_close(actual: Results, operands: Operands) -> None:
    """float32 sums, rounded once to the storage type."""
    pixels = operands.x.shape[0] * operands.x.shape[2] * operands.x.shape[3]
    lengths = (operands.grad_y.shape[1], pixels)
    for name, a, b, length in zip(Results._fields, actual, expected(operands), lengths, strict=True):
        stored = operands.x.dtype
        assert a.dtype == stored, name
        bound = 4 * torch.finfo(torch.float32).eps * (1 + length**0.5 / 4) * float(b.abs().max()) + 2.0**-25
        if stored != torch.float32:
            bound = bound + torch.finfo(stored).eps / 2 * b.abs()
        error = (a.double() - b).abs()
        assert bool((error <= bound).all()), f"{name}: {float((error - bound).max()):.2e} too far"
        assert bool((a[b == 0] == 0).all()), f"{name}: something was written outside the active part"


@names
@pytest.mark.parametrize("call", CALLS, ids=lambda c: "x".join(map(str, c[:6])))
def test_every_order(call: Call, dtype: torch.dtype, ordered: ModuleType, seed: int) -> None:
    operands = inputs(call._replace(dtype=dtype), seed)
    assert_close(run(operands), operands)


@names
def test_orders_agree_to_the_bit(dtype: torch.dtype, plain: ModuleType) -> None:
    operands = inputs(CALLS[-1]._replace(dtype=dtype))
    results: list[Results] = []
    with emulated_ops(plain):
        for order, seed in itertools.product(ORDERS, SEEDS):
            plain.set_order(order, seed)
            results.append(run(operands))
    plain.set_order("forward")
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("call", CALLS, ids=lambda c: "x".join(map(str, c[:6])))
def test_older_devices_compute_halves_without_tensor_cores(call: Call, emulated: ModuleType) -> None:
    emulated.set_compute_capability(75)
    operands = inputs(call._replace(dtype=torch.float16))
    assert_close(run(operands), operands)


@names
def test_autograd(dtype: torch.dtype, emulated: ModuleType) -> None:
    """Only what is wanted is computed."""
    operands = inputs(Call(2, 24, 5, 6, 72, dtype=dtype))
    x, panels, grad_y = operands
    wanted = run(operands)
    for need_x, need_panels in ((True, True), (True, False), (False, True)):
        leaves = x.detach().requires_grad_(need_x), panels.detach().requires_grad_(need_panels)
        product(*leaves, 72).backward(grad_y)
        for leaf, need, gradient in zip(leaves, (need_x, need_panels), wanted, strict=True):
            assert (leaf.grad is not None) == need
            assert leaf.grad is None or torch.equal(leaf.grad, gradient)
            leaf.grad = None


@names
def test_outputs_and_workspace_need_no_initialisation(dtype: torch.dtype, emulated: ModuleType) -> None:
    operands = inputs(CALLS[-1]._replace(dtype=dtype))
    clean = run(operands)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like"):
            make = getattr(torch, name)
            patch.setattr(torch, name, lambda *a, _make=make, **k: _make(*a, **k).fill_(math.nan))
        poisoned = run(operands)
    assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True))


@names
def test_nan_goes_where_it_belongs(dtype: torch.dtype, emulated: ModuleType) -> None:
    operands = inputs(Call(1, 40, 6, 6, 50, dtype=dtype))
    operands.grad_y[0, 49, 2, 3] = math.nan
    grad_x, grad_panels = run(operands)
    hit = torch.zeros_like(grad_x, dtype=torch.bool)
    hit[:, :, 2, 3] = True
    assert torch.equal(grad_x.isnan(), hit)
    hit = torch.zeros_like(grad_panels, dtype=torch.bool)
    hit[1, :, 1] = True
    assert torch.equal(grad_panels.isnan(), hit)


MOMENTS = [Call(1, 3, 1, 1, 5), Call(2, 24, 9, 13, 72), Call(3, 17, 23, 41, 100, spare_in=4)]


@names
@pytest.mark.parametrize("call", MOMENTS, ids=lambda c: "x".join(map(str, c[:6])))
def test_moments_of_what_was_stored(call: Call, dtype: torch.dtype, ordered: ModuleType, seed: int) -> None:
    """Against float64 sums of y itself, as stored; y is that of the plain op."""
    operands = inputs(call._replace(dtype=dtype), seed)
    y, mean, variance = moments(operands, call.out)
    assert torch.equal(y, product(operands.x, operands.panels, call.out))
    stored = y.double().transpose(0, 1).flatten(1)  # [O, pixels]
    spread = stored.var(dim=1, unbiased=False)
    assert torch.allclose(mean.double(), stored.mean(dim=1), rtol=0, atol=4e-7 * float(stored.abs().max()))
    assert torch.allclose(variance.double(), spread, rtol=4e-6, atol=1e-12)


def test_moments_far_from_zero(emulated: ModuleType) -> None:
    """Mean over deviation 2000: E[y^2] - E[y]^2 would lose all of the variance's digits in float32."""
    x = torch.randn(2, 1, 20, 20) + 2000.0
    panels = pack_pointwise_weight(torch.ones(2, 1, 1, 1))
    y, _, variance = torch.ops.pfnas_fast.dynamic_pointwise_conv_moments(x, panels, 2)
    expected = y.double().transpose(0, 1).flatten(1).var(dim=1, unbiased=False)
    assert torch.allclose(variance.double(), expected, rtol=1e-4, atol=0)
    naive = (y * y).mean(dim=(0, 2, 3)) - y.mean(dim=(0, 2, 3)) ** 2
    assert not torch.allclose(naive.double(), expected, rtol=1e-2, atol=0)


def test_moments_of_nan(emulated: ModuleType) -> None:
    x, panels, _ = inputs(Call(1, 8, 12, 12, 20))
    x[0, 3, 4, 5] = math.nan
    _, mean, variance = torch.ops.pfnas_fast.dynamic_pointwise_conv_moments(x, panels, 20)
    assert mean.isnan().all()
    assert variance.isnan().all()


TRAFFIC = [
    Call(1, 24, 14, 20, 96, dtype=torch.bfloat16),
    Call(2, 112, 20, 30, 200, dtype=torch.bfloat16),
    Call(1, 40, 10, 20, 120, dtype=torch.float32),
]


# Share of the touched sectors that the requests of loads and stores use, at least; counted.
PINNED = {96: (1.0, 0.92), 200: (0.89, 1.0), 120: (0.70, 1.0)}


def traced_backward(module: ModuleType, operands: Operands) -> tuple[Trace, int]:
    x, panels, grad_y = operands
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    floats = module.dynamic_pointwise_conv_cuda_backward_workspace(pixels, x.shape[1], grad_y.shape[1])
    named = {
        "grad_y": grad_y,
        "x": x,
        "panels": panels,
        "workspace": torch.empty(floats),
        "grad_x": torch.empty_like(x),
        "grad_panels": torch.zeros_like(panels),
    }
    buffers = {name: (t.data_ptr(), t.numel() * t.element_size()) for name, t in named.items()}
    found = trace(module, buffers, lambda: module.dynamic_pointwise_conv_cuda_backward(*named.values()))
    return found, floats


@pytest.mark.parametrize("call", TRAFFIC, ids=lambda c: "x".join(map(str, c[:5])))
def test_traffic(call: Call, traced: ModuleType) -> None:
    """No race, in bounds, free of bank conflicts; each tensor once per tile that it is an operand of."""
    operands = inputs(call)
    found, floats = traced_backward(traced, operands)
    assert found.clean, (found.races, found.out_of_bounds)
    assert found.conflicts() <= 1.002  # where a row of outputs ends inside a quarter warp
    loads, stores = PINNED[call.out]
    assert found.useful_share("load") >= loads
    assert found.useful_share("store") >= stores
    item = operands.x.element_size()
    pixels = call.n * call.h * call.w
    x, grad_y = (-(-pixels * channels * item // SECTOR) for channels in (call.c, call.out))
    use = found.buffers
    assert use["x"].read_footprint <= 1.15 * x
    assert use["grad_y"].read_footprint <= 1.15 * grad_y
    assert use["grad_x"].write_footprint <= 1.15 * x
    # For grad_x a block has 128 pixels and 96 inputs and needs all outputs of its pixels; for the gradient of
    # the panels 512 pixels, 64 inputs and 96 outputs.
    of_x = of_grad_y = of_grad_x = 0
    for some in tiles(pixels, 128):
        for inputs_of in tiles(call.c, 96):
            of_grad_y += sectors_of(some, range(call.out), row=call.out, item=item)
            of_grad_x += sectors_of(some, inputs_of, row=call.c, item=item)
    for some in tiles(pixels, 512):
        for inputs_of in tiles(call.c, 64):
            for outputs in tiles(call.out, 96):
                of_x += sectors_of(some, inputs_of, row=call.c, item=item)
                of_grad_y += sectors_of(some, outputs, row=call.out, item=item)
    assert 0.9 * of_grad_y <= use["grad_y"].block_reads <= 1.1 * of_grad_y
    assert 0.9 * of_x <= use["x"].block_reads <= 1.1 * of_x
    assert 0.9 * of_grad_x <= use["grad_x"].block_writes <= 1.1 * of_grad_x
    assert use["workspace"].block_writes <= 1.1 * floats * 4 / SECTOR


def test_moments_traffic(traced: ModuleType) -> None:
    """They ride on the sums on their way to y: two floats per tile and output more."""
    x, panels, _ = inputs(Call(1, 24, 14, 20, 96, dtype=torch.bfloat16))
    y = torch.empty(1, 96, 14, 20, dtype=x.dtype).contiguous(memory_format=torch.channels_last)
    floats = traced.dynamic_pointwise_conv_cuda_moments_workspace(280, 96)
    assert floats == 3 * 2 * 96
    named = {
        "x": x,
        "panels": panels,
        "workspace": torch.empty(floats),
        "y": y,
        "mean": torch.empty(96),
        "variance": torch.empty(96),
    }
    buffers = {name: (t.data_ptr(), t.numel() * t.element_size()) for name, t in named.items()}
    found = trace(traced, buffers, lambda: traced.dynamic_pointwise_conv_cuda_moments(*named.values()))
    assert found.clean, (found.races, found.out_of_bounds)
    assert found.conflicts() == 1
    assert found.buffers["y"].read_footprint == 0

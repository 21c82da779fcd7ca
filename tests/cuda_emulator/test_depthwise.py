# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of dynamic_depthwise_conv, emulated: storage types, thread orders, ragged shapes."""

import itertools
import math
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from emulated_ops import ORDERS, SEEDS, emulated_ops
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pfnas_fast.ops import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Call(NamedTuple):
    """One call of the op."""

    n: int
    c: int
    h: int
    w: int
    kernel_size: int
    stride: int
    max_kernel: int = 7
    dtype: torch.dtype = torch.float32


class Results(NamedTuple):
    """y and all gradients."""

    y: Tensor
    grad_x: Tensor
    grad_weight: Tensor
    grad_matrix_5: Tensor
    grad_matrix_3: Tensor


def inputs(call: Call, seed: int = 0) -> list[Tensor]:
    """x, weight, matrix_5, matrix_3, grad_y in the storage type."""
    g = torch.Generator().manual_seed(seed)
    out = (call.n, call.c, -(-call.h // call.stride), -(-call.w // call.stride))
    tensors = [
        torch.randn(call.n, call.c, call.h, call.w, generator=g),
        torch.randn(call.c + 3, 1, call.max_kernel, call.max_kernel, generator=g),
        torch.eye(25) + torch.randn(25, 25, generator=g) / 25,
        torch.eye(9) + torch.randn(9, 9, generator=g) / 9,
        torch.randn(out, generator=g),
    ]
    tensors = [t.to(call.dtype) for t in tensors]
    for i in (0, 4):
        tensors[i] = tensors[i].contiguous(memory_format=torch.channels_last)
    return tensors


def run(tensors: list[Tensor], call: Call) -> Results:
    x, *filters, grad_y = tensors
    ops = torch.ops.pfnas_fast
    y = ops.dynamic_depthwise_conv(x, *filters, call.kernel_size, call.stride)
    gradients = ops.dynamic_depthwise_conv_backward(
        grad_y, x, *filters, call.kernel_size, call.stride, True, True
    )
    return Results(y, *gradients)


def expected(tensors: list[Tensor], call: Call) -> Results:
    """float64, from the same rounded inputs."""
    *leaves, grad_y = (t.double().requires_grad_() for t in tensors)
    y = reference.dynamic_depthwise_conv(*leaves, kernel_size=call.kernel_size, stride=call.stride)
    y.backward(grad_y.detach())
    return Results(y.detach(), *(torch.zeros(0) if t.grad is None else t.grad for t in leaves))


def assert_close(actual: Results, wanted: Results, call: Call) -> None:
    """float32 sums of rounded inputs, rounded once to the storage type at the end."""
    images = call.n * wanted.y.shape[2] * wanted.y.shape[3]
    lengths = (call.kernel_size**2 + 25, call.kernel_size**2 + 25, images + 25, *2 * [images * call.c + 25])
    eps32, eps = torch.finfo(torch.float32).eps, torch.finfo(call.dtype).eps
    for name, a, b, length in zip(Results._fields, actual, wanted, lengths, strict=True):
        assert a.dtype == call.dtype
        assert a.numel() == b.numel() or b.numel() == 0, name
        if b.numel() == 0 or a.numel() == 0:
            continue
        b = b.reshape(a.shape)
        allowed = 4 * eps32 * (1 + length**0.5 / 4)
        error = (a.double() - b).abs()
        bound = allowed * float(b.abs().max()) + (eps / 2 * b.abs() if call.dtype != torch.float32 else 0)
        # denormals of float16 have an absolute spacing
        bound = bound + (2.0**-25 if call.dtype == torch.float16 else 0)
        assert bool((error <= bound).all()), f"{name} {call}: {float((error - bound).max()):.2e} too far"


CALLS = [
    Call(1, 1, 1, 1, 7, 1),
    Call(2, 3, 5, 4, 3, 2),
    Call(2, 24, 9, 7, 5, 2),
    Call(1, 40, 17, 13, 7, 2),
    Call(3, 18, 11, 10, 3, 1),
    Call(1, 130, 8, 9, 5, 1),
    Call(1, 10, 40, 6, 7, 1),
    Call(2, 8, 12, 12, 3, 1, max_kernel=5),
    Call(1, 6, 9, 9, 5, 2, max_kernel=5),
    Call(1, 5, 6, 7, 3, 2, max_kernel=3),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("call", CALLS, ids=lambda c: "x".join(map(str, c[:7])))
def test_every_order(call: Call, dtype: torch.dtype, ordered: ModuleType, seed: int) -> None:
    call = call._replace(dtype=dtype)
    tensors = inputs(call, seed)
    assert_close(run(tensors, call), expected(tensors, call), call)


def test_orders_agree_to_the_bit(plain: ModuleType) -> None:
    """No result depends on the schedule: there are no atomics on floats."""
    for call in CALLS:
        tensors = inputs(call)
        results: list[Results] = []
        with emulated_ops(plain):
            for order, seed in itertools.product(ORDERS, SEEDS):
                plain.set_order(order, seed)
                results.append(run(tensors, call))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    plain.set_order("forward")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 3),
    c=st.one_of(st.integers(1, 9), st.sampled_from([16, 23, 24, 40, 72, 129])),
    h=st.integers(1, 14),
    w=st.integers(1, 19),
    kernel_size=st.sampled_from([3, 5, 7]),
    stride=st.sampled_from([1, 2]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_ragged_shapes(emulated: ModuleType, seed: int, **sizes: Any) -> None:
    call = Call(**sizes)
    tensors = inputs(call, seed)
    assert_close(run(tensors, call), expected(tensors, call), call)


@pytest.mark.parametrize("fill", [math.nan, 1e30])
def test_outputs_and_workspace_need_no_initialisation(emulated: ModuleType, fill: float) -> None:
    """torch.empty filled with NaN, or with large numbers that would survive a sum."""
    call = Call(2, 17, 9, 10, 3, 2)
    tensors = inputs(call)
    clean = run(tensors, call)
    torch_empty, torch_empty_like = torch.empty, torch.empty_like

    def filled(make: Any) -> Any:
        return lambda *args, **kwargs: make(*args, **kwargs).fill_(fill)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", filled(torch_empty))
        patch.setattr(torch, "empty_like", filled(torch_empty_like))
        poisoned = run(tensors, call)
    assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_nan_goes_where_it_belongs(emulated: ModuleType, dtype: torch.dtype) -> None:
    call = Call(2, 20, 9, 9, 5, 1, dtype=dtype)
    tensors = inputs(call)
    tensors[0][1, 18, 4, 5] = math.nan
    results = run(tensors, call)
    hit = torch.zeros_like(results.y, dtype=torch.bool)
    hit[1, 18, 2:7, 3:8] = True
    assert torch.equal(results.y.isnan(), hit)
    assert results.grad_weight[18].isnan().any()
    assert not results.grad_weight[:18].isnan().any()


def test_replays_with_the_same_arguments(emulated: ModuleType) -> None:
    """What a captured CUDA graph does: the same launches on the same memory again give the same bits."""
    call = Call(1, 24, 10, 10, 5, 2)
    tensors = inputs(call)
    y = torch.full((1, 24, 5, 5), math.nan).contiguous(memory_format=torch.channels_last)
    count = emulated.dynamic_depthwise_conv_cuda_workspace(tensors[0].shape, 5, 7, 2, False)
    workspace = torch.full((count,), math.nan)
    first = None
    for _ in range(3):
        emulated.dynamic_depthwise_conv_cuda_forward(*tensors[:4], 5, 2, workspace, y)
        first = y.clone() if first is None else first
        assert torch.equal(y, first)


def test_compiled_module_checks_its_caller(emulated: ModuleType) -> None:
    call = Call(1, 8, 6, 6, 7, 1)
    x, weight, *_ = inputs(call)
    y, workspace = torch.empty_like(x), torch.empty(49 * 8)
    with pytest.raises(RuntimeError, match="is_channels_last"):
        emulated.dynamic_depthwise_conv_cuda_forward(
            x.contiguous(), weight, None, None, 7, 1, workspace, y.contiguous()
        )
    with pytest.raises(RuntimeError, match="scratch"):
        emulated.dynamic_depthwise_conv_cuda_forward(x, weight, None, None, 7, 1, workspace[1:], y)
    with pytest.raises(RuntimeError, match="dtype"):
        emulated.dynamic_depthwise_conv_cuda_forward(x, weight.half(), None, None, 7, 1, workspace, y)

# SPDX-License-Identifier: Apache-2.0
"""batch_norm_act against its float64 twin: values, moments, gradients, determinism, errors."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from pfnas_fast.errors import InputError
from pfnas_fast.ops import batch_norm_act, reference


class Case(NamedTuple):
    """Sizes of one call."""

    n: int
    c: int
    h: int
    w: int
    activation: str | None = "hswish"
    mean: float = 0.0


CASES = [
    Case(2, 16, 8, 8),
    Case(3, 24, 7, 9, "relu"),
    Case(2, 7, 3, 5, None),  # channels that fill no vector
    Case(1, 1, 1, 2),
    Case(2, 49, 1, 1, "relu"),
    Case(4, 16, 40, 40),  # several groups, each of several runs
    Case(1, 33, 67, 61, "relu"),
    Case(4, 16, 20, 20, "hswish", mean=20.0),
]


def make(case: Case) -> list[Tensor]:
    """x, gamma, beta."""
    g = torch.Generator().manual_seed(case.c)
    x = torch.randn(case.n, case.c, case.h, case.w, generator=g) * 2 + case.mean
    gamma, beta = torch.randn(case.c, generator=g) * 0.3 + 1, torch.randn(case.c, generator=g)
    return [t.requires_grad_() for t in (x.contiguous(memory_format=torch.channels_last), gamma, beta)]


def run(op: Any, case: Case, leaves: list[Tensor]) -> list[Tensor]:
    """y, moments and the three gradients."""
    y, moments = op(*leaves, activation=case.activation)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
    return [y.detach(), moments, *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case, tier: str) -> None:
    """Errors of at most four times those of the twin in float32, or 1e-5 (gradients 1e-4)."""
    ours, torchs = (run(op, case, make(case)) for op in (batch_norm_act, reference.batch_norm_act))
    exact = run(reference.batch_norm_act, case, [t.detach().double().requires_grad_() for t in make(case)])
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    assert not ours[1].requires_grad
    pairs = [*zip(*(r[1] for r in (ours, torchs, exact)), strict=True)]  # each row of the moments
    pairs += zip(ours[:1] + ours[2:], torchs[:1] + torchs[2:], exact[:1] + exact[2:], strict=True)
    for index, (mine, theirs, wanted) in enumerate(pairs):
        error, torch_error = (float((t.double() - wanted).abs().max()) for t in (mine, theirs))
        tolerance = 1e-5 if index < 4 else 1e-4
        limit = max(4 * torch_error, tolerance * float(wanted.abs().max()))
        assert error <= limit, f"{index}: error {error:.2e}, torch {torch_error:.2e}"


def test_same_bits_for_any_number_of_threads(num_threads: None) -> None:
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(run(batch_norm_act, CASES[5], make(CASES[5])))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_nan_in_gives_nan_out(tier: str) -> None:
    case = CASES[1]
    leaves = make(case)
    with torch.no_grad():
        leaves[0][1, 5, 2, 3] = math.nan
    results = [run(op, case, leaves) for op in (batch_norm_act, reference.batch_norm_act)]
    for ours, wanted in zip(*results, strict=True):
        assert torch.equal(ours.isnan(), wanted.isnan())
    assert all(result.isnan().any() for result in results[0][:4])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
def test_opcheck() -> None:
    x, gamma, beta = make(CASES[1])
    ops = torch.ops.pfnas_fast
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.batch_norm_act.default, (x, gamma, beta, 1, 1e-5), test_utils=utils)
    x, gamma, beta = (t.detach() for t in (x, gamma, beta))
    y, moments = ops.batch_norm_act(x, gamma, beta, 1, 1e-5)
    arguments = (y, x, gamma, beta, moments, 1, 1e-5, True)
    torch.library.opcheck(ops.batch_norm_act_backward.default, arguments, test_utils=utils)


def test_compile() -> None:
    case = CASES[0]

    @torch.compile(fullgraph=True, backend="aot_eager")  # no code is generated, to keep this fast
    def compiled(*leaves: Tensor, activation: str | None) -> tuple[Tensor, Tensor]:
        return batch_norm_act(leaves[0], leaves[1], leaves[2], activation=activation)

    for actual, expected in zip(
        run(compiled, case, make(case)), run(batch_norm_act, case, make(case)), strict=True
    ):
        assert torch.equal(actual, expected)


def test_autocast_computes_in_float32() -> None:
    x, gamma, beta = make(CASES[0])
    half = x.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = batch_norm_act(half, gamma, beta)
    assert torch.equal(y, batch_norm_act(half.detach().float(), gamma, beta)[0])
    y.sum().backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


def test_frozen_parts_get_no_gradient() -> None:
    wanted = run(batch_norm_act, CASES[0], make(CASES[0]))[2:]
    for index in range(3):
        leaves = make(CASES[0])
        leaves[index].requires_grad_(False)
        y, _ = batch_norm_act(leaves[0], leaves[1], leaves[2], activation="hswish")
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(7)))
        for other, (leaf, gradient) in enumerate(zip(leaves, wanted, strict=True)):
            assert (leaf.grad is None) == (other == index)
            assert leaf.grad is None or torch.equal(leaf.grad, gradient)


def test_second_derivatives_raise() -> None:
    leaves = make(CASES[0])
    y, _ = batch_norm_act(leaves[0], leaves[1], leaves[2])
    (grad,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="gradient cannot be differentiated again"):
        grad.sum().backward()


def test_mistakes_are_named() -> None:
    x, gamma, beta = make(CASES[0])
    with pytest.raises(InputError, match="expected 'relu', 'hswish' or None for activation, got 'swish'"):
        batch_norm_act(x, gamma, beta, activation="swish")
    with pytest.raises(InputError, match=r"expected shape \[16\] for beta, got \[15\]"):
        batch_norm_act(x, gamma, beta[:15])
    with pytest.raises(InputError, match="expected more than one value per channel for x"):
        batch_norm_act(x[:1, :, :1, :1], gamma, beta)
    with pytest.raises(TypeError, match="expected float32 for x, got float64"):
        batch_norm_act(x.double(), gamma, beta)


def test_lazily_negated_and_zero_tensors() -> None:
    """Their memory holds other numbers, or none: only the dispatcher makes tensors of them."""
    x, gamma, beta = (leaf.detach() for leaf in make(CASES[0]))
    make_lazy: Any = torch
    expected, _ = batch_norm_act(x, -gamma, beta)
    assert torch.equal(batch_norm_act(x, make_lazy._neg_view(gamma), beta)[0], expected)
    zero, _ = batch_norm_act(x, make_lazy._efficientzerotensor(gamma.shape), beta)
    assert torch.equal(zero, batch_norm_act(x, torch.zeros_like(gamma), beta)[0])


def test_a_profiler_sees_the_op_and_its_derivative() -> None:
    leaves = make(CASES[0])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        batch_norm_act(*leaves)[0].sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"pfnas_fast::batch_norm_act", "pfnas_fast::batch_norm_act_backward"} <= names
    assert any("batch_norm_act_derivative" in name for name in names)

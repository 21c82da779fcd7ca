# SPDX-License-Identifier: Apache-2.0
"""train_mbconv within torch: what is kept for backward, dispatcher, autograd, autocast, compilation."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from train_mbconv_cases import CASES, Arguments, Case

from pfnas_fast.ops import train_mbconv


def test_plan_memory_keeps_thin_tensors_only() -> None:
    case, kept = Case(2, 8, 48, 8, 12, 12, kernel_size=5), []
    for plan in ("speed", "memory"):
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        a = Arguments(case)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            a.run(train_mbconv, plan=plan)
        own = {leaf.untyped_storage().data_ptr() for leaf in a.leaves().values()}
        kept.append(sum(size for pointer, size in sizes.items() if pointer not in own))
    pixels = 2 * 12 * 12
    assert kept[0] >= (48 + 48 + 16) * pixels * 4
    assert kept[1] <= 3 * (48 + 48 + 8) * 4


def test_nothing_is_kept_without_gradients() -> None:
    sizes: list[int] = []

    class Outputs(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.pfnas_fast.train_mbconv.default:
                sizes.append(sum(t.numel() for t in result[1:]))
            return result

    a = Arguments(CASES[0])
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), Outputs():
            y, _ = a.run(train_mbconv)
    assert y.grad_fn is None
    assert sizes[1] == 3 * (2 * 24 + 8) < sizes[0]


class Witness(TorchDispatchMode):
    """Counts the calls of ops of this package; its presence takes them through the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "pfnas_fast":
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


def test_calls_with_and_without_the_dispatcher_agree() -> None:
    direct = Arguments(CASES[2]).gradients(train_mbconv)
    with Witness() as witness:
        watched = Arguments(CASES[2]).gradients(train_mbconv)
    assert witness.seen == ["train_mbconv", "train_mbconv_backward"]
    assert torch.equal(direct[0], watched[0])
    assert torch.equal(direct[1], watched[1])
    for name, grad in direct[2].items():
        other = watched[2][name]
        assert (grad is None) == (other is None), name
        assert grad is None or other is None or torch.equal(grad, other), name


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[11]], ids=lambda case: case.name)
def test_opcheck(case: Case) -> None:
    a = Arguments(case)
    norms = [part for norm in a.norms for part in (norm or (None, None))]
    tensors = (a.x, a.expand, a.bank, *a.matrices, a.project, *norms, *(a.excitation or (None,) * 4))
    codes = [{None: 0, "relu": 1, "hswish": 2}[name] for name in case.activations]
    options = (
        case.ce,
        case.co,
        case.se,
        case.kernel_size,
        case.stride,
        case.residual,
        codes,
        [1e-5] * 3,
        True,
    )
    ops = torch.ops.pfnas_fast
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.train_mbconv.default, (*tensors, *options), test_utils=utils)
    plain = tuple(None if t is None else t.detach() for t in tensors)
    y, *kept = ops.train_mbconv(*plain, *options)
    torch.library.opcheck(
        ops.train_mbconv_backward.default, (y, *plain, *kept, *options, True), test_utils=utils
    )


def test_second_derivatives_raise() -> None:
    a = Arguments(CASES[0])
    y, _ = a.run(train_mbconv)
    (grad_x,) = torch.autograd.grad(y.square().sum(), a.x, create_graph=True)
    with pytest.raises(NotImplementedError, match="gradient cannot be differentiated again"):
        grad_x.sum().backward()


def test_frozen_parameters_get_no_gradient() -> None:
    a, full = Arguments(CASES[2]), Arguments(CASES[2])
    for name in ("x", "expand", "w1", "beta_2"):
        a.leaves()[name].requires_grad_(False)
    _, _, grads = a.gradients(train_mbconv)
    _, _, wanted = full.gradients(train_mbconv)
    for name, grad in grads.items():
        if name in ("x", "expand", "w1", "beta_2"):
            assert grad is None
        elif grad is not None:
            full_grad = wanted[name]
            assert full_grad is not None
            assert torch.equal(grad, full_grad), name


def test_autocast_computes_in_float32() -> None:
    """The one rule: what arrives in half precision is cast up, the result and its gradients are float32."""
    plain, cast = Arguments(CASES[2]), Arguments(CASES[2])
    plain.x = plain.x.detach().bfloat16().float().requires_grad_()
    cast.x = cast.x.detach().bfloat16().requires_grad_()
    expected, expected_moments, wanted = plain.gradients(train_mbconv)
    with torch.autocast("cpu", torch.bfloat16):
        y, moments = cast.run(train_mbconv)
    assert y.dtype == torch.float32
    assert torch.equal(y, expected)
    assert torch.equal(moments, expected_moments)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(7)))
    for name, leaf in cast.leaves().items():
        gradient = wanted[name]
        assert (leaf.grad is None) == (gradient is None), name
        if leaf.grad is not None and gradient is not None:
            assert leaf.grad.dtype == leaf.dtype
            assert torch.equal(leaf.grad, gradient.to(leaf.dtype)), name


def test_compile_once_for_all_widths() -> None:
    """Forward and backward are one graph, and 50 widths of a block cost three compilations at most."""
    counter = CompileCounterWithBackend("aot_eager")  # no code is generated, to keep this fast
    compiled, eager = Arguments(Case(2, 16, 96, 16, 6, 6)), Arguments(Case(2, 16, 96, 16, 6, 6))

    def run(a: Arguments, x: Tensor, mid_channels: int) -> tuple[Tensor, Tensor]:
        return train_mbconv(
            *(x, a.expand, a.bank, (a.matrices[0], a.matrices[1]), a.project, a.norms),
            mid_channels=mid_channels,
            out_channels=16,
            kernel_size=3,
            residual=True,
        )

    block = torch.compile(partial(run, compiled), backend=counter, fullgraph=True)
    for mid_channels in range(24, 74):
        results = []
        for a, call in ((compiled, block), (eager, partial(run, eager))):
            for leaf in a.leaves().values():
                leaf.grad = None
            y, moments = call(a.x, mid_channels)
            y.square().sum().backward()
            results.append([y.detach(), moments, *(leaf.grad for leaf in a.leaves().values())])
        for actual, expected in zip(*results, strict=True):
            assert torch.equal(actual, expected)
    assert counter.frame_count <= 3

# SPDX-License-Identifier: Apache-2.0
"""Batch normalisation by the moments of the batch and the activation behind it as one op (arXiv:1502.03167).

Call path: `batch_norm_act` checks -> `Op` (through torch.ops.pfnas_fast.batch_norm_act where somebody may
look) -> `_forward` allocates -> _C. Autograd calls `_backward` likewise. The op is functional: it returns the
moments, and whoever owns running statistics moves them.
"""

from typing import Any

import torch
from torch import Tensor

from pfnas_fast.errors import InputError
from pfnas_fast.ops._autograd import Op
from pfnas_fast.ops._library import _C, LIBRARY
from pfnas_fast.ops._memory import empty_channels_last

__all__ = ["batch_norm_act"]

_ACTIVATIONS = {None: 0, "relu": 1, "hswish": 2}
_HALVES = (torch.bfloat16, torch.float16)
_TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)
LIBRARY.define(
    "batch_norm_act(Tensor x, Tensor gamma, Tensor beta, int activation, float eps) "
    "-> (Tensor y, Tensor moments)",
    tags=_TAGS,
)
LIBRARY.define(
    "batch_norm_act_backward(Tensor grad_y, Tensor x, Tensor gamma, Tensor beta, Tensor moments, "
    "int activation, float eps, bool need_x) -> (Tensor grad_x, Tensor grad_gamma, Tensor grad_beta)",
    tags=_TAGS,
)


def batch_norm_act(
    x: Tensor, gamma: Tensor, beta: Tensor, *, activation: str | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Normalise every channel of a batch by its own moments, scale, shift and activate; forward and backward.

    Runs on the CPU in float32, also under autocast (which casts up). Derivatives are of first order only.

    Args:
        x: [N, C, H, W], float32; copied into channels_last memory where it is not.
        gamma: Scale, [C].
        beta: Shift, [C].
        activation: "relu", "hswish" or None.
        eps: Added to the variance.

    Returns:
        y, [N, C, H, W], channels_last, and the moments of the batch, [3, C], without gradient: mean, unbiased
        variance, 1 / sqrt(biased variance + eps).

    Raises:
        InputError: Shapes or options disagree, or there is one value per channel (a ValueError).
        TypeError: A tensor is not float32.
        NotImplementedError: A tensor is not on the CPU.

    Source:
        Batch normalisation, arXiv:1502.03167.

    Example:
        >>> import torch
        >>> from pfnas_fast.ops import batch_norm_act
        >>> y, moments = batch_norm_act(
        ...     torch.randn(2, 8, 6, 6), torch.ones(8), torch.zeros(8), activation="hswish")
        >>> y.shape, moments.shape
        (torch.Size([2, 8, 6, 6]), torch.Size([3, 8]))
    """
    if activation not in _ACTIVATIONS:
        raise InputError(_fail("'relu', 'hswish' or None", "activation", repr(activation)))
    for name, tensor in (("x", x), ("gamma", gamma), ("beta", beta)):
        _check_tensor(name, tensor)
    if x.ndim != 4 or x.shape[1] == 0:
        raise InputError(_fail("shape [N, C, H, W] with C >= 1", "x", list(x.shape)))
    for name, tensor in (("gamma", gamma), ("beta", beta)):
        if tensor.ndim != 1 or tensor.shape[0] != x.shape[1]:
            raise InputError(_fail(f"shape [{x.shape[1]}]", name, list(tensor.shape)))
    if x.shape[0] * x.shape[2] * x.shape[3] < 2:
        raise InputError(_fail("more than one value per channel", "x", list(x.shape)))
    x = x.contiguous(memory_format=torch.channels_last)
    return _OP(x, gamma, beta, _ACTIVATIONS[activation], eps)


def _fail(expected: str, argument: str, got: object) -> str:
    return f"batch_norm_act: expected {expected} for {argument}, got {got}"


def _check_tensor(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(_fail("a torch.Tensor", name, type(tensor).__name__))
    if tensor.dtype != torch.float32 and not (tensor.dtype in _HALVES and torch.is_autocast_enabled("cpu")):
        raise TypeError(_fail("float32", name, str(tensor.dtype).removeprefix("torch.")))
    if tensor.device.type not in ("cpu", "meta"):
        raise NotImplementedError(_fail("a CPU tensor", name, f"one on {tensor.device.type}"))


def _rows(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _forward(x: Tensor, gamma: Tensor, beta: Tensor, activation: int, eps: float) -> tuple[Tensor, Tensor]:
    y = empty_channels_last(x, tuple(x.shape))
    moments = x.new_empty(3, x.shape[1])
    _C.batch_norm_act_forward(_rows(x), gamma.contiguous(), beta.contiguous(), activation, eps, moments, y)
    return y, moments


def _fake_forward(
    x: Tensor, gamma: Tensor, beta: Tensor, activation: int, eps: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.channels_last), x.new_empty(3, x.shape[1])


def _backward(
    grad_y: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    moments: Tensor,
    activation: int,
    eps: float,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = empty_channels_last(x, tuple(x.shape)) if need_x else None
    grads = torch.empty_like(gamma), torch.empty_like(beta)
    parameters = gamma.contiguous(), beta.contiguous(), moments.contiguous()
    _C.batch_norm_act_backward(_rows(grad_y), _rows(x), *parameters, activation, eps, grad_x, *grads)
    return x.new_empty(0) if grad_x is None else grad_x, *grads


def _fake_backward(
    grad_y: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    moments: Tensor,
    activation: int,
    eps: float,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.channels_last) if need_x else x.new_empty(0)
    return grad_x, torch.empty_like(gamma), torch.empty_like(beta)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, gamma, beta, activation, eps = inputs
    ctx.options = activation, eps
    ctx.save_for_backward(x, gamma, beta, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _arguments_of_backward(
    ctx: Any, needed: tuple[bool, ...], grad_y: Tensor | None, _: Tensor | None
) -> tuple[Any, ...] | None:
    return None if grad_y is None else (grad_y, *ctx.saved_tensors, *ctx.options, needed[0])


def _gradients(
    _ctx: Any, needed: tuple[bool, ...], gradients: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    wanted = (g if want else None for g, want in zip(gradients, needed[:3], strict=True))
    return *wanted, None, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    raise NotImplementedError(
        "batch_norm_act: its gradient cannot be differentiated again; that of the twin in"
        " pfnas_fast.ops.reference can"
    )


_OP = Op(
    "batch_norm_act",
    forward=_forward,
    backward=_backward,
    arguments_of_backward=_arguments_of_backward,
    gradients=_gradients,
    setup_context=_setup_context,
)
torch.library.register_fake("pfnas_fast::batch_norm_act", _fake_forward, lib=LIBRARY)
torch.library.register_fake("pfnas_fast::batch_norm_act_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autocast("pfnas_fast::batch_norm_act", "cpu", torch.float32, lib=LIBRARY)
torch.library.register_autograd("pfnas_fast::batch_norm_act_backward", _no_second_derivative, lib=LIBRARY)

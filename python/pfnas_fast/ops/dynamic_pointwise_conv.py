# SPDX-License-Identifier: Apache-2.0
"""1x1 convolution on prefixes of weights that are packed once, with a block's epilogue fused in.

Call path: `pack_pointwise_weight` lays the largest weight out as panels of 48; `dynamic_pointwise_conv`
checks -> torch.ops.pfnas_fast.dynamic_pointwise_conv -> `_forward` allocates y -> _C fills Params, picks the
CPU tier, runs it without the GIL. Inference only: the op has no gradient.
"""

from typing import Any

import torch
from torch import Tensor

from pfnas_fast.errors import InputError
from pfnas_fast.ops._library import _C, LIBRARY

__all__ = ["ACTIVATIONS", "PANEL_WIDTH", "dynamic_pointwise_conv", "pack_pointwise_weight"]

PANEL_WIDTH: int = _C.panel_width
"""Outputs per panel: 48."""
ACTIVATIONS = (None, "relu", "hswish")
"""Activations that kernels can end with; the place of each is its number in the compiled module."""

_TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)
LIBRARY.define(
    "dynamic_pointwise_conv(Tensor x, Tensor panels, Tensor? scale, Tensor? shift, Tensor? residual,"
    " int out_channels, int activation) -> Tensor",
    tags=_TAGS,
)


def pack_pointwise_weight(weight: Tensor) -> Tensor:
    """Lay out the weight of a 1x1 convolution so that the kernels read any width as a prefix.

    Args:
        weight: [O_max, I_max, 1, 1], float32, on the CPU.

    Returns:
        Panels, [ceil(O_max / 48), I_max, 48], float32: a copy, which later changes of `weight` do not reach.

    Raises:
        InputError: Another shape, or an empty weight (a ValueError).
        TypeError: Not a float32 tensor.
        NotImplementedError: Not on the CPU.

    Example:
        >>> import torch
        >>> from pfnas_fast.ops import pack_pointwise_weight
        >>> pack_pointwise_weight(torch.randn(100, 16, 1, 1)).shape
        torch.Size([3, 16, 48])
    """
    _check_tensor("pack_pointwise_weight", weight, "weight", "cpu")
    if weight.ndim != 4 or tuple(weight.shape[2:]) != (1, 1) or weight.numel() == 0:
        raise InputError(
            "pack_pointwise_weight: expected shape [O, I, 1, 1] with O, I >= 1 for weight,"
            f" got {list(weight.shape)}"
        )
    weight = weight.detach().contiguous()
    panels = weight.new_empty(-(-weight.shape[0] // PANEL_WIDTH), weight.shape[1], PANEL_WIDTH)
    _C.pack_pointwise_weight(weight, panels)
    return panels


def dynamic_pointwise_conv(
    x: Tensor,
    panels: Tensor,
    *,
    out_channels: int,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Compute ``act(conv(x) * scale + shift + residual)`` on the first inputs and outputs of a packed weight.

    Folded batch normalisation is `scale` and `shift`. Inference only: differentiating it raises.

    Args:
        x: Input, [N, C, H, W], float32. C may be less than the panels' inputs. An input that is not
            channels_last in memory is copied into that layout first.
        panels: From `pack_pointwise_weight`, [P, I_max, 48].
        out_channels: Active outputs O, 1 <= O <= 48 P. Outputs beyond those that were packed are sums of
            zeros.
        scale: [O], float32; None: 1.
        shift: [O], float32; None: 0.
        activation: ``"relu"``, ``"hswish"`` or None.
        residual: [N, O, H, W], float32, added before the activation; None: 0.

    Returns:
        [N, O, H, W], float32, channels_last.

    Raises:
        InputError: Shapes disagree or an unknown activation (a ValueError).
        TypeError: A tensor is not float32.
        NotImplementedError: A tensor is not on the CPU; in backward, always.

    Source:
        Elastic width: Once-for-All, arXiv:1908.09791, section 3.

    Example:
        >>> import torch
        >>> from pfnas_fast.ops import dynamic_pointwise_conv, pack_pointwise_weight
        >>> panels = pack_pointwise_weight(torch.randn(100, 16, 1, 1))
        >>> dynamic_pointwise_conv(torch.randn(2, 8, 5, 5), panels, out_channels=72, activation="relu").shape
        torch.Size([2, 72, 5, 5])
    """
    _check(x, panels, scale, shift, residual, out_channels, activation)
    return torch.ops.pfnas_fast.dynamic_pointwise_conv(
        x.contiguous(memory_format=torch.channels_last),
        panels,
        scale,
        shift,
        residual,
        out_channels,
        ACTIVATIONS.index(activation),
    )


def _fail(op: str, expected: str, argument: str, got: object) -> str:
    return f"{op}: expected {expected} for {argument}, got {got}"


def _check_tensor(op: str, tensor: Tensor, argument: str, *devices: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(_fail(op, "a torch.Tensor", argument, type(tensor).__name__))
    if tensor.dtype != torch.float32:
        raise TypeError(_fail(op, "float32", argument, str(tensor.dtype).removeprefix("torch.")))
    if tensor.device.type not in devices:
        raise NotImplementedError(_fail(op, "a CPU tensor", argument, f"one on {tensor.device.type}"))


def _check(
    x: Tensor,
    panels: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    out_channels: int,
    activation: str | None,
) -> None:
    op = "dynamic_pointwise_conv"
    named = {"x": x, "panels": panels, "scale": scale, "shift": shift, "residual": residual}
    for argument, tensor in named.items():
        if tensor is not None:
            _check_tensor(op, tensor, argument, "cpu", "meta")
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise InputError(_fail(op, "shape [N, C, H, W] with C, H, W >= 1", "x", list(x.shape)))
    if panels.ndim != 3 or panels.shape[2] != PANEL_WIDTH:
        raise InputError(_fail(op, f"shape [P, I_max, {PANEL_WIDTH}]", "panels", list(panels.shape)))
    if x.shape[1] > panels.shape[1]:
        got = f"{panels.shape[1]} inputs"
        raise InputError(_fail(op, f"at least {x.shape[1]} inputs (the channels of x)", "panels", got))
    if not 1 <= out_channels <= panels.shape[0] * PANEL_WIDTH:
        most = panels.shape[0] * PANEL_WIDTH
        raise InputError(_fail(op, f"a number from 1 to {most}", "out_channels", out_channels))
    if activation not in ACTIVATIONS:
        raise InputError(_fail(op, "'relu', 'hswish' or None", "activation", repr(activation)))
    for argument, vector in (("scale", scale), ("shift", shift)):
        if vector is not None and tuple(vector.shape) != (out_channels,):
            raise InputError(_fail(op, f"shape [{out_channels}]", argument, list(vector.shape)))
    shape = [x.shape[0], out_channels, x.shape[2], x.shape[3]]
    if residual is not None and list(residual.shape) != shape:
        raise InputError(_fail(op, f"shape {shape}", "residual", list(residual.shape)))


def _empty_output(x: Tensor, out_channels: int) -> Tensor:
    shape = (x.shape[0], out_channels, x.shape[2], x.shape[3])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _forward(
    x: Tensor,
    panels: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    out_channels: int,
    activation: int,
) -> Tensor:
    y = _empty_output(x, out_channels)
    _C.dynamic_pointwise_conv_forward(
        x.contiguous(memory_format=torch.channels_last),
        panels.contiguous(),
        None if scale is None else scale.contiguous(),
        None if shift is None else shift.contiguous(),
        None if residual is None else residual.contiguous(memory_format=torch.channels_last),
        activation,
        y,
    )
    return y


def _fake(
    x: Tensor,
    panels: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    out_channels: int,
    activation: int,
) -> Tensor:
    return _empty_output(x, out_channels)


def _no_gradient(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    raise NotImplementedError("dynamic_pointwise_conv: has no gradient; it is for inference")


LIBRARY.impl("dynamic_pointwise_conv", _forward, "CPU")
torch.library.register_fake("pfnas_fast::dynamic_pointwise_conv", _fake, lib=LIBRARY)
torch.library.register_autograd("pfnas_fast::dynamic_pointwise_conv", _no_gradient, lib=LIBRARY)

# SPDX-License-Identifier: Apache-2.0
"""1x1 convolution on prefixes of weights that are packed once, with a block's epilogue fused in.

Call path: `pack_pointwise_weight` lays the largest weight out as panels of 48; `dynamic_pointwise_conv`
checks -> torch.ops.pfnas_fast.dynamic_pointwise_conv -> `_forward` allocates y -> _C fills Params, picks the
CPU tier, runs it without the GIL. On a GPU _C launches on torch's current stream and returns: on tensor cores
for 16-bit storage from sm_80 on. On the CPU the op is for inference and has no gradient; on a GPU the plain
product has gradients to x and panels, and `dynamic_pointwise_conv_moments` gives a batch normalisation the
moments of what it wrote.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pfnas_fast.errors import InputError
from pfnas_fast.ops._library import _C, LIBRARY

__all__ = [
    "ACTIVATIONS",
    "PANEL_WIDTH",
    "dynamic_pointwise_conv",
    "dynamic_pointwise_conv_moments",
    "pack_pointwise_weight",
]

PANEL_WIDTH: int = _C.panel_width
"""Outputs per panel: 48."""
ACTIVATIONS = (None, "relu", "hswish")
"""Activations that kernels can end with; the place of each is its number in the compiled module."""

_DEVICES = ("cpu", "meta", "cuda") if _C.cuda_built else ("cpu", "meta")
_TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)
LIBRARY.define(
    "dynamic_pointwise_conv(Tensor x, Tensor panels, Tensor? scale, Tensor? shift, Tensor? residual,"
    " int out_channels, int activation) -> Tensor",
    tags=_TAGS,
)
LIBRARY.define(
    "dynamic_pointwise_conv_moments(Tensor x, Tensor panels, int out_channels) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
LIBRARY.define(
    "dynamic_pointwise_conv_backward(Tensor grad_y, Tensor x, Tensor panels, bool need_x, bool need_panels)"
    " -> (Tensor, Tensor)",
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

    Folded batch normalisation is `scale` and `shift`. Differentiating it raises, except on a CUDA device with
    neither `scale`, `shift`, `residual` nor `activation`: `x` and `panels` then get gradients. On CUDA
    devices, where the build has them, `x`, `panels` and `residual` may also be bfloat16 or float16 (one
    dtype for all three); sums are float32, and float32 is never rounded to TF32.

    Args:
        x: Input, [N, C, H, W], float32 (on CUDA also bfloat16, float16). C may be less than the panels'
            inputs. An input that is not channels_last in memory is copied into that layout first.
        panels: From `pack_pointwise_weight`, [P, I_max, 48], moved to the device and dtype of `x`.
        out_channels: Active outputs O, 1 <= O <= 48 P. Outputs beyond those that were packed are sums of
            zeros.
        scale: [O], float32; None: 1.
        shift: [O], float32; None: 0.
        activation: ``"relu"``, ``"hswish"`` or None.
        residual: [N, O, H, W], dtype of `x`, added before the activation; None: 0.

    Returns:
        [N, O, H, W], dtype of `x`, channels_last.

    Raises:
        InputError: Shapes or devices disagree, or an unknown activation (a ValueError).
        TypeError: A tensor's dtype is not supported on its device, or dtypes differ.
        NotImplementedError: A tensor is neither on the CPU nor on a CUDA device that this build has kernels
            for; in backward, on the CPU or with an epilogue.

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


def dynamic_pointwise_conv_moments(
    x: Tensor, panels: Tensor, *, out_channels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``conv(x)`` and the mean and variance of each output, as a batch normalisation wants them.

    For CUDA devices. The moments are those of y as stored, so after its rounding, and the same bits in every
    run. They are not differentiable, and neither is y here.

    Args:
        x: Input, [N, C, H, W], at least one pixel.
        panels: From `pack_pointwise_weight`, [P, I_max, 48], on the device and of the dtype of `x`.
        out_channels: Active outputs O, 1 <= O <= 48 P.

    Returns:
        y, [N, O, H, W], dtype of `x`, channels_last; mean, [O], float32; biased variance, [O], float32.

    Raises:
        InputError: Shapes or devices disagree, or an empty batch (a ValueError).
        TypeError: A tensor's dtype is not supported on its device, or dtypes differ.
        NotImplementedError: On the CPU, or in a build without CUDA kernels.

    Source:
        Chan, Golub, LeVeque: Updating formulae and a pairwise algorithm for computing sample variances, 1979.

    Example:
        >>> import torch
        >>> from pfnas_fast.ops import dynamic_pointwise_conv_moments, pack_pointwise_weight
        >>> if torch.cuda.is_available():
        ...     panels = pack_pointwise_weight(torch.randn(100, 16, 1, 1)).cuda()
        ...     x = torch.randn(2, 16, 5, 5, device="cuda")
        ...     y, mean, variance = dynamic_pointwise_conv_moments(x, panels, out_channels=72)
    """
    op = "dynamic_pointwise_conv_moments"
    _check(x, panels, None, None, None, out_channels, None, op=op)
    if x.shape[0] == 0:
        raise InputError(_fail(op, "at least one image", "x", list(x.shape)))
    return torch.ops.pfnas_fast.dynamic_pointwise_conv_moments(
        x.contiguous(memory_format=torch.channels_last), panels, out_channels
    )


def _fail(op: str, expected: str, argument: str, got: object) -> str:
    return f"{op}: expected {expected} for {argument}, got {got}"


def _check_tensor(op: str, tensor: Tensor, argument: str, *devices: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(_fail(op, "a torch.Tensor", argument, type(tensor).__name__))
    device = tensor.device.type
    if device not in devices:
        built = "a CPU or CUDA tensor" if "cuda" in devices else "a CPU tensor"
        raise NotImplementedError(_fail(op, built, argument, f"one on {device}"))
    halves = device == "cuda" and argument not in ("scale", "shift")
    if tensor.dtype != torch.float32 and not (halves and tensor.dtype in (torch.bfloat16, torch.float16)):
        expected = "float32, bfloat16 or float16" if halves else "float32"
        raise TypeError(_fail(op, expected, argument, str(tensor.dtype).removeprefix("torch.")))


def _check_like_x(op: str, tensor: Tensor, argument: str, x: Tensor) -> None:
    if tensor.device != x.device:
        expected = f"a tensor on {x.device} (the device of x)"
        raise InputError(_fail(op, expected, argument, f"one on {tensor.device}"))
    if argument in ("panels", "residual") and tensor.dtype != x.dtype:
        ours, theirs = (str(t.dtype).removeprefix("torch.") for t in (x, tensor))
        raise TypeError(_fail(op, f"{ours} (the dtype of x)", argument, theirs))


def _check(
    x: Tensor,
    panels: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    out_channels: int,
    activation: str | None,
    op: str = "dynamic_pointwise_conv",
) -> None:
    named = {"x": x, "panels": panels, "scale": scale, "shift": shift, "residual": residual}
    for argument, tensor in named.items():
        if tensor is not None:
            _check_tensor(op, tensor, argument, *_DEVICES)
            _check_like_x(op, tensor, argument, x)
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
    run: Callable[..., None],
    x: Tensor,
    panels: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    out_channels: int,
    activation: int,
) -> Tensor:
    """`run` is the compiled module's function for the device."""
    y = _empty_output(x, out_channels)
    run(
        x.contiguous(memory_format=torch.channels_last),
        panels.contiguous(),
        None if scale is None else scale.contiguous(),
        None if shift is None else shift.contiguous(),
        None if residual is None else residual.contiguous(memory_format=torch.channels_last),
        activation,
        y,
    )
    return y


def _moments_cuda(module: Any, x: Tensor, panels: Tensor, out_channels: int) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, variance = _fake_moments(x, panels, out_channels)
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    floats = module.dynamic_pointwise_conv_cuda_moments_workspace(pixels, out_channels)
    module.dynamic_pointwise_conv_cuda_moments(
        x.contiguous(memory_format=torch.channels_last),
        panels.contiguous(),
        _workspace(x, floats),
        y,
        mean,
        variance,
    )
    return y, mean, variance


def _backward_cuda(
    module: Any, grad_y: Tensor, x: Tensor, panels: Tensor, need_x: bool, need_panels: bool
) -> tuple[Tensor, Tensor]:
    grad_x, grad_panels = _empty_gradients(grad_y, x, panels, need_x, need_panels)
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    floats = 0
    if need_panels:
        floats = module.dynamic_pointwise_conv_cuda_backward_workspace(pixels, x.shape[1], grad_y.shape[1])
    module.dynamic_pointwise_conv_cuda_backward(
        grad_y.contiguous(memory_format=torch.channels_last),
        x.contiguous(memory_format=torch.channels_last),
        panels.contiguous(),
        _workspace(x, floats),
        grad_x if need_x else None,
        grad_panels if need_panels else None,
    )
    return grad_x, grad_panels


def _workspace(x: Tensor, floats: int) -> Tensor:
    """Scratch of one call: memory of torch's allocator, so that CUDA graphs may capture the op."""
    return torch.empty(floats, dtype=torch.float32, device=x.device)


def cuda_implementations(module: Any) -> dict[str, Callable[..., Any]]:
    """The op's CUDA implementations by name, over a compiled module: `_C`, or the tests' emulator."""
    return {
        "dynamic_pointwise_conv": partial(_forward, module.dynamic_pointwise_conv_cuda_forward),
        "dynamic_pointwise_conv_moments": partial(_moments_cuda, module),
        "dynamic_pointwise_conv_backward": partial(_backward_cuda, module),
    }


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


def _fake_moments(x: Tensor, panels: Tensor, out_channels: int) -> tuple[Tensor, Tensor, Tensor]:
    mean = torch.empty(out_channels, dtype=torch.float32, device=x.device)
    return _empty_output(x, out_channels), mean, torch.empty_like(mean)


def _empty_gradients(
    grad_y: Tensor, x: Tensor, panels: Tensor, need_x: bool, need_panels: bool
) -> tuple[Tensor, Tensor]:
    """Gradients to be filled, those of inactive weights zero; [0] in place of one that is not wanted."""
    grad_x = torch.empty_like(x, memory_format=torch.channels_last) if need_x else x.new_empty(0)
    return grad_x, panels.new_zeros(panels.shape) if need_panels else panels.new_empty(0)


def _moments_cpu(x: Tensor, panels: Tensor, out_channels: int) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError(
        _fail("dynamic_pointwise_conv_moments", "a CUDA tensor", "x", f"one on {x.device}")
    )


def _backward_cpu(
    grad_y: Tensor, x: Tensor, panels: Tensor, need_x: bool, need_panels: bool
) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("dynamic_pointwise_conv: has no gradient on the CPU; there it is for inference")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, panels, scale, shift, residual, _, activation = inputs
    ctx.plain = scale is None and shift is None and residual is None and activation == 0
    if ctx.plain:
        ctx.save_for_backward(x, panels)


def _autograd(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.plain:
        raise NotImplementedError(
            "dynamic_pointwise_conv: has no gradient with an epilogue (scale, shift, residual, activation)"
        )
    x, panels = ctx.saved_tensors
    need_x, need_panels = ctx.needs_input_grad[:2]
    grad_x, grad_panels = torch.ops.pfnas_fast.dynamic_pointwise_conv_backward(
        grad_y, x, panels, need_x, need_panels
    )
    gradients = (grad_x if need_x else None, grad_panels if need_panels else None)
    return *gradients, None, None, None, None, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    raise NotImplementedError("dynamic_pointwise_conv: its gradient cannot be differentiated again")


def _no_gradient_of_moments(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    raise NotImplementedError("dynamic_pointwise_conv_moments: has no gradient")


LIBRARY.impl("dynamic_pointwise_conv", partial(_forward, _C.dynamic_pointwise_conv_forward), "CPU")
LIBRARY.impl("dynamic_pointwise_conv_moments", _moments_cpu, "CPU")
LIBRARY.impl("dynamic_pointwise_conv_backward", _backward_cpu, "CPU")
if _C.cuda_built:
    for _name, _implementation in cuda_implementations(_C).items():
        LIBRARY.impl(_name, _implementation, "CUDA")
torch.library.register_fake("pfnas_fast::dynamic_pointwise_conv", _fake, lib=LIBRARY)
torch.library.register_fake("pfnas_fast::dynamic_pointwise_conv_moments", _fake_moments, lib=LIBRARY)
torch.library.register_fake("pfnas_fast::dynamic_pointwise_conv_backward", _empty_gradients, lib=LIBRARY)
torch.library.register_autograd(
    "pfnas_fast::dynamic_pointwise_conv", _autograd, setup_context=_setup_context, lib=LIBRARY
)
torch.library.register_autograd(
    "pfnas_fast::dynamic_pointwise_conv_moments", _no_gradient_of_moments, lib=LIBRARY
)
torch.library.register_autograd(
    "pfnas_fast::dynamic_pointwise_conv_backward", _no_second_derivative, lib=LIBRARY
)

# SPDX-License-Identifier: Apache-2.0
"""An elastic inverted residual block in training mode as one op (arXiv:1905.02244, arXiv:1908.09791).

Call path: `train_mbconv` checks -> `Op` (through torch.ops.pfnas_fast.train_mbconv where somebody may look)
-> `_forward` allocates outputs -> _C fills Params and runs every pass of the block. Autograd calls
`_backward` likewise. The op is functional: it returns the moments of the batch, and whoever owns running
statistics moves them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pfnas_fast.errors import InputError
from pfnas_fast.ops._autograd import Op
from pfnas_fast.ops._library import _C, LIBRARY
from pfnas_fast.ops._memory import empty, empty_channels_last

__all__ = ["train_mbconv"]

_ACTIVATIONS = {None: 0, "relu": 1, "hswish": 2}
_HALVES = (torch.bfloat16, torch.float16)
_TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)
PLANS = ("speed", "memory")
_BLOCK = 16  # channels per block of the tensors that only this op reads
_TENSORS = (
    "Tensor x, Tensor? expand_weight, Tensor depth_weight, Tensor? matrix_5, Tensor? matrix_3, "
    "Tensor project_weight, Tensor? gamma_1, Tensor? beta_1, Tensor? gamma_2, Tensor? beta_2, "
    "Tensor gamma_3, Tensor beta_3, Tensor? se_reduce_weight, Tensor? se_reduce_bias, "
    "Tensor? se_expand_weight, Tensor? se_expand_bias"
)
_NAMES = tuple(part.split()[-1] for part in _TENSORS.split(", "))
_OPTIONS = (
    "SymInt mid_channels, SymInt out_channels, SymInt se_channels, int kernel_size, int stride, "
    "bool residual, int[] activations, float[] eps, bool keep"
)
_KEPT = ("expanded", "depthwise", "projected", "moments", "pooled", "hidden", "gate")
LIBRARY.define(
    f"train_mbconv({_TENSORS}, {_OPTIONS}) -> (Tensor y, {', '.join(f'Tensor {name}' for name in _KEPT)})",
    tags=_TAGS,
)
LIBRARY.define(
    f"train_mbconv_backward(Tensor grad_y, {_TENSORS}, {', '.join(f'Tensor {name}' for name in _KEPT)}, "
    f"{_OPTIONS}, bool need_x) -> ({', '.join(f'Tensor grad_{name}' for name in _NAMES)})",
    tags=_TAGS,
)


def train_mbconv(
    x: Tensor,
    expand_weight: Tensor | None,
    depth_weight: Tensor,
    matrices: tuple[Tensor | None, Tensor | None],
    project_weight: Tensor,
    norms: Sequence[tuple[Tensor, Tensor] | None],
    excitation: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    *,
    mid_channels: int,
    out_channels: int,
    se_channels: int = 0,
    kernel_size: int,
    stride: int = 1,
    residual: bool = False,
    activations: Sequence[str | None] = ("relu", "relu", None),
    eps: Sequence[float] = (1e-5, 1e-5, 1e-5),
    plan: str = "speed",
) -> tuple[Tensor, Tensor]:
    """Expand, depthwise, excite, project, each with batch normalisation of this batch; forward and backward.

    Every weight may be larger than what runs: the first rows and columns take part, and the gradient of the
    others is zero. Runs on the CPU in float32, also under autocast (which casts up). Derivatives are of first
    order only. Under `torch.compile` the widths are symbols: a block is not compiled anew for each.

    Args:
        x: Input, [N, Ci, H, W], float32; copied into channels_last memory where it is not.
        expand_weight: [>= Ce, >= Ci, 1, 1], or None: no expansion, then Ce = Ci and `norms[0]` is None.
        depth_weight: Filter bank, [>= Ce, 1, K_max, K_max], K_max 3, 5 or 7.
        matrices: Maps from 7x7 to 5x5 filters, [25, 25], and from 5x5 to 3x3 filters, [9, 9]; None where not
            needed. See `dynamic_depthwise_conv`.
        project_weight: [>= Co, >= Ce, 1, 1].
        norms: (scale, shift) after each convolution, [>= channels]; the second may be None: no normalisation.
        excitation: Weight and bias of both layers of squeeze-and-excitation after the second activation,
            [>= R, >= Ce], [>= R], [>= Ce, >= R], [>= Ce]; None without.
        mid_channels: Ce.
        out_channels: Co.
        se_channels: R; 0 without excitation.
        kernel_size: Active size, 3, 5 or 7.
        stride: 1 or 2, of the depthwise convolution.
        residual: Add x at the end; needs Ci = Co and stride 1.
        activations: "relu", "hswish" or None after each normalisation.
        eps: Of each normalisation.
        plan: "speed" keeps what the three convolutions wrote for the backward pass; "memory" keeps x and the
            moments only and computes the rest again, to the same bits.

    Returns:
        y, [N, Co, ceil(H / stride), ceil(W / stride)], channels_last, and the moments of the batch,
        [3, 2 Ce + Co], without gradient: rows are mean, unbiased variance and 1 / sqrt(biased variance +
        eps); columns are the channels of the three normalisations one after another (NaN for an absent one).

    Raises:
        InputError: Shapes or options disagree, or there is one value per channel (a ValueError).
        TypeError: A tensor is not float32.
        NotImplementedError: A tensor is not on the CPU.

    Source:
        MobileNetV3, arXiv:1905.02244; batch normalisation, arXiv:1502.03167.

    Example:
        >>> import torch
        >>> from pfnas_fast.ops import train_mbconv
        >>> norms = [(torch.ones(c), torch.zeros(c)) for c in (32, 32, 8)]
        >>> y, moments = train_mbconv(
        ...     torch.randn(2, 8, 6, 6), torch.randn(32, 8, 1, 1), torch.randn(32, 1, 3, 3),
        ...     (None, None), torch.randn(8, 32, 1, 1), norms, mid_channels=24, out_channels=8,
        ...     kernel_size=3, residual=True)
        >>> y.shape, moments.shape
        (torch.Size([2, 8, 6, 6]), torch.Size([3, 56]))
    """
    if len(norms) != 3 or any(norm is not None and len(norm) != 2 for norm in norms):
        raise InputError(_fail("3 entries, each (scale, shift) or None", "norms", _lengths(norms)))
    if len(matrices) != 2:
        raise InputError(_fail("2 entries", "matrices", len(matrices)))
    if excitation is not None and len(excitation) != 4:
        raise InputError(_fail("4 tensors or None", "excitation", len(excitation)))
    if (excitation is None) != (se_channels == 0):
        raise InputError(_fail("0 without excitation and >= 1 with it", "se_channels", se_channels))
    first, second, third = ((None, None) if norm is None else norm for norm in norms)
    tensors = (
        *(x, expand_weight, depth_weight, *matrices, project_weight, *first, *second, *third),
        *((None,) * 4 if excitation is None else excitation),
    )
    codes = _codes(activations)
    options = (mid_channels, out_channels, se_channels, kernel_size, stride, residual, codes, list(eps))
    if plan not in PLANS:
        raise InputError(_fail("one of 'speed', 'memory'", "plan", repr(plan)))
    _check_tensors(tensors)
    _check_sizes(dict(zip(_NAMES, tensors, strict=True)), *options)
    x = x.contiguous(memory_format=torch.channels_last)
    keep = plan == "speed" and torch.is_grad_enabled()
    y, _, _, _, moments, *_ = _OP(x, *tensors[1:], *options, keep)
    return y, moments


def _fail(expected: str, argument: str, got: object) -> str:
    return f"train_mbconv: expected {expected} for {argument}, got {got}"


def _lengths(norms: Sequence[Sequence[Tensor] | None]) -> list[int | None]:
    return [None if norm is None else len(norm) for norm in norms]


def _codes(activations: Sequence[str | None]) -> list[int]:
    if len(activations) != 3 or any(name not in _ACTIVATIONS for name in activations):
        raise InputError(_fail("three of 'relu', 'hswish', None", "activations", list(activations)))
    return [_ACTIVATIONS[name] for name in activations]


def _check_tensors(tensors: Sequence[Tensor | None]) -> None:
    for name, tensor in zip(_NAMES, tensors, strict=True):
        if tensor is None:
            if name in ("x", "depth_weight", "project_weight", "gamma_3", "beta_3"):
                raise TypeError(_fail("a torch.Tensor", name, None))
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(_fail("a torch.Tensor", name, type(tensor).__name__))
        if tensor.dtype != torch.float32 and not (
            tensor.dtype in _HALVES and torch.is_autocast_enabled("cpu")
        ):
            raise TypeError(_fail("float32", name, str(tensor.dtype).removeprefix("torch.")))
        if tensor.device.type not in ("cpu", "meta"):
            raise NotImplementedError(_fail("a CPU tensor", name, f"one on {tensor.device.type}"))


def _check_sizes(
    tensors: dict[str, Tensor | None],
    mid_channels: int,
    out_channels: int,
    se_channels: int,
    kernel_size: int,
    stride: int,
    residual: bool,
    activations: list[int],
    eps: list[float],
) -> None:
    x, bank = tensors["x"], tensors["depth_weight"]
    assert x is not None
    assert bank is not None
    if x.ndim != 4 or 0 in x.shape:
        raise InputError(_fail("shape [N, C, H, W] with sizes >= 1", "x", list(x.shape)))
    if (
        bank.ndim != 4
        or bank.shape[1] != 1
        or bank.shape[2] != bank.shape[3]
        or bank.shape[2] not in (3, 5, 7)
    ):
        raise InputError(_fail("shape [C_max, 1, K, K] with K 3, 5 or 7", "depth_weight", list(bank.shape)))
    if kernel_size not in (3, 5, 7) or kernel_size > bank.shape[2]:
        raise InputError(_fail(f"an odd size from 3 to {bank.shape[2]}", "kernel_size", kernel_size))
    if stride not in (1, 2):
        raise InputError(_fail("1 or 2", "stride", stride))
    for name, value, least in (
        ("mid_channels", mid_channels, 1),
        ("out_channels", out_channels, 1),
        ("se_channels", se_channels, 0),
    ):
        if value < least:
            raise InputError(_fail(f"at least {least}", name, value))
    for stage in (1, 2, 3):
        if (tensors[f"gamma_{stage}"] is None) != (tensors[f"beta_{stage}"] is None):
            raise InputError(
                _fail("both scale and shift, or None in their place", "norms", f"one in {stage}")
            )
    channels = x.shape[1]
    if residual and (stride != 1 or channels != out_channels):
        raise InputError(_fail("False unless stride is 1 and Ci = Co", "residual", residual))
    if len(eps) != 3:
        raise InputError(_fail("3 entries", "eps", len(eps)))
    expands = tensors["expand_weight"] is not None
    if not expands and (mid_channels != channels or tensors["gamma_1"] is not None or activations[0] != 0):
        raise InputError(
            _fail("Ce = Ci and no first norm and activation without expansion", "mid_channels", mid_channels)
        )
    if expands and tensors["gamma_1"] is None:
        raise InputError(_fail("a first norm with expansion", "norms", None))
    shapes: dict[str, tuple[int, ...]] = {
        "expand_weight": (mid_channels, channels, 1, 1),
        "depth_weight": (mid_channels, 1, 1, 1),
        "project_weight": (out_channels, mid_channels, 1, 1),
        "se_reduce_weight": (se_channels, mid_channels),
        "se_reduce_bias": (se_channels,),
        "se_expand_weight": (mid_channels, se_channels),
        "se_expand_bias": (mid_channels,),
    }
    for stage, count in ((1, mid_channels), (2, mid_channels), (3, out_channels)):
        shapes[f"gamma_{stage}"] = shapes[f"beta_{stage}"] = (count,)
    if bank.shape[2] == 7 and kernel_size < 7:
        shapes["matrix_5"] = (25, 25)
    if bank.shape[2] > 3 and kernel_size == 3:
        shapes["matrix_3"] = (9, 9)
    for name, least in shapes.items():
        tensor = tensors[name]
        if tensor is None:
            if name.startswith("matrix") or (name.startswith("se_") and se_channels > 0):
                raise InputError(_fail(f"a tensor of shape {list(least)}", name, None))
            continue
        exact = name.startswith("matrix")
        if (
            tensor.ndim != len(least)
            or any(have < need for have, need in zip(tensor.shape, least, strict=True))
            or (exact and tuple(tensor.shape) != least)
        ):
            size = "shape" if exact else "at least shape"
            raise InputError(_fail(f"{size} {list(least)}", name, list(tensor.shape)))
    pixels = x.shape[0] * ((x.shape[2] + stride - 1) // stride) * ((x.shape[3] + stride - 1) // stride)
    if pixels < 2:
        raise InputError(_fail("more than one value per channel", "x", list(x.shape)))


def _out_size(x: Tensor, stride: int) -> tuple[int, int]:
    return (x.shape[2] + stride - 1) // stride, (x.shape[3] + stride - 1) // stride


def _output_shapes(x: Tensor, options: Sequence[Any]) -> tuple[tuple[int, ...], ...]:
    """y, and what is kept for the backward pass."""
    mid_channels, out_channels, se_channels, _, stride, *_, keep = options
    n = x.shape[0]
    height, width = _out_size(x, stride)
    mid, out = -(-mid_channels // _BLOCK), -(-out_channels // _BLOCK)
    reduced = -(-se_channels // _BLOCK)
    excited = mid if se_channels > 0 else 0
    return (
        (n, out_channels, height, width),
        (mid if keep else 0, n * x.shape[2] * x.shape[3], _BLOCK),
        (mid if keep else 0, n * height * width, _BLOCK),
        (out if keep else 0, n * height * width, _BLOCK),
        (3, 2 * mid_channels + out_channels),
        (excited, n, _BLOCK),
        (reduced, n, _BLOCK),
        (excited, n, _BLOCK),
    )


def _dense(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """x in channels_last, the parameters contiguous."""
    x = tensors[0]
    assert x is not None
    rest = (None if tensor is None else tensor.contiguous() for tensor in tensors[1:])
    return x.contiguous(memory_format=torch.channels_last), *rest


_NUM_TENSORS, _NUM_KEPT = len(_NAMES), len(_KEPT)


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, options = arguments[:_NUM_TENSORS], arguments[_NUM_TENSORS:]
    x = tensors[0]
    y_shape, *kept_shapes = _output_shapes(x, options)
    y = empty_channels_last(x, y_shape)
    kept = tuple(empty(x, shape) for shape in kept_shapes)
    _C.train_mbconv_forward(_dense(tensors), kept, y, *options)
    return y, *kept


def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    x = arguments[0]
    y_shape, *kept_shapes = _output_shapes(x, arguments[_NUM_TENSORS:])
    y = torch.empty(y_shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return y, *(x.new_empty(shape) for shape in kept_shapes)


def _parameter_gradients(tensors: Sequence[Tensor | None], kernel_size: int) -> tuple[Tensor, ...]:
    """Room for each parameter's gradient; [0] in place of those without a part."""
    x, bank = tensors[0], tensors[2]
    assert x is not None
    assert bank is not None
    absent = [tensor is None for tensor in tensors]
    absent[3] |= not (bank.shape[-1] == 7 and kernel_size < 7)
    absent[4] |= not (bank.shape[-1] > 3 and kernel_size == 3)
    return tuple(
        x.new_empty(0) if no or tensor is None else tensor.new_empty(tensor.shape)
        for tensor, no in zip(tensors[1:], absent[1:], strict=True)
    )


def _backward(grad_y: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    tensors, kept = arguments[:_NUM_TENSORS], arguments[_NUM_TENSORS : _NUM_TENSORS + _NUM_KEPT]
    *options, need_x = arguments[_NUM_TENSORS + _NUM_KEPT :]
    x = tensors[0]
    grad_x = empty_channels_last(x, tuple(x.shape)) if need_x else x.new_empty(0)
    gradients = (grad_x, *_parameter_gradients(tensors, options[3]))
    wanted = tuple(g if g.numel() or g.ndim > 1 else None for g in gradients)
    grad_y = grad_y.contiguous(memory_format=torch.channels_last)
    kept = tuple(tensor.contiguous() for tensor in kept)
    _C.train_mbconv_backward(grad_y, _dense(tensors), kept, wanted, *options)
    return gradients


def _fake_backward(grad_y: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *options, need_x = arguments[_NUM_TENSORS + _NUM_KEPT :]
    x = arguments[0]
    grad_x = torch.empty_like(x, memory_format=torch.channels_last) if need_x else x.new_empty(0)
    return grad_x, *_parameter_gradients(arguments[:_NUM_TENSORS], options[3])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *kept = output
    ctx.options = inputs[_NUM_TENSORS:]
    ctx.save_for_backward(*inputs[:_NUM_TENSORS], *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # else autograd fills a zero gradient for every kept tensor


def _arguments_of_backward(
    ctx: Any, needed: tuple[bool, ...], grad_y: Tensor | None, *_: Tensor | None
) -> tuple[Any, ...] | None:
    return None if grad_y is None else (grad_y, *ctx.saved_tensors, *ctx.options, needed[0])


def _gradients(
    _ctx: Any, needed: tuple[bool, ...], gradients: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    # A gradient of shape [0] stands for "no part in this call".
    wanted = zip(gradients, needed[:_NUM_TENSORS], strict=True)
    grads = (g if want and (g.numel() or g.ndim > 1) else None for g, want in wanted)
    return *grads, *(None,) * (len(needed) - _NUM_TENSORS)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    raise NotImplementedError(
        "train_mbconv: its gradient cannot be differentiated again; that of the twin in"
        " pfnas_fast.ops.reference can"
    )


_OP = Op(
    "train_mbconv",
    forward=_forward,
    backward=_backward,
    arguments_of_backward=_arguments_of_backward,
    gradients=_gradients,
    setup_context=_setup_context,
)
torch.library.register_fake("pfnas_fast::train_mbconv", _fake_forward, lib=LIBRARY)
torch.library.register_fake("pfnas_fast::train_mbconv_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autocast("pfnas_fast::train_mbconv", "cpu", torch.float32, lib=LIBRARY)
torch.library.register_autograd("pfnas_fast::train_mbconv_backward", _no_second_derivative, lib=LIBRARY)

# SPDX-License-Identifier: Apache-2.0
"""Depthwise convolution with a run-time channel count and kernel size (Once-for-All, arXiv:1908.09791).

Call path: `dynamic_depthwise_conv` checks and lays out -> torch.ops.pfnas_fast.dynamic_depthwise_conv ->
`_forward` allocates y -> _C fills Params, picks the kernel by sizes and CPU tier, runs it without the GIL.
On a GPU it also allocates the workspace, and _C launches on torch's current stream and returns.
Autograd calls torch.ops.pfnas_fast.dynamic_depthwise_conv_backward: every wanted gradient in one pass.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pfnas_fast.errors import InputError
from pfnas_fast.ops._library import _C, LIBRARY
from pfnas_fast.ops._memory import empty_channels_last

__all__ = ["dynamic_depthwise_conv"]

_ARGUMENTS = "Tensor x, Tensor weight, Tensor? matrix_5, Tensor? matrix_3, int kernel_size, int stride"
_HALVES = (torch.bfloat16, torch.float16)
_TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)
LIBRARY.define(f"dynamic_depthwise_conv({_ARGUMENTS}) -> Tensor", tags=_TAGS)
LIBRARY.define(
    f"dynamic_depthwise_conv_backward(Tensor grad_y, {_ARGUMENTS}, bool need_x, bool need_filter)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_matrix_5, Tensor grad_matrix_3)",
    tags=_TAGS,
)


def dynamic_depthwise_conv(
    x: Tensor,
    weight: Tensor,
    matrix_5: Tensor | None = None,
    matrix_3: Tensor | None = None,
    *,
    kernel_size: int,
    stride: int = 1,
) -> Tensor:
    """Convolve each active channel with the filter derived from its largest one.

    A smaller filter is a learned linear map of the centre of the next larger one: the 5x5 filter is
    ``matrix_5 @ vec(centre of the bank)``, the 3x3 filter ``matrix_3 @ vec(centre of the 5x5 filter)``.
    Padding is ``kernel_size // 2``. Runs on the CPU in float32, also under autocast (which casts up), and on
    CUDA devices, where the build has them, in float32, bfloat16 or float16 storage with float32 arithmetic
    (autocast casts to its own type). Derivatives are of first order only: differentiating a gradient again
    raises.

    Args:
        x: Input, [N, C, H, W], float32 (on CUDA also bfloat16, float16). C may be less than the bank's. An
            input that is not channels_last in memory is copied into that layout first (one pass over it, in
            every call).
        weight: Filter bank, [C_max, 1, K_max, K_max], K_max 3, 5 or 7. Only its first C rows take part; the
            gradient of the others is zero. Dtype and device of `x`, as for the matrices.
        matrix_5: Map from 7x7 to 5x5 filters, [25, 25]. Needed where K_max is 7 and `kernel_size` is less. A
            matrix that is not needed may be given; its gradient stays None.
        matrix_3: Map from 5x5 to 3x3 filters, [9, 9]. Needed where K_max is 7 or 5 and `kernel_size` is 3.
        kernel_size: Active size, 3, 5 or 7, at most K_max.
        stride: 1 or 2.

    Returns:
        [N, C, ceil(H / stride), ceil(W / stride)], dtype of `x`, channels_last.

    Raises:
        InputError: Shapes or devices disagree, or `kernel_size` or `stride` is not one of the choices (a
            ValueError).
        TypeError: A tensor's dtype is not supported on its device, or dtypes differ.
        NotImplementedError: A tensor is neither on the CPU nor on a CUDA device that this build has kernels
            for.

    Source:
        Once-for-All, arXiv:1908.09791, section 3.

    Example:
        >>> import torch
        >>> from pfnas_fast.ops import dynamic_depthwise_conv
        >>> bank = torch.randn(16, 1, 7, 7)
        >>> x = torch.randn(2, 8, 10, 10).to(memory_format=torch.channels_last)
        >>> dynamic_depthwise_conv(x, bank, torch.eye(25), torch.eye(9), kernel_size=3, stride=2).shape
        torch.Size([2, 8, 5, 5])
    """
    _check(x, weight, matrix_5, matrix_3, kernel_size, stride)
    x = x.contiguous(memory_format=torch.channels_last)
    return torch.ops.pfnas_fast.dynamic_depthwise_conv(x, weight, matrix_5, matrix_3, kernel_size, stride)


def _fail(expected: str, argument: str, got: object) -> str:
    return f"dynamic_depthwise_conv: expected {expected} for {argument}, got {got}"


def _check_tensor(tensor: Tensor, argument: str, x: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(_fail("a torch.Tensor", argument, type(tensor).__name__))
    device = tensor.device.type
    if device not in ("cpu", "meta") and not (device == "cuda" and _C.cuda_built):
        built = "a CPU or CUDA tensor" if _C.cuda_built else "a CPU tensor (this build has no CUDA kernels)"
        raise NotImplementedError(_fail(built, argument, f"one on {device}"))
    if tensor.device != x.device:
        raise InputError(
            _fail(f"a tensor on {x.device} (the device of x)", argument, f"one on {tensor.device}")
        )
    dtype = str(tensor.dtype).removeprefix("torch.")
    if device == "cuda":
        if tensor.dtype not in (torch.float32, *_HALVES):
            raise TypeError(_fail("float32, bfloat16 or float16", argument, dtype))
        if tensor.dtype != x.dtype and not torch.is_autocast_enabled("cuda"):
            raise TypeError(_fail(f"{str(x.dtype).removeprefix('torch.')} (the dtype of x)", argument, dtype))
    elif tensor.dtype != torch.float32 and not (tensor.dtype in _HALVES and torch.is_autocast_enabled("cpu")):
        raise TypeError(_fail("float32", argument, dtype))


def _check(
    x: Tensor, weight: Tensor, matrix_5: Tensor | None, matrix_3: Tensor | None, kernel_size: int, stride: int
) -> None:
    _check_tensor(x, "x", x)
    _check_tensor(weight, "weight", x)
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise InputError(_fail("shape [N, C, H, W] with C, H, W >= 1", "x", list(x.shape)))
    if (
        weight.ndim != 4
        or weight.shape[1] != 1
        or weight.shape[2] != weight.shape[3]
        or weight.shape[2] not in (3, 5, 7)
    ):
        raise InputError(_fail("shape [C_max, 1, K, K] with K 3, 5 or 7", "weight", list(weight.shape)))
    channels, max_channels, max_kernel = x.shape[1], weight.shape[0], weight.shape[2]
    if channels > max_channels:
        raise InputError(_fail(f"at least {channels} filters (the channels of x)", "weight", max_channels))
    if kernel_size not in (3, 5, 7) or kernel_size > max_kernel:
        raise InputError(_fail(f"an odd size from 3 to {max_kernel}", "kernel_size", kernel_size))
    if stride not in (1, 2):
        raise InputError(_fail("1 or 2", "stride", stride))
    if max_kernel == 7 and kernel_size < 7:
        _check_matrix(matrix_5, "matrix_5", 25, x, f"kernel_size {kernel_size} of a 7x7 bank")
    if max_kernel > 3 and kernel_size == 3:
        _check_matrix(matrix_3, "matrix_3", 9, x, f"kernel_size 3 of a {max_kernel}x{max_kernel} bank")


def _check_matrix(matrix: Tensor | None, argument: str, size: int, x: Tensor, why: str) -> None:
    if matrix is None:
        raise InputError(_fail(f"a [{size}, {size}] tensor ({why})", argument, None))
    _check_tensor(matrix, argument, x)
    if tuple(matrix.shape) != (size, size):
        raise InputError(_fail(f"shape [{size}, {size}]", argument, list(matrix.shape)))


def _uses(weight: Tensor, kernel_size: int) -> tuple[bool, bool]:
    """Whether matrix_5 and matrix_3 take part in the derivation."""
    max_kernel = weight.shape[-1]
    return max_kernel == 7 and kernel_size < 7, max_kernel > 3 and kernel_size == 3


def _output_shape(x: Tensor, stride: int) -> tuple[int, int, int, int]:
    n, c, h, w = x.shape
    return n, c, (h + stride - 1) // stride, (w + stride - 1) // stride


def _forward(
    run: Callable[..., None],
    workspace: Callable[..., tuple[Tensor, ...]],
    x: Tensor,
    weight: Tensor,
    matrix_5: Tensor | None,
    matrix_3: Tensor | None,
    kernel_size: int,
    stride: int,
) -> Tensor:
    """`run` is the compiled module's function for the device, `workspace` what it needs besides."""
    x = x.contiguous(memory_format=torch.channels_last)
    y = empty_channels_last(x, _output_shape(x, stride))
    run(
        x,
        weight.contiguous(),
        _contiguous(matrix_5),
        _contiguous(matrix_3),
        kernel_size,
        stride,
        *workspace(x, weight, kernel_size, stride, backward=False),
        y,
    )
    return y


def _contiguous(matrix: Tensor | None) -> Tensor | None:
    return None if matrix is None else matrix.contiguous()


def _empty_filter_gradients(
    weight: Tensor, kernel_size: int, need_filter: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to be filled; [0] in place of those that are not wanted or have no part in the derivation."""
    uses_5, uses_3 = _uses(weight, kernel_size)
    grad_weight = weight.new_zeros(weight.shape) if need_filter else weight.new_empty(0)
    grad_5 = weight.new_zeros(25, 25) if need_filter and uses_5 else weight.new_empty(0)
    grad_3 = weight.new_zeros(9, 9) if need_filter and uses_3 else weight.new_empty(0)
    return grad_weight, grad_5, grad_3


def _backward(
    run: Callable[..., None],
    workspace: Callable[..., tuple[Tensor, ...]],
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    matrix_5: Tensor | None,
    matrix_3: Tensor | None,
    kernel_size: int,
    stride: int,
    need_x: bool,
    need_filter: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_x = empty_channels_last(x, tuple(x.shape)) if need_x else x.new_empty(0)
    gradients = (grad_x, *_empty_filter_gradients(weight, kernel_size, need_filter))
    run(
        grad_y.contiguous(memory_format=torch.channels_last),
        x.contiguous(memory_format=torch.channels_last),
        weight.contiguous(),
        _contiguous(matrix_5),
        _contiguous(matrix_3),
        kernel_size,
        stride,
        *workspace(x, weight, kernel_size, stride, backward=True),
        *(gradient if gradient.numel() or gradient.ndim > 1 else None for gradient in gradients),
    )
    return gradients


def _no_workspace(x: Tensor, weight: Tensor, kernel_size: int, stride: int, *, backward: bool) -> tuple[()]:
    return ()


def _cuda_workspace(
    module: Any, x: Tensor, weight: Tensor, kernel_size: int, stride: int, *, backward: bool
) -> tuple[Tensor]:
    """Scratch of one call, float32: memory of torch's allocator, so that CUDA graphs may capture the op."""
    count = module.dynamic_depthwise_conv_cuda_workspace(
        x.shape, kernel_size, weight.shape[-1], stride, backward
    )
    return (torch.empty(count, dtype=torch.float32, device=x.device),)


def cuda_implementations(module: Any) -> dict[str, Callable[..., Any]]:
    """The op's CUDA implementations by name, over a compiled module: `_C`, or the tests' emulator."""
    workspace = partial(_cuda_workspace, module)
    return {
        "dynamic_depthwise_conv": partial(_forward, module.dynamic_depthwise_conv_cuda_forward, workspace),
        "dynamic_depthwise_conv_backward": partial(
            _backward, module.dynamic_depthwise_conv_cuda_backward, workspace
        ),
    }


def _autocast_cuda(
    x: Tensor, weight: Tensor, matrix_5: Tensor | None, matrix_3: Tensor | None, kernel_size: int, stride: int
) -> Tensor:
    """Cast to the type of the autocast region, whichever the user chose for it."""
    dtype = torch.get_autocast_dtype("cuda")
    tensors = (None if t is None else t.to(dtype) for t in (x, weight, matrix_5, matrix_3))
    with torch.autocast("cuda", enabled=False):
        return torch.ops.pfnas_fast.dynamic_depthwise_conv(*tensors, kernel_size, stride)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, matrix_5, matrix_3, ctx.kernel_size, ctx.stride = inputs
    ctx.save_for_backward(x, weight, matrix_5, matrix_3)


def _autograd(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, matrix_5, matrix_3 = ctx.saved_tensors
    need_x, *need_filter = ctx.needs_input_grad[:4]
    gradients = torch.ops.pfnas_fast.dynamic_depthwise_conv_backward(
        grad_y, x, weight, matrix_5, matrix_3, ctx.kernel_size, ctx.stride, need_x, any(need_filter)
    )
    wanted = zip(
        gradients, ctx.needs_input_grad[:4], (True, True, *_uses(weight, ctx.kernel_size)), strict=True
    )
    return *(gradient if needed and used else None for gradient, needed, used in wanted), None, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    raise NotImplementedError(
        "dynamic_depthwise_conv: its gradient cannot be differentiated again; that of the twin"
        " in pfnas_fast.ops.reference can"
    )


def _fake_forward(
    x: Tensor, weight: Tensor, matrix_5: Tensor | None, matrix_3: Tensor | None, kernel_size: int, stride: int
) -> Tensor:
    shape = _output_shape(x, stride)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _fake_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    matrix_5: Tensor | None,
    matrix_3: Tensor | None,
    kernel_size: int,
    stride: int,
    need_x: bool,
    need_filter: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.channels_last) if need_x else x.new_empty(0)
    return (grad_x, *_empty_filter_gradients(weight, kernel_size, need_filter))


LIBRARY.impl(
    "dynamic_depthwise_conv", partial(_forward, _C.dynamic_depthwise_conv_forward, _no_workspace), "CPU"
)
LIBRARY.impl(
    "dynamic_depthwise_conv_backward",
    partial(_backward, _C.dynamic_depthwise_conv_backward, _no_workspace),
    "CPU",
)
if _C.cuda_built:
    for _name, _implementation in cuda_implementations(_C).items():
        LIBRARY.impl(_name, _implementation, "CUDA")
    LIBRARY.impl("dynamic_depthwise_conv", _autocast_cuda, "AutocastCUDA")
torch.library.register_fake("pfnas_fast::dynamic_depthwise_conv", _fake_forward, lib=LIBRARY)
torch.library.register_fake("pfnas_fast::dynamic_depthwise_conv_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autocast("pfnas_fast::dynamic_depthwise_conv", "cpu", torch.float32, lib=LIBRARY)
torch.library.register_autograd(
    "pfnas_fast::dynamic_depthwise_conv", _autograd, setup_context=_setup_context, lib=LIBRARY
)
torch.library.register_autograd(
    "pfnas_fast::dynamic_depthwise_conv_backward", _no_second_derivative, lib=LIBRARY
)

# SPDX-License-Identifier: Apache-2.0
"""Memory of the ops' large outputs: reused, so that a training step does not ask the system for it anew.

`empty_channels_last` and `empty` are what an op's CPU implementation calls in place of `torch.empty`. A
float32 tensor of 2 MiB or more gets a block of a process-wide pool (csrc/common/tensor_pool.h) that it gives
back when it dies.
"""

import math

import torch
from torch import Tensor

from pfnas_fast.ops._library import _C

__all__ = ["empty", "empty_channels_last", "pooled_bytes", "release_memory"]

_MIN_POOLED_FLOATS = (2 << 20) // 4  # a huge page; torch's allocator reuses smaller blocks itself


def empty_channels_last(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An uninitialised [N, C, H, W] in channels_last; device and dtype of `like`."""
    n, c, h, w = shape
    if not _is_pooled(like, n * c * h * w):
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
    return _pooled(like, shape, (h * w * c, 1, w * c, c))


def empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An uninitialised contiguous tensor of up to four dimensions; device and dtype of `like`."""
    if not _is_pooled(like, math.prod(shape)):
        return like.new_empty(shape)
    return _pooled(like, shape, tuple(math.prod(shape[d + 1 :]) for d in range(len(shape))))


def _is_pooled(like: Tensor, num_floats: int) -> bool:
    return like.device.type == "cpu" and like.dtype == torch.float32 and num_floats >= _MIN_POOLED_FLOATS


def _pooled(like: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    tensor = _C.pooled_empty(like, shape, strides)
    fills = torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]
    if fills and torch.are_deterministic_algorithms_enabled():
        tensor.fill_(float("nan"))  # as torch.empty does
    return tensor


def pooled_bytes() -> tuple[int, int]:
    """Bytes behind living tensors, and bytes kept for the next ones."""
    return _C.tensor_pool_bytes()


def release_memory() -> None:
    """Give kept memory back to the system: blocks that wait for the next large tensors, and kernels' scratch.

    All blocks together never exceed 5/4 of what was in use at once, and those that wait never a quarter of
    the machine's memory; call this where that is still too much, between training and something else, for
    example. Scratch of other threads goes when they next run a kernel. Not to be called while kernels run.

    Example:
        >>> import pfnas_fast as pf
        >>> pf.ops.release_memory()
    """
    _C.release_tensor_pool()
    _C.release_scratch()

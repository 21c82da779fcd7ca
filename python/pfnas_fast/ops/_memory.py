# SPDX-License-Identifier: Apache-2.0
"""Memory of the ops' large outputs: reused, so that a training step does not ask the system for it anew.

`empty_channels_last` is what an op's CPU implementation calls in place of `torch.empty`. A tensor of 2 MiB
or more gets a block of a process-wide pool (csrc/common/tensor_pool.h) that it gives back when it dies.
"""

import torch
from torch import Tensor

from pfnas_fast.ops._library import _C

__all__ = ["empty_channels_last", "pooled_bytes", "release_memory"]

_MIN_POOLED_FLOATS = (2 << 20) // 4  # a huge page; torch's allocator reuses smaller blocks itself


def empty_channels_last(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An uninitialised float32 [N, C, H, W] in channels_last; device and dtype of `like`."""
    n, c, h, w = shape
    if like.device.type != "cpu" or like.dtype != torch.float32 or n * c * h * w < _MIN_POOLED_FLOATS:
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
    tensor = _C.pooled_empty(like, shape, (h * w * c, 1, w * c, c))
    fills = torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]
    if fills and torch.are_deterministic_algorithms_enabled():
        tensor.fill_(float("nan"))  # as torch.empty does
    return tensor


def pooled_bytes() -> tuple[int, int]:
    """Bytes behind living tensors, and bytes kept for the next ones."""
    return _C.tensor_pool_bytes()


def release_memory() -> None:
    """Give the memory that is kept for the next large tensors back to the system.

    Kept and living memory together never exceed 5/4 of what was alive at once, and what is kept never a
    quarter of the machine's memory; call this where that is still too much, between training and something
    else, for example.

    Example:
        >>> import pfnas_fast as pf
        >>> pf.ops.release_memory()
    """
    _C.release_tensor_pool()

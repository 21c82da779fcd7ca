# SPDX-License-Identifier: Apache-2.0
"""Data parallel training under `torchrun`, without wrapping the supernet.

All ranks draw the same paths (same seed), different images, and average gradients after the backward pass. A
parameter that no path of the step used has no gradient on any rank, so it takes no part and keeps `grad`
None.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) outside torchrun."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def average_gradients(net: nn.Module) -> None:
    """Replace every gradient by its mean over the ranks, in one message."""
    _, size = rank_and_size()
    if size == 1:
        return
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    flat /= size
    offset = 0
    for gradient in gradients:
        gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
        offset += gradient.numel()


def broadcast_parameters(net: nn.Module) -> None:
    """Start all ranks from rank 0's weights and buffers."""
    _, size = rank_and_size()
    if size > 1:
        for tensor in net.state_dict().values():
            dist.broadcast(tensor, src=0)

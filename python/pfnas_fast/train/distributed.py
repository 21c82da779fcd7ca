# SPDX-License-Identifier: Apache-2.0
"""Data parallel training under `torchrun`, without wrapping the supernet.

All ranks draw the same paths (same seed), different images, and average gradients after the backward pass. A
parameter that no path of the step used has no gradient on any rank, so it takes no part and keeps `grad`
None. The run folder must be one that all ranks see; only rank 0 writes to it.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

# Ranks wait here while rank 0 labels and searches.
_TIMEOUT = timedelta(hours=12)


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) outside torchrun."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def start_processes(device: str) -> None:
    """Join the other processes if `torchrun` started this one; otherwise do nothing.

    Args:
        device: "cpu" (gloo) or "cuda" (nccl; each process takes the GPU of its local rank).
    """
    if not dist.is_available() or not dist.is_torchelastic_launched() or dist.is_initialized():
        return
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=_TIMEOUT)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def decide_together(value: bool) -> bool:
    """Rank 0's value, on every rank; waits for all ranks."""
    _, size = rank_and_size()
    if size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return bool(box[0])


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

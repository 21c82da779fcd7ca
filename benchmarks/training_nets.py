# SPDX-License-Identifier: Apache-2.0
"""Pairs of equal nets, one per backend, and the check that their training steps do equal work.

The baseline everywhere: backend="reference", the same sampled path in the sliced supernet, F.hardswish,
channels_last, huge pages for torch's allocator.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

__all__ = ["assert_same", "channels_last", "gradients", "make_pair"]


Net = TypeVar("Net", bound=nn.Module)


def make_pair(build: Callable[[str], Net]) -> tuple[Net, Net]:
    """(fast, reference) with the same weights, in training mode."""
    torch.manual_seed(0)
    reference = build("reference").train()
    fast = build("fast").train()
    fast.load_state_dict(reference.state_dict())
    return fast, reference


def channels_last(*shape: int, seed: int = 0) -> Tensor:
    """Normal values, [N, C, H, W] in channels_last memory."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.contiguous(memory_format=torch.channels_last)


def assert_same(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float = 1e-2) -> None:
    """Norm of the difference against the norm, over all tensors together.

    Not element by element: ReLUs whose input rounds to the other side of zero move single values, and the
    gradient of a scale before a normalisation is a sum that cancels to almost nothing.
    """
    pairs = [(a.detach(), b.detach()) for a, b in zip(ours, theirs, strict=True)]
    error = sum(float((a - b).square().sum()) for a, b in pairs)
    norm = sum(float(b.square().sum()) for _, b in pairs)
    assert error <= tolerance**2 * norm, f"the two sides differ by {(error / norm) ** 0.5}"


def gradients(net: nn.Module) -> list[Tensor]:
    """Of all parameters on the path, in the order of the net."""
    return [p.grad for p in net.parameters() if p.grad is not None]

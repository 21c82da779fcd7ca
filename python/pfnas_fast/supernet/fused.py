# SPDX-License-Identifier: Apache-2.0
"""When blocks of ``backend="fast"`` train through one op, and what the op leaves to its caller."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def load_train_op(backend: str) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The compiled op, imported at construction (a missing build is loud); None for the reference backend."""
    if backend != "fast":
        return None
    from pfnas_fast.ops import train_mbconv

    return train_mbconv


def trains_fused(x: Tensor, block: nn.Module, norms: Sequence[nn.BatchNorm2d]) -> bool:
    """Whether a block on the CPU normalises with the moments of this batch and nothing looks inside.

    False on other devices, in evaluation, for frozen normalisation (layers in evaluation mode inside a
    training net), while `recalibrate` measures, while fixed statistics are in use, and with hooks on a layer
    of the block: then the layers run one by one.

    Args:
        x: The block's input.
        block: Owner of the layers; its own hooks do not count.
        norms: The layers of `block` that normalise.
    """
    if x.device.type != "cpu":
        return False
    for norm in norms:
        if not norm.training:
            return False
        if getattr(norm, "collector", None) is not None or getattr(norm, "statistics", None) is not None:
            return False
    return not any(_is_hooked(layer) for layer in block.modules() if layer is not block)


def _is_hooked(layer: nn.Module) -> bool:
    return bool(
        layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    )


def move_running_statistics(norms: Sequence[nn.BatchNorm2d], widths: Sequence[int], moments: Tensor) -> None:
    """Do what `torch.nn.BatchNorm2d` does with a batch's moments in training mode.

    Args:
        norms: Layers with running buffers.
        widths: Active channels of each layer.
        moments: [2 or more, sum of the widths]: mean and unbiased variance.
    """
    running: list[Tensor] = []
    batch: list[Tensor] = []
    momenta: list[float] = []
    means, variances = moments[0].split(list(widths)), moments[1].split(list(widths))
    for norm, width, mean, variance in zip(norms, widths, means, variances, strict=True):
        if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
            continue  # track_running_stats=False
        norm.num_batches_tracked.add_(1)
        momentum = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        running += [norm.running_mean.narrow(0, 0, width), norm.running_var.narrow(0, 0, width)]
        batch += [mean, variance]
        momenta.append(momentum)
    if len(set(momenta)) == 1:
        torch._foreach_lerp_(running, batch, momenta[0])  # pyright: ignore[reportPrivateImportUsage]
        return
    for index, momentum in enumerate(momenta):
        for at in (2 * index, 2 * index + 1):
            running[at].lerp_(batch[at], momentum)

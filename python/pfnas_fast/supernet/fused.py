# SPDX-License-Identifier: Apache-2.0
"""When blocks of ``backend="fast"`` run as one op with the moments of their batch, in training and
recalibration, and what the op leaves to its caller."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pfnas_fast.errors import InputError


class MomentsCollector:
    """A `DynamicBatchNorm2d.collector` that can do without the tensor: it is told the batch's moments."""

    def take(self, count: int, mean: Tensor, unbiased_var: Tensor) -> None:
        """Moments of one batch: values per channel, and float32 [C] each."""
        raise NotImplementedError


def load_train_op(backend: str) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The compiled op, imported at construction (a missing build is loud); None for the reference backend."""
    if backend != "fast":
        return None
    from pfnas_fast.ops import train_mbconv

    return train_mbconv


def load_norm_op(backend: str) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """As `load_train_op`, for a normalisation that no block owns."""
    if backend != "fast":
        return None
    from pfnas_fast.ops import batch_norm_act

    return batch_norm_act


def set_training_plan(net: nn.Module, plan: str) -> None:
    """Choose what the blocks of a ``backend="fast"`` net keep between forward and backward.

    Args:
        net: The net, or a part of it; changed in place.
        plan: "speed" (the default) keeps what the convolutions wrote. "memory" keeps each block's input and
            moments only and computes the rest again in the backward pass: the same numbers to the bit.

    Raises:
        InputError: Another plan, or no block of `net` has one (``backend="reference"``).

    Example:
        >>> from pfnas_fast.space import load_space
        >>> from pfnas_fast.supernet import Backbone, set_training_plan
        >>> set_training_plan(Backbone(load_space("tiny"), backend="fast"), "memory")
    """
    if plan not in ("speed", "memory"):
        raise InputError(f"set_training_plan: expected one of 'speed', 'memory' for plan, got {plan!r}")
    blocks = [module for module in net.modules() if getattr(module, "_train_op", None) is not None]
    if not blocks:
        raise InputError("set_training_plan: expected a net with backend='fast', got one without such blocks")
    for block in blocks:
        block.plan = plan  # pyright: ignore[reportArgumentType]


def trains_fused(x: Tensor, block: nn.Module, norms: Sequence[nn.BatchNorm2d]) -> bool:
    """Whether a block on the CPU normalises with the moments of this batch and nothing looks inside.

    That is so in training, and while `recalibrate` measures. False on other devices, in evaluation, for
    frozen normalisation (layers in evaluation mode inside a training net), while fixed statistics are in use,
    and with hooks on a layer of the block: then the layers run one by one.

    Args:
        x: The block's input.
        block: Owner of the layers; its own hooks do not count.
        norms: The layers of `block` that normalise.
    """
    if x.device.type != "cpu":
        return False
    if _measures(norms):
        least_pixels = x.shape[0] * ((x.shape[2] + 1) // 2) * ((x.shape[3] + 1) // 2)
        if x.dtype != torch.float32 or x.requires_grad or least_pixels < 2:
            return False
    elif any(
        not norm.training
        or getattr(norm, "collector", None) is not None
        or getattr(norm, "statistics", None) is not None
        for norm in norms
    ):
        return False
    return not any(_is_hooked(layer) for layer in block.modules() if layer is not block)


def _measures(norms: Sequence[nn.BatchNorm2d]) -> bool:
    return all(isinstance(getattr(norm, "collector", None), MomentsCollector) for norm in norms)


def _is_hooked(layer: nn.Module) -> bool:
    return bool(
        layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    )


def hand_over_moments(
    norms: Sequence[nn.BatchNorm2d], widths: Sequence[int], moments: Tensor, x: Tensor, y: Tensor
) -> None:
    """Give a batch's moments to whom they are for: the running statistics, or `recalibrate`.

    Args:
        norms: As in `move_running_statistics`, the first three of a block with expansion or the last ones.
        widths: Active channels of each layer.
        moments: [2 or more, sum of the widths]: mean and unbiased variance.
        x: The block's input; what is expanded has its pixels.
        y: The block's output; everything else has its pixels.
    """
    if not _measures(norms):
        move_running_statistics(norms, widths, moments)
        return
    means, variances = moments[0].split(list(widths)), moments[1].split(list(widths))
    for index, norm in enumerate(norms):
        like = x if index == len(norms) - 3 else y
        collector: Any = getattr(norm, "collector", None)
        collector.take(like.shape[0] * like.shape[2] * like.shape[3], means[index], variances[index])


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
    counters = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    if counters:
        torch._foreach_add_(counters, 1)  # pyright: ignore[reportPrivateImportUsage]
    for norm, width, mean, variance in zip(norms, widths, means, variances, strict=True):
        if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
            continue  # track_running_stats=False
        momentum = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        running += [norm.running_mean[:width], norm.running_var[:width]]
        batch += [mean, variance]
        momenta.append(momentum)
    if len(set(momenta)) == 1:
        torch._foreach_lerp_(running, batch, momenta[0])  # pyright: ignore[reportPrivateImportUsage]
        return
    for index, momentum in enumerate(momenta):
        for at in (2 * index, 2 * index + 1):
            running[at].lerp_(batch[at], momentum)

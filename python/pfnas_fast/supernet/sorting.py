# SPDX-License-Identifier: Apache-2.0
"""Channel sorting: the important middle channels of every block come first, for the narrower widths."""

from __future__ import annotations

import torch
from torch import Tensor

from pfnas_fast.errors import InputError
from pfnas_fast.space import se_channels
from pfnas_fast.supernet.backbone import Backbone
from pfnas_fast.supernet.layers import DynamicBatchNorm2d, DynamicMBConv, DynamicSE


def reorganize_middle_weights(backbone: Backbone, *, expand_ratio_stage: int = 0) -> None:
    """Permute the middle channels of every block, the most important first, without changing the largest net.

    The importance of a channel is the L1 norm of the projection's weights that read it. One permutation goes
    through the projection, the depthwise bank and its normalisation (running statistics included), the
    expansion and its normalisation, and the excitation, whose hidden channels are sorted likewise. Nets at
    least as wide as width number `expand_ratio_stage` keep their function; narrower ones now get the best
    channels.

    Parameters change in place: momenta that an optimiser holds and statistics recalibrated before belong to
    the old order.

    Args:
        backbone: The backbone to sort.
        expand_ratio_stage: Which width, from 0 for the largest, keeps its function: only the channels that it
            has are sorted. Call with 0 before the second largest width is trained, with 1 before the third.

    Raises:
        InputError: no block has so many widths.

    Source: Once-for-All, arXiv:1908.09791, section 3.3 (elastic width). OFA's code sorts all hidden
    channels of the excitation in every phase, which changes the middle nets; here a later phase leaves those
    beyond the kept width alone.
    """
    num_widths = max(len(block.expand_ratios) for block in backbone.space.blocks)
    if not 0 <= expand_ratio_stage < num_widths:
        raise InputError(
            f"re_organize_middle_weights: expected 0 to {num_widths - 1} for expand_ratio_stage, "
            f"got {expand_ratio_stage}"
        )
    for block in backbone.blocks:
        if not isinstance(block, DynamicMBConv):
            raise RuntimeError(f"reorganize_middle_weights: unexpected block {type(block).__name__}")
        if expand_ratio_stage < len(block.block.expand_ratios):
            ratio = block.block.expand_ratios[-1 - expand_ratio_stage]
            _sort_block(block, block.block.mid_channels(ratio))


@torch.no_grad()
def _sort_block(block: DynamicMBConv, num_sorted: int) -> None:
    """Sort the first `num_sorted` middle channels of `block`."""
    importance = block.project_conv.weight.abs().sum((0, 2, 3))  # [C_mid]
    order = _descending_prefix(importance, num_sorted)
    _permute(block.project_conv.weight, 1, order)
    _permute(block.depth_conv.weight, 0, order)
    _permute(block.expand_conv.weight, 0, order)
    for norm in (block.depth_bn, block.expand_bn):
        _permute_norm(norm, order)
    if block.se is not None:
        _sort_excitation(block.se, order, se_channels(num_sorted))


def _sort_excitation(se: DynamicSE, order: Tensor, num_sorted: int) -> None:
    """Follow the outer permutation `order`, then sort the first `num_sorted` hidden channels."""
    _permute(se.reduce.weight, 1, order)
    _permute(se.expand.weight, 0, order)
    _permute(se.expand.bias, 0, order)
    hidden_order = _descending_prefix(se.expand.weight.abs().sum(0), num_sorted)
    _permute(se.expand.weight, 1, hidden_order)
    _permute(se.reduce.weight, 0, hidden_order)
    _permute(se.reduce.bias, 0, hidden_order)


def _descending_prefix(importance: Tensor, num_sorted: int) -> Tensor:
    """Indices that sort the first `num_sorted` entries in descending order and leave the others alone."""
    order = torch.arange(importance.numel(), device=importance.device)
    order[:num_sorted] = importance[:num_sorted].argsort(descending=True, stable=True)
    return order


def _permute_norm(norm: DynamicBatchNorm2d, order: Tensor) -> None:
    for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        if values is None:
            raise RuntimeError("reorganize_middle_weights: a batch normalisation lost its buffers")
        _permute(values, 0, order)


def _permute(values: Tensor, dim: int, order: Tensor) -> None:
    values.copy_(values.index_select(dim, order))

# SPDX-License-Identifier: Apache-2.0
"""Slow, obvious twins of the compiled ops: pure PyTorch, any device and dtype. The tests' ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from pfnas_fast.ops.path_score import RankerTables

__all__ = [
    "apply_activation",
    "batch_norm_act",
    "derive_filter",
    "dynamic_depthwise_conv",
    "dynamic_pointwise_conv",
    "path_cost",
    "path_score",
    "train_mbconv",
]


def _centre(weight: Tensor, size: int) -> Tensor:
    """The centred `size` x `size` part of [C, 1, K, K]."""
    border = (weight.shape[-1] - size) // 2
    return weight[:, :, border : border + size, border : border + size]


def derive_filter(
    weight: Tensor, matrix_5: Tensor | None, matrix_3: Tensor | None, kernel_size: int
) -> Tensor:
    """Derive the active filter from the bank: shrink by 2 and apply the matrix, until `kernel_size` is left.

    Args:
        weight: Filter bank, [C, 1, K_max, K_max].
        matrix_5: [25, 25], applied when shrinking 7 to 5; None only where that step is not taken.
        matrix_3: [9, 9], applied when shrinking 5 to 3; None only where that step is not taken.
        kernel_size: Active size, odd, at most K_max.

    Returns:
        [C, 1, kernel_size, kernel_size].

    Source:
        Once-for-All, arXiv:1908.09791, section 3 (elastic kernel size).
    """
    matrices = {5: matrix_5, 3: matrix_3}
    while weight.shape[-1] > kernel_size:
        size = weight.shape[-1] - 2
        matrix = matrices[size]
        assert matrix is not None, f"shrinking to {size} needs its matrix"
        taps = _centre(weight, size).flatten(1)  # [C, size^2]
        weight = F.linear(taps, matrix).view(-1, 1, size, size)
    return weight


def dynamic_depthwise_conv(
    x: Tensor,
    weight: Tensor,
    matrix_5: Tensor | None = None,
    matrix_3: Tensor | None = None,
    *,
    kernel_size: int,
    stride: int = 1,
) -> Tensor:
    """Twin of `pfnas_fast.ops.dynamic_depthwise_conv`: same arguments and result, all derivatives."""
    channels = x.shape[1]  # [N, C, H, W]
    taps = derive_filter(weight[:channels], matrix_5, matrix_3, kernel_size)  # [C, 1, k, k]
    return F.conv2d(x, taps, stride=stride, padding=kernel_size // 2, groups=channels)


def apply_activation(x: Tensor, activation: str | None) -> Tensor:
    """``"relu"``, ``"hswish"`` or None on any shape."""
    if activation is None:
        return x
    return {"relu": F.relu, "hswish": F.hardswish}[activation](x)


def dynamic_pointwise_conv(
    x: Tensor,
    panels: Tensor,
    *,
    out_channels: int,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Twin of `pfnas_fast.ops.dynamic_pointwise_conv`: same arguments and result, all derivatives."""
    weight = panels.transpose(1, 2).flatten(0, 1)[:out_channels, : x.shape[1]]  # [O, C]
    y = F.conv2d(x, weight[:, :, None, None])
    if scale is not None:
        y = y * scale[:, None, None]
    if shift is not None:
        y = y + shift[:, None, None]
    return apply_activation(y if residual is None else y + residual, activation)


def path_cost(codes: Tensor, table: Tensor, constant: Tensor) -> Tensor:
    """Additive cost of each path.

    Args:
        codes: [n, num_blocks + 1], 0 = absent; the last slot holds 1 + resolution.
        table: [num_resolutions, num_blocks, num_codes].
        constant: [num_resolutions].

    Returns:
        [n], dtype of `table`.
    """
    index = codes.long()
    resolution = index[:, -1] - 1
    blocks = torch.arange(table.shape[1])
    return constant[resolution] + table[resolution.unsqueeze(1), blocks, index[:, :-1]].sum(1)


def path_score(tables: RankerTables, codes: Tensor, z: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Twin of `pfnas_fast.ops.path_score`, computed in float64.

    Args:
        tables: The ranker.
        codes: [n, num_slots].
        z: [n] or None.

    Returns:
        (scores [n], members [M, n]), float64.
    """
    rows = codes.long() + torch.arange(tables.num_slots) * tables.num_codes  # [n, slots]
    budget = torch.zeros(len(codes), 1, 1).double() if z is None else z.double().view(-1, 1, 1)
    members = []
    if (net := tables.networks) is not None:
        hidden = net.table.double()[rows].sum(1) + net.offset.double()  # [n, E, H]
        if net.budget is not None:
            hidden = hidden + budget * net.budget.double()
        hidden = hidden.relu()
        for weight, bias in net.dense:
            hidden = (torch.einsum("neh,eho->neo", hidden, weight.double()) + bias.double()).relu()
        members.append((hidden * net.head.double()).sum(2))
    if (kernel := tables.kernels) is not None:
        exponent = kernel.table.double()[rows].sum(1) + kernel.offset.double()
        if kernel.budget is not None:
            exponent = exponent + budget * kernel.budget.double()
        if kernel.budget_square is not None:
            exponent = exponent + budget**2 * kernel.budget_square.double()
        members.append((exponent.exp() * kernel.head.double()).sum(2))
    each = torch.cat(members, dim=1)  # [n, M]
    if tables.linear is not None and tables.linear_offset is not None:
        each = each + tables.linear.double()[rows].sum(1) + tables.linear_offset.double()
        if tables.linear_budget is not None:
            each = each + budget.view(-1, 1) * tables.linear_budget.double()
    scores = each @ tables.weights.double()
    if tables.curve is not None:
        low, high = tables.curve_range
        knots = len(tables.curve) - 1
        place = ((budget.view(-1) - low) / (high - low) * knots).clamp(0, knots)
        left = place.floor().clamp(max=knots - 1).long()
        curve = tables.curve.double()
        scores = scores + curve[left] + (place - left) * (curve[left + 1] - curve[left])
    return scores, each.t()


def _normalize(x: Tensor, norm: tuple[Tensor, Tensor] | None, eps: float) -> tuple[Tensor, Tensor]:
    """Batch normalisation over [N, C, H, W] by its own moments, and these, [3, C]."""
    channels = x.shape[1]
    if norm is None:
        return x, x.new_full((3, channels), torch.nan)
    var, mean = torch.var_mean(x, (0, 2, 3), unbiased=False)  # [C] each
    invstd = (var + eps).rsqrt()
    scale, shift = (values[:channels, None, None] for values in norm)
    y = (x - mean[:, None, None]) * invstd[:, None, None] * scale + shift
    count = x.numel() // channels
    return y, torch.stack([mean, var * count / (count - 1), invstd]).detach()


def batch_norm_act(
    x: Tensor, gamma: Tensor, beta: Tensor, *, activation: str | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Twin of `pfnas_fast.ops.batch_norm_act`: same arguments and result, all derivatives."""
    y, moments = _normalize(x, (gamma, beta), eps)
    return apply_activation(y, activation), moments


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
) -> tuple[Tensor, Tensor]:
    """Twin of `pfnas_fast.ops.train_mbconv`: same arguments and result, all derivatives."""
    y, moments = x, [x.new_full((3, mid_channels), torch.nan)]  # [N, Ci, H, W]
    if expand_weight is not None:
        y = F.conv2d(x, expand_weight[:mid_channels, : x.shape[1]])  # [N, Ce, H, W]
        y, moments[0] = _normalize(y, norms[0], eps[0])
    y = apply_activation(y, activations[0])
    y = dynamic_depthwise_conv(y, depth_weight, *matrices, kernel_size=kernel_size, stride=stride)
    y, moment = _normalize(y, norms[1], eps[1])
    moments.append(moment)
    y = apply_activation(y, activations[1])  # [N, Ce, Ho, Wo]
    if excitation is not None:
        w1, b1, w2, b2 = excitation
        hidden = F.relu(F.linear(y.mean((2, 3)), w1[:se_channels, :mid_channels], b1[:se_channels]))
        gate = F.hardsigmoid(F.linear(hidden, w2[:mid_channels, :se_channels], b2[:mid_channels]))  # [N, Ce]
        y = y * gate[:, :, None, None]
    y = F.conv2d(y, project_weight[:out_channels, :mid_channels])  # [N, Co, Ho, Wo]
    y, moment = _normalize(y, norms[2], eps[2])
    moments.append(moment)
    y = apply_activation(y, activations[2])
    return (y + x if residual else y), torch.cat(moments, 1)

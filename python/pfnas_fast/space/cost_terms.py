# SPDX-License-Identifier: Apache-2.0
"""What each part of a network costs at given sizes: the formulas behind the cost tables.

MACs: convolutions, linear layers and squeeze-and-excitation; BN, activations, biases, pooling and additions
    are free.
Params: every learnable number of the stand-alone subnet (elastic-kernel matrices belong to the supernet, not
    to a path).
Saved: float32 elements, per image, of the tensors that autograd keeps for the backward pass of a training
    forward.
Autograd keeps, each storage once: the input of a convolution or linear layer, the input of a BN, the *output*
of a ReLU, the *input* of an h-swish or h-sigmoid, both factors of the SE product. It keeps nothing for
pooling, additions and nearest up-sampling. A tensor between two layers belongs to the layer that makes it, so
that blocks add up.
"""

from __future__ import annotations

from dataclasses import dataclass

from pfnas_fast.space.specs import BlockSpec, HeadSpec, StaticBlockSpec, TailSpec, se_channels

Size = tuple[int, int]


@dataclass(frozen=True)
class Cost:
    """MACs, parameters, and elements saved for backward per image."""

    macs: int = 0
    params: int = 0
    saved: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.macs + other.macs, self.params + other.params, self.saved + other.saved)


def _conv(in_channels: int, out_channels: int, area: int, kernel_size: int = 1, groups: int = 1) -> Cost:
    """A convolution without bias whose output has `area` px; the next layer saves its output."""
    weights = out_channels * (in_channels // groups) * kernel_size**2
    return Cost(macs=weights * area, params=weights)


def _conv_bn(in_channels: int, out_channels: int, area: int, kernel_size: int = 1, groups: int = 1) -> Cost:
    """Convolution and BN: the BN saves its input."""
    return _conv(in_channels, out_channels, area, kernel_size, groups) + Cost(
        params=2 * out_channels, saved=out_channels * area
    )


def _activation(channels: int, area: int, kind: str) -> Cost:
    """ReLU saves its output; h-swish its input, and the layer after it the output."""
    return Cost(saved=channels * area * (2 if kind == "hswish" else 1))


def _squeeze_excite(channels: int, area: int) -> Cost:
    """Pool, two linear layers with bias and ReLU between them, h-sigmoid, product; output included."""
    hidden = se_channels(channels)
    return Cost(
        macs=2 * channels * hidden,
        params=2 * channels * hidden + hidden + channels,
        saved=channels + hidden + 2 * channels + channels * area,
    )


def stem_cost(channels: int, activation: str, canvas: Size, size: Size) -> Cost:
    """3x3 stride-2 convolution on the image (which it saves), BN, activation."""
    area = size[0] * size[1]
    image = Cost(saved=3 * canvas[0] * canvas[1])
    return image + _conv_bn(3, channels, area, kernel_size=3) + _activation(channels, area, activation)


def static_block_cost(block: StaticBlockSpec, size: Size) -> Cost:
    """Depthwise, BN, activation, project, BN; output included."""
    area, mid = size[0] * size[1], block.mid_channels
    return (
        _conv_bn(mid, mid, area, block.kernel_size, groups=mid)
        + _activation(mid, area, block.activation)
        + _conv_bn(mid, block.out_channels, area)
        + Cost(saved=block.out_channels * area)
    )


def block_cost(block: BlockSpec, kernel_size: int, expand_ratio: int, in_size: Size, out_size: Size) -> Cost:
    """One elastic block at a kernel size and expand ratio; output included."""
    in_area, out_area = in_size[0] * in_size[1], out_size[0] * out_size[1]
    mid = block.mid_channels(expand_ratio)
    cost = (
        _conv_bn(block.in_channels, mid, in_area)
        + _activation(mid, in_area, block.activation)
        + _conv_bn(mid, mid, out_area, kernel_size, groups=mid)
        + _activation(mid, out_area, block.activation)
        + _conv_bn(mid, block.out_channels, out_area)
        + Cost(saved=block.out_channels * out_area)
    )
    return cost + _squeeze_excite(mid, out_area) if block.se else cost


def neck_head_cost(
    head: HeadSpec, tap_channels: tuple[int, ...], tap_sizes: tuple[Size, ...], num_classes: int
) -> Cost:
    """Lateral 1x1 + BN + h-swish per level; shared separable convolutions with one BN per level; three
    predictors.

    The weights of the head are shared over levels: their parameters count once, their MACs at every level.
    """
    c = head.channels
    cost = Cost()
    for channels, size in zip(tap_channels, tap_sizes, strict=True):
        area = size[0] * size[1]
        cost += _conv_bn(channels, c, area) + _activation(c, area, "hswish")
        for _ in range(head.num_convs):
            depthwise = _conv(c, c, area, kernel_size=3, groups=c) + Cost(saved=c * area)
            cost += depthwise + _conv_bn(c, c, area) + _activation(c, area, "hswish")
        # One matrix for all predictors. Its whole output stays: the box scale keeps its four columns, a view;
        # softplus keeps its input.
        cost += _conv(c, num_classes + 5, area) + Cost(params=1, saved=(num_classes + 5 + 4) * area)
    shared = head.num_convs * (9 * c + c * c) + c * (num_classes + 5)
    return cost + Cost(params=num_classes + 5 - (len(tap_sizes) - 1) * shared)


def tail_cost(tail: TailSpec, in_channels: int, size: Size, num_classes: int) -> Cost:
    """1x1 + BN + h-swish, pool, 1x1 + h-swish, dropout (which saves its mask), linear with bias."""
    area, feature, hidden = size[0] * size[1], tail.feature_channels, tail.hidden_channels
    features = _conv_bn(in_channels, feature, area) + Cost(saved=feature * area)
    mixed = _conv(feature, hidden, 1) + Cost(saved=feature + hidden + hidden * (2 if tail.dropout else 1))
    return features + mixed + _conv(hidden, num_classes, 1) + Cost(params=num_classes)

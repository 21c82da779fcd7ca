# SPDX-License-Identifier: Apache-2.0
"""The parts a search space is made of: stages, blocks, head and classification tail (plain frozen data)."""

from __future__ import annotations

from dataclasses import dataclass


def make_divisible(value: float, divisor: int = 8) -> int:
    """Round a channel count to a multiple of `divisor`, never losing more than 10 %.

    Args:
        value: Wished number of channels, > 0.
        divisor: The result is a multiple of this, and at least this.

    Returns:
        The number of channels.

    Source:
        MobileNetV2's rule, as Once-for-All (arXiv:1908.09791) uses it.

    Example:
        >>> make_divisible(72), make_divisible(18), make_divisible(3)
        (72, 24, 8)
    """
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def se_channels(mid_channels: int) -> int:
    """Hidden channels of a squeeze-and-excitation of reduction 4 on `mid_channels` channels."""
    return make_divisible(mid_channels // 4, 8)


@dataclass(frozen=True)
class StageSpec:
    """One elastic stage: at most max(depths) blocks, the first of which has the stage's stride.

    Attributes:
        out_channels: Static output width of every block.
        stride: 1 or 2, of the first block.
        activation: "relu" or "hswish".
        se: Whether every block has squeeze-and-excitation.
        depths: Ascending numbers of blocks that a path may keep (the first d are kept).
        expand_ratios: Ascending expand ratios of each block.
        kernel_sizes: Ascending depthwise kernel sizes of each block, from {3, 5, 7}.
    """

    out_channels: int
    stride: int
    activation: str
    se: bool
    depths: tuple[int, ...]
    expand_ratios: tuple[int, ...]
    kernel_sizes: tuple[int, ...]


@dataclass(frozen=True)
class BlockSpec:
    """One elastic block (expand 1x1, depthwise k x k, optional SE, project 1x1).

    Attributes:
        index: Position among all elastic blocks of the space, from 0.
        stage: Stage index, from 0.
        position: Position inside the stage, from 0. Blocks at position >= the stage's depth are skipped.
        in_channels: Static input width.
        out_channels: Static output width.
        stride: 1 or 2.
        activation: "relu" or "hswish".
        se: Whether the block has squeeze-and-excitation.
        kernel_sizes: Ascending choices.
        expand_ratios: Ascending choices.
    """

    index: int
    stage: int
    position: int
    in_channels: int
    out_channels: int
    stride: int
    activation: str
    se: bool
    kernel_sizes: tuple[int, ...]
    expand_ratios: tuple[int, ...]

    def mid_channels(self, expand_ratio: int) -> int:
        """Channels of the depthwise convolution at an expand ratio."""
        return make_divisible(round(self.in_channels * expand_ratio), 8)

    @property
    def max_mid_channels(self) -> int:
        """Channels of the depthwise convolution at the largest expand ratio."""
        return self.mid_channels(self.expand_ratios[-1])

    @property
    def max_kernel_size(self) -> int:
        """Side of the kernel bank."""
        return self.kernel_sizes[-1]

    @property
    def has_residual(self) -> bool:
        """Whether the block adds its input to its output."""
        return self.stride == 1 and self.in_channels == self.out_channels


@dataclass(frozen=True)
class StaticBlockSpec:
    """The block between stem and stages: depthwise, project 1x1; no expansion, no SE, nothing elastic.

    Attributes:
        in_channels: Input width (the stem's); also the width of the depthwise convolution.
        out_channels: Output width.
        kernel_size: Side of the depthwise kernel.
        activation: "relu" or "hswish", after the depthwise convolution.
        stride: Always 1.
        se: Always False.
    """

    in_channels: int
    out_channels: int
    kernel_size: int = 3
    activation: str = "relu"
    stride: int = 1
    se: bool = False

    @property
    def mid_channels(self) -> int:
        """Channels of the depthwise convolution (expand ratio 1, no expansion layer)."""
        return self.in_channels

    @property
    def has_residual(self) -> bool:
        """Whether the block adds its input to its output."""
        return self.stride == 1 and self.in_channels == self.out_channels


@dataclass(frozen=True)
class HeadSpec:
    """Static neck and head of the detector.

    Attributes:
        channels: Width of every pyramid level.
        num_convs: Separable 3x3 convolutions before the predictors, shared over the levels.
    """

    channels: int
    num_convs: int


@dataclass(frozen=True)
class TailSpec:
    """Static classification tail: 1x1, global pool, 1x1, dropout, linear.

    Attributes:
        feature_channels: Width of the 1x1 convolution before the pool.
        hidden_channels: Width of the 1x1 convolution after the pool.
        dropout: Dropout probability before the linear layer.
    """

    feature_channels: int
    hidden_channels: int
    dropout: float

# SPDX-License-Identifier: Apache-2.0
"""Subnets as plain modules: ordinary convolutions and batch normalisations, no dependence on the supernet.

A plain module uses the supernet's module names, so copying weights goes by name and statistics keep theirs.
It is described by (space, path) alone, so a file with those two and a state dict rebuilds it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pfnas_fast.errors import InputError
from pfnas_fast.space import BlockSpec, Path, Space, StaticBlockSpec, TailSpec, se_channels
from pfnas_fast.supernet.layers import (
    DynamicBatchNorm2d,
    DynamicDepthwiseConv2d,
    DynamicPointwiseConv2d,
    activate,
)
from pfnas_fast.supernet.recalibration import BNStatistics


class PlainConvBN(nn.Module):
    """Convolution without bias, batch normalisation, activation (``"relu"``, ``"hswish"`` or None)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, ceil(H / stride), ceil(W / stride)]."""
        x = self.bn(self.conv(x))
        return x if self.activation is None else activate(x, self.activation)


class PlainSE(nn.Module):
    """Squeeze-and-excitation of reduction 4 on `channels` channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(channels, se_channels(channels))
        self.expand = nn.Linear(se_channels(channels), channels)

    def forward(self, x: Tensor) -> Tensor:
        """Scale every channel of `x` [N, C, H, W] by a gate computed from the channel means."""
        gate = self.expand(F.relu(self.reduce(x.mean((2, 3)))))
        return x * F.hardsigmoid(gate)[:, :, None, None]


class PlainMBConv(nn.Module):
    """Inverted residual block of fixed kernel size and expand ratio."""

    def __init__(self, block: BlockSpec, kernel_size: int, expand_ratio: int) -> None:
        super().__init__()
        mid = block.mid_channels(expand_ratio)
        self.activation, self.has_residual = block.activation, block.has_residual
        self.expand_conv = nn.Conv2d(block.in_channels, mid, 1, bias=False)
        self.expand_bn = nn.BatchNorm2d(mid)
        self.depth_conv = nn.Conv2d(
            mid, mid, kernel_size, block.stride, kernel_size // 2, groups=mid, bias=False
        )
        self.depth_bn = nn.BatchNorm2d(mid)
        self.se = PlainSE(mid) if block.se else None
        self.project_conv = nn.Conv2d(mid, block.out_channels, 1, bias=False)
        self.project_bn = nn.BatchNorm2d(block.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, ceil(H / stride), ceil(W / stride)]."""
        y = activate(self.expand_bn(self.expand_conv(x)), self.activation)
        y = activate(self.depth_bn(self.depth_conv(y)), self.activation)
        if self.se is not None:
            y = self.se(y)
        y = self.project_bn(self.project_conv(y))
        return y + x if self.has_residual else y


class PlainStaticBlock(nn.Module):
    """The static first block of OFA-MobileNetV3."""

    def __init__(self, block: StaticBlockSpec) -> None:
        super().__init__()
        channels = block.in_channels
        self.depth = PlainConvBN(
            channels,
            channels,
            kernel_size=block.kernel_size,
            stride=block.stride,
            groups=channels,
            activation=block.activation,
        )
        self.project = PlainConvBN(channels, block.out_channels)
        self.has_residual = block.has_residual

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, H, W]."""
        y = self.project(self.depth(x))
        return y + x if self.has_residual else y


class PlainBackbone(nn.Module):
    """The backbone of one path.

    Args:
        space: The search space.
        path: A path of it.
        taps: forward returns the tapped features; otherwise the last stage's output.
    """

    def __init__(self, space: Space, path: Path, *, taps: bool = True) -> None:
        super().__init__()
        self.stem = PlainConvBN(
            3, space.stem_channels, kernel_size=3, stride=2, activation=space.stem_activation
        )
        self.first_block = None if space.first_block is None else PlainStaticBlock(space.first_block)
        kept = [block for block in space.blocks if block.position < path.depths[block.stage]]
        # A dict, because the keys must be the supernet's block indices.
        self.blocks = nn.ModuleDict(
            {
                str(block.index): PlainMBConv(
                    block, path.kernel_sizes[block.index], path.expand_ratios[block.index]
                )
                for block in kept
            }
        )
        self.tap_keys = tuple(
            str(max(block.index for block in kept if block.stage == stage)) for stage in space.taps if taps
        )
        self.taps = taps

    def forward(self, x: Tensor) -> list[Tensor] | Tensor:
        """Normalised images [N, 3, H, W] -> list of tapped features, or the last stage's output."""
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        if self.first_block is not None:
            x = self.first_block(x)
        features: list[Tensor] = []
        for key, block in self.blocks.items():
            x = block(x)
            if key in self.tap_keys:
                features.append(x)
        return features if self.taps else x


class PlainTail(nn.Module):
    """The classification tail; see `ClassificationTail`."""

    def __init__(self, in_channels: int, tail: TailSpec, num_classes: int) -> None:
        super().__init__()
        self.feature = PlainConvBN(in_channels, tail.feature_channels, activation="hswish")
        self.hidden = nn.Linear(tail.feature_channels, tail.hidden_channels, bias=False)
        self.dropout = nn.Dropout(tail.dropout)
        self.classifier = nn.Linear(tail.hidden_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> logits [N, num_classes]."""
        pooled = self.feature(x).mean((2, 3))
        return self.classifier(self.dropout(F.hardswish(self.hidden(pooled))))


class ClassificationSubnet(nn.Module):
    """One classifier of a space as a plain module.

    Args:
        space: The search space.
        path: A path of it.
        num_classes: Number of classes.
    """

    def __init__(self, space: Space, path: Path, *, num_classes: int) -> None:
        super().__init__()
        self.backbone = PlainBackbone(space, path, taps=False)
        self.tail = PlainTail(space.stages[-1].out_channels, space.tail, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W] -> logits [N, num_classes]."""
        return self.tail(self.backbone(x))


@torch.no_grad()
def copy_active_weights(source: nn.Module, target: nn.Module, statistics: BNStatistics | None = None) -> None:
    """Copy what a plain `target` needs out of the dynamic `source`, module by module, by name.

    Dynamic layers give the slice, or the transformed kernel, that fits the target's shape; other modules give
    their parameters and buffers as they are.

    Args:
        source: A supernet or a part of it.
        target: Plain modules under the same names; may leave out any of the source's.
        statistics: Under the source's names; None takes the source's running buffers.

    Raises:
        InputError: `statistics` lacks a batch normalisation of the target or has another width.

    Example:
        >>> from pfnas_fast.space import load_space
        >>> from pfnas_fast.supernet import Backbone
        >>> space = load_space("tiny")
        >>> plain = PlainBackbone(space, space.min_path())
        >>> copy_active_weights(Backbone(space), plain)
    """
    modules = dict(source.named_modules())
    for name, module in target.named_modules():
        if next(module.parameters(recurse=False), None) is None:
            continue
        if name not in modules:
            raise RuntimeError(f"copy_active_weights: the source has no module {name!r}")
        twin = modules[name]
        if isinstance(module, nn.BatchNorm2d):
            _copy_norm(name, twin, module, statistics)
        elif isinstance(module, nn.Conv2d) and isinstance(twin, DynamicPointwiseConv2d):
            module.weight.copy_(twin.active_weight(module.in_channels, module.out_channels))
        elif isinstance(module, nn.Conv2d) and isinstance(twin, DynamicDepthwiseConv2d):
            module.weight.copy_(twin.active_weight(module.out_channels, module.kernel_size[0]))
        elif isinstance(module, nn.Linear) and isinstance(twin, nn.Linear):
            rows, columns = module.weight.shape
            module.weight.copy_(twin.weight[:rows, :columns])
            if module.bias is not None:
                module.bias.copy_(twin.bias[:rows])
        else:
            module.load_state_dict(twin.state_dict())


def _copy_norm(name: str, twin: nn.Module, module: nn.BatchNorm2d, statistics: BNStatistics | None) -> None:
    """Affine part from `twin`; mean and variance from `statistics`, else from the twin's buffers."""
    channels = module.num_features
    if not isinstance(twin, DynamicBatchNorm2d) or module.running_mean is None or module.running_var is None:
        raise RuntimeError(f"copy_active_weights: {name} is not a batch normalisation on both sides")
    weight, bias = twin.active_affine(channels)
    if statistics is None:
        mean, var = twin.active_running(channels)
    elif name in statistics.layers and statistics.layers[name][0].shape[0] == channels:
        mean, var = statistics.layers[name]
    else:
        raise InputError(
            f"copy_active_weights: expected statistics of {channels} channels for {name}, "
            "got those of another path"
        )
    for target, values in (
        (module.weight, weight),
        (module.bias, bias),
        (module.running_mean, mean),
        (module.running_var, var),
    ):
        target.copy_(values)
    module.eps, module.momentum = twin.eps, twin.momentum

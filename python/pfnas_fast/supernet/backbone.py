# SPDX-License-Identifier: Apache-2.0
"""The elastic backbone: stem, optional static first block, stages of `DynamicMBConv`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pfnas_fast.errors import InputError
from pfnas_fast.space import Path, Space, StaticBlockSpec
from pfnas_fast.supernet.fused import hand_over_moments, load_norm_op, load_train_op, trains_fused
from pfnas_fast.supernet.layers import DynamicBatchNorm2d, DynamicMBConv, activate, check_backend, init_conv_


class ConvBN(nn.Module):
    """Static k x k convolution without bias, batch normalisation and an optional activation.

    Args:
        in_channels: Input channels.
        out_channels: Output channels.
        kernel_size: Odd size; the padding is kernel_size // 2.
        stride: Step of the convolution.
        groups: 1, or `in_channels` for a depthwise convolution.
        activation: ``"relu"``, ``"hswish"`` or None.
        backend: ``"reference"``, or ``"fast"``: normalisation and activation are one op in training mode.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        activation: str | None = None,
        backend: str = "reference",
    ) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False
        )
        init_conv_(self.conv.weight.data, groups=groups)
        self.bn = DynamicBatchNorm2d(out_channels)
        self.activation = activation
        self._norm_op = load_norm_op(backend)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, ceil(H / stride), ceil(W / stride)]."""
        if self._norm_op is not None and trains_fused(x, self, (self.bn,)):
            conv, bn = self.conv(x), self.bn
            y, moments = self._norm_op(conv, bn.weight, bn.bias, activation=self.activation, eps=bn.eps)
            hand_over_moments((bn,), (conv.shape[1],), moments, x, y)
            return y
        x = self.bn(self.conv(x))
        return x if self.activation is None else activate(x, self.activation)


class StaticBlock(nn.Module):
    """The first block of OFA-MobileNetV3: depthwise 3x3 and projection, no expansion, not elastic.

    Args:
        block: What the space says about it.
        backend: ``"reference"``, or ``"fast"``: one op in training mode.
    """

    def __init__(self, block: StaticBlockSpec, *, backend: str = "reference") -> None:
        super().__init__()
        channels = block.in_channels
        self.depth = ConvBN(
            channels,
            channels,
            kernel_size=block.kernel_size,
            stride=block.stride,
            groups=channels,
            activation=block.activation,
        )
        self.project = ConvBN(channels, block.out_channels)
        self.has_residual = block.stride == 1 and channels == block.out_channels
        self._train_op = load_train_op(backend)
        self.plan = "speed"  # see `set_training_plan`

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, ceil(H / stride), ceil(W / stride)]."""
        if self._train_op is not None and trains_fused(x, self, (self.depth.bn, self.project.bn)):
            return self._train(self._train_op, x)
        y = self.project(self.depth(x))
        return y.add_(x) if self.has_residual else y

    def _train(self, op: Callable[..., tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
        depth, project = self.depth, self.project
        channels, out_channels = x.shape[1], project.bn.num_features
        y, moments = op(
            x,
            None,
            depth.conv.weight,
            (None, None),
            project.conv.weight,
            [None, (depth.bn.weight, depth.bn.bias), (project.bn.weight, project.bn.bias)],
            mid_channels=channels,
            out_channels=out_channels,
            kernel_size=depth.conv.kernel_size[0],
            stride=depth.conv.stride[0],
            residual=self.has_residual,
            activations=(None, depth.activation, project.activation),
            eps=(0.0, depth.bn.eps, project.bn.eps),
            plan=self.plan,
        )
        hand_over_moments((depth.bn, project.bn), (channels, out_channels), moments[:, channels:], x, y)
        return y


class Backbone(nn.Module):
    """All paths of a space in one set of weights.

    Args:
        space: The search space.
        backend: ``"reference"`` (pure PyTorch) or ``"fast"`` (the ops of this package).

    Raises:
        InputError: unknown backend.

    Example:
        >>> import torch
        >>> from pfnas_fast.space import load_space
        >>> space = load_space("tiny")
        >>> backbone = Backbone(space)
        >>> [tuple(f.shape) for f in backbone(torch.zeros(2, 3, 96, 128), space.max_path())]
        [(2, 24, 12, 16), (2, 40, 6, 8), (2, 64, 3, 4)]
    """

    def __init__(self, space: Space, *, backend: str = "reference") -> None:
        super().__init__()
        self.space = space
        self.backend = check_backend(backend, "Backbone")
        self.stem = ConvBN(
            3,
            space.stem_channels,
            kernel_size=3,
            stride=2,
            activation=space.stem_activation,
            backend=backend,
        )
        self.first_block = (
            None if space.first_block is None else StaticBlock(space.first_block, backend=backend)
        )
        self.blocks = nn.ModuleList(DynamicMBConv(block, backend=backend) for block in space.blocks)
        stages: list[list[int]] = [[] for _ in space.stages]
        for block in space.blocks:
            stages[block.stage].append(block.index)
        self.stage_blocks = tuple(tuple(stage) for stage in stages)

    def forward(self, x: Tensor, path: Path, *, taps: bool = True) -> list[Tensor] | Tensor:
        """Run the blocks of `path`.

        Args:
            x: Normalised images, [N, 3, H, W], float32; made channels_last if it is not.
            path: Which blocks run, with which kernel sizes and expand ratios. Its resolution is not used.
            taps: Return the outputs of the tapped stages; otherwise the output of the last stage.

        Returns:
            taps: list of [N, space.tap_channels[i], ceil(H / stride), ceil(W / stride)] with the strides of
            `space.tap_strides`; else one tensor.

        Raises:
            InputError: the path belongs to a space with other stages.
        """
        if len(path.depths) != len(self.stage_blocks) or len(path.kernel_sizes) != len(self.blocks):
            raise InputError(
                f"Backbone: expected {len(self.stage_blocks)} stages and {len(self.blocks)} blocks for path, "
                f"got {len(path.depths)} and {len(path.kernel_sizes)}"
            )
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        if self.first_block is not None:
            x = self.first_block(x)
        features: list[Tensor] = []
        for stage, indices in enumerate(self.stage_blocks):
            for index in indices[: path.depths[stage]]:
                x = self.blocks[index](x, path.kernel_sizes[index], path.expand_ratios[index])
            if taps and stage in self.space.taps:
                features.append(x)
        return features if taps else x

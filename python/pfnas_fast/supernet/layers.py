# SPDX-License-Identifier: Apache-2.0
"""Layers whose width and kernel size are chosen at run time (Once-for-All, arXiv:1908.09791, section 3).

Every layer owns the parameters of its largest form and runs on a prefix of them: the first rows of a
pointwise convolution, the first channels of a depthwise one, of batch normalisation and of
squeeze-and-excitation. The slices are views; autograd gives the full parameter a gradient that is zero
outside the slice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pfnas_fast.errors import InputError
from pfnas_fast.space import BlockSpec, se_channels
from pfnas_fast.supernet.fused import hand_over_moments, load_train_op, trains_fused

BACKENDS = ("reference", "fast")


def check_backend(backend: str, function: str) -> str:
    """Return `backend` unchanged if it is known.

    Args:
        backend: ``"reference"`` (pure PyTorch) or ``"fast"`` (the ops of this package).
        function: Name that the error message starts with.

    Raises:
        InputError: any other value.
    """
    if backend not in BACKENDS:
        raise InputError(f"{function}: expected one of {', '.join(BACKENDS)} for backend, got {backend!r}")
    return backend


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply ``"relu"`` or ``"hswish"`` to `x`, overwriting it where autograd allows.

    Args:
        x: Any shape. Must be a fresh tensor that nothing else reads, such as the output of batch
            normalisation.
        activation: ``"relu"`` or ``"hswish"``.

    Returns:
        The activated tensor, shape and memory format of `x`.
    """
    if activation == "relu":
        return F.relu(x, inplace=True)  # the gradient needs the output only
    if activation == "hswish":
        return F.hardswish(x, inplace=not x.requires_grad)  # the gradient needs the input
    raise RuntimeError(f"activate: unknown activation {activation!r}")


def pixel_mean(x: Tensor) -> Tensor:
    """Mean over the pixels, [N, C, H, W] -> [N, C], for channels_last input.

    Not ``x.mean((2, 3))``: its gradient comes in NCHW order and costs a pass, which makes the excitation
    slower (0.87 instead of 0.60 ms forward and backward on [16, 96, 12, 16]); a sum's gradient is a view.
    """
    return x.permute(0, 2, 3, 1).flatten(1, 2).sum(1) * (1.0 / (x.shape[2] * x.shape[3]))


def init_conv_(weight: Tensor, *, groups: int = 1) -> None:
    """Fill `weight` [O, I / groups, k, k] with He normal values, fan-out counted per group, drawn on the CPU.

    Per group, because a depthwise filter sends each output to k * k places only: with the ungrouped count the
    filters start sqrt(O) smaller and an adaptive optimiser's first steps are as large as the filters.
    """
    fan_out = weight.shape[0] * weight.shape[2] * weight.shape[3] / groups
    nn.init.normal_(weight, std=(2.0 / fan_out) ** 0.5)


class DynamicPointwiseConv2d(nn.Module):
    """1x1 convolution without bias on the first input and output channels.

    Args:
        max_in_channels: Largest number of input channels.
        max_out_channels: Largest number of output channels.

    Example:
        >>> DynamicPointwiseConv2d(16, 64)(torch.zeros(2, 8, 5, 5), out_channels=24).shape
        torch.Size([2, 24, 5, 5])
    """

    def __init__(self, max_in_channels: int, max_out_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_out_channels, max_in_channels, 1, 1))
        init_conv_(self.weight.data)

    def active_weight(self, in_channels: int, out_channels: int) -> Tensor:
        """The view [out_channels, in_channels, 1, 1] of the weight."""
        weight = self.weight
        if out_channels != weight.shape[0]:
            weight = weight[:out_channels]
        if in_channels != weight.shape[1]:
            weight = weight[:, :in_channels]
        return weight

    def forward(self, x: Tensor, out_channels: int) -> Tensor:
        """Convolve `x` [N, C, H, W] (C at most the largest input) to [N, out_channels, H, W]."""
        return F.conv2d(x, self.active_weight(x.shape[1], out_channels))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"


class DynamicDepthwiseConv2d(nn.Module):
    """Depthwise convolution whose channel count and kernel size are chosen at run time.

    The bank keeps the largest kernel. A smaller one is the centre of the next larger one times a matrix that
    all channels share, `7to5_matrix` [25, 25] and `5to3_matrix` [9, 9], chained: 3x3 = M53 vec(centre(5x5))
    and 5x5 = M75 vec(centre(7x7)). The matrices start as identities.

    Args:
        max_channels: Largest number of channels.
        kernel_sizes: Odd sizes that may be asked for.
        stride: 1 or 2; the padding is kernel_size // 2.
        backend: ``"reference"`` or ``"fast"``.

    Raises:
        InputError: even or no sizes, an unknown backend, or sizes that the fast backend does not have.

    Source: Once-for-All, arXiv:1908.09791, section 3.3 (elastic kernel size).

    Example:
        >>> layer = DynamicDepthwiseConv2d(16, (3, 5, 7), stride=2)
        >>> layer(torch.zeros(2, 8, 10, 10), kernel_size=5).shape
        torch.Size([2, 8, 5, 5])
    """

    def __init__(
        self, max_channels: int, kernel_sizes: Sequence[int], *, stride: int = 1, backend: str = "reference"
    ) -> None:
        super().__init__()
        check_backend(backend, "DynamicDepthwiseConv2d")
        sizes = sorted(set(kernel_sizes))
        if not sizes or any(size < 1 or size % 2 == 0 for size in sizes):
            raise InputError(
                f"DynamicDepthwiseConv2d: expected odd sizes for kernel_sizes, got {tuple(kernel_sizes)}"
            )
        self.kernel_sizes = tuple(sizes)
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(max_channels, 1, sizes[-1], sizes[-1]))
        init_conv_(self.weight.data, groups=max_channels)
        # Every size between the largest and the smallest has a matrix, so that the chain has steps of two.
        self.transform_names: tuple[tuple[int, str], ...] = tuple(
            (size, f"{size}to{size - 2}_matrix") for size in range(sizes[-1], sizes[0], -2)
        )
        for size, name in self.transform_names:
            self.register_parameter(name, nn.Parameter(torch.eye((size - 2) ** 2)))
        self._op: Callable[..., Tensor] | None = None
        if backend == "fast":
            self._op = _load_depthwise_op(self.kernel_sizes)

    def active_weight(self, channels: int, kernel_size: int) -> Tensor:
        """The filters [channels, 1, kernel_size, kernel_size] that this layer convolves with.

        Raises:
            InputError: the layer does not offer `kernel_size`.
        """
        self.check_kernel_size(kernel_size)
        weight = self.weight
        if channels != weight.shape[0]:
            weight = weight[:channels]
        for size, name in self.transform_names:
            if size <= kernel_size:
                break
            centre = weight[:, :, 1:-1, 1:-1].reshape(channels, -1)  # [C, (size - 2) ** 2]
            weight = F.linear(centre, getattr(self, name)).view(channels, 1, size - 2, size - 2)
        return weight

    def forward(self, x: Tensor, kernel_size: int) -> Tensor:
        """Convolve `x` [N, C, H, W] (C at most the bank's) to [N, C, ceil(H / stride), ceil(W / stride)].

        Raises:
            InputError: the layer does not offer `kernel_size`.
        """
        if self._op is not None:
            self.check_kernel_size(kernel_size)
            matrices = self.matrices()
            return self._op(x, self.weight, *matrices, kernel_size=kernel_size, stride=self.stride)
        channels = x.shape[1]
        weight = self.active_weight(channels, kernel_size)
        return F.conv2d(x, weight, None, self.stride, kernel_size // 2, 1, channels)

    def matrices(self) -> tuple[Tensor | None, Tensor | None]:
        """The maps from 7x7 to 5x5 and from 5x5 to 3x3 filters; None where the layer has none."""
        return self._parameters.get("7to5_matrix"), self._parameters.get("5to3_matrix")

    def check_kernel_size(self, kernel_size: int) -> None:
        """Raise `InputError` where the layer does not offer `kernel_size`."""
        if kernel_size not in self.kernel_sizes:
            raise InputError(
                f"DynamicDepthwiseConv2d: expected one of {self.kernel_sizes} for kernel_size, "
                f"got {kernel_size}"
            )

    def extra_repr(self) -> str:
        backend = "reference" if self._op is None else "fast"
        return f"{self.weight.shape[0]}, kernel_sizes={self.kernel_sizes}, stride={self.stride}, {backend}"


def _load_depthwise_op(kernel_sizes: tuple[int, ...]) -> Callable[..., Tensor]:
    """The compiled op, imported at construction: the reference needs none, and a missing build is loud."""
    if not set(kernel_sizes) <= {3, 5, 7}:
        raise InputError(
            "DynamicDepthwiseConv2d: expected sizes out of 3, 5, 7 for kernel_sizes with backend='fast', "
            f"got {kernel_sizes}"
        )
    from pfnas_fast.ops import dynamic_depthwise_conv

    return dynamic_depthwise_conv


class DynamicBatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` of the largest width that runs on the first channels.

    Training uses the statistics of the batch and moves the running statistics of the active channels;
    evaluation uses the running ones. `statistics` replaces the running ones (see
    `pfnas_fast.supernet.use_statistics`: a path needs its own), and `collector` takes over the layer while
    `recalibrate` measures them. Both are None except inside those.

    Example:
        >>> norm = DynamicBatchNorm2d(16)
        >>> norm(torch.rand(2, 4, 3, 3)).shape, bool(norm.running_mean[4:].any())
        (torch.Size([2, 4, 3, 3]), False)
    """

    statistics: tuple[Tensor, Tensor] | None
    collector: Callable[[DynamicBatchNorm2d, Tensor], Tensor] | None

    def __init__(self, num_features: int, *, eps: float = 1e-5, momentum: float | None = 0.1) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.statistics = None
        self.collector = None

    def active_affine(self, channels: int) -> tuple[Tensor, Tensor]:
        """Scale and shift of the first `channels` channels, views of shape [channels]."""
        weight, bias = self.weight, self.bias
        if channels != weight.shape[0]:
            return weight.narrow(0, 0, channels), bias.narrow(0, 0, channels)  # cheaper than indexing
        return weight, bias

    def active_running(self, channels: int) -> tuple[Tensor, Tensor]:
        """Mean and variance to normalise with, [channels] each: `statistics` where set, else the buffers.

        Raises:
            InputError: `statistics` are set and belong to another width or do not cover this layer.
        """
        if self.statistics is not None:
            mean, var = self.statistics
            if mean.shape[0] != channels:
                raise InputError(
                    f"DynamicBatchNorm2d: expected statistics of {channels} channels (recalibrated for the "
                    f"path that runs), got {mean.shape[0]} channels"
                )
            return mean, var
        mean, var = self.running_mean, self.running_var
        if mean is None or var is None:
            raise RuntimeError("DynamicBatchNorm2d: the running buffers are gone")
        if channels != mean.shape[0]:
            return mean.narrow(0, 0, channels), var.narrow(0, 0, channels)
        return mean, var

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` [N, C, H, W], C at most `num_features`, per channel.

        Raises:
            ValueError: training with one value per channel, as in `torch.nn.BatchNorm2d`.
        """
        if self.collector is not None:
            return self.collector(self, x)
        weight, bias = self.active_affine(x.shape[1])
        if not self.training:
            mean, var = self.active_running(x.shape[1])
            return F.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps)
        if self.statistics is not None:
            raise RuntimeError("DynamicBatchNorm2d: in training mode while fixed statistics are in use")
        mean, var = self.active_running(x.shape[1])
        self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        momentum = self.momentum
        if momentum is None:
            momentum = 1.0 / float(self.num_batches_tracked)  # type: ignore[arg-type]
        return F.batch_norm(x, mean, var, weight, bias, True, momentum, self.eps)


class DynamicSE(nn.Module):
    """Squeeze-and-excitation on the first channels, with reduction 4 (rounded to 8) and biases.

    Args:
        max_channels: Largest number of channels.

    Source: Squeeze-and-Excitation Networks, arXiv:1709.01507; hard sigmoid as in MobileNetV3,
        arXiv:1905.02244.
    """

    def __init__(self, max_channels: int) -> None:
        super().__init__()
        max_reduced = se_channels(max_channels)
        self.reduce = nn.Linear(max_channels, max_reduced)
        self.expand = nn.Linear(max_reduced, max_channels)
        for linear in (self.reduce, self.expand):
            nn.init.normal_(linear.weight, std=(2.0 / linear.out_features) ** 0.5)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Scale every channel of `x` [N, C, H, W] by a gate in [0, 1] computed from the channel means."""
        channels = x.shape[1]
        reduced = se_channels(channels)
        pooled = pixel_mean(x)
        gate = F.linear(pooled, self.reduce.weight[:reduced, :channels], self.reduce.bias[:reduced])
        gate = F.relu(gate, inplace=True)
        gate = F.linear(gate, self.expand.weight[:channels, :reduced], self.expand.bias[:channels])
        return x * F.hardsigmoid(gate)[:, :, None, None]


class DynamicMBConv(nn.Module):
    """Inverted residual block with run-time kernel size and expand ratio.

    expand 1x1 - BN - act - depthwise - BN - act - [SE] - project 1x1 - BN [+ input]. In OFA's order the
    excitation follows the activation. With ``backend="fast"`` a block that normalises with the moments of its
    batch, in training and in recalibration, is one op (`pfnas_fast.ops.train_mbconv`); else its layers run
    one by one, where no whole path runs prepared (`prepare`).

    Args:
        block: What the space says about this block.
        backend: ``"reference"`` or ``"fast"``.

    Source: MobileNetV3, arXiv:1905.02244; elastic form Once-for-All, arXiv:1908.09791, section 3.3.

    Example:
        >>> from pfnas_fast.space import load_space
        >>> block = DynamicMBConv(load_space("tiny").blocks[0])
        >>> block(torch.zeros(1, 8, 6, 8), kernel_size=5, expand_ratio=3).shape
        torch.Size([1, 16, 3, 4])
    """

    def __init__(self, block: BlockSpec, *, backend: str = "reference") -> None:
        super().__init__()
        widest = block.max_mid_channels
        self.block = block
        self.expand_conv = DynamicPointwiseConv2d(block.in_channels, widest)
        self.expand_bn = DynamicBatchNorm2d(widest)
        self.depth_conv = DynamicDepthwiseConv2d(
            widest, block.kernel_sizes, stride=block.stride, backend=backend
        )
        self.depth_bn = DynamicBatchNorm2d(widest)
        self.se = DynamicSE(widest) if block.se else None
        self.project_conv = DynamicPointwiseConv2d(widest, block.out_channels)
        self.project_bn = DynamicBatchNorm2d(block.out_channels)
        self._train_op = load_train_op(backend)
        self.plan = "speed"  # see `set_training_plan`

    def forward(self, x: Tensor, kernel_size: int, expand_ratio: int) -> Tensor:
        """Run the block on `x` [N, in_channels, H, W].

        Args:
            x: Input, [N, in_channels, H, W], float32.
            kernel_size: One of the block's kernel sizes.
            expand_ratio: One of the block's expand ratios.

        Returns:
            [N, out_channels, ceil(H / stride), ceil(W / stride)].
        """
        block = self.block
        if self._train_op is not None and trains_fused(
            x, self, (self.expand_bn, self.depth_bn, self.project_bn)
        ):
            return self._train(self._train_op, x, kernel_size, block.mid_channels(expand_ratio))
        y = self.expand_conv(x, block.mid_channels(expand_ratio))
        y = activate(self.expand_bn(y), block.activation)
        y = self.depth_conv(y, kernel_size)
        y = activate(self.depth_bn(y), block.activation)
        if self.se is not None:
            y = self.se(y)
        y = self.project_bn(self.project_conv(y, block.out_channels))
        return y.add_(x) if block.has_residual else y

    def _train(
        self, op: Callable[..., tuple[Tensor, Tensor]], x: Tensor, kernel_size: int, mid_channels: int
    ) -> Tensor:
        block, se, depth = self.block, self.se, self.depth_conv
        depth.check_kernel_size(kernel_size)
        norms = (self.expand_bn, self.depth_bn, self.project_bn)
        excitation = None
        if se is not None:
            excitation = (se.reduce.weight, se.reduce.bias, se.expand.weight, se.expand.bias)
        y, moments = op(
            x,
            self.expand_conv.weight,
            depth.weight,
            depth.matrices(),
            self.project_conv.weight,
            [(norm.weight, norm.bias) for norm in norms],
            excitation,
            mid_channels=mid_channels,
            out_channels=block.out_channels,
            se_channels=0 if se is None else se_channels(mid_channels),
            kernel_size=kernel_size,
            stride=block.stride,
            residual=block.has_residual,
            activations=(block.activation, block.activation, None),
            eps=[norm.eps for norm in norms],
            plan=self.plan,
        )
        hand_over_moments(norms, (mid_channels, mid_channels, block.out_channels), moments, x, y)
        return y

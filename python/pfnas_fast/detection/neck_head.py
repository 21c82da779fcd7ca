# SPDX-License-Identifier: Apache-2.0
"""The static part of the detector: top-down neck and FCOS-lite head.

Both exist in a dynamic and a plain form under the same module names. The dynamic form uses
`DynamicBatchNorm2d`, whose statistics depend on the path and are recalibrated with the backbone's; the plain
form uses torch's own layers.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pfnas_fast.detection.grid import PointGrid, make_grid
from pfnas_fast.detection.output import DetectorOutput
from pfnas_fast.supernet.fused import hand_over_moments, load_train_op, trains_fused
from pfnas_fast.supernet.layers import DynamicBatchNorm2d, DynamicDepthwiseConv2d, activate, init_conv_

CLASS_PRIOR = (
    0.01  # initial probability of every class at every location (focal loss, arXiv:1708.02002, sec. 3.3)
)
BOX_PRIOR = 1.5  # initial distance from a point to each side, in strides: the middle of a level's size range


def _norm(channels: int, plain: bool) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels) if plain else DynamicBatchNorm2d(channels)


class Neck(nn.Module):
    """Lateral 1x1 convolutions and a top-down pathway, without smoothing convolutions.

    p_i = h-swish(BN(conv(x_i)) + upsample(p_{i+1})), nearest neighbour; the coarsest level has no second
    term.

    Args:
        tap_channels: Channels of each backbone feature, finest first.
        channels: Channels of every output.
        plain: Torch's own layers instead of dynamic ones.

    Source:
        Feature Pyramid Networks, arXiv:1612.03144, reduced.
    """

    def __init__(self, tap_channels: Sequence[int], channels: int, *, plain: bool = False) -> None:
        super().__init__()
        convs = [nn.Conv2d(c, channels, 1, bias=False) for c in tap_channels]
        for conv in convs:
            init_conv_(conv.weight.data)
        self.lateral_convs = nn.ModuleList(convs)
        self.lateral_bns = nn.ModuleList(_norm(channels, plain) for _ in tap_channels)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Features [N, tap_channels[i], H_i, W_i] -> pyramid [N, channels, H_i, W_i], finest first."""
        pyramid: list[Tensor] = []
        above: Tensor | None = None
        layers = zip(features, self.lateral_convs, self.lateral_bns, strict=True)
        for feature, conv, bn in reversed(list(layers)):
            y = bn(conv(feature))
            if above is not None:
                y = y + F.interpolate(above, size=(y.shape[2], y.shape[3]), mode="nearest")
            above = activate(y, "hswish")
            pyramid.append(above)
        return pyramid[::-1]


class SeparableConv(nn.Module):
    """Depthwise 3x3, pointwise 1x1, BN, h-swish; weights shared over levels, statistics and affine of BN per
    level.

    Args:
        channels: Channels in and out.
        num_levels: Number of BNs.
        plain: Torch's own layers instead of dynamic ones.
        backend: ``"reference"`` or ``"fast"``: one op in training mode.
    """

    def __init__(self, channels: int, num_levels: int, *, plain: bool, backend: str) -> None:
        super().__init__()
        self.plain = plain
        if plain:
            self.depth_conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        else:
            self.depth_conv = DynamicDepthwiseConv2d(channels, (3,), backend=backend)
        self.point_conv = nn.Conv2d(channels, channels, 1, bias=False)
        init_conv_(self.point_conv.weight.data)
        self.bns = nn.ModuleList(_norm(channels, plain) for _ in range(num_levels))
        self._train_op = None if plain else load_train_op(backend)
        self.plan = "speed"  # see `set_training_plan`

    def forward(self, x: Tensor, level: int) -> Tensor:
        """[N, C, H, W] of one level -> [N, C, H, W]."""
        norm = self.bns[level]
        assert isinstance(norm, nn.BatchNorm2d)
        if self._train_op is not None and trains_fused(x, self, (norm,)):
            return self._train(self._train_op, x, norm)
        y = self.depth_conv(x) if self.plain else self.depth_conv(x, 3)
        return activate(norm(self.point_conv(y)), "hswish")

    def _train(self, op: Callable[..., tuple[Tensor, Tensor]], x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
        channels = x.shape[1]
        y, moments = op(
            x,
            None,
            self.depth_conv.weight,
            (None, None),
            self.point_conv.weight,
            [None, None, (norm.weight, norm.bias)],
            mid_channels=channels,
            out_channels=channels,
            kernel_size=3,
            activations=(None, None, "hswish"),
            eps=(0.0, 0.0, norm.eps),
            plan=self.plan,
        )
        hand_over_moments((norm,), (channels,), moments[:, 2 * channels :], x, y)
        return y


class LevelScale(nn.Module):
    """One learnable factor per level, so that levels can share the box predictor.

    Args:
        num_levels: Number of factors; they start at 1.
    """

    def __init__(self, num_levels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_levels))

    def forward(self, x: Tensor, level_index: Tensor) -> Tensor:
        """[N, L, 4] and the level of each location [L] -> [N, L, 4]."""
        return x * self.weight[level_index][:, None]


class Head(nn.Module):
    """FCOS-lite: shared separable convolutions and predictors of class, box and centerness at every location.

    Distances are softplus(scale * x) * stride. FCOS's exp turns a stray step of x into a huge box and a huge
    gradient, and the ReLU of its later version gives no gradient to a side that it predicts as zero; softplus
    has neither trouble: it is linear for large objects and never dead.

    The three 1x1 predictors are one linear layer with K + 4 + 1 outputs over the locations of all levels: the
    same function in one matrix product.

    Args:
        channels: Channels of the pyramid.
        num_convs: Separable convolutions before the predictors.
        num_classes: K.
        strides: Stride of each level in px, finest first.
        plain: Torch's own layers instead of dynamic ones.
        backend: Of the separable convolutions.

    Source:
        FCOS, arXiv:1904.01355, with one tower and separable convolutions.
    """

    def __init__(
        self,
        channels: int,
        num_convs: int,
        *,
        num_classes: int,
        strides: Sequence[int],
        plain: bool = False,
        backend: str = "reference",
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.strides = tuple(strides)
        levels = len(self.strides)
        self.convs = nn.ModuleList(
            SeparableConv(channels, levels, plain=plain, backend=backend) for _ in range(num_convs)
        )
        self.predictor = nn.Linear(channels, num_classes + 5)
        self.scale = LevelScale(levels)
        nn.init.normal_(self.predictor.weight, std=0.01)
        with torch.no_grad():
            self.predictor.bias[:num_classes] = -math.log((1 - CLASS_PRIOR) / CLASS_PRIOR)
            self.predictor.bias[num_classes : num_classes + 4] = math.log(math.expm1(BOX_PRIOR))
            self.predictor.bias[num_classes + 4] = 0

    def forward(self, pyramid: Sequence[Tensor], image_size: tuple[int, int]) -> DetectorOutput:
        """Predict at every location.

        Args:
            pyramid: [N, channels, H_i, W_i] per level, finest first.
            image_size: (height, width) of the canvas in px.

        Returns:
            Predictions of the N images.
        """
        rows: list[Tensor] = []
        for level, x in enumerate(pyramid):
            for conv in self.convs:
                x = conv(x, level)
            rows.append(
                x.permute(0, 2, 3, 1).flatten(1, 2)
            )  # [N, H_i * W_i, C], a view of channels_last memory
        sizes = [(x.shape[2], x.shape[3]) for x in pyramid]
        grid = make_grid(image_size, self.strides, sizes=sizes, device=pyramid[0].device)
        raw = self.predictor(torch.cat(rows, dim=1))  # [N, L, K + 5]
        logits, sides, centerness = raw.split([self.num_classes, 4, 1], dim=-1)
        return _output(logits, self.scale(sides, grid.level_index), centerness, grid)


def _output(logits: Tensor, sides: Tensor, centerness: Tensor, grid: PointGrid) -> DetectorOutput:
    """Predictions from [N, L, K] class logits, [N, L, 4] scaled sides and [N, L, 1] centerness."""
    ltrb = F.softplus(sides) * grid.stride_px[:, None]
    return DetectorOutput(logits, ltrb, centerness.squeeze(-1), grid)


def run_prepared_detector(head: Head, images: Tensor, compiled: Any) -> DetectorOutput:
    """Run a packed subnet of the detector that `head` belongs to.

    Args:
        head: Says what a location predicts.
        images: [N, 3, H, W], float32.
        compiled: The compiled subnet; its predictor has scaled the sides.

    Returns:
        What `Head.forward` returns.
    """
    grid = make_grid((images.shape[2], images.shape[3]), head.strides)
    raw = images.new_empty(images.shape[0], grid.num_locations, head.num_classes + 5)
    compiled.run(images, raw)
    logits, sides, centerness = raw.split([head.num_classes, 4, 1], dim=-1)
    return _output(logits, sides, centerness, grid)

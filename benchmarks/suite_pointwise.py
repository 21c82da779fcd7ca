# SPDX-License-Identifier: Apache-2.0
"""1x1 convolution with folded batch normalisation and activation, channels_last, N = 32.

Ours: `dynamic_pointwise_conv` on panels packed beforehand. Theirs: F.conv2d with the scale folded into its
weight and the shift as its bias, then the activation in place: the best that eager torch offers.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from harness import Comparison
from torch import Tensor

from pfnas_fast.ops import dynamic_pointwise_conv, pack_pointwise_weight

__all__ = ["comparisons"]

BATCH = 32


class Shape(NamedTuple):
    """Input and output channels of a square map."""

    inputs: int
    outputs: int
    size: int
    activation: str | None

    @property
    def name(self) -> str:
        return f"pointwise/{self.inputs}-{self.outputs}/{self.size}x{self.size}"


SHAPES = [
    Shape(24, 96, 56, "relu"),
    Shape(80, 480, 14, "hswish"),
    Shape(112, 672, 14, "hswish"),
    Shape(160, 960, 7, "hswish"),
    Shape(96, 24, 56, None),
    Shape(480, 80, 14, None),
    Shape(672, 112, 14, None),
    Shape(960, 160, 7, None),
]


def pointwise(shape: Shape) -> Comparison:
    """One shape."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, shape.inputs, shape.size, shape.size, generator=g)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(shape.outputs, shape.inputs, 1, 1, generator=g) / shape.inputs**0.5
    scale, shift = torch.rand(shape.outputs, generator=g) + 0.5, torch.randn(shape.outputs, generator=g)
    panels = pack_pointwise_weight(weight)
    folded = (weight * scale[:, None, None, None]).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def ours() -> Tensor:
        return dynamic_pointwise_conv(
            x,
            panels,
            out_channels=shape.outputs,
            scale=scale,
            shift=shift,
            activation=shape.activation,
        )

    @torch.no_grad()
    def theirs() -> Tensor:
        y = F.conv2d(x, folded, shift)
        if shape.activation is None:
            return y
        return F.relu_(y) if shape.activation == "relu" else F.hardswish(y, inplace=True)

    def check() -> None:
        error = (ours() - theirs()).abs().max()
        assert float(error) <= 1e-4 * float(theirs().abs().max()), "the two sides differ"

    return Comparison(shape.name, ours, theirs, check)


def comparisons() -> Iterator[tuple[str, Callable[[], Comparison]]]:
    """Every row's name with the function that prepares it."""
    for shape in SHAPES:
        yield shape.name, partial(pointwise, shape)

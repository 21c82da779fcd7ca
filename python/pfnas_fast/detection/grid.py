# SPDX-License-Identifier: Apache-2.0
"""The locations at which a dense detector predicts: one point per feature-map cell, over all levels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PointGrid:
    """All prediction locations of a canvas, level by level (finest first), row-major within a level.

    Attributes:
        points: (x, y) of each location in canvas px, [L, 2], float32. Cell i of a level with stride s has its
            point at (i + 0.5) * s, so the points cover a canvas evenly and a mirrored canvas has mirrored
            points.
        level_index: Level of each location, [L], int64.
        stride_px: Stride of each location's level, [L], float32.
        strides: Stride of each level in px.
        sizes: (height, width) of each level in cells.
        image_size: (height, width) of the canvas in px.
    """

    points: Tensor
    level_index: Tensor
    stride_px: Tensor
    strides: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]
    image_size: tuple[int, int]

    @property
    def num_locations(self) -> int:
        """L, the number of locations over all levels."""
        return self.points.shape[0]

    @property
    def level_starts(self) -> tuple[int, ...]:
        """Index of the first location of each level."""
        starts, total = [], 0
        for height, width in self.sizes:
            starts.append(total)
            total += height * width
        return tuple(starts)


def make_grid(
    image_size: tuple[int, int],
    strides: Sequence[int],
    *,
    sizes: Sequence[tuple[int, int]] | None = None,
    device: torch.device | str = "cpu",
) -> PointGrid:
    """Build (or fetch from a small cache) the grid of a canvas.

    Args:
        image_size: (height, width) of the canvas in px.
        strides: Stride of each level in px, finest first.
        sizes: (height, width) of each level in cells. Default: ceil(canvas / stride), which is what stride-2
            convolutions with padding k // 2 give.
        device: Where the tensors shall live.

    Returns:
        The grid. It is shared between callers: do not write into its tensors.

    Example:
        >>> make_grid((96, 128), (8, 16, 32)).num_locations
        252
    """
    if sizes is None:
        height, width = image_size
        sizes = [(math.ceil(height / s), math.ceil(width / s)) for s in strides]
    key = tuple((int(h), int(w)) for h, w in sizes)
    return _cached_grid((int(image_size[0]), int(image_size[1])), tuple(strides), key, str(device))


@lru_cache(maxsize=64)
def _cached_grid(
    image_size: tuple[int, int], strides: tuple[int, ...], sizes: tuple[tuple[int, int], ...], device: str
) -> PointGrid:
    points, levels = [], []
    for level, (stride, (height, width)) in enumerate(zip(strides, sizes, strict=True)):
        y = (torch.arange(height, dtype=torch.float32) + 0.5) * stride
        x = (torch.arange(width, dtype=torch.float32) + 0.5) * stride
        points.append(torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).reshape(-1, 2).flip(-1))
        levels.append(torch.full((height * width,), level, dtype=torch.int64))
    level_index = torch.cat(levels).to(device)
    stride_px = torch.tensor(strides, dtype=torch.float32, device=device)[level_index]
    return PointGrid(torch.cat(points).to(device), level_index, stride_px, strides, sizes, image_size)

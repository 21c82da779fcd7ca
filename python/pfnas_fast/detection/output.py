# SPDX-License-Identifier: Apache-2.0
"""What a detector returns: raw dense predictions, and final detections of one image."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pfnas_fast.detection.grid import PointGrid


@dataclass(frozen=True, eq=False)
class DetectorOutput:
    """Raw predictions of a batch at every location of the grid.

    Attributes:
        logits: Class logits (independent sigmoids), [N, L, K].
        ltrb: Distances from the point to the left, top, right and bottom side of the box, px, >= 0, [N, L,
            4].
        centerness: Centerness logits, [N, L].
        grid: The locations.
    """

    logits: Tensor
    ltrb: Tensor
    centerness: Tensor
    grid: PointGrid

    @property
    def points(self) -> Tensor:
        """(x, y) of each location in canvas px, [L, 2]."""
        return self.grid.points

    @property
    def level_index(self) -> Tensor:
        """Level of each location, [L], int64."""
        return self.grid.level_index

    @property
    def strides(self) -> tuple[int, ...]:
        """Stride of each level in px."""
        return self.grid.strides

    @property
    def num_classes(self) -> int:
        """K, the number of classes."""
        return self.logits.shape[-1]

    @property
    def boxes(self) -> Tensor:
        """Predicted boxes, xyxy px, [N, L, 4], not clipped to the canvas."""
        return ltrb_to_boxes(self.points, self.ltrb)

    def select(self, index: int) -> "DetectorOutput":
        """The predictions of one image, as a batch of one."""
        rows = slice(index, index + 1)
        return DetectorOutput(self.logits[rows], self.ltrb[rows], self.centerness[rows], self.grid)

    def detach(self) -> "DetectorOutput":
        """The same predictions outside the autograd graph, for use as a teacher."""
        return DetectorOutput(self.logits.detach(), self.ltrb.detach(), self.centerness.detach(), self.grid)


@dataclass(frozen=True, eq=False)
class Detection:
    """The detections of one image, best first.

    Attributes:
        boxes: xyxy in px, [n, 4], float32.
        scores: In [0, 1], descending, [n], float32.
        labels: Class indices, 0-based, [n], int64.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.boxes.shape[0]

    def to_original(self, scale: float, image_size: tuple[int, int]) -> "Detection":
        """Map boxes from a top-left anchored letterbox back to the image it was made from.

        Args:
            scale: Canvas px per original px.
            image_size: (height, width) of the original image in px; boxes are clipped to it.

        Returns:
            The detections in original px.

        Example:
            >>> box = torch.tensor([[10.0, 20.0, 30.0, 90.0]])
            >>> one = Detection(box, torch.ones(1), torch.zeros(1).long())
            >>> one.to_original(0.5, (100, 200)).boxes.tolist()
            [[20.0, 40.0, 60.0, 100.0]]
        """
        height, width = image_size
        limit = torch.tensor([width, height, width, height], dtype=self.boxes.dtype, device=self.boxes.device)
        boxes = torch.minimum((self.boxes / scale).clamp(min=0), limit)
        return Detection(boxes, self.scores, self.labels)


def ltrb_to_boxes(points: Tensor, ltrb: Tensor) -> Tensor:
    """Turn distances from points into boxes.

    Args:
        points: (x, y) px, [..., 2].
        ltrb: Distances px, [..., 4], broadcastable against `points` in the leading dimensions.

    Returns:
        xyxy px, [..., 4].
    """
    return torch.cat([points - ltrb[..., :2], points + ltrb[..., 2:]], dim=-1)

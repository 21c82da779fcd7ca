# SPDX-License-Identifier: Apache-2.0
"""Draw detections beside the ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path as FilePath

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes, make_grid

from pfnas_fast.data import DetectionDataset
from pfnas_fast.detection import Detection

_COLOURS = (
    "#e6194b",
    "#3cb44b",
    "#4363d8",
    "#f58231",
    "#911eb4",
    "#008080",
    "#9a6324",
    "#808000",
    "#000075",
    "#800000",
)
_SHOWN_SIDE_PX = 480


def draw_boxes(
    image: Tensor, detection: Detection, class_names: Sequence[str], *, threshold: float = 0.3
) -> Tensor:
    """Draw the detections scored at least `threshold`.

    Args:
        image: uint8 RGB [3, H, W].
        detection: Boxes in px of `image`.
        class_names: Name of each label.
        threshold: Lowest score drawn.

    Returns:
        uint8 [3, H', W'], the longest side scaled to 480 px.
    """
    factor = _SHOWN_SIDE_PX / max(image.shape[1:])
    size = [max(1, round(side * factor)) for side in image.shape[1:]]
    canvas = F.resize(image, size, antialias=True)
    kept = detection.scores >= threshold
    if not bool(kept.any()):
        return canvas
    labels = detection.labels[kept].tolist()
    texts = [
        f"{class_names[label]} {score:.2f}"
        for label, score in zip(labels, detection.scores[kept].tolist(), strict=True)
    ]
    colours = [_COLOURS[label % len(_COLOURS)] for label in labels]
    return draw_bounding_boxes(canvas, detection.boxes[kept] * factor, texts, colors=colours, width=2)


def draw_detections(file: FilePath, dataset: DetectionDataset, detections: Sequence[Detection]) -> None:
    """Write a PNG with one row per image: ground truth left, detections right."""
    tiles = []
    for index, detection in enumerate(detections):
        image, target = dataset.read(index), dataset.target(index)
        truth = Detection(target.boxes, torch.ones(len(target.boxes)), target.labels)
        tiles += [
            draw_boxes(image, truth, dataset.class_names),
            draw_boxes(image, detection, dataset.class_names),
        ]
    height, width = (max(tile.shape[axis] for tile in tiles) for axis in (1, 2))
    padded = [F.pad(tile, [0, 0, width - tile.shape[2], height - tile.shape[1]], fill=255) for tile in tiles]
    write_png(file, make_grid(padded, nrow=2, padding=4, pad_value=255))


def write_png(file: FilePath, image: Tensor) -> None:
    """Write uint8 RGB [3, H, W] as a PNG."""
    F.to_pil_image(image).save(file, format="PNG")

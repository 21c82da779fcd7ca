# SPDX-License-Identifier: Apache-2.0
"""Images decoded once for many evaluations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pfnas_fast.data.datasets import ClassificationDataset, DetectionDataset
from pfnas_fast.data.images import letterbox, resize
from pfnas_fast.errors import InputError

CACHE_BYTES = 2 << 30


class EvalImages:
    """A dataset's images at one canvas, without augmentation.

    Decoded at once and kept as one uint8 tensor; a set that takes more than 2 GiB is decoded anew for every
    pass.

    Args:
        dataset: What to show.
        canvas: (height, width) px.
        fit: "letterbox" (detection, BN recalibration) or "crop": shorter side to the canvas, centre crop
            (classification).

    Raises:
        InputError: an empty dataset, an unknown `fit`, an unreadable image.

    Example:
        >>> from pfnas_fast.data import load_detection
        >>> images = EvalImages(load_detection("digits").label, (72, 96))
        >>> next(images.batches(8)).shape, float(images.scales[0])
        (torch.Size([8, 3, 72, 96]), 0.5)
    """

    def __init__(
        self,
        dataset: DetectionDataset | ClassificationDataset,
        canvas: tuple[int, int],
        *,
        fit: str = "letterbox",
    ) -> None:
        if fit not in ("letterbox", "crop"):
            raise InputError(f"EvalImages: expected 'letterbox' or 'crop' for fit, got {fit!r}")
        if len(dataset) == 0:
            raise InputError(
                f"EvalImages: expected at least one image for dataset {dataset.name!r}, got none"
            )
        self.dataset, self.canvas, self.fit = dataset, canvas, fit
        self.scales = torch.ones(len(dataset))
        self._images: Tensor | None = None
        if len(dataset) * 3 * canvas[0] * canvas[1] <= CACHE_BYTES:
            self._images = torch.stack([self._load(i) for i in range(len(dataset))])
        elif isinstance(dataset, DetectionDataset) and fit == "letterbox":
            sizes = [(r.height, r.width) for r in dataset.records]
            self.scales = torch.tensor([min(canvas[0] / h, canvas[1] / w) for h, w in sizes])

    @classmethod
    def at(
        cls, dataset: DetectionDataset | ClassificationDataset, canvases: Sequence[tuple[int, int]]
    ) -> dict[tuple[int, int], EvalImages]:
        """The same images at several canvases, letterboxed."""
        return {canvas: cls(dataset, canvas) for canvas in dict.fromkeys(canvases)}

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def is_cached(self) -> bool:
        """Whether the images are kept."""
        return self._images is not None

    @property
    def images(self) -> Tensor:
        """All images, uint8 [N, 3, height, width]."""
        if self._images is None:
            return torch.stack([self._load(i) for i in range(len(self))])
        return self._images

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Yield the images in order, uint8 [<= batch_size, 3, height, width]."""
        if batch_size < 1:
            raise InputError(
                f"EvalImages.batches: expected a whole number >= 1 for batch_size, got {batch_size}"
            )
        for start in range(0, len(self), batch_size):
            stop = min(start + batch_size, len(self))
            if self._images is None:
                yield torch.stack([self._load(i) for i in range(start, stop)])
            else:
                yield self._images[start:stop]

    def to_original(self, index: int, boxes: Tensor) -> Tensor:
        """Map boxes [n, 4], xyxy px of the canvas, to px of original image `index`, clipped to it."""
        if not isinstance(self.dataset, DetectionDataset):
            raise InputError(
                "EvalImages.to_original: expected a detection dataset, got a classification dataset"
            )
        record = self.dataset.records[index]
        limit = boxes.new_tensor([record.width, record.height] * 2)
        return (boxes / self.scales[index].to(boxes)).clamp(min=0).minimum(limit)

    def _load(self, index: int) -> Tensor:
        image = self.dataset.read(index)
        if self.fit == "letterbox":
            out, scale = letterbox(image, self.canvas)
            self.scales[index] = scale
            return out
        return _centre_crop(image, self.canvas)


def _centre_crop(image: Tensor, canvas: tuple[int, int]) -> Tensor:
    height, width = canvas
    scale = max(height / image.shape[1], width / image.shape[2])
    size = max(height, round(image.shape[1] * scale)), max(width, round(image.shape[2] * scale))
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return resize(image, size)[:, top : top + height, left : left + width]

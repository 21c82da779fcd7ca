# SPDX-License-Identifier: Apache-2.0
"""Datasets: records of what is in each image, and pixels that are read only when asked for.

Every `read` is recorded in the dataset's `reads`. A split that no stage may look at yet can so be proved
untouched: ``assert not data.test.reads``. Subsets made with `subset` keep a log of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pfnas_fast.errors import InputError


@dataclass
class Target:
    """Ground truth of one image.

    Attributes:
        boxes: [n, 4] float32, xyxy px of the image they belong to.
        labels: [n] int64, 0-based.
        ignore_boxes: [m, 4] float32, xyxy px: regions (crowds, difficult objects) where a detection is
            neither right nor wrong.
    """

    boxes: Tensor
    labels: Tensor
    ignore_boxes: Tensor

    @staticmethod
    def empty() -> Target:
        """A target without boxes, for images that show none of the classes."""
        return Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))


@dataclass
class Batch:
    """Images of one size with their targets: images [N, 3, H, W] uint8 RGB, targets a list of N."""

    images: Tensor
    targets: list[Target]

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class Record:
    """What an annotation file says about one image.

    Attributes:
        image_id: Unique in its dataset; goes into `splits.json`.
        source: File path, or for the embedded digits the index of the scene, as text.
        width, height: Size in px.
        boxes: [n, 4] float64, xyxy px, inside the image.
        labels: [n] int64, 0-based.
        ignore: [n] bool: COCO `iscrowd`, VOC `difficult`.
        areas: [n] float64, px^2, as annotated (COCO: area of the mask); decides small / medium / large in
            evaluation.
    """

    image_id: str
    source: str
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    ignore: np.ndarray
    areas: np.ndarray


@dataclass
class DetectionDataset:
    """Images with boxes.

    Attributes:
        name: Role or split, for messages.
        class_names: Name of each label.
        records: One per image.
        reader: Returns the pixels of a record, uint8 [3, H, W].
        mirror: Whether a mirrored image is still a natural one (false for digits).
        on_read: Called with each record that is read, if given.
        reads: Ids of the images read so far through this object.
        calib: Training images on which BatchNorm is recalibrated before a path is evaluated on these (None:
            not known).
    """

    name: str
    class_names: tuple[str, ...]
    records: tuple[Record, ...]
    reader: Callable[[Record], Tensor]
    mirror: bool = True
    on_read: Callable[[Record], None] | None = None
    reads: set[str] = field(default_factory=set)
    calib: DetectionDataset | None = None

    def __len__(self) -> int:
        return len(self.records)

    @property
    def num_classes(self) -> int:
        """Number of classes, background not counted."""
        return len(self.class_names)

    def log_read(self, index: int) -> None:
        """Record that image `index` is read, also where a worker process does the reading."""
        record = self.records[index]
        self.reads.add(record.image_id)
        if self.on_read is not None:
            self.on_read(record)

    def read(self, index: int) -> Tensor:
        """Decode image `index`.

        Returns:
            uint8 RGB, [3, height, width].

        Raises:
            InputError: the file cannot be decoded, or has another size than its annotation says.
        """
        self.log_read(index)
        return self.reader(self.records[index])

    def target(self, index: int) -> Target:
        """Ground truth of image `index`, boxes in px of the original image."""
        record = self.records[index]
        boxes = torch.from_numpy(record.boxes.astype(np.float32)).reshape(-1, 4)
        ignore = torch.from_numpy(record.ignore)
        return Target(boxes[~ignore], torch.from_numpy(record.labels)[~ignore], boxes[ignore])

    def subset(self, indices: Sequence[int] | np.ndarray, name: str | None = None) -> DetectionDataset:
        """The images `indices`, in that order, as a dataset with a read log of its own."""
        records = tuple(self.records[int(i)] for i in indices)
        return DetectionDataset(
            name or self.name,
            self.class_names,
            records,
            self.reader,
            self.mirror,
            self.on_read,
            calib=self.calib,
        )


@dataclass
class ClassificationDataset:
    """Images with one label each.

    Attributes:
        name: Split, for messages.
        class_names: Name of each label.
        sources: File path (or, for the embedded digits, the index of the view, as text) of each image.
        labels: [n] int64, 0-based.
        reader: Returns the pixels of a source, uint8 [3, H, W].
        mirror: Whether a mirrored image is still a natural one (false for digits).
        reads: Sources read so far through this object.
    """

    name: str
    class_names: tuple[str, ...]
    sources: tuple[str, ...]
    labels: np.ndarray
    reader: Callable[[str], Tensor]
    mirror: bool = True
    reads: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if len(self.sources) != len(self.labels):
            raise InputError(
                f"ClassificationDataset: expected one label per image for labels of split {self.name!r}, "
                f"got {len(self.labels)} for {len(self.sources)} images"
            )

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def log_read(self, index: int) -> None:
        """Record that image `index` is read, also where a worker process does the reading."""
        self.reads.add(self.sources[index])

    def read(self, index: int) -> Tensor:
        """Decode image `index`: uint8 RGB, [3, H, W]. Raises InputError if its file cannot be decoded."""
        self.log_read(index)
        return self.reader(self.sources[index])

    def subset(self, indices: Sequence[int] | np.ndarray, name: str | None = None) -> ClassificationDataset:
        """The images `indices`, in that order, as a dataset with a read log of its own."""
        index = np.asarray(indices, dtype=np.int64)
        sources = tuple(self.sources[int(i)] for i in index)
        return ClassificationDataset(
            name or self.name, self.class_names, sources, self.labels[index], self.reader, self.mirror
        )

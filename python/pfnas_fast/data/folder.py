# SPDX-License-Identifier: Apache-2.0
"""Classification sets: one folder per class (ImageFolder), or the embedded digits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pfnas_fast.data.coco import class_mismatch
from pfnas_fast.data.datasets import ClassificationDataset
from pfnas_fast.data.digits import digit_views
from pfnas_fast.data.images import IMAGE_SUFFIXES, read_image
from pfnas_fast.errors import InputError

_STREAM_SPLIT = 31


@dataclass(frozen=True)
class ClassificationData:
    """A classification set: `train` fits weights, `val` measures them. A test split on disk is left alone.

    Attributes:
        train, val: The two datasets.
        source: Folder, or "digits".
    """

    train: ClassificationDataset
    val: ClassificationDataset
    source: str

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each label."""
        return self.train.class_names

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.train.class_names)

    @property
    def mirror(self) -> bool:
        """Whether a mirrored image is still a natural one."""
        return self.train.mirror


def load_classification(source: str | Path, *, val: float = 0.1, seed: int = 0) -> ClassificationData:
    """Load a classification set.

    Args:
        source: A folder with `train/{class}/` and (optionally) `val/{class}/`, a folder of class folders, or
            "digits" for the embedded handwritten digits. Without a val folder `val` of each class's images is
            carved, by `seed`.
        val: Share of the images to carve, above 0 and below 1.
        seed: Draws the images that are carved.

    Returns:
        The training and validation datasets, labels in alphabetical order of the classes.

    Raises:
        InputError: no such folder, fewer than two classes, an empty class folder, classes that differ between
            train and val, too few images to carve from.

    Example:
        >>> data = load_classification("digits")
        >>> data.num_classes, tuple(data.train.read(0).shape)
        (10, (3, 64, 64))
    """
    if not 0 < val < 1:
        raise InputError(f"load_classification: expected a fraction above 0 and below 1 for val, got {val}")
    if source == "digits":
        views = digit_views()
        return ClassificationData(views["train"], views["val"], "digits")
    folder = Path(source)
    if not folder.is_dir():
        raise InputError(
            f"load_classification: expected a folder or 'digits' for source, got {str(source)!r}"
        )
    has_train = (folder / "train").is_dir()
    train = _read_folder(folder / "train" if has_train else folder, "train")
    if has_train and (folder / "val").is_dir():
        held_out = _read_folder(folder / "val", "val")
        if held_out.class_names != train.class_names:
            raise InputError(class_mismatch(train.class_names, held_out.class_names, str(folder / "val")))
        return ClassificationData(train, held_out, str(source))
    keep, carved = _carve(train.labels, val, seed)
    if not keep.size or not carved.size:
        raise InputError(
            f"load_classification: expected at least two images of some class in {folder}, got one each"
        )
    return ClassificationData(train.subset(keep, "train"), train.subset(carved, "val"), str(source))


def _read_folder(folder: Path, split: str) -> ClassificationDataset:
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(classes) < 2:
        raise InputError(
            f"load_classification: expected two or more class folders in {folder}, got {classes}"
        )
    sources: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = sorted(str(p) for p in (folder / name).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise InputError(
                f"load_classification: expected images in class folder {folder / name}, got none"
            )
        sources += files
        labels += [label] * len(files)
    return ClassificationDataset(
        split, tuple(classes), tuple(sources), np.array(labels, dtype=np.int64), read_image
    )


def _carve(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices kept and carved, `share` of every class, at least one of each class that has two."""
    rng = np.random.default_rng([seed, _STREAM_SPLIT])
    carved = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        carved.append(members[: max(1, round(share * len(members))) if len(members) > 1 else 0])
    chosen = np.sort(np.concatenate(carved))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen

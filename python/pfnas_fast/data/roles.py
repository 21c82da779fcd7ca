# SPDX-License-Identifier: Apache-2.0
"""Who may see which image: the roles of a path-filter run, disjoint and written down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pfnas_fast.data.datasets import DetectionDataset
from pfnas_fast.errors import InputError

_STREAM_CARVE, _STREAM_TRAIN, _STREAM_CALIB = 11, 12, 13


@dataclass(frozen=True)
class Roles:
    """Sizes of the roles.

    Attributes:
        label: Fraction of the training images on which labelled paths are evaluated; never trained on.
        calib: Largest number of `fit` images used to recalibrate batch normalisation.
        select: Fraction of the training images that becomes `select` where no split is left for it.
        test: Fraction of the training images that becomes `test` where the data have only one split.
    """

    label: float = 0.2
    calib: int = 256
    select: float = 0.2
    test: float = 0.2

    def __post_init__(self) -> None:
        for name in ("label", "select", "test"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise InputError(f"Roles: expected a fraction above 0 and below 1 for {name}, got {value}")
        if not isinstance(self.calib, int) or self.calib < 1:
            raise InputError(f"Roles: expected a whole number of images >= 1 for calib, got {self.calib}")
        if self.select + self.test >= 1:
            raise InputError(f"Roles: expected select + test below 1, got {self.select + self.test:g}")


@dataclass(frozen=True)
class DetectionData:
    """A detection set with its images divided by role.

    Attributes:
        fit: Images that train weights.
        calib: A subset of `fit` that recalibrates batch normalisation.
        label: Images on which paths are evaluated to train the filter.
        select: Images that decide between the final candidates.
        test: Images for the report alone.
        kind: "coco", "voc" or "digits".
        source: Folder, or "digits".
        seed, fraction: As given to `load_detection`.
    """

    fit: DetectionDataset
    calib: DetectionDataset
    label: DetectionDataset
    select: DetectionDataset
    test: DetectionDataset
    kind: str
    source: str
    seed: int
    fraction: float

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each label."""
        return self.fit.class_names

    @property
    def num_classes(self) -> int:
        """Number of classes, background not counted."""
        return len(self.fit.class_names)

    @property
    def mirror(self) -> bool:
        """Whether a mirrored image is still a natural one."""
        return self.fit.mirror

    def roles(self) -> dict[str, DetectionDataset]:
        """The datasets by role name."""
        return {
            "fit": self.fit,
            "calib": self.calib,
            "label": self.label,
            "select": self.select,
            "test": self.test,
        }

    def splits(self) -> dict[str, Any]:
        """What `splits.json` holds: where the data come from and the image ids of each role."""
        head = {"source": self.source, "kind": self.kind, "seed": self.seed, "fraction": self.fraction}
        ids = {role: [r.image_id for r in dataset.records] for role, dataset in self.roles().items()}
        return {**head, "class_names": list(self.class_names), **ids}


def assign_roles(
    splits: Mapping[str, DetectionDataset],
    roles: Roles,
    *,
    seed: int,
    fraction: float,
    kind: str,
    source: str,
) -> DetectionData:
    """Turn the splits that the data come with into roles.

    `select` = val and `test` = test. Without a test split val becomes `test` and `select` is carved from
    train; without val `select` is carved from train; with train alone both are. Carving does not depend on
    `fraction`, and a smaller fraction keeps a subset of a larger one's images, so runs that differ in
    `fraction` are comparable.

    Raises:
        InputError: no training split; an empty split or role; an image in two splits.
    """
    if not 0 < fraction <= 1:
        raise InputError(
            f"load_detection: expected a number above 0 and at most 1 for fraction, got {fraction}"
        )
    if "train" not in splits:
        raise InputError(
            f"load_detection: expected a training split in {source}, got {sorted(splits) or 'none'}"
        )
    for name, dataset in splits.items():
        if len(dataset) == 0:
            raise InputError(
                f"load_detection: expected at least one image in split {name!r} of {source}, got none"
            )
    _check_disjoint(splits, source)
    train, test, select = splits["train"], splits.get("test"), splits.get("val")
    if test is None:
        test, select = select, None
    shuffled = np.random.default_rng([seed, _STREAM_CARVE]).permutation(len(train))
    num_select = 0 if select is not None else max(1, round(roles.select * len(train)))
    num_test = 0 if test is not None else max(1, round(roles.test * len(train)))
    if select is None:
        select = train.subset(np.sort(shuffled[:num_select]), "select")
    if test is None:
        test = train.subset(np.sort(shuffled[num_select : num_select + num_test]), "test")
    rest = np.sort(shuffled[num_select + num_test :])
    fit, label = _fit_and_label(rest, roles.label, seed, fraction)
    if not fit.size or not label.size:
        raise InputError(
            f"load_detection: expected enough training images in {source} for the roles fit and label, got "
            f"{fit.size + label.size} (fraction {fraction:g})"
        )
    num_calib = min(roles.calib, fit.size)
    calib = train.subset(
        np.sort(np.random.default_rng([seed, _STREAM_CALIB]).permutation(fit)[:num_calib]), "calib"
    )
    data = DetectionData(
        fit=train.subset(fit, "fit"),
        calib=calib,
        label=train.subset(label, "label"),
        select=select.subset(range(len(select)), "select"),
        test=test.subset(range(len(test)), "test"),
        kind=kind,
        source=source,
        seed=seed,
        fraction=fraction,
    )
    for dataset in (data.label, data.select, data.test):
        dataset.calib = calib
    return data


def _fit_and_label(
    rest: np.ndarray, share: float, seed: int, fraction: float
) -> tuple[np.ndarray, np.ndarray]:
    """Deal a permutation to fit and label one by one, so that every prefix has the same share of labels."""
    dealt = np.random.default_rng([seed, _STREAM_TRAIN]).permutation(rest)
    kept = dealt[: max(1, round(fraction * len(dealt)))] if len(dealt) else dealt
    counts = np.ceil(np.round(np.arange(len(kept) + 1) * share, 9)).astype(np.int64)
    is_label = np.diff(counts) > 0
    return np.sort(kept[~is_label]), np.sort(kept[is_label])


def _check_disjoint(splits: Mapping[str, DetectionDataset], source: str) -> None:
    owner: dict[str, str] = {}
    for name, dataset in splits.items():
        for record in dataset.records:
            first = owner.setdefault(record.source, name)
            if first != name:
                raise InputError(
                    f"load_detection: expected every image of {source} in one split, got {record.source} in "
                    f"{first!r} and {name!r}"
                )

# SPDX-License-Identifier: Apache-2.0
"""Pascal VOC: `VOCdevkit/VOC{year}` with `Annotations/*.xml`, `JPEGImages`,
`ImageSets/Main/{train,val,test}.txt`.

VOC pixels are counted from 1 and boxes include their last pixel: a box of the file becomes
[xmin - 1, ymin - 1, xmax, ymax] in the continuous coordinates used everywhere here.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np

from pfnas_fast.data.coco import check_files_exist, class_mismatch, clip_box
from pfnas_fast.data.datasets import DetectionDataset, Record
from pfnas_fast.data.images import read_record
from pfnas_fast.errors import InputError

VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)


def find_voc_years(folder: Path) -> list[Path]:
    """The folders with `Annotations` and `ImageSets/Main` in `folder`, its `VOCdevkit` or itself."""
    candidates = [folder, *sorted(folder.glob("VOC[0-9]*")), *sorted(folder.glob("VOCdevkit/*"))]
    return [c for c in candidates if (c / "Annotations").is_dir() and (c / "ImageSets" / "Main").is_dir()]


def read_voc(years: list[Path]) -> dict[str, DetectionDataset]:
    """Read every split of one or more VOC years; splits of the same name are joined.

    The classes are VOC's twenty if no other name occurs, else the names of the training split in alphabetical
    order. `trainval` stands in for `train` where a year has no `train.txt`.

    Raises:
        InputError: unreadable list or XML, missing image, box outside its image, or a class that the training
            split lacks; all by file name.
    """
    raw = {split: _read_split(years, split) for split in ("train", "val", "test")}
    raw = {split: items for split, items in raw.items() if items}
    if "train" not in raw:
        raise InputError(
            f"load_detection: expected ImageSets/Main/train.txt in {years[0]}, got no training images"
        )
    train_names = sorted({name for _, names in raw["train"] for name in names})
    class_names = VOC_CLASSES if set(train_names) <= set(VOC_CLASSES) else tuple(train_names)
    datasets = {}
    for split, items in raw.items():
        used = {name for _, names in items for name in names}
        if not used <= set(class_names):
            raise InputError(
                class_mismatch(
                    class_names, [*class_names, *sorted(used - set(class_names))], f"split {split!r}"
                )
            )
        records = tuple(_with_labels(record, names, class_names) for record, names in items)
        check_files_exist(records)
        datasets[split] = DetectionDataset(split, class_names, records, read_record)
    return datasets


def _read_split(years: list[Path], split: str) -> list[tuple[Record, list[str]]]:
    items = []
    for year in years:
        listing = year / "ImageSets" / "Main" / f"{split}.txt"
        if split == "train" and not listing.is_file():
            listing = year / "ImageSets" / "Main" / "trainval.txt"
        if listing.is_file():
            names = [
                line.split()[0] for line in listing.read_text(encoding="utf-8").splitlines() if line.strip()
            ]
            items += [_read_annotation(year, name) for name in names]
    return items


def _read_annotation(year: Path, name: str) -> tuple[Record, list[str]]:
    """A record without labels yet, and the class name of each box."""
    path = year / "Annotations" / f"{name}.xml"
    try:
        root = ElementTree.parse(path).getroot()
        width, height = int(root.findtext("size/width", "")), int(root.findtext("size/height", ""))
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise InputError(
            f"load_detection: expected a VOC annotation with an image size for {path}, got {error}"
        ) from error
    boxes, names, difficult = [], [], []
    for item in root.iter("object"):
        try:
            corners = [float(item.findtext(f"bndbox/{key}", "")) for key in ("xmin", "ymin", "xmax", "ymax")]
        except ValueError as error:
            raise InputError(
                f"load_detection: expected four numbers in each bndbox of {path}, got {error}"
            ) from error
        box = np.array(corners) - np.array([1.0, 1.0, 0.0, 0.0])
        box = clip_box(
            box,
            width,
            height,
            f"{year / 'JPEGImages' / (name + '.jpg')}, object {len(boxes) + 1} of {path.name}",
        )
        boxes.append(box)
        names.append((item.findtext("name") or "").strip())
        difficult.append((item.findtext("difficult") or "0").strip() == "1")
    array = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    record = Record(
        image_id=f"{year.name}/{name}",
        source=str(year / "JPEGImages" / f"{name}.jpg"),
        width=width,
        height=height,
        boxes=array,
        labels=np.zeros(len(names), dtype=np.int64),
        ignore=np.array(difficult, dtype=bool),
        areas=(array[:, 2] - array[:, 0]) * (array[:, 3] - array[:, 1]),
    )
    return record, names


def _with_labels(record: Record, names: list[str], class_names: tuple[str, ...]) -> Record:
    labels = np.array([class_names.index(name) for name in names], dtype=np.int64)
    return Record(
        record.image_id,
        record.source,
        record.width,
        record.height,
        record.boxes,
        labels,
        record.ignore,
        record.areas,
    )

# SPDX-License-Identifier: Apache-2.0
"""COCO JSON: `annotations/instances_{split}.json` beside `images/{split}/` (or `{split}/`)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pfnas_fast.data.datasets import DetectionDataset, Record
from pfnas_fast.data.images import read_record
from pfnas_fast.errors import InputError

SPLITS = ("train", "val", "test")
MAX_OVERHANG_PX = 1.0  # rounding of annotation tools; more than this is a wrong box


def find_coco_splits(folder: Path) -> dict[str, tuple[Path, Path]]:
    """The annotation file and image folder of each split present; empty if this is no COCO folder.

    `instances_val.json` is preferred to `instances_val2017.json`; several of the latter kind are refused.
    """
    found = {}
    for split in SPLITS:
        exact = folder / "annotations" / f"instances_{split}.json"
        files = [exact] if exact.is_file() else sorted(folder.glob(f"annotations/instances_{split}*.json"))
        if len(files) > 1:
            raise InputError(
                f"load_detection: expected one annotation file for split {split!r} in {folder}, "
                f"got {', '.join(f.name for f in files)}"
            )
        if files:
            found[split] = (files[0], _image_folder(folder, files[0]))
    return found


def _image_folder(folder: Path, annotations: Path) -> Path:
    name = annotations.stem.removeprefix("instances_")
    candidates = [folder / "images" / name, folder / name, folder / "images"]
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    raise InputError(
        f"load_detection: expected a folder of images for {annotations}, got none of "
        f"{', '.join(str(c) for c in candidates)}"
    )


def read_coco_categories(annotations: Path) -> tuple[str, ...]:
    """Class names of an annotation file by ascending category id."""
    return tuple(_categories(_load_json(annotations), annotations).values())


def read_coco(
    annotations: Path, images: Path, *, class_names: Sequence[str] | None = None, check_files: bool = True
) -> DetectionDataset:
    """Read one COCO annotation file.

    Images come in order of their ids. Ids may have holes; labels count from 0 by ascending category id, or
    follow `class_names`. Crowds become ignore regions, images without boxes stay. A box that sticks out of
    its image by at most 1 px is clipped; a box without area is dropped with a warning.

    Args:
        annotations: The JSON file.
        images: Folder that the file names are relative to.
        class_names: Fixes the label order, so that several splits agree.
        check_files: Whether every image file has to exist.

    Raises:
        InputError: not COCO JSON; unknown image or category id; class names that differ from `class_names`; a
            box outside its image (names file and box); a missing image file.
    """
    content = _load_json(annotations)
    categories = _categories(content, annotations)
    names = tuple(class_names) if class_names is not None else tuple(categories.values())
    if set(names) != set(categories.values()):
        raise InputError(class_mismatch(names, tuple(categories.values()), str(annotations)))
    labels = {identity: names.index(name) for identity, name in categories.items()}
    grouped = _group_annotations(content, annotations)
    dropped = 0
    records = []
    _check_distinct_ids(content["images"], annotations)
    # the order in which the COCO tools rank detections of equal score
    for image in sorted(content["images"], key=lambda image: (isinstance(image["id"], str), image["id"])):
        record, num_dropped = _record(image, grouped.pop(image["id"], []), labels, annotations, images)
        dropped += num_dropped
        records.append(record)
    if grouped:
        raise InputError(
            f"load_detection: expected known image ids for annotations in {annotations}, "
            f"got {next(iter(grouped))!r}"
        )
    if dropped:
        warnings.warn(f"{annotations}: {dropped} boxes without area dropped", stacklevel=2)
    if check_files:
        check_files_exist(records)
    return DetectionDataset(annotations.stem.removeprefix("instances_"), names, tuple(records), read_record)


def class_mismatch(expected: Sequence[str], got: Sequence[str], where: str) -> str:
    """One line that says which classes a split lacks or adds."""
    missing = [n for n in expected if n not in set(got)]
    extra = [n for n in got if n not in set(expected)]
    parts = [f"no {missing}"] if missing else []
    parts += [f"also {extra}"] if extra else []
    return f"load: expected the same classes as in the training split for {where}, got {' and '.join(parts)}"


def check_files_exist(records: Sequence[Record]) -> None:
    """Raise InputError naming the first of the missing image files, and their number."""
    missing = [r.source for r in records if not Path(r.source).is_file()]
    if missing:
        raise InputError(
            f"load_detection: expected an image file {missing[0]}, got no such file "
            f"({len(missing)} missing in all)"
        )


def clip_box(box: np.ndarray, width: int, height: int, where: str) -> np.ndarray:
    """Clip an xyxy box that sticks out by at most 1 px.

    Raises:
        InputError: not finite, negative size or further outside; `where` names file and annotation.
    """
    size = np.array([width, height, width, height], dtype=np.float64)
    bad = not np.isfinite(box).all() or box[2] < box[0] or box[3] < box[1]
    if bad or (box < -MAX_OVERHANG_PX).any() or (box > size + MAX_OVERHANG_PX).any():
        numbers = ", ".join(f"{v:g}" for v in box)
        raise InputError(
            f"load_detection: expected a box inside the {width}x{height} px image for {where}, "
            f"got x1, y1, x2, y2 = {numbers}"
        )
    return np.clip(box, 0, size)


def _load_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"load_detection: expected a readable JSON file for {path}, got {error}") from error
    keys = ("images", "annotations", "categories")
    if not isinstance(content, dict) or any(not isinstance(content.get(key), list) for key in keys):
        raise InputError(
            f"load_detection: expected COCO JSON with lists {', '.join(keys)} for {path}, got none"
        )
    return content


def _categories(content: Mapping[str, Any], path: Path) -> dict[int, str]:
    """Category id -> name, ascending ids."""
    try:
        categories = {int(c["id"]): str(c["name"]) for c in content["categories"]}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"load_detection: expected categories with id and name in {path}, got {error!r}"
        ) from error
    if len(set(categories.values())) != len(content["categories"]) or not categories:
        raise InputError(
            f"load_detection: expected distinct categories in {path}, got {list(categories.values())}"
        )
    return dict(sorted(categories.items()))


def _check_distinct_ids(images: Sequence[Mapping[str, Any]], path: Path) -> None:
    seen = set()
    for image in images:
        if not isinstance(image, dict) or "id" not in image or image["id"] in seen:
            raise InputError(f"load_detection: expected images with distinct ids in {path}, got {image}")
        seen.add(image["id"])


def _group_annotations(content: Mapping[str, Any], path: Path) -> dict[Any, list[dict[str, Any]]]:
    grouped: dict[Any, list[dict[str, Any]]] = {}
    for annotation in content["annotations"]:
        try:
            grouped.setdefault(annotation["image_id"], []).append(annotation)
        except (KeyError, TypeError) as error:
            raise InputError(
                f"load_detection: expected image_id in each annotation of {path}, got {annotation}"
            ) from error
    return grouped


def _record(
    image: Mapping[str, Any],
    annotations: Sequence[Mapping[str, Any]],
    labels: Mapping[int, int],
    path: Path,
    folder: Path,
) -> tuple[Record, int]:
    """The record of one image and the number of boxes dropped for having no area."""
    try:
        width, height, name = int(image["width"]), int(image["height"]), str(image["file_name"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"load_detection: expected file_name, width and height in {path}, got {image}"
        ) from error
    boxes, classes, crowds, areas = [], [], [], []
    for annotation in annotations:
        where = f"{name}, annotation {annotation.get('id')} of {path.name}"
        x, y, w, h = _numbers(annotation.get("bbox"), where)
        if annotation.get("category_id") not in labels:
            raise InputError(
                f"load_detection: expected a listed category_id for {where}, "
                f"got {annotation.get('category_id')}"
            )
        xyxy = clip_box(np.array([x, y, x + w, y + h]), width, height, where)
        if xyxy[2] <= xyxy[0] or xyxy[3] <= xyxy[1]:
            continue
        boxes.append(xyxy)
        classes.append(labels[annotation["category_id"]])
        crowds.append(bool(annotation.get("iscrowd", 0)))
        areas.append(float(annotation.get("area", w * h)))
    record = Record(
        image_id=name,
        source=str(folder / name),
        width=width,
        height=height,
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        labels=np.array(classes, dtype=np.int64),
        ignore=np.array(crowds, dtype=bool),
        areas=np.array(areas, dtype=np.float64),
    )
    return record, len(annotations) - len(boxes)


def _numbers(box: Any, where: str) -> list[float]:
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, (int, float)) for v in box):
        raise InputError(f"load_detection: expected bbox [x, y, width, height] for {where}, got {box}")
    return [float(v) for v in box]

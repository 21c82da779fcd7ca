# SPDX-License-Identifier: Apache-2.0
"""What several data tests share: a small COCO folder to break, and detections made from ground truth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pfnas_fast.data import DetectionDataset


class Found(NamedTuple):
    """Detections of one image."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


def nothing() -> Found:
    """No detections."""
    return Found(np.zeros((0, 4)), np.zeros(0), np.zeros(0, dtype=np.int64))


def perturbed(dataset: DetectionDataset, rng: np.random.Generator, num: int) -> list[Found]:
    """Shifted copies of the ground truth with tied scores and some wrong labels, `num` per image."""
    found = []
    for record in dataset.records:
        if not len(record.labels):
            found.append(nothing())
            continue
        pick = rng.integers(0, len(record.labels), num)
        boxes = record.boxes[pick] + rng.normal(size=(num, 4)) * rng.choice([0, 2, 10, 40], size=(num, 1))
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        wrong = rng.integers(0, dataset.num_classes, num)
        labels = np.where(rng.random(num) < 0.8, record.labels[pick], wrong)
        found.append(Found(boxes, rng.random(num).round(1), labels))
    return found


def coco_json(num_images: int, *, first_id: int = 1, width: int = 40, height: int = 30) -> dict[str, Any]:
    """COCO JSON with two classes (ids 3 and 7) and one box in each image but the last."""
    ids = [first_id + 2 * i for i in range(num_images)]
    images = [{"id": i, "file_name": f"{i:04d}.png", "width": width, "height": height} for i in ids]
    annotations = [
        {
            "id": 10 + n,
            "image_id": i,
            "category_id": (3, 7)[n % 2],
            "bbox": [4.0, 5.0, 12.0, 10.0],
            "area": 100.0,
            "iscrowd": 0,
        }
        for n, i in enumerate(ids[:-1])
    ]
    categories = [{"id": 7, "name": "nut"}, {"id": 3, "name": "bolt"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_split(folder: Path, split: str, content: dict[str, Any], *, value: int = 90) -> None:
    """Write annotations and flat grey images of a split."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / "images" / split).mkdir(parents=True, exist_ok=True)
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    for image in content["images"]:
        pixels = np.full((image["height"], image["width"], 3), value, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / split / image["file_name"])

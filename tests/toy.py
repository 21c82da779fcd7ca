# SPDX-License-Identifier: Apache-2.0
"""A detection set of coloured rectangles in COCO layout, small enough for whole runs in a test."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

CLASS_NAMES = ("red", "green")
_COLOURS = ((200, 40, 40), (40, 180, 40))


def write_toy_detection(folder: Path, *, num_images: dict[str, int] | None = None, seed: int = 0) -> Path:
    """Write `folder` with images of 96x72 px, two classes, one to three boxes each."""
    rng = np.random.default_rng(seed)
    for split, count in (num_images or {"train": 20, "val": 6, "test": 6}).items():
        (folder / "images" / split).mkdir(parents=True)
        (folder / "annotations").mkdir(exist_ok=True)
        images, annotations = [], []
        for index in range(count):
            pixels = rng.integers(90, 150, (72, 96, 3), dtype=np.uint8)
            for _ in range(int(rng.integers(1, 4))):
                label, side = int(rng.integers(2)), rng.integers(16, 40, 2)
                x, y = int(rng.integers(0, 96 - side[0])), int(rng.integers(0, 72 - side[1]))
                pixels[y : y + side[1], x : x + side[0]] = _COLOURS[label]
                box = [x, y, int(side[0]), int(side[1])]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index + 1,
                        "category_id": label + 1,
                        "bbox": box,
                        "area": box[2] * box[3],
                        "iscrowd": 0,
                    }
                )
            name = f"{split}_{index}.png"
            Image.fromarray(pixels).save(folder / "images" / split / name)
            images.append({"id": index + 1, "file_name": name, "width": 96, "height": 72})
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASS_NAMES)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


def write_toy_classification(folder: Path, *, per_class: int = 8, seed: int = 0) -> Path:
    """Write an ImageFolder of one colour per class."""
    rng = np.random.default_rng(seed)
    for split in ("train", "val"):
        for name, colour in zip(CLASS_NAMES, _COLOURS, strict=True):
            (folder / split / name).mkdir(parents=True)
            for index in range(per_class):
                noise = rng.integers(-30, 30, (48, 48, 3))
                pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    return folder

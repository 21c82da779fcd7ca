# SPDX-License-Identifier: Apache-2.0
"""VOCdevkit: 1-based inclusive boxes, difficult objects, several years, errors by file name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pfnas_fast.data import load_detection
from pfnas_fast.data.voc import VOC_CLASSES
from pfnas_fast.errors import InputError


def add_image(
    year: Path, name: str, objects: list[tuple[str, tuple[int, ...], int]], splits: tuple[str, ...]
) -> None:
    """Write one 40x30 px image with its annotation and list it in the splits."""
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (year / part).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), (90, 90, 90)).save(year / "JPEGImages" / f"{name}.jpg")
    items = "".join(
        f"<object><name>{label}</name><difficult>{difficult}</difficult><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>"
        f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for label, (x1, y1, x2, y2), difficult in objects
    )
    size = "<size><width>40</width><height>30</height><depth>3</depth></size>"
    (year / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}{items}</annotation>")
    for split in splits:
        with open(year / "ImageSets" / "Main" / f"{split}.txt", "a") as file:
            file.write(f"{name}\n")


def small_voc(root: Path, year: str = "VOC2012", label: str = "cat") -> Path:
    """Four training and two validation images with one object each."""
    for i in range(6):
        split = "train" if i < 4 else "val"
        add_image(root / "VOCdevkit" / year, f"{year}_{i}", [(label, (1, 1, 40, 30), 0)], (split,))
    return root


def test_boxes_are_one_based_and_inclusive(tmp_path):
    data = load_detection(small_voc(tmp_path))
    assert data.kind == "voc"
    assert data.class_names == VOC_CLASSES
    np.testing.assert_array_equal(data.test.records[0].boxes, [[0, 0, 40, 30]])
    assert data.test.records[0].labels.tolist() == [VOC_CLASSES.index("cat")]
    assert data.test.read(0).shape == (3, 30, 40)


def test_difficult_objects_become_ignore_regions(tmp_path):
    root = small_voc(tmp_path)
    add_image(
        root / "VOCdevkit/VOC2012", "hard", [("dog", (5, 5, 9, 9), 1), ("cat", (2, 3, 8, 9), 0)], ("val",)
    )
    target = load_detection(root).test.target(2)
    assert target.ignore_boxes.tolist() == [[4.0, 4.0, 9.0, 9.0]]
    assert target.boxes.tolist() == [[1.0, 2.0, 8.0, 9.0]]
    assert target.labels.tolist() == [VOC_CLASSES.index("cat")]


def test_years_are_joined(tmp_path):
    small_voc(tmp_path, "VOC2007")
    data = load_detection(small_voc(tmp_path, "VOC2012"))
    assert [r.image_id for r in data.test.records] == [
        f"VOC{y}/VOC{y}_{i}" for y in (2007, 2012) for i in (4, 5)
    ]


def test_own_class_names_are_sorted(tmp_path):
    root = small_voc(tmp_path, label="widget")
    add_image(root / "VOCdevkit/VOC2012", "one", [("bolt", (2, 2, 5, 5), 0)], ("train",))
    assert load_detection(root).class_names == ("bolt", "widget")


def test_class_that_training_lacks_is_refused(tmp_path):
    root = small_voc(tmp_path, label="widget")
    add_image(root / "VOCdevkit/VOC2012", "one", [("bolt", (2, 2, 5, 5), 0)], ("val",))
    with pytest.raises(InputError, match=r"same classes .* split 'val', got also \['bolt'\]"):
        load_detection(root)


def test_errors_name_the_file(tmp_path):
    root = small_voc(tmp_path)
    year = root / "VOCdevkit/VOC2012"
    add_image(year, "wide", [("cat", (3, 4, 60, 20), 0)], ("train",))
    with pytest.raises(
        InputError, match=r"JPEGImages/wide\.jpg, object 1 of wide\.xml, got .* = 2, 3, 60, 20"
    ):
        load_detection(root)
    (year / "Annotations/wide.xml").write_text("<annotation>")
    with pytest.raises(InputError, match=r"VOC annotation .*wide\.xml"):
        load_detection(root)
    (year / "Annotations/wide.xml").unlink()
    with pytest.raises(InputError, match=r"VOC annotation .*wide\.xml"):
        load_detection(root)
    (year / "ImageSets/Main/train.txt").unlink()
    with pytest.raises(InputError, match=r"ImageSets/Main/train\.txt"):
        load_detection(root)


def test_missing_image_is_refused_by_name(tmp_path):
    root = small_voc(tmp_path)
    (root / "VOCdevkit/VOC2012/JPEGImages/VOC2012_4.jpg").unlink()
    with pytest.raises(InputError, match=r"VOC2012_4\.jpg, got no such file"):
        load_detection(root)


def test_the_real_folder_loads(shared_data):
    data = load_detection(shared_data / "voc100")
    assert {role: len(d) for role, d in data.roles().items()} == {
        "fit": 44,
        "calib": 44,
        "label": 12,
        "select": 14,
        "test": 30,
    }
    assert sum(len(r.labels) for r in data.test.records) == 69
    record = data.test.records[0]
    assert data.test.read(0).shape == (3, record.height, record.width)

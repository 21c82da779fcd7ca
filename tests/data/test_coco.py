# SPDX-License-Identifier: Apache-2.0
"""COCO folders: ids with holes, crowds, empty images, and every kind of broken input by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from data_helpers import coco_json, write_split

from pfnas_fast.data import load_detection
from pfnas_fast.data.coco import read_coco
from pfnas_fast.errors import InputError


def edit(folder: Path, split: str, change) -> Path:
    """Apply `change` to the JSON of a split."""
    path = folder / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def test_labels_follow_category_ids_and_empty_images_stay(coco_folder):
    data = load_detection(coco_folder(train=10, val=4, test=4))
    assert data.class_names == ("bolt", "nut")  # ids 3 and 7, listed the other way round
    assert data.kind == "coco"
    records = [*data.fit.records, *data.label.records]
    assert sorted(len(r.labels) for r in records) == [0] + [1] * 9
    by_id = {r.image_id: r for r in records}
    np.testing.assert_array_equal(by_id["0001.png"].boxes, [[4, 5, 16, 15]])
    assert by_id["0001.png"].labels.tolist() == [0]
    assert by_id["0003.png"].labels.tolist() == [1]
    assert by_id["0001.png"].areas.tolist() == [100.0]  # as annotated, not width * height


def test_images_come_in_order_of_id(tmp_path):
    content = coco_json(5)
    content["images"].reverse()
    write_split(tmp_path, "train", content)
    dataset = read_coco(tmp_path / "annotations/instances_train.json", tmp_path / "images/train")
    assert [r.image_id for r in dataset.records] == [
        "0001.png",
        "0003.png",
        "0005.png",
        "0007.png",
        "0009.png",
    ]


def test_crowds_become_ignore_regions(coco_folder):
    folder = coco_folder(train=6, val=4, test=4)
    edit(folder, "train", lambda c: [a.update(iscrowd=1) for a in c["annotations"]])
    data = load_detection(folder)
    target = data.fit.target(0)
    assert target.boxes.shape == (0, 4)
    assert target.labels.shape == (0,)
    assert target.ignore_boxes.tolist() == [[4.0, 5.0, 16.0, 15.0]]


def test_overhang_of_one_px_is_clipped(coco_folder):
    folder = coco_folder(train=6, val=4, test=4)
    edit(folder, "train", lambda c: c["annotations"][0].update(bbox=[-0.5, 5.0, 41.0, 10.0]))
    data = load_detection(folder)
    record = next(r for r in [*data.fit.records, *data.label.records] if r.image_id == "0001.png")
    np.testing.assert_array_equal(record.boxes, [[0, 5, 40, 15]])


def test_boxes_without_area_are_dropped_with_a_warning(coco_folder):
    folder = coco_folder(train=6, val=4, test=4)
    edit(folder, "train", lambda c: c["annotations"][0].update(bbox=[4.0, 5.0, 0.0, 10.0]))
    with pytest.warns(UserWarning, match=r"instances_train\.json: 1 boxes without area dropped"):
        data = load_detection(folder)
    record = next(r for r in [*data.fit.records, *data.label.records] if r.image_id == "0001.png")
    assert not len(record.labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["annotations"][0].update(bbox=[30.0, 5.0, 12.0, 10.0]),
            r"a box inside the 40x30 px image for 0001\.png, annotation 10 of instances_train\.json, "
            r"got x1, y1, x2, y2 = 30, 5, 42, 15",
        ),
        (
            lambda c: c["annotations"][0].update(bbox=[4.0, 5.0, -3.0, 10.0]),
            r"0001\.png.*got x1.* = 4, 5, 1, 15",
        ),
        (lambda c: c["annotations"][0].update(bbox=[4.0, float("nan"), 3.0, 1.0]), r"0001\.png.*nan"),
        (
            lambda c: c["annotations"][0].update(bbox=[4.0, 5.0]),
            r"bbox \[x, y, width, height\] for 0001\.png",
        ),
        (lambda c: c["annotations"][0].update(bbox=["a", 1, 2, 3]), r"bbox .* for 0001\.png.*'a'"),
        (lambda c: c["annotations"][0].update(category_id=5), r"category_id for 0001\.png.*got 5"),
        (lambda c: c["annotations"][0].update(image_id=2), r"known image ids.*instances_train\.json, got 2"),
        (lambda c: c["annotations"][0].pop("image_id"), "image_id in each annotation"),
        (lambda c: c["images"][1].update(id=1), "distinct ids"),
        (lambda c: c["images"][0].pop("width"), "file_name, width and height"),
        (lambda c: c["categories"][0].update(name="bolt"), "distinct categories"),
        (lambda c: c["categories"][0].pop("id"), "categories with id and name"),
        (lambda c: c.pop("categories"), "COCO JSON with lists images, annotations, categories"),
        (lambda c: c.update(images=[], annotations=[]), "at least one image in split 'train'"),
    ],
)
def test_broken_annotations_are_refused_by_name(coco_folder, change, message):
    folder = coco_folder(train=6, val=4, test=4)
    edit(folder, "train", change)
    with pytest.raises(InputError, match=message):
        load_detection(folder)


def test_class_mismatch_between_splits_names_the_classes(coco_folder):
    folder = coco_folder(train=6, val=4, test=4)
    edit(folder, "val", lambda c: c["categories"][0].update(name="screw"))
    with pytest.raises(
        InputError, match=r"same classes .*instances_val\.json, got no \['nut'\] and also \['screw'\]"
    ):
        load_detection(folder)


def test_same_names_under_other_ids_are_matched_by_name(coco_folder):
    folder = coco_folder(train=6, val=4, test=4)

    def swap(content):
        for category in content["categories"]:
            category["id"] = 10 - category["id"]

    edit(folder, "val", swap)
    data = load_detection(folder)
    assert data.select.class_names == ("bolt", "nut")
    assert data.select.records[0].labels.tolist() == [1]  # id 3 is "nut" here


def test_missing_image_and_broken_json_are_refused_by_name(coco_folder):
    folder = coco_folder(train=6, val=4, test=4)
    (folder / "images/val/1001.png").unlink()
    with pytest.raises(InputError, match=r"images/val/1001\.png, got no such file \(1 missing in all\)"):
        load_detection(folder)
    (folder / "annotations/instances_val.json").write_text("{")
    with pytest.raises(InputError, match=r"readable JSON file for .*instances_val\.json"):
        load_detection(folder)


def test_other_layouts_of_coco_are_recognised(coco_folder):
    folder = coco_folder(train=6, val=4)
    for split in ("train", "val"):
        annotations = folder / "annotations" / f"instances_{split}.json"
        annotations.rename(annotations.with_name(f"instances_{split}2017.json"))
        (folder / "images" / split).rename(folder / f"{split}2017")
    data = load_detection(folder)
    assert len(data.test) == 4
    assert data.fit.read(0).shape == (3, 30, 40)


def test_unknown_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match="a folder or 'digits' for source, got 'nowhere'"):
        load_detection("nowhere")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(InputError, match=r"COCO.*VOC.*notes\.txt"):
        load_detection(tmp_path)


@pytest.mark.parametrize(
    ("name", "sizes", "num_classes"),
    [
        ("bccd", {"fit": 164, "calib": 164, "label": 41, "select": 87, "test": 72}, 3),
        ("cards", {"fit": 200, "calib": 200, "label": 50, "select": 46, "test": 67}, 6),
        ("coco_mini", {"fit": 113, "calib": 113, "label": 29, "select": 36, "test": 177}, 80),
    ],
)
def test_real_folders_load(shared_data, name, sizes, num_classes):
    data = load_detection(shared_data / name)
    assert {role: len(dataset) for role, dataset in data.roles().items()} == sizes
    assert data.num_classes == num_classes
    record = data.test.records[0]
    assert data.test.read(0).shape == (3, record.height, record.width)

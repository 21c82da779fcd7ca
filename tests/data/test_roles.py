# SPDX-License-Identifier: Apache-2.0
"""Roles are disjoint, complete, seeded and leak-proof."""

from __future__ import annotations

import json

import pytest
from data_helpers import coco_json, write_split

from pfnas_fast.data import (
    EvalImages,
    Roles,
    check_images,
    classification_batches,
    load_classification,
    load_detection,
    train_batches,
)
from pfnas_fast.errors import InputError

CANVAS = (24, 32)


def ids(dataset) -> set[str]:
    return {r.image_id for r in dataset.records}


def test_roles_are_disjoint_and_complete(coco_folder):
    data = load_detection(coco_folder(train=50, val=7, test=5), roles=Roles(label=0.2, calib=16))
    assert [len(d) for d in data.roles().values()] == [40, 16, 10, 7, 5]
    assert ids(data.calib) < ids(data.fit)
    parts = [ids(data.fit), ids(data.label), ids(data.select), ids(data.test)]
    assert len(set.union(*parts)) == sum(len(p) for p in parts) == 62


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (
            {"train": 50, "val": 7},
            {"fit": 32, "label": 8, "select": 10, "test": 7},
        ),  # val is test, select is carved
        ({"train": 50, "test": 7}, {"fit": 32, "label": 8, "select": 10, "test": 7}),
        ({"train": 50}, {"fit": 24, "label": 6, "select": 10, "test": 10}),
    ],
)
def test_missing_splits_are_carved_from_train(coco_folder, sizes, expected):
    data = load_detection(coco_folder(**sizes))
    assert {role: len(d) for role, d in data.roles().items() if role != "calib"} == expected
    parts = [ids(data.fit), ids(data.label), ids(data.select), ids(data.test)]
    assert len(set.union(*parts)) == sum(len(p) for p in parts)


def test_seed_decides_and_repeats(coco_folder):
    folder = coco_folder(train=50, val=7, test=5)
    first, again, other = (load_detection(folder, seed=s) for s in (1, 1, 2))
    assert first.splits() == again.splits()
    assert ids(first.label) != ids(other.label)


def test_smaller_fractions_are_nested_and_leave_evaluation_alone(coco_folder):
    folder = coco_folder(train=50)
    whole, half, tenth = (load_detection(folder, fraction=f) for f in (1.0, 0.5, 0.1))
    assert len(half.fit) + len(half.label) == 15
    assert len(half.label) == 3
    for small, large in ((half, whole), (tenth, half)):
        assert ids(small.fit) < ids(large.fit)
        assert ids(small.label) < ids(large.label)
        assert ids(small.select) == ids(large.select)
        assert ids(small.test) == ids(large.test)


def test_splits_are_json_with_ids(coco_folder):
    data = load_detection(coco_folder(train=10, val=4, test=4), seed=3, fraction=0.8)
    splits = json.loads(json.dumps(data.splits()))
    assert splits["seed"] == 3
    assert splits["fraction"] == 0.8
    assert splits["class_names"] == ["bolt", "nut"]
    assert splits["test"] == [r.image_id for r in data.test.records]
    assert len(splits["fit"]) + len(splits["label"]) == 8


@pytest.mark.parametrize("bad", [{"label": 0.0}, {"label": 1.0}, {"calib": 0}, {"select": 0.6, "test": 0.5}])
def test_bad_roles_are_refused(bad):
    with pytest.raises(InputError, match=f"Roles: expected .*{next(iter(bad))}"):
        Roles(**bad)


def test_bad_amounts_are_refused(coco_folder):
    folder = coco_folder(train=3, val=4, test=4)
    with pytest.raises(InputError, match=r"at most 1 for fraction, got 1\.5"):
        load_detection(folder, fraction=1.5)
    with pytest.raises(InputError, match=r"enough training images .* got 1"):
        load_detection(folder, fraction=0.2)


def test_an_image_in_two_splits_is_refused(tmp_path):
    content = coco_json(5)
    write_split(tmp_path, "train", content)
    write_split(tmp_path, "val", content)
    for split in ("train", "val"):
        (tmp_path / "images" / split).rename(tmp_path / f"old_{split}")
    (tmp_path / "old_train").rename(tmp_path / "images_all")
    (tmp_path / "images").rmdir()
    (tmp_path / "images_all").rename(tmp_path / "images")
    with pytest.raises(InputError, match=r"one split, got .*0001\.png in 'train' and 'val'"):
        load_detection(tmp_path)


def early_stages(data, num_workers: int) -> None:
    """Everything that happens to images before candidates are selected."""
    check_images(data.fit, data.label)
    check_images(data.select, data.test, decode=False)
    batches = train_batches(
        data.fit, canvas=CANVAS, batch_size=4, seed=0, num_steps=6, num_workers=num_workers
    )
    assert len(list(batches)) == 6
    for dataset in (data.calib, data.label):
        assert len(list(EvalImages(dataset, CANVAS).batches(8)))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_no_early_stage_opens_select_or_test(coco_folder, monkeypatch, num_workers):
    """Select and test images carry a marker colour; no earlier stage may see it or read a file of theirs."""
    folder = coco_folder(train=20, val=6, test=6)
    marker = 213
    for n, split in enumerate(("val", "test")):
        write_split(folder, split, coco_json(6, first_id=1001 + 1000 * n), value=marker)
    data = load_detection(folder)
    seen = []
    for dataset in data.roles().values():
        reader = dataset.reader
        monkeypatch.setattr(dataset, "reader", lambda r, reader=reader: seen.append(reader(r)) or seen[-1])
    early_stages(data, num_workers)
    assert seen
    assert not any((image == marker).any() for image in seen)
    assert not data.select.reads
    assert not data.test.reads
    assert data.fit.reads == ids(data.fit)
    assert data.label.reads == ids(data.label)
    EvalImages(data.select, CANVAS)
    assert data.select.reads == ids(data.select)
    assert (seen[-1] == marker).all()
    assert not data.test.reads


def test_hook_sees_each_read(coco_folder):
    data = load_detection(coco_folder(train=20, val=6, test=6))
    opened = []
    data.test.on_read = opened.append
    data.select.read(0)
    assert not opened
    data.test.read(2)
    assert opened == [data.test.records[2]]


def test_digits_of_pre_training_are_in_no_val_or_test_scene():
    from pfnas_fast.data.digits import _plan_scene, digit_instances

    views = load_classification("digits")
    pretrained = {int(s.split("/")[1]) for s in views.train.sources}
    next(iter(classification_batches(views.train, canvas=(16, 16), batch_size=2, seed=0, num_steps=1)))
    assert not views.val.reads
    for split in ("val", "test"):
        shown = {g.instance for i in range(100) for g in _plan_scene(split, i)[0]}
        assert shown
        assert not shown & pretrained
        assert shown <= set(digit_instances()[split].tolist())


def test_evaluation_roles_know_their_calibration_images(coco_folder):
    data = load_detection(coco_folder(train=20, val=6, test=6))
    assert all(d.calib is data.calib for d in (data.label, data.select, data.test))
    assert data.label.subset([0]).calib is data.calib

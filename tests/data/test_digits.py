# SPDX-License-Identifier: Apache-2.0
"""The embedded scenes: fixed, varied, and with boxes where the digits are."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from pfnas_fast.data import load_classification, load_detection
from pfnas_fast.data.digits import digit_instances, digit_scenes


def test_sizes_and_types():
    data = load_detection("digits")
    assert {role: len(d) for role, d in data.roles().items()} == {
        "fit": 320,
        "calib": 256,
        "label": 80,
        "select": 100,
        "test": 100,
    }
    image = data.fit.read(0)
    assert image.shape == (3, 144, 192)
    assert image.dtype == torch.uint8
    assert not data.mirror
    assert data.class_names == tuple("0123456789")


def test_scenes_do_not_depend_on_the_seed_or_on_order():
    first, second = load_detection("digits", seed=0), load_detection("digits", seed=1)
    assert first.splits()["test"] == second.splits()["test"]
    assert torch.equal(first.test.read(7), second.test.read(7))
    digests = {hashlib.sha256(first.test.read(i).numpy().tobytes()).hexdigest() for i in range(20)}
    assert len(digests) == 20


def test_instances_are_divided_and_complete():
    parts = list(digit_instances().values())
    assert sorted(np.concatenate(parts).tolist()) == list(range(1797))


def test_scenes_are_varied():
    train = digit_scenes()["train"]
    counts = np.array([len(r.labels) for r in train.records])
    assert set(counts.tolist()) == {1, 2, 3, 4, 5, 6}
    sizes = np.concatenate([(r.boxes[:, 2:] - r.boxes[:, :2]).max(1) for r in train.records])
    assert sizes.min() >= 8
    assert sizes.max() <= 70
    assert np.quantile(sizes, 0.1) < 20
    assert np.quantile(sizes, 0.9) > 50
    labels = np.bincount(np.concatenate([r.labels for r in train.records]), minlength=10)
    assert labels.min() > 80


@pytest.mark.parametrize("index", range(12))
def test_boxes_lie_inside_and_hold_ink(index):
    scene = digit_scenes()["val"]
    record = scene.records[index]
    assert (record.boxes >= 0).all()
    assert (record.boxes <= [192, 144, 192, 144]).all()
    image = scene.read(index).float()
    for x1, y1, x2, y2 in record.boxes.astype(int):
        assert image[:, y1:y2, x1:x2].std() > 8  # noise alone has 2-13, ink steps by 35 or more


def test_views_show_each_digit_of_a_split_three_times():
    data = load_classification("digits")
    instances = [int(s.split("/")[1]) for s in data.train.sources]
    assert sorted(set(instances)) == sorted(digit_instances()["train"].tolist())
    assert len(instances) == 3 * len(set(instances))
    assert data.train.read(0).shape == (3, 64, 64)
    assert not torch.equal(data.train.read(0), data.train.read(1))  # same digit, other ground
    assert data.train.labels[0] == data.train.labels[1]

# SPDX-License-Identifier: Apache-2.0
"""Batches are a function of (seed, step), whoever prepares them."""

from __future__ import annotations

import pytest
import torch

from pfnas_fast.data import (
    Augmentation,
    Batch,
    classification_batches,
    load_classification,
    load_detection,
    loader,
    train_batches,
)
from pfnas_fast.errors import InputError

CANVAS = (24, 32)


def assert_same(a: Batch, b: Batch) -> None:
    assert torch.equal(a.images, b.images)
    assert len(a) == len(b)
    for x, y in zip(a.targets, b.targets, strict=True):
        assert torch.equal(x.boxes, y.boxes)
        assert torch.equal(x.labels, y.labels)
        assert torch.equal(x.ignore_boxes, y.ignore_boxes)


@pytest.fixture(scope="module")
def digits():
    return load_detection("digits").fit.subset(range(30))


def batches(dataset, **changes) -> list[Batch]:
    arguments = {"canvas": CANVAS, "batch_size": 4, "seed": 5, "num_steps": 6, **changes}
    return list(train_batches(dataset, **arguments))


def test_shapes_and_types(digits):
    batch = batches(digits, num_steps=1)[0]
    assert batch.images.shape == (4, 3, *CANVAS)
    assert batch.images.dtype == torch.uint8
    for target in batch.targets:
        assert target.boxes.dtype == torch.float32
        assert target.labels.dtype == torch.int64
        assert target.ignore_boxes.shape == (0, 4)
        assert (target.boxes >= 0).all()
        assert (target.boxes <= torch.tensor([32, 24, 32, 24])).all()
        assert (target.boxes[:, 2:] - target.boxes[:, :2] >= 2).all()


def test_resuming_gives_the_same_batches(digits):
    whole = batches(digits)
    for resumed, expected in zip(batches(digits, start_step=4, num_steps=2), whole[4:], strict=True):
        assert_same(resumed, expected)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_worker_processes_change_nothing(digits):
    state = torch.get_rng_state()
    alone = digits.subset(range(30))
    shared = digits.subset(range(30))
    for a, b in zip(batches(alone, num_steps=4), batches(shared, num_steps=4, num_workers=2), strict=True):
        assert_same(a, b)
    assert alone.reads <= shared.reads  # workers' reads are logged too
    assert torch.equal(torch.get_rng_state(), state)  # and nothing global was drawn from


def test_seed_and_step_matter(digits):
    first, second = batches(digits, num_steps=2)
    other = batches(digits, num_steps=1, seed=6)[0]
    assert not torch.equal(first.images, second.images)
    assert not torch.equal(first.images, other.images)


def test_each_step_and_position_augments_anew(digits):
    shown = torch.cat([b.images for b in batches(digits.subset([3]), num_steps=3)])
    assert len({image.numpy().tobytes() for image in shown}) == 12


def test_every_epoch_shows_every_image_once():
    steps = loader._Steps(lambda i, rng: (i,), 10, 4, 3, lambda made: [m[0] for m in made])
    order = [i for step in range(10) for i in steps[step]]
    epochs = [order[n : n + 10] for n in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_cache_that_is_full_changes_nothing(digits):
    cache = loader.PixelCache(digits, CANVAS, 1.5, max_bytes=2 * 3 * 36 * 48)
    images = [cache.get(i) for i in range(4)]
    assert len(cache.images) == 2
    assert all(torch.equal(cache.get(i), image) for i, image in enumerate(images))
    assert images[0].shape == (3, 36, 48)  # shrunk to 1.5 times the canvas


def test_boxes_follow_a_shrunk_image(coco_folder):
    data = load_detection(coco_folder(train=8, val=4, test=4))
    dataset = data.fit.subset([i for i, r in enumerate(data.fit.records) if len(r.labels)])
    batch = batches(dataset, canvas=(9, 12), augment=Augmentation.none(), num_steps=1)[0]
    for target in batch.targets:
        torch.testing.assert_close(target.boxes, torch.tensor([[4.0, 5.0, 16.0, 15.0]]) * 0.3)


def test_images_without_boxes_train(coco_folder):
    data = load_detection(coco_folder(train=20, val=4, test=4))
    empty = data.fit.subset([0])
    record = empty.records[0]
    none = type(record)(
        record.image_id,
        record.source,
        40,
        30,
        record.boxes[:0],
        record.labels[:0],
        record.ignore[:0],
        record.areas[:0],
    )
    empty.records = (none,)
    batch = batches(empty, num_steps=1)[0]
    assert all(t.boxes.shape == (0, 4) and t.labels.shape == (0,) for t in batch.targets)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "train_batches: expected a whole number >= 1 for batch_size, got 0"),
        ({"start_step": -1}, "start_step, got -1"),
        ({"num_workers": -2}, "num_workers, got -2"),
    ],
)
def test_bad_arguments_are_refused(digits, changes, message):
    with pytest.raises(InputError, match=message):
        batches(digits, **changes)


def test_empty_dataset_is_refused(digits):
    with pytest.raises(InputError, match="at least one image for dataset 'none'"):
        batches(digits.subset([], "none"))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_classification_batches_resume_and_share():
    data = load_classification("digits")
    arguments = {"canvas": (20, 20), "batch_size": 8, "seed": 1}
    small = data.train.subset(range(0, 400, 10))
    whole = list(classification_batches(small, num_steps=4, **arguments))
    late = list(classification_batches(small, num_steps=2, start_step=2, num_workers=1, **arguments))
    images, labels = whole[0]
    assert images.shape == (8, 3, 20, 20)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    for (a, b), (c, d) in zip(whole[2:], late, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)

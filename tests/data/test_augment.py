# SPDX-License-Identifier: Apache-2.0
"""Augmentation moves boxes with the pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pfnas_fast.data import Augmentation, ClassificationAugmentation, Target
from pfnas_fast.data.augment import augment_classification, augment_detection, vary_colour
from pfnas_fast.errors import InputError

CANVAS = (72, 96)
BOX = (30.0, 20.0, 70.0, 60.0)


def picture() -> tuple[torch.Tensor, Target]:
    """A white square on black, 120x90 px."""
    image = torch.zeros(3, 90, 120, dtype=torch.uint8)
    x1, y1, x2, y2 = (int(v) for v in BOX)
    image[:, y1:y2, x1:x2] = 255
    return image, Target(torch.tensor([BOX]), torch.tensor([4]), torch.tensor([[0.0, 0.0, 120.0, 10.0]]))


@pytest.mark.parametrize("seed", range(25))
def test_boxes_follow_the_pixels(seed):
    augment = Augmentation(flip=0.5, vertical_flip=0.5, zoom=1.0, colour=0.0)
    rng = np.random.default_rng(seed)
    image, target = augment_detection(*picture(), CANVAS, augment, rng, mirror=True)
    white = image[0] > 200
    if not len(target.labels):
        assert white.float().mean() < 0.4  # the centre has left, so at most a part is left
        return
    assert target.labels.tolist() == [4]
    rows, columns = torch.nonzero(white.any(1)).flatten(), torch.nonzero(white.any(0)).flatten()
    seen = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()
    assert (seen - target.boxes[0]).abs().max() <= 1.0


@pytest.mark.parametrize("seed", range(10))
def test_padding_keeps_its_value(seed):
    augment = Augmentation(scale=(0.5, 0.5), zoom=1.0, colour=1.0)
    image, _ = augment_detection(*picture(), CANVAS, augment, np.random.default_rng(seed), mirror=False)
    assert float((image == 114).all(0).float().mean()) >= 0.6


def test_no_augmentation_is_the_letterbox():
    image, target = augment_detection(
        *picture(), CANVAS, Augmentation.none(), np.random.default_rng(0), mirror=True
    )
    torch.testing.assert_close(target.boxes, torch.tensor([BOX]) * 0.8)
    torch.testing.assert_close(target.ignore_boxes, torch.tensor([[0.0, 0.0, 96.0, 8.0]]))
    assert int(image[0, 40, 40]) == 255


def test_boxes_that_lose_their_centre_are_dropped_and_others_clipped():
    image, _ = picture()
    boxes = torch.tensor([[0.0, 0.0, 120.0, 90.0], [0.0, 0.0, 4.0, 4.0]])
    target = Target(boxes, torch.tensor([0, 1]), boxes[1:])
    augment = Augmentation(scale=(3.0, 3.0), aspect=(1.0, 1.0), zoom=1.0, flip=0, colour=0)
    kept = 0
    for seed in range(40):
        _, out = augment_detection(image, target, CANVAS, augment, np.random.default_rng(seed), mirror=False)
        kept += 1 in out.labels.tolist()
        if 0 in out.labels.tolist():
            assert out.boxes[0].tolist() == [0.0, 0.0, 96.0, 72.0]
    assert kept < 20


def test_datasets_that_forbid_mirrors_are_not_mirrored():
    augment = Augmentation(flip=1.0, vertical_flip=1.0, zoom=0.0, colour=0.0)
    _, target = augment_detection(*picture(), CANVAS, augment, np.random.default_rng(0), mirror=False)
    torch.testing.assert_close(target.boxes, torch.tensor([BOX]) * 0.8)
    _, target = augment_detection(*picture(), CANVAS, augment, np.random.default_rng(0), mirror=True)
    torch.testing.assert_close(target.boxes, torch.tensor([[96 - 56.0, 72 - 48.0, 96 - 24.0, 72 - 16.0]]))


def test_colour_folds_into_what_torchvision_does():
    from torchvision.transforms.v2 import functional as TF

    generator = torch.Generator().manual_seed(0)
    image = torch.randint(90, 130, (3, 8, 9), dtype=torch.uint8, generator=generator)
    augment = Augmentation(colour=1.0, brightness=0.2, contrast=0.0, saturation=0.3, hue_degrees=0.0)
    ours = vary_colour(image, augment, np.random.default_rng(3))
    rng = np.random.default_rng(3)
    rng.random()
    draws = rng.uniform(-1, 1, size=4)
    theirs = TF.adjust_saturation(image.float() / 255, 1 + 0.3 * draws[2])
    theirs = TF.adjust_brightness(theirs, 1 + 0.2 * draws[0]) * 255
    assert (ours.float() - theirs).abs().max() <= 1.0
    flat = vary_colour(torch.full_like(image, 120), Augmentation(colour=1.0, brightness=0), rng)
    assert (flat.float() - 120).abs().max() <= 1.0  # contrast, saturation and hue leave grey alone


def test_classification_crops_fill_the_canvas():
    image, _ = picture()
    for seed in range(10):
        augment = ClassificationAugmentation(area=(0.1, 1.0))
        out = augment_classification(image, (20, 24), augment, np.random.default_rng(seed), mirror=True)
        assert out.shape == (3, 20, 24)
        assert out.dtype == torch.uint8


@pytest.mark.parametrize("bad", [{"flip": 1.5}, {"scale": (1.5, 0.5)}, {"aspect": (0.0, 1.0)}])
def test_bad_strengths_are_refused(bad):
    with pytest.raises(InputError, match=f"Augmentation: expected .* for {next(iter(bad))}"):
        Augmentation(**bad)

# SPDX-License-Identifier: Apache-2.0
"""Decoding, checking, letterboxing, normalising."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from pfnas_fast.data import (
    EvalImages,
    Target,
    check_images,
    letterbox,
    load_detection,
    normalize,
    read_image,
    resize_batch,
)
from pfnas_fast.errors import InputError


def test_truncated_jpeg_is_refused_by_name(shared_data):
    with pytest.raises(InputError, match=r"readable image for file .*truncated\.jpg, got .*truncated"):
        read_image(shared_data / "broken/truncated.jpg")


@pytest.mark.parametrize("decode", [True, False])
def test_check_images_names_the_truncated_file(shared_data, coco_folder, decode):
    folder = coco_folder(train=8, val=4, test=4)
    data = load_detection(folder)
    assert check_images(data.test, data.fit, decode=decode) == len(data.test) + len(data.fit)
    broken = folder / "images/test" / "damaged.jpg"
    shutil.copy(shared_data / "broken/truncated.jpg", broken)
    record = dataclasses.replace(data.test.records[1], source=str(broken), width=590, height=393)
    test = dataclasses.replace(data.test, records=(data.test.records[0], record), reads=set())
    with pytest.raises(InputError, match=r"damaged\.jpg"):
        check_images(test, decode=decode)
    assert bool(test.reads) is decode  # a check without pixels is no read


def test_check_images_counts_several(coco_folder):
    data = load_detection(coco_folder(train=8, val=4, test=4))
    for record in data.test.records[:2]:
        with open(record.source, "wb") as file:
            file.write(b"not an image")
    with pytest.raises(InputError, match=r"got 2 unreadable \(.*2001\.png, .*2003\.png\)"):
        check_images(data.test, decode=False)


def test_size_other_than_annotated_is_refused(coco_folder):
    data = load_detection(coco_folder(train=8, val=4, test=4))
    Image.new("RGB", (41, 30)).save(data.test.records[0].source)
    for decode in (True, False):
        with pytest.raises(InputError, match=r"expected 40x30 px, as annotated, .*2001\.png, got 41x30"):
            check_images(data.test, decode=decode)


def test_orientation_follows_the_annotated_size(coco_folder):
    data = load_detection(coco_folder(train=8, val=4, test=4))
    record = data.test.records[0]
    exif = Image.Exif()
    exif[0x0112] = 6
    path = record.source.replace(".png", ".jpg")
    Image.new("RGB", (30, 40)).save(path, exif=exif)
    turned = dataclasses.replace(record, source=path)
    assert data.test.reader(turned).shape == (3, 30, 40)
    as_stored = dataclasses.replace(record, source=path, width=30, height=40)
    assert data.test.reader(as_stored).shape == (3, 40, 30)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16"])
def test_every_colour_mode_becomes_rgb(tmp_path, mode):
    suffix = ".jpg" if mode == "CMYK" else ".png"
    Image.new(mode, (5, 4)).save(tmp_path / f"a{suffix}")
    image = read_image(tmp_path / f"a{suffix}")
    assert image.shape == (3, 4, 5)
    assert image.dtype == torch.uint8


@pytest.mark.parametrize("size", [(30, 40), (60, 20), (7, 90), (24, 32), (1, 1)])
def test_letterbox_fits_and_pads_with_grey(size):
    image = torch.full((3, *size), 200, dtype=torch.uint8)
    out, scale = letterbox(image, (24, 32))
    assert out.shape == (3, 24, 32)
    assert scale == min(24 / size[0], 32 / size[1])
    height, width = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    assert (out[:, :height, :width] == 200).all()
    assert (out[:, height:] == 114).all()
    assert (out[:, :, width:] == 114).all()


def test_normalize_matches_torchvision():
    from torchvision.transforms.v2 import functional as TF

    images = torch.randint(
        0, 256, (2, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    ours = normalize(images)
    theirs = TF.normalize(images.float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    planes = normalize(images, memory_format=torch.contiguous_format)
    assert planes.is_contiguous()
    assert torch.equal(planes, ours)
    with pytest.raises(InputError, match="normalize: expected uint8"):
        normalize(images.float())


def test_resize_batch_scales_boxes():
    images = torch.zeros(2, 3, 48, 64, dtype=torch.uint8)
    target = Target(
        torch.tensor([[4.0, 8.0, 32.0, 48.0]]), torch.tensor([1]), torch.tensor([[0.0, 0.0, 64.0, 2.0]])
    )
    smaller, targets = resize_batch(images, [target, Target.empty()], (24, 32))
    assert smaller.shape == (2, 3, 24, 32)
    assert smaller.dtype == torch.uint8
    assert targets[0].boxes.tolist() == [[2.0, 4.0, 16.0, 24.0]]
    assert targets[0].ignore_boxes.tolist() == [[0.0, 0.0, 32.0, 1.0]]
    assert targets[1].boxes.shape == (0, 4)
    same, unchanged = resize_batch(images, targets, (48, 64))
    assert same is images
    assert unchanged is targets
    with pytest.raises(InputError, match=r"resize_batch: expected a canvas of aspect 64:48 .* got 24x24"):
        resize_batch(images, targets, (24, 24))


def test_eval_images_map_boxes_back(shared_data):
    data = load_detection(shared_data / "cards")
    dataset = data.select.subset(range(5))
    images = EvalImages(dataset, (144, 192))
    assert [len(b) for b in images.batches(2)] == [2, 2, 1]
    for i, record in enumerate(dataset.records):
        scale = min(144 / record.height, 192 / record.width)
        boxes = torch.from_numpy(record.boxes).float()
        torch.testing.assert_close(images.to_original(i, boxes * scale), boxes, rtol=1e-5, atol=1e-3)
    outside = images.to_original(0, torch.tensor([[-5.0, -5.0, 900.0, 900.0]]))
    record = dataset.records[0]
    assert outside.tolist() == [[0.0, 0.0, float(record.width), float(record.height)]]


def test_eval_images_too_many_to_keep_are_read_anew(coco_folder, monkeypatch):
    from pfnas_fast.data import eval_images

    data = load_detection(coco_folder(train=12, val=4, test=4))
    kept = EvalImages(data.fit, (24, 32))
    monkeypatch.setattr(eval_images, "CACHE_BYTES", 0)
    streamed = EvalImages(data.fit, (24, 32))
    assert torch.equal(torch.cat(list(streamed.batches(3))), kept.images)
    assert torch.equal(streamed.scales, kept.scales)


def test_centre_crop_for_classification():
    class Gradient:
        """One image whose columns count from 0."""

        name, records = "gradient", ()

        def __len__(self) -> int:
            return 1

        def read(self, index: int) -> torch.Tensor:
            return torch.arange(60, dtype=torch.uint8).expand(3, 20, 60).contiguous()

    images = EvalImages(Gradient(), (20, 20), fit="crop").images  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(images[0, 0, 0].numpy(), np.arange(20, 40))
    with pytest.raises(InputError, match="'letterbox' or 'crop' for fit, got 'stretch'"):
        EvalImages(Gradient(), (20, 20), fit="stretch")  # pyright: ignore[reportArgumentType]

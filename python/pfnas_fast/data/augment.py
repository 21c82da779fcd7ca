# SPDX-License-Identifier: Apache-2.0
"""Training-time augmentation of one image, driven by a numpy generator so that (seed, step, position) fixes
every bit.

The geometric part is one crop and one resize; the colour part is one 3x3 matrix and an offset per image, into
which brightness, contrast, saturation and hue are folded (one small matrix product instead of four passes
over the pixels).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pfnas_fast.data.datasets import Target
from pfnas_fast.data.images import PAD_VALUE, resize
from pfnas_fast.errors import InputError

_LUMA = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Augmentation:
    """How strongly detection images are varied.

    Attributes:
        flip: Probability of a left-right mirror; ignored for datasets whose `mirror` is false (digits).
        vertical_flip: Probability of an upside-down mirror, for pictures without an up (microscopy, aerial).
        zoom: Probability of a random scale and place; otherwise the image is letterboxed.
        scale: Range of the scale against the letterbox, drawn uniformly: > 1 crops, < 1 pads.
        aspect: Range of the stretch of width against height, drawn log-uniformly.
        colour: Probability of a colour change.
        brightness, contrast, saturation: Largest relative change.
        hue_degrees: Largest turn of the hue.
        min_box_px: A box with a shorter side after cropping is dropped, like one whose centre has left the
            canvas.
    """

    flip: float = 0.5
    vertical_flip: float = 0.0
    zoom: float = 0.9
    scale: tuple[float, float] = (0.8, 1.6)
    aspect: tuple[float, float] = (0.85, 1.18)
    colour: float = 0.5
    brightness: float = 0.3
    contrast: float = 0.3
    saturation: float = 0.4
    hue_degrees: float = 15.0
    min_box_px: float = 2.0

    def __post_init__(self) -> None:
        for name in ("flip", "vertical_flip", "zoom", "colour"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(
                    f"Augmentation: expected a probability for {name}, got {getattr(self, name)}"
                )
        for name in ("scale", "aspect"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise InputError(f"Augmentation: expected 0 < low <= high for {name}, got {low}, {high}")

    @staticmethod
    def none() -> Augmentation:
        """Letterbox only."""
        return Augmentation(flip=0, zoom=0, colour=0)


@dataclass(frozen=True)
class ClassificationAugmentation:
    """How strongly classification images are varied.

    Attributes:
        flip: Probability of a left-right mirror; ignored for datasets whose `mirror` is false (digits).
        area: Range of the share of the image's area that is kept.
        aspect: Range of the crop's width over its height, drawn log-uniformly.
        colour, brightness, contrast, saturation, hue_degrees: As in `Augmentation`.
    """

    flip: float = 0.5
    area: tuple[float, float] = (0.6, 1.0)
    aspect: tuple[float, float] = (0.75, 4 / 3)
    colour: float = 0.5
    brightness: float = 0.3
    contrast: float = 0.3
    saturation: float = 0.4
    hue_degrees: float = 15.0


def augment_detection(
    image: Tensor,
    target: Target,
    canvas: tuple[int, int],
    augment: Augmentation,
    rng: np.random.Generator,
    *,
    mirror: bool,
) -> tuple[Tensor, Target]:
    """Vary one image and bring it to the canvas.

    Args:
        image: uint8 RGB, [3, h, w].
        target: Ground truth in px of `image`.
        canvas: (height, width) px.
        augment: Strengths.
        rng: Source of all randomness.
        mirror: Whether the dataset allows mirroring.

    Returns:
        uint8 [3, height, width] and its target. Boxes are clipped; one is dropped if its centre left the
        canvas or a side became shorter than `augment.min_box_px`. Ignore regions are clipped and kept while
        any of them shows.
    """
    height, width = canvas
    h, w = image.shape[1:]
    scale_x = scale_y = min(height / h, width / w)
    left = top = 0.0
    if rng.random() < augment.zoom:
        zoom, stretch = rng.uniform(*augment.scale), _log_uniform(rng, augment.aspect) ** 0.5
        scale_x, scale_y = scale_x * zoom * stretch, scale_y * zoom / stretch
        left = float(rng.random()) * (width - w * scale_x)
        top = float(rng.random()) * (height - h * scale_y)
    columns = _place(left, scale_x, w, width)
    rows = _place(top, scale_y, h, height)
    out = torch.full((3, height, width), PAD_VALUE, dtype=torch.uint8)
    crop = image[:, rows.source[0] : rows.source[1], columns.source[0] : columns.source[1]]
    size = (rows.target[1] - rows.target[0], columns.target[1] - columns.target[0])
    crop = vary_colour(resize(crop, size), augment, rng)  # before the padding, which keeps its value
    out[:, rows.target[0] : rows.target[1], columns.target[0] : columns.target[1]] = crop
    gain = torch.tensor([columns.scale, rows.scale] * 2)
    shift = torch.tensor([columns.offset, rows.offset] * 2)
    boxes, ignore = target.boxes * gain + shift, target.ignore_boxes * gain + shift
    flip_x = rng.random() < augment.flip and mirror
    flip_y = rng.random() < augment.vertical_flip and mirror
    if flip_x:
        out = out.flip(2)
        boxes, ignore = _mirror(boxes, 0, width), _mirror(ignore, 0, width)
    if flip_y:
        out = out.flip(1)
        boxes, ignore = _mirror(boxes, 1, height), _mirror(ignore, 1, height)
    return out, _visible(Target(boxes, target.labels, ignore), canvas, augment.min_box_px)


def augment_classification(
    image: Tensor,
    canvas: tuple[int, int],
    augment: ClassificationAugmentation,
    rng: np.random.Generator,
    *,
    mirror: bool,
) -> Tensor:
    """Random crop of random aspect, mirror and colour: uint8 [3, h, w] -> uint8 [3, *canvas]."""
    h, w = image.shape[1:]
    area = rng.uniform(*augment.area) * h * w
    aspect = _log_uniform(rng, augment.aspect)
    crop_w = min(w, max(1, round((area * aspect) ** 0.5)))
    crop_h = min(h, max(1, round((area / aspect) ** 0.5)))
    x, y = int(rng.integers(0, w - crop_w + 1)), int(rng.integers(0, h - crop_h + 1))
    out = resize(image[:, y : y + crop_h, x : x + crop_w], canvas)
    if rng.random() < augment.flip and mirror:
        out = out.flip(2)
    return vary_colour(out, augment, rng)


def vary_colour(
    image: Tensor, augment: Augmentation | ClassificationAugmentation, rng: np.random.Generator
) -> Tensor:
    """Brightness, contrast, saturation and hue as one affine map of RGB: uint8 [3, H, W] -> the same."""
    change = rng.random() < augment.colour
    draws = rng.uniform(-1, 1, size=4)
    if not change:
        return image
    brightness = 1 + augment.brightness * draws[0]
    contrast = 1 + augment.contrast * draws[1]
    hue = _turn_hue(np.radians(augment.hue_degrees * draws[3]))
    matrix = brightness * contrast * _saturate(1 + augment.saturation * draws[2]) @ hue
    pixels = image.reshape(3, -1).float()
    grey = float(_LUMA @ pixels.mean(1).numpy().astype(np.float64))
    offset = torch.full((3, 1), brightness * (1 - contrast) * grey + 0.5)  # 0.5: the cast truncates
    out = torch.addmm(offset, torch.from_numpy(matrix).float(), pixels)
    return out.clamp_(0, 255).to(torch.uint8).reshape(image.shape)


@dataclass(frozen=True)
class _Placement:
    """One axis of a crop and resize: whole-px ranges, and the map x -> x * scale + offset they imply."""

    source: tuple[int, int]
    target: tuple[int, int]

    @property
    def scale(self) -> float:
        return (self.target[1] - self.target[0]) / (self.source[1] - self.source[0])

    @property
    def offset(self) -> float:
        return self.target[0] - self.source[0] * self.scale


def _place(start: float, scale: float, length: int, canvas: int) -> _Placement:
    """Put `length` px, scaled, at `start` on a canvas and crop what sticks out; at least one px is kept."""
    first = min(length - 1, max(0, int(np.floor(-start / scale))))
    last = max(first + 1, min(length, int(np.ceil((canvas - start) / scale))))
    begin = min(canvas - 1, max(0, round(start + first * scale)))
    end = max(begin + 1, min(canvas, round(start + last * scale)))
    return _Placement((first, last), (begin, end))


def _log_uniform(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    return float(np.exp(rng.uniform(np.log(bounds[0]), np.log(bounds[1]))))


def _mirror(boxes: Tensor, axis: int, length: int) -> Tensor:
    out = boxes.clone()
    out[:, axis] = length - boxes[:, axis + 2]
    out[:, axis + 2] = length - boxes[:, axis]
    return out


def _visible(target: Target, canvas: tuple[int, int], min_box_px: float) -> Target:
    limit = torch.tensor([canvas[1], canvas[0]] * 2, dtype=torch.float32)
    centre = (target.boxes[:, :2] + target.boxes[:, 2:]) / 2
    clipped = target.boxes.clamp(min=0).minimum(limit)
    sides = clipped[:, 2:] - clipped[:, :2]
    keep = ((centre >= 0) & (centre < limit[:2])).all(1) & (sides >= min_box_px).all(1)
    ignore = target.ignore_boxes.clamp(min=0).minimum(limit)
    shows = (ignore[:, 2:] > ignore[:, :2]).all(1)
    return Target(clipped[keep], target.labels[keep], ignore[shows])


def _saturate(factor: float) -> np.ndarray:
    return factor * np.eye(3) + (1 - factor) * np.outer(np.ones(3), _LUMA)


def _turn_hue(angle: float) -> np.ndarray:
    """Rotation of RGB about the grey axis (Rodrigues)."""
    third, root = 1 / 3, (1 / 3) ** 0.5
    cos, sin = np.cos(angle), np.sin(angle)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) * root
    return cos * np.eye(3) + sin * cross + (1 - cos) * third * np.ones((3, 3))

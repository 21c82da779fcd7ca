# SPDX-License-Identifier: Apache-2.0
"""The embedded data: real handwritten digits, alone and composed into cluttered scenes.

The 1,797 digits are those of scikit-learn's `load_digits` (8x8 px, UCI, collected by E. Alpaydin and C.
Kaynak). They are divided by instance into train / val / test before anything is composed, and this division,
like the scenes, is fixed: it depends on no seed of a run, so a network pre-trained on single digits has never
met a digit of a val or test scene.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from pfnas_fast.data.datasets import ClassificationDataset, DetectionDataset, Record
from pfnas_fast.errors import InputError

SCENE_WIDTH, SCENE_HEIGHT = 192, 144
VIEW_SIZE = 64
DIGIT_NAMES = tuple("0123456789")
NUM_SCENES = {"train": 400, "val": 100, "test": 100}
_VIEWS_PER_DIGIT = 3
_WORK = 72  # px at which digits are turned and sheared
_SEED = 20130321  # of the set itself
_STREAM_INSTANCES, _STREAM_SCENES, _STREAM_VIEWS = 1, 2, 3
_SPLIT_SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}


@dataclass(frozen=True)
class _Glyph:
    """How a digit is drawn: corner and size in px, angle in degrees, ink threshold, grey step to ground."""

    instance: int
    x: int
    y: int
    size: int
    angle: float
    shear: float
    ink: float
    contrast: float


@lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels [1797, 8, 8] float32 in 0..1 and labels [1797] int64."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            "load: expected scikit-learn to be installed for source 'digits', got none "
            "(pip install scikit-learn)"
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    return (pixels.reshape(-1, 8, 8) / 16).astype(np.float32), labels.astype(np.int64)


@lru_cache(maxsize=1)
def digit_instances() -> dict[str, np.ndarray]:
    """Indices of the handwritten digits of each split; disjoint, fixed."""
    labels = _digits()[1]
    order = np.random.default_rng([_SEED, _STREAM_INSTANCES]).permutation(len(labels))
    bounds = np.round(np.cumsum(list(_SPLIT_SHARES.values())) * len(order)).astype(int)
    parts = np.split(order, bounds[:-1])
    return dict(zip(_SPLIT_SHARES, parts, strict=True))


def digit_scenes() -> dict[str, DetectionDataset]:
    """The detection set: 400 / 100 / 100 scenes of 192x144 px with 1-6 digits each, rendered when read."""
    return {split: _scene_split(split) for split in NUM_SCENES}


def digit_views() -> dict[str, ClassificationDataset]:
    """The classification set: each digit three times on other grounds, 64x64 px, rendered when read."""
    labels = _digits()[1]
    views = {}
    for split, instances in digit_instances().items():
        repeated = np.repeat(instances, _VIEWS_PER_DIGIT)
        sources = tuple(f"{split}/{instance}/{i}" for i, instance in enumerate(repeated))
        views[split] = ClassificationDataset(
            split, DIGIT_NAMES, sources, labels[repeated], render_view, mirror=False
        )
    return views


def _scene_split(split: str) -> DetectionDataset:
    records = tuple(_plan_record(split, index) for index in range(NUM_SCENES[split]))
    return DetectionDataset(split, DIGIT_NAMES, records, render_scene, mirror=False)


def _plan_record(split: str, index: int) -> Record:
    labels = _digits()[1]
    glyphs, boxes = _plan_scene(split, index)
    array = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    return Record(
        image_id=f"{split}/{index}",
        source=f"{split}/{index}",
        width=SCENE_WIDTH,
        height=SCENE_HEIGHT,
        boxes=array,
        labels=np.array([labels[g.instance] for g in glyphs], dtype=np.int64),
        ignore=np.zeros(len(glyphs), dtype=bool),
        areas=(array[:, 2] - array[:, 0]) * (array[:, 3] - array[:, 1]),
    )


@lru_cache(maxsize=1024)
def _plan_scene(split: str, index: int) -> tuple[tuple[_Glyph, ...], tuple[tuple[float, ...], ...]]:
    """Where which digit stands: glyphs and their boxes, xyxy px."""
    instances = digit_instances()[split]
    rng = _scene_rng(split, index, 0)
    glyphs: list[_Glyph] = []
    boxes: list[tuple[float, ...]] = []
    wanted = int(rng.integers(1, 7))
    for _ in range(60):
        glyph = _draw_glyph(rng, int(rng.choice(instances)), SCENE_WIDTH, SCENE_HEIGHT)
        box = _ink_box(glyph)
        if all(_overlap(box, other) < 0.12 for other in boxes):
            glyphs.append(glyph)
            boxes.append(box)
        if len(glyphs) == wanted:
            break
    return tuple(glyphs), tuple(boxes)


def _scene_rng(split: str, index: int, part: int) -> np.random.Generator:
    return np.random.default_rng([_SEED, _STREAM_SCENES, list(NUM_SCENES).index(split), index, part])


def _draw_glyph(rng: np.random.Generator, instance: int, width: int, height: int) -> _Glyph:
    size = round(float(np.exp(rng.uniform(np.log(16), np.log(72)))))
    return _Glyph(
        instance=instance,
        x=int(rng.integers(0, width - size + 1)),
        y=int(rng.integers(0, height - size + 1)),
        size=size,
        angle=float(rng.uniform(-10, 10)),
        shear=float(rng.uniform(-0.15, 0.15)),
        ink=float(rng.uniform(0.3, 0.55)),
        contrast=float(rng.uniform(50, 150)),
    )


@lru_cache(maxsize=4096)
def _glyph_alpha(glyph: _Glyph) -> np.ndarray:
    """Opacity of a digit, [size, size] float32 in 0..1; its ink fills the longer side of the square."""
    middle = _WORK / 2
    pixels = np.pad(_digits()[0][glyph.instance], 2)
    big = Image.fromarray(pixels).resize((_WORK, _WORK), Image.Resampling.BICUBIC)
    cos, sin = np.cos(np.radians(glyph.angle)), np.sin(np.radians(glyph.angle))
    a, b, d, e = cos, sin + glyph.shear, -sin, cos
    matrix = (a, b, middle * (1 - a - b), d, e, middle * (1 - d - e))
    warped = big.transform(big.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    rows, columns = _extent(np.asarray(warped) > glyph.ink)
    half = max(rows[1] - rows[0], columns[1] - columns[0]) / 2 + 1
    x, y = (columns[0] + columns[1]) / 2, (rows[0] + rows[1]) / 2
    patch = warped.resize(
        (glyph.size, glyph.size),
        Image.Resampling.BICUBIC,
        box=(max(0.0, x - half), max(0.0, y - half), min(_WORK, x + half), min(_WORK, y + half)),
    )
    softness = 0.12 + 1.5 / glyph.size  # about one px of blur at the stroke's edge
    return np.clip((np.asarray(patch) - glyph.ink) / softness + 0.5, 0, 1)


def _extent(ink: np.ndarray) -> tuple[tuple[int, int], tuple[int, int]]:
    """First row and end row, first column and end column of a mask; the whole of an empty one."""
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    if not rows.size:
        return (0, ink.shape[0]), (0, ink.shape[1])
    return (int(rows[0]), int(rows[-1]) + 1), (int(columns[0]), int(columns[-1]) + 1)


def _ink_box(glyph: _Glyph) -> tuple[float, float, float, float]:
    """Tight box of the ink in scene px, xyxy."""
    rows, columns = _extent(_glyph_alpha(glyph) > 0.5)
    return glyph.x + columns[0], glyph.y + rows[0], glyph.x + columns[1], glyph.y + rows[1]


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Intersection over the smaller area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


def render_scene(record: Record) -> Tensor:
    """Pixels of a scene, uint8 [3, 144, 192]."""
    split, index = record.source.split("/")
    glyphs, _ = _plan_scene(split, int(index))
    rng = _scene_rng(split, int(index), 1)
    canvas = _ground(rng, SCENE_WIDTH, SCENE_HEIGHT)
    _add_strokes(canvas, rng, int(rng.integers(1, 6)))
    instances = digit_instances()[split]
    for _ in range(int(rng.integers(0, 3))):
        decoy = _draw_glyph(rng, int(rng.choice(instances)), SCENE_WIDTH, SCENE_HEIGHT)
        _paint(canvas, rng, decoy, _scramble(_glyph_alpha(decoy), rng), [_ink_box(g) for g in glyphs])
    for glyph in glyphs:
        _paint(canvas, rng, glyph, _glyph_alpha(glyph), [])
    if rng.random() < 0.2:
        _add_strokes(canvas, rng, 1)  # crosses some digit now and then
    return _expose(canvas, rng)


def render_view(source: str) -> Tensor:
    """Pixels of a single digit on clutter, uint8 [3, 64, 64]."""
    _, instance, index = source.split("/")
    rng = np.random.default_rng([_SEED, _STREAM_VIEWS, int(index)])
    drawn = _draw_glyph(rng, int(instance), SCENE_WIDTH, SCENE_HEIGHT)
    size = int(rng.integers(34, VIEW_SIZE - 1))
    x, y = (int(v) for v in rng.integers(0, VIEW_SIZE - size + 1, size=2))
    glyph = _Glyph(drawn.instance, x, y, size, drawn.angle, drawn.shear, drawn.ink, drawn.contrast)
    canvas = _ground(rng, VIEW_SIZE, VIEW_SIZE)
    _add_strokes(canvas, rng, int(rng.integers(0, 3)))
    _paint(canvas, rng, glyph, _glyph_alpha(glyph), [])
    return _expose(canvas, rng)


def _ground(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A coloured ground with soft patches and a slope of light, [height, width, 3] float32."""
    base = rng.uniform(25, 105, size=3) * 0.5 + rng.uniform(25, 105) * 0.5
    patches = rng.normal(size=(int(rng.integers(3, 8)), int(rng.integers(4, 10)))).astype(np.float32)
    texture = np.asarray(Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC))
    slope = np.linspace(-1, 1, width)[None, :] * rng.uniform(-25, 25) + np.linspace(-1, 1, height)[
        :, None
    ] * rng.uniform(-25, 25)
    tint = rng.uniform(0.7, 1.3, size=3)
    return (base + (texture * rng.uniform(3, 22) + slope)[..., None] * tint).astype(np.float32)


def _add_strokes(canvas: np.ndarray, rng: np.random.Generator, count: int) -> None:
    """Blend `count` random pen strokes (arcs, lines, hooks) into the canvas, in place."""
    height, width = canvas.shape[:2]
    mean = canvas.mean((0, 1))
    for _ in range(count):
        mask = Image.new("L", (2 * width, 2 * height))
        draw = ImageDraw.Draw(mask)
        thickness = int(rng.integers(2, 10))
        reach = rng.uniform(0.15, 0.9) * height
        points = np.cumsum(rng.normal(size=(4, 2)) * reach * 0.45, axis=0) + rng.uniform(0, 1, 2) * (
            width,
            height,
        )
        if rng.random() < 0.4:
            low, high = points.min(0) * 2, points.max(0) * 2 + 4
            start = rng.uniform(0, 360)
            draw.arc((*low, *high), start, start + rng.uniform(60, 340), fill=255, width=thickness)
        else:
            draw.line(
                [tuple(p * 2) for p in points[: int(rng.integers(2, 5))]],
                fill=255,
                width=thickness,
                joint="curve",
            )
        mask = mask.reduce(2)
        step = rng.choice([-1, 1]) * rng.uniform(10, 55) + rng.normal(size=3) * 15
        extent = mask.getbbox()
        if extent is None:
            continue
        x0, y0, x1, y1 = extent
        region = canvas[y0:y1, x0:x1]
        alpha = np.asarray(mask.crop(extent), dtype=np.float32)[..., None] / 255
        region += alpha * ((mean + step).astype(np.float32) - region)


def _scramble(alpha: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A decoy with a digit's strokes in the wrong places: its quadrants shuffled and mirrored."""
    half = alpha.shape[0] // 2
    parts = [alpha[:half, :half], alpha[:half, -half:], alpha[-half:, :half], alpha[-half:, -half:]]
    parts = [np.flip(parts[i], int(rng.integers(0, 2))) for i in (rng.permutation(3) + 1) % 4] + [parts[0]]
    out = np.zeros_like(alpha)
    out[:half, :half], out[:half, -half:], out[-half:, :half], out[-half:, -half:] = parts
    return out


def _paint(
    canvas: np.ndarray,
    rng: np.random.Generator,
    glyph: _Glyph,
    alpha: np.ndarray,
    keep_clear: list[tuple[float, ...]],
) -> None:
    """Blend a glyph in, brighter than its ground (chalk on a board), unless it hits a `keep_clear` box."""
    box = (glyph.x, glyph.y, glyph.x + glyph.size, glyph.y + glyph.size)
    noise = rng.normal(size=3) * 22
    if any(_overlap(box, other) > 0.1 for other in keep_clear):
        return
    region = canvas[glyph.y : glyph.y + glyph.size, glyph.x : glyph.x + glyph.size]
    ground = region.mean((0, 1))
    colour = np.clip(ground + glyph.contrast + noise, 0, 255).astype(np.float32)
    region += alpha[..., None] * (colour - region)


def _expose(canvas: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Sensor noise and rounding: uint8 [3, H, W]."""
    noisy = canvas + rng.normal(size=canvas.shape) * rng.uniform(2, 13)
    pixels = np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))

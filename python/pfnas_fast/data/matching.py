# SPDX-License-Identifier: Apache-2.0
"""The twelve COCO numbers in one vectorised pass, and again on any subset or bootstrap of the images for next
to nothing.

The rules are pycocotools': per image and class at most 100 detections in order of score, each takes the free
ground truth of largest IoU (the later one of equals), ignored ground truth only if no other is left; crowds
can be taken any number of times. Detections whose best IoU is below 0.5 cannot match at any threshold; they
skip the matching loop, which leaves a few hundred array steps where pycocotools runs millions of Python ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pfnas_fast.data.datasets import DetectionDataset
from pfnas_fast.data.evaluation import METRIC_NAMES, DetectionLike, detection_arrays, image_indices, to_xywh
from pfnas_fast.errors import InputError

_IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_RECALLS = np.linspace(0.0, 1.0, 101)
_AREA_RANGES = np.array([[0, 1e10], [0, 32**2], [32**2, 96**2], [96**2, 1e10]])  # all, small, medium, large
_MAX_DETECTIONS = (1, 10, 100)


@dataclass(frozen=True)
class _ClassTruth:
    """Ground truth of one class, sorted by image.

    Attributes:
        boxes: [g, 4] float64, x, y, width, height.
        crowd: [g] bool.
        ignored: [4, g] bool: crowd or outside the area range.
        start: [images + 1] int64: the boxes of image i are start[i] .. start[i + 1] - 1.
    """

    boxes: np.ndarray
    crowd: np.ndarray
    ignored: np.ndarray
    start: np.ndarray


@dataclass(frozen=True)
class _ClassMatches:
    """Detections of one class in order of falling score, and how they fared.

    Attributes:
        image: [d] int64.
        rank: [d] int64: place among the detections of its image.
        hit, false: [4, 10, d] bool (area range, IoU threshold): right, wrong; neither if ignored.
        positives: [4, images] int64: boxes to be found in each image.
    """

    image: np.ndarray
    rank: np.ndarray
    hit: np.ndarray
    false: np.ndarray
    positives: np.ndarray


class Evaluator:
    """Ground truth prepared for many evaluations; gives the numbers of `evaluate` without its cost.

    Args:
        dataset: Ground truth.
        indices: Images to evaluate; None for all.

    Example:
        >>> from pfnas_fast.data import load_detection
        >>> from collections import namedtuple
        >>> Found = namedtuple("Found", "boxes scores labels")
        >>> val = load_detection("digits").select
        >>> matches = Evaluator(val).match([Found(r.boxes, 0 * r.areas, r.labels) for r in val.records])
        >>> round(matches.metrics()["ap"], 6), round(matches.metrics(images=range(0, 100, 2))["ap"], 6)
        (1.0, 1.0)
    """

    def __init__(self, dataset: DetectionDataset, indices: Sequence[int] | np.ndarray | None = None) -> None:
        self.dataset = dataset
        self.indices = image_indices(dataset, indices, "Evaluator")
        records = [dataset.records[i] for i in self.indices]
        image = np.repeat(np.arange(len(records)), [len(r.labels) for r in records])
        boxes = to_xywh(_concatenate([r.boxes for r in records], 4))
        labels = _concatenate([r.labels for r in records]).astype(np.int64)
        crowd = _concatenate([r.ignore for r in records]).astype(bool)
        areas = _concatenate([r.areas for r in records])
        outside = (areas < _AREA_RANGES[:, :1]) | (areas > _AREA_RANGES[:, 1:])
        self._truth = []
        for label in range(dataset.num_classes):
            of_class = np.flatnonzero(labels == label)
            start = np.searchsorted(image[of_class], np.arange(len(records) + 1))
            truth = _ClassTruth(boxes[of_class], crowd[of_class], (crowd | outside)[:, of_class], start)
            self._truth.append(truth)

    def match(self, detections: Sequence[DetectionLike]) -> Matches:
        """Match detections with the ground truth.

        Args:
            detections: One per image of `indices`, in that order; boxes in px of the original image.

        Returns:
            What `Matches.metrics` computes numbers from.

        Raises:
            InputError: as `evaluate`.
        """
        arrays = detection_arrays(self.dataset, detections, len(self.indices), "Evaluator.match")
        image = np.repeat(np.arange(len(arrays)), [len(a[1]) for a in arrays])
        boxes = to_xywh(_concatenate([a[0] for a in arrays], 4))
        scores = _concatenate([a[1] for a in arrays])
        labels = _concatenate([a[2] for a in arrays]).astype(np.int64)
        matches = []
        for label, truth in enumerate(self._truth):
            of_class = np.flatnonzero(labels == label)
            matches.append(_match_class(truth, image[of_class], boxes[of_class], scores[of_class]))
        return Matches(tuple(matches), len(arrays), self.dataset.class_names)

    def evaluate(self, detections: Sequence[DetectionLike]) -> dict[str, float]:
        """The twelve COCO numbers over all images; `match(detections).metrics()`."""
        return self.match(detections).metrics()


@dataclass(frozen=True)
class Matches:
    """Detections matched with ground truth, ready to be counted.

    Attributes:
        classes: Matches of each class.
        num_images: Number of images.
        class_names: Name of each label.
    """

    classes: tuple[_ClassMatches, ...]
    num_images: int
    class_names: tuple[str, ...]

    def metrics(self, *, images: Sequence[int] | np.ndarray | None = None) -> dict[str, float]:
        """The twelve COCO numbers.

        Args:
            images: Places in the evaluated list, 0 .. num_images - 1; None for all. One that occurs twice
                counts twice, so halves of the images and bootstrap samples need no further matching.

        Returns:
            `METRIC_NAMES` -> value in 0..1, or -1 where there is no ground truth to judge by.

        Raises:
            InputError: no image, or a number outside the range.
        """
        times = self._times(images)
        precision, recall = zip(*(_curves(c, times) for c in self.classes), strict=True)
        ap = np.stack(precision)  # [classes, area, threshold], NaN without ground truth
        ar = np.stack(recall)  # [classes, area, threshold, max detections]
        values = (
            [ap[:, 0], ap[:, 0, 0], ap[:, 0, 5], ap[:, 1], ap[:, 2], ap[:, 3]]
            + [ar[:, 0, :, m] for m in range(3)]
            + [ar[:, a, :, 2] for a in (1, 2, 3)]
        )
        return dict(zip(METRIC_NAMES, map(_mean, values), strict=True))

    def class_ap(self, *, images: Sequence[int] | np.ndarray | None = None) -> dict[str, float]:
        """AP (mean over IoU 0.5..0.95) of each class by name; -1 for a class without ground truth."""
        times = self._times(images)
        return {
            name: _mean(_curves(c, times)[0][0])
            for name, c in zip(self.class_names, self.classes, strict=True)
        }

    def _times(self, images: Sequence[int] | np.ndarray | None) -> np.ndarray:
        """How often each image counts, int64 [num_images]."""
        if images is None:
            return np.ones(self.num_images, dtype=np.int64)
        chosen = np.asarray(images, dtype=np.int64).reshape(-1)
        if not chosen.size or chosen.min() < 0 or chosen.max() >= self.num_images:
            raise InputError(
                f"Matches: expected image numbers in 0..{self.num_images - 1} for images, got {images}"
            )
        return np.bincount(chosen, minlength=self.num_images)


def _match_class(
    truth: _ClassTruth, image: np.ndarray, boxes: np.ndarray, scores: np.ndarray
) -> _ClassMatches:
    by_image = np.lexsort((-scores, image))  # stable, as pycocotools' mergesort
    rank = np.arange(len(image)) - np.searchsorted(image[by_image], image[by_image])
    by_image, rank = by_image[rank < _MAX_DETECTIONS[-1]], rank[rank < _MAX_DETECTIONS[-1]]
    image, boxes, scores = image[by_image], boxes[by_image], scores[by_image]
    matched, ignored = _assign(truth, image, boxes)
    areas = boxes[:, 2] * boxes[:, 3]
    outside = (areas < _AREA_RANGES[:, :1]) | (areas > _AREA_RANGES[:, 1:])
    ignored |= ~matched & outside[:, None]
    order = np.argsort(-scores, kind="stable")
    before = np.concatenate([np.zeros((4, 1), dtype=np.int64), np.cumsum(~truth.ignored, axis=1)], axis=1)
    positives = np.diff(before[:, truth.start], axis=1)
    return _ClassMatches(
        image[order],
        rank[order],
        (matched & ~ignored)[..., order],
        (~matched & ~ignored)[..., order],
        positives,
    )


def _assign(truth: _ClassTruth, image: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give each detection its ground truth, in order of rank within each image.

    Args:
        truth: Ground truth of the class.
        image: [d], ascending.
        boxes: [d, 4] x, y, width, height; falling scores within an image.

    Returns:
        matched, ignored: [4, 10, d] bool; `ignored` tells whether the ground truth it took is ignored.
    """
    matched = np.zeros((len(_AREA_RANGES), len(_IOU_THRESHOLDS), len(image)), dtype=bool)
    ignored = np.zeros_like(matched)
    counts = np.diff(truth.start)
    width = int(counts.max(initial=0))
    candidates = np.flatnonzero(counts[image] > 0)
    if not width or not candidates.size:
        return matched, ignored
    of_image = image[candidates]
    columns = truth.start[of_image][:, None] + np.arange(width)
    valid = np.arange(width) < counts[of_image][:, None]
    columns = np.where(valid, columns, 0)
    iou = np.where(valid, _iou(boxes[candidates], truth.boxes[columns], truth.crowd[columns]), -1.0)
    promising = iou.max(1) >= _IOU_THRESHOLDS[0]
    candidates, of_image, columns, iou = (a[promising] for a in (candidates, of_image, columns, iou))
    if not candidates.size:
        return matched, ignored
    turn = np.arange(len(of_image)) - np.searchsorted(of_image, of_image)
    free = np.ones((len(counts), *matched.shape[:2], width), dtype=bool)
    thresholds = np.minimum(_IOU_THRESHOLDS, 1 - 1e-10)[None, None, :, None]
    for step in range(int(turn.max()) + 1):
        rows = np.flatnonzero(turn == step)  # one detection of each image at most
        where, column, overlap = of_image[rows], columns[rows], iou[rows][:, None, None, :]
        ignore = truth.ignored[:, column].transpose(1, 0, 2)[:, :, None, :]  # [rows, area, 1, truths]
        open_to = (overlap >= thresholds) & (free[where] | truth.crowd[column][:, None, None, :])
        proper = open_to & ~ignore
        pool = np.where(proper.any(-1, keepdims=True), proper, open_to)
        ranked = np.where(pool, overlap, -1.0)
        best = width - 1 - np.argmax(ranked[..., ::-1], axis=-1)  # the last of equals
        took = np.any(pool, axis=-1)
        places = candidates[rows]
        matched[:, :, places] = took.transpose(1, 2, 0)
        of_ignored = np.take_along_axis(np.broadcast_to(ignore, pool.shape), best[..., None], -1)[..., 0]
        ignored[:, :, places] = (of_ignored & took).transpose(1, 2, 0)
        free[where] &= ~((np.arange(width) == best[..., None]) & took[..., None])
    return matched, ignored


def _iou(boxes: np.ndarray, truths: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """IoU [d, g] of x, y, width, height boxes, computed as in pycocotools; crowds: share of detection."""
    x, y, w, h = (boxes[:, None, i] for i in range(4))
    tx, ty, tw, th = (truths[..., i] for i in range(4))
    overlap_w = np.minimum(w + x, tw + tx) - np.maximum(x, tx)
    overlap_h = np.minimum(h + y, th + ty) - np.maximum(y, ty)
    shared = np.where((overlap_w > 0) & (overlap_h > 0), overlap_w * overlap_h, 0.0)
    union = np.where(crowd, w * h, w * h + tw * th - shared)
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def _curves(matches: _ClassMatches, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean precision [4, 10] and recall at 1 / 10 / 100 detections [4, 10, 3]; NaN without ground truth."""
    keep = np.repeat(np.arange(len(matches.image)), times[matches.image])
    positives = (matches.positives * times).sum(1)  # [4]
    known = positives > 0
    hit, rank = matches.hit[..., keep], matches.rank[keep]
    ap = np.full(hit.shape[:2], np.nan)
    ar = np.full((*hit.shape[:2], len(_MAX_DETECTIONS)), np.nan)
    # Recall rises at hits alone, and the envelope of precision is constant between them: only the columns
    # with a hit in any area at any threshold count.
    columns = np.flatnonzero(hit.any((0, 1)))
    hit, rank = hit[..., columns], rank[columns]
    for i, limit in enumerate(_MAX_DETECTIONS):
        ar[known, :, i] = hit[known][..., rank < limit].sum(-1) / positives[known, None]
    wrong = np.cumsum(matches.false[..., keep], -1, dtype=np.int32)[..., columns]
    hits = np.cumsum(hit, -1, dtype=np.float64)
    precision = hits / (hits + wrong + np.spacing(1))
    envelope = np.maximum.accumulate(precision[..., ::-1], axis=-1)[..., ::-1]
    for area in np.flatnonzero(known):
        recall = hits[area] / positives[area]
        for threshold in range(hit.shape[1]):
            places = np.searchsorted(recall[threshold], _RECALLS, side="left")
            reached = places[places < recall.shape[1]]
            ap[area, threshold] = envelope[area, threshold][reached].sum() / len(_RECALLS)
    return ap, ar


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else -1.0


def _concatenate(arrays: list[np.ndarray], columns: int | None = None) -> np.ndarray:
    empty = np.zeros(0 if columns is None else (0, columns))
    return np.concatenate([empty, *arrays])

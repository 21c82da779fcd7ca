# SPDX-License-Identifier: Apache-2.0
"""COCO and Pascal VOC average precision.

`evaluate` runs pycocotools itself. `Evaluator` computes the same twelve numbers (a test holds them equal) in
one vectorised pass, for the hundreds of evaluations that labelling paths takes.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from pfnas_fast.data.datasets import DetectionDataset
from pfnas_fast.errors import InputError

METRIC_NAMES = (
    "ap",
    "ap50",
    "ap75",
    "ap_small",
    "ap_medium",
    "ap_large",
    "ar_1",
    "ar_10",
    "ar_100",
    "ar_small",
    "ar_medium",
    "ar_large",
)


class DetectionLike(Protocol):
    """Detections of an image: boxes [n, 4] xyxy px of the original, scores [n], labels [n]; any arrays."""

    @property
    def boxes(self) -> Any: ...

    @property
    def scores(self) -> Any: ...

    @property
    def labels(self) -> Any: ...


def evaluate(
    dataset: DetectionDataset,
    detections: Sequence[DetectionLike],
    indices: Sequence[int] | np.ndarray | None = None,
) -> dict[str, float]:
    """The twelve COCO numbers, by pycocotools.

    Ignore regions (crowds, difficult objects) count as COCO crowds: a detection that lies mostly in one is
    not counted.

    Args:
        dataset: Ground truth.
        detections: One per image of `indices`, in that order.
        indices: Images to evaluate; None for all.

    Returns:
        `METRIC_NAMES` -> value in 0..1, or -1 where there is no ground truth to judge by (as pycocotools has
        it). No detections at all give 0.

    Raises:
        InputError: number of detections and images differ, label outside the classes, shapes disagree, or a
            box or score that is not finite.

    Example:
        >>> import numpy as np
        >>> import pfnas_fast as pf
        >>> images = pf.load_detection("digits").select.subset(range(4))
        >>> perfect = [pf.Detection(r.boxes, np.ones(len(r.labels)), r.labels) for r in images.records]
        >>> round(pf.evaluate(images, perfect)["ap50"], 6)
        1.0
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    chosen = image_indices(dataset, indices, "evaluate")
    arrays = detection_arrays(dataset, detections, len(chosen), "evaluate")
    with contextlib.redirect_stdout(io.StringIO()):
        truth: Any = COCO()
        found: Any = COCO()
        truth.dataset = _coco_dict(dataset, chosen, _truth_annotations(dataset, chosen))
        found.dataset = _coco_dict(dataset, chosen, _detection_annotations(arrays))
        truth.createIndex()
        found.createIndex()
        judge = COCOeval(truth, found, "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return dict(zip(METRIC_NAMES, (float(v) for v in judge.stats), strict=True))


def image_indices(
    dataset: DetectionDataset, indices: Sequence[int] | np.ndarray | None, caller: str
) -> np.ndarray:
    """Validated image indices, int64 [n], distinct."""
    if indices is None:
        return np.arange(len(dataset))
    chosen = np.asarray(indices, dtype=np.int64).reshape(-1)
    if len(np.unique(chosen)) != len(chosen) or (chosen < 0).any() or (chosen >= len(dataset)).any():
        raise InputError(
            f"{caller}: expected distinct image numbers in 0..{len(dataset) - 1} for indices, got {indices}"
        )
    return chosen


def detection_arrays(
    dataset: DetectionDataset, detections: Sequence[DetectionLike], num_images: int, caller: str
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Boxes float64 [n, 4], scores float64 [n], labels int64 [n] of each image, validated."""
    if len(detections) != num_images:
        raise InputError(
            f"{caller}: expected {num_images} entries, one per image, for detections, got {len(detections)}"
        )
    arrays = []
    for i, detection in enumerate(detections):
        boxes, scores = (
            _array(detection.boxes, np.float64).reshape(-1, 4),
            _array(detection.scores, np.float64),
        )
        labels = _array(detection.labels, np.int64)
        if not len(boxes) == len(scores) == len(labels):
            raise InputError(
                f"{caller}: expected as many boxes as scores and labels for detections[{i}], got "
                f"{len(boxes)}, {len(scores)}, {len(labels)}"
            )
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise InputError(
                f"{caller}: expected finite boxes and scores for detections[{i}], got NaN or infinity"
            )
        if len(labels) and not 0 <= labels.min() <= labels.max() < dataset.num_classes:
            raise InputError(
                f"{caller}: expected labels in 0..{dataset.num_classes - 1} for detections[{i}], "
                f"got {labels.min()}..{labels.max()}"
            )
        arrays.append((boxes, scores, labels))
    return arrays


def _array(values: Any, dtype: type) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    return np.asarray(values, dtype=dtype)


def _coco_dict(
    dataset: DetectionDataset, chosen: np.ndarray, annotations: list[dict[str, Any]]
) -> dict[str, Any]:
    categories = [{"id": i, "name": name} for i, name in enumerate(dataset.class_names)]
    return {
        "images": [{"id": i} for i in range(len(chosen))],
        "annotations": annotations,
        "categories": categories,
    }


def _truth_annotations(dataset: DetectionDataset, chosen: np.ndarray) -> list[dict[str, Any]]:
    annotations = []
    for image, index in enumerate(chosen):
        record = dataset.records[index]
        for box, label, ignore, area in zip(
            to_xywh(record.boxes), record.labels, record.ignore, record.areas, strict=True
        ):
            annotations.append(_annotation(len(annotations), image, label, box, area, int(ignore)))
    return annotations


def _detection_annotations(arrays: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> list[dict[str, Any]]:
    annotations = []
    for image, (boxes, scores, labels) in enumerate(arrays):
        for box, score, label in zip(to_xywh(boxes), scores, labels, strict=True):
            item = _annotation(len(annotations), image, label, box, box[2] * box[3], 0)
            annotations.append({**item, "score": float(score)})
    return annotations


def _annotation(
    number: int, image: int, label: int, box: np.ndarray, area: float, crowd: int
) -> dict[str, Any]:
    return {
        "id": number + 1,  # pycocotools takes a match with id 0 for no match
        "image_id": image,
        "category_id": int(label),
        "bbox": [float(v) for v in box],
        "area": float(area),
        "iscrowd": crowd,
    }


def to_xywh(boxes: np.ndarray) -> np.ndarray:
    """xyxy [n, 4] -> x, y, width, height."""
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)

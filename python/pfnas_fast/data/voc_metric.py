# SPDX-License-Identifier: Apache-2.0
"""Pascal VOC's own AP50, in the form of 2007 (eleven recalls) and of 2010-2012 (area under the curve)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pfnas_fast.data.datasets import DetectionDataset
from pfnas_fast.data.evaluation import DetectionLike, detection_arrays, image_indices
from pfnas_fast.errors import InputError


def voc_ap50(
    dataset: DetectionDataset,
    detections: Sequence[DetectionLike],
    indices: Sequence[int] | np.ndarray | None = None,
    *,
    form: str = "voc12",
) -> float:
    """Mean over the classes of Pascal VOC's average precision at IoU 0.5.

    As in the VOC development kit each detection, in order of score, goes to the ground truth of largest IoU:
    right if that is above or at 0.5 and not taken yet, not counted if it is difficult, else wrong.

    Args:
        dataset: Ground truth.
        detections: One per image of `indices`, in that order; boxes in px of the original image.
        indices: Images to evaluate; None for all.
        form: "voc07": mean precision at recall 0, 0.1 .. 1; "voc12": area under the precision-recall curve.

    Returns:
        Value in 0..1 over the classes that have ground truth; -1 if none has.

    Raises:
        InputError: unknown form, or detections as for `evaluate`.

    Source:
        Everingham et al., The Pascal Visual Object Classes Challenge, IJCV 2010, section 4.2; the kit's
        VOCevaldet.m.

    Example:
        >>> from pfnas_fast.data import load_detection
        >>> from collections import namedtuple
        >>> Found = namedtuple("Found", "boxes scores labels")
        >>> val = load_detection("digits").select
        >>> found = [Found(r.boxes, 0 * r.areas, r.labels) for r in val.records]
        >>> round(voc_ap50(val, found, form="voc07"), 6)
        1.0
    """
    if form not in ("voc07", "voc12"):
        raise InputError(f"voc_ap50: expected 'voc07' or 'voc12' for form, got {form!r}")
    chosen = image_indices(dataset, indices, "voc_ap50")
    arrays = detection_arrays(dataset, detections, len(chosen), "voc_ap50")
    values = [_class_ap(dataset, chosen, arrays, label, form) for label in range(dataset.num_classes)]
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else -1.0


def _class_ap(
    dataset: DetectionDataset,
    chosen: np.ndarray,
    arrays: list[tuple[np.ndarray, np.ndarray, np.ndarray]],
    label: int,
    form: str,
) -> float | None:
    truths, difficult = [], []
    for index in chosen:
        record = dataset.records[index]
        of_class = record.labels == label
        truths.append(record.boxes[of_class])
        difficult.append(record.ignore[of_class])
    positives = sum(int((~d).sum()) for d in difficult)
    if positives == 0:
        return None
    image = np.concatenate([np.full(int((a[2] == label).sum()), i) for i, a in enumerate(arrays)])
    boxes = np.concatenate([a[0][a[2] == label] for a in arrays])
    scores = np.concatenate([a[1][a[2] == label] for a in arrays])
    order = np.argsort(-scores, kind="stable")
    outcome = _outcomes(image[order].astype(np.int64), boxes[order], truths, difficult)
    hits, wrong = np.cumsum(outcome == 1), np.cumsum(outcome == -1)
    recall, precision = hits / positives, hits / np.maximum(hits + wrong, 1)
    return _eleven_point(recall, precision) if form == "voc07" else _area(recall, precision)


def _outcomes(
    image: np.ndarray, boxes: np.ndarray, truths: list[np.ndarray], difficult: list[np.ndarray]
) -> np.ndarray:
    """1 right, -1 wrong, 0 not counted, for each detection in order of score."""
    taken = [np.zeros(len(t), dtype=bool) for t in truths]
    outcome = np.full(len(image), -1)
    for place, (i, box) in enumerate(zip(image, boxes, strict=True)):
        if not len(truths[i]):
            continue
        overlaps = _iou(box, truths[i])
        best = int(np.argmax(overlaps))
        if overlaps[best] < 0.5:
            continue
        if difficult[i][best]:
            outcome[place] = 0
        elif not taken[i][best]:
            taken[i][best] = True
            outcome[place] = 1
    return outcome


def _iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=1)
    area, areas = np.prod(box[2:] - box[:2]), np.prod(others[:, 2:] - others[:, :2], axis=1)
    return shared / np.maximum(area + areas - shared, 1e-12)


def _eleven_point(recall: np.ndarray, precision: np.ndarray) -> float:
    best = [precision[recall >= r].max(initial=0.0) for r in np.arange(11) / 10]
    return float(np.mean(best))


def _area(recall: np.ndarray, precision: np.ndarray) -> float:
    steps = np.diff(np.concatenate([[0.0], recall]))
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(steps * envelope))

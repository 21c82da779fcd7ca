# SPDX-License-Identifier: Apache-2.0
"""From dense predictions to a short list of boxes per image."""

import torch
from torch import Tensor
from torchvision.ops import clip_boxes_to_image, nms

from pfnas_fast.detection.output import Detection, DetectorOutput
from pfnas_fast.errors import InputError


@torch.no_grad()
def postprocess(
    output: DetectorOutput,
    *,
    score_threshold: float = 0.05,
    iou_threshold: float = 0.6,
    max_detections: int = 100,
    pre_nms_top_k: int = 1000,
) -> list[Detection]:
    """Score, select, suppress and clip.

    The score of a (location, class) pair is sqrt(class probability * centerness probability). The best
    `pre_nms_top_k` pairs of an image that pass the threshold enter a class-wise NMS.

    Args:
        output: Predictions of N images.
        score_threshold: Pairs below it are dropped, in [0, 1].
        iou_threshold: Overlap in IoU above which the weaker box of the same class is dropped, in [0, 1].
        max_detections: Most boxes kept per image, >= 1.
        pre_nms_top_k: Most pairs of an image that enter NMS, >= 1.

    Returns:
        N detections, boxes in canvas px and clipped to the canvas.

    Raises:
        InputError: an argument is out of its range.
    """
    for name, value in (("score_threshold", score_threshold), ("iou_threshold", iou_threshold)):
        if not 0 <= value <= 1:
            raise InputError(f"postprocess: expected a number in [0, 1] for {name}, got {value}")
    for name, count in (("max_detections", max_detections), ("pre_nms_top_k", pre_nms_top_k)):
        if count < 1:
            raise InputError(f"postprocess: expected at least 1 for {name}, got {count}")
    num_locations, num_classes = output.logits.shape[1:]
    scores = (output.logits.float().sigmoid() * output.centerness.float().sigmoid()[..., None]).sqrt()
    scores = scores.nan_to_num(0.0)  # a diverged path finds nothing, instead of ranking NaN first
    top = min(pre_nms_top_k, num_locations * num_classes)
    scores, pair = scores.flatten(1).topk(top, dim=1)  # [N, top], descending
    location, labels = pair.div(num_classes, rounding_mode="floor"), pair % num_classes
    boxes = output.boxes.float().gather(1, location[..., None].expand(-1, -1, 4))
    boxes = clip_boxes_to_image(boxes, output.grid.image_size)
    # Boxes of different classes lie on canvases of their own; float64 holds them apart without rounding.
    apart = boxes.double() + (labels * (max(output.grid.image_size) + 1))[..., None]
    counts = (scores >= score_threshold).sum(1).tolist()
    result = []
    for i, n in enumerate(counts):
        keep = _suppress(apart[i, :n], scores[i, :n], iou_threshold, max_detections)
        result.append(Detection(boxes[i, keep], scores[i, keep], labels[i, keep]))
    return result


def _suppress(boxes: Tensor, scores: Tensor, iou_threshold: float, max_kept: int) -> Tensor:
    """Indices of the first `max_kept` boxes that NMS keeps; `scores` descend.

    NMS costs the square of its boxes, and what it does to the best of them does not depend on the others: so
    it sees as many as yield `max_kept`, not all.
    """
    size = 3 * max_kept
    while True:
        keep = nms(boxes[:size], scores[:size].double(), iou_threshold)
        if len(keep) >= max_kept or size >= len(boxes):
            return keep[:max_kept]
        size *= 2

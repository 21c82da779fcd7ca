# SPDX-License-Identifier: Apache-2.0
"""Training losses of the dense detector: against ground truth, and against a teacher path."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from pfnas_fast.data.datasets import Target
from pfnas_fast.detection.assignment import IGNORED, Assignment, assign_targets
from pfnas_fast.detection.output import DetectorOutput, ltrb_to_boxes
from pfnas_fast.errors import InputError

FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0


def detection_loss(output: DetectorOutput, targets: Sequence[Target] | Assignment) -> dict[str, Tensor]:
    """The FCOS loss: focal classification, GIoU weighted by centerness, and centerness.

    Args:
        output: Predictions of a batch of N images.
        targets: N targets in canvas px, or their assignment to `output.grid` (compute it once for several
            paths).

    Returns:
        Scalars: "total" (the sum of the others), "cls" (sum over locations and classes / positives), "box"
            (mean over
        positives weighted by centerness), "centerness" (mean over positives). Positives are counted over the
        batch, at least 1. All three are differentiable also for a batch without objects.

    Raises:
        InputError: the number of targets or the grid disagrees with the output, or a label is not in [0, K).

    Source:
        FCOS, arXiv:1904.01355, eq. 2-3; GIoU, arXiv:1902.09630; focal loss, arXiv:1708.02002.
    """
    assignment = targets if isinstance(targets, Assignment) else assign_targets(output.grid, targets)
    _check_assignment("detection_loss", output, assignment)
    image, location = assignment.image_index, assignment.location
    labels = assignment.labels[image, location]  # [P]
    num_positives = max(assignment.num_positives, 1)

    truth = torch.zeros_like(output.logits)
    truth[image, location, labels] = 1
    focal = sigmoid_focal_loss(output.logits, truth, alpha=FOCAL_ALPHA, gamma=FOCAL_GAMMA)  # [N, L, K]
    cls = (focal * (assignment.labels != IGNORED)[..., None]).sum() / num_positives

    weight = assignment.centerness.to(output.logits.dtype)
    giou = generalized_box_iou_loss(_boxes_at(output, assignment), assignment.boxes.to(weight.dtype))  # [P]
    box = (giou * weight).sum() / weight.sum().clamp(min=1e-6)
    logits = output.centerness[image, location]
    centerness = F.binary_cross_entropy_with_logits(logits, weight, reduction="sum") / num_positives
    return {"total": cls + box + centerness, "cls": cls, "box": box, "centerness": centerness}


def distillation_loss(
    student: DetectorOutput, teacher: DetectorOutput, assignment: Assignment
) -> dict[str, Tensor]:
    """Pull a path towards the teacher's predictions; to be added to `detection_loss`, never to replace it.

    Classes: binary cross entropy to the teacher's probabilities p_t over all locations, weighted by |p_t -
        p_s|^2 (so that
    the many agreed background locations do not dominate) and divided by sum(p_t). Boxes: GIoU to the
    teacher's boxes at ground-truth-positive locations, weighted by the teacher's probability of the true
    class.

    Args:
        student: Predictions of a batch; they get the gradient.
        teacher: Predictions for the same images at the same resolution; detached here.
        assignment: Ground truth over the common grid.

    Returns:
        Scalars: "total" (the sum of the others), "cls", "box".

    Raises:
        InputError: student, teacher and assignment differ in shape.

    Source:
        The weighting follows the quality focal loss, arXiv:2006.04388, eq. 3, with the teacher as the
        quality.
    """
    if student.logits.shape != teacher.logits.shape:
        shapes = f"{tuple(student.logits.shape)} and {tuple(teacher.logits.shape)}"
        raise InputError(
            f"distillation_loss: expected logits of one shape for student and teacher, got {shapes}"
        )
    _check_assignment("distillation_loss", student, assignment)
    teacher = teacher.detach()
    probability = teacher.logits.sigmoid()  # [N, L, K]
    gap = (probability - student.logits.sigmoid()).square()
    entropy = F.binary_cross_entropy_with_logits(student.logits, probability, reduction="none")
    cls = (gap * entropy).sum() / probability.sum().clamp(min=1)

    image, location = assignment.image_index, assignment.location
    weight = probability[image, location, assignment.labels[image, location]]  # [P]
    giou = generalized_box_iou_loss(_boxes_at(student, assignment), _boxes_at(teacher, assignment))
    box = (giou * weight).sum() / weight.sum().clamp(min=1e-6)
    return {"total": cls + box, "cls": cls, "box": box}


def _boxes_at(output: DetectorOutput, assignment: Assignment) -> Tensor:
    """Predicted boxes at the positives, xyxy px, [P, 4]."""
    points = output.points[assignment.location]
    return ltrb_to_boxes(points, output.ltrb[assignment.image_index, assignment.location])


def _check_assignment(name: str, output: DetectorOutput, assignment: Assignment) -> None:
    if output.logits.shape[:2] != assignment.labels.shape:
        expected, got = tuple(output.logits.shape[:2]), tuple(assignment.labels.shape)
        raise InputError(f"{name}: expected [images, locations] = {expected} for targets, got {got}")
    highest = int(assignment.labels.max()) if assignment.labels.numel() else -1
    if highest >= output.num_classes:
        raise InputError(f"{name}: expected labels below {output.num_classes} for targets, got {highest}")
    if bool((assignment.labels[assignment.image_index, assignment.location] < 0).any()):
        raise InputError(f"{name}: expected labels >= 0 for targets, got a negative one")

# SPDX-License-Identifier: Apache-2.0
"""Losses: against formulas written out, gradients, and what must not matter."""

import math

import pytest
import torch

from pfnas_fast.data import Target
from pfnas_fast.detection import DetectorOutput, assign_targets, detection_loss, distillation_loss, make_grid
from pfnas_fast.errors import InputError

GRID = make_grid((48, 64), (8, 16, 32))
TARGETS = [
    Target(
        torch.tensor([[8.0, 8, 30, 26], [40, 20, 48, 30]]),
        torch.tensor([0, 2]),
        torch.tensor([[0.0, 30, 20, 48]]),
    ),
    Target.empty(),
]


def output(seed, dtype=torch.float64, num_classes=3, grid=GRID, num_images=2):
    generator = torch.Generator().manual_seed(seed)
    size = grid.num_locations

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return DetectorOutput(
        draw(num_images, size, num_classes).requires_grad_(),
        (draw(num_images, size, 4).abs() * 10 + 1).requires_grad_(),
        draw(num_images, size).requires_grad_(),
        grid,
    )


def gradient(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad


def giou(a, b):
    """Generalised IoU of two boxes, written out."""
    overlap = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return overlap / union - (hull - union) / hull


def test_detection_loss_equals_the_formulas():
    out = output(0).detach()
    assignment = assign_targets(GRID, TARGETS)
    losses = detection_loss(out, TARGETS)
    cls = 0.0
    for image in range(2):
        for location in range(GRID.num_locations):
            label = int(assignment.labels[image, location])
            for k in range(3):
                p = 1 / (1 + math.exp(-float(out.logits[image, location, k])))
                if label == k:
                    cls -= 0.25 * (1 - p) ** 2 * math.log(p)
                elif label != -2:
                    cls -= 0.75 * p**2 * math.log(1 - p)
    box, weights, centerness = 0.0, 0.0, 0.0
    boxes = out.boxes
    for i in range(assignment.num_positives):
        where = int(assignment.image_index[i]), int(assignment.location[i])
        weight = float(assignment.centerness[i])
        box += weight * (1 - giou(boxes[where].tolist(), assignment.boxes[i].tolist()))
        weights += weight
        p = 1 / (1 + math.exp(-float(out.centerness[where])))
        centerness -= weight * math.log(p) + (1 - weight) * math.log(1 - p)
    count = assignment.num_positives
    assert count > 5
    assert losses["cls"].item() == pytest.approx(cls / count, rel=1e-5)
    assert losses["box"].item() == pytest.approx(box / weights, rel=1e-5)
    assert losses["centerness"].item() == pytest.approx(centerness / count, rel=1e-5)
    assert losses["total"].item() == pytest.approx(
        sum(losses[k].item() for k in ("cls", "box", "centerness"))
    )


def test_distillation_loss_equals_the_formulas():
    student, teacher = output(0).detach(), output(1)
    assignment = assign_targets(GRID, TARGETS)
    losses = distillation_loss(student, teacher, assignment)
    ps, pt = student.logits.sigmoid(), teacher.logits.detach().sigmoid()
    entropy = -(pt * ps.log() + (1 - pt) * (1 - ps).log())
    assert losses["cls"].item() == pytest.approx(
        ((ps - pt) ** 2 * entropy).sum().item() / pt.sum().item(), rel=1e-6
    )
    total, weights = 0.0, 0.0
    for i in range(assignment.num_positives):
        image, location = int(assignment.image_index[i]), int(assignment.location[i])
        weight = pt[image, location, assignment.labels[image, location]].item()
        total += weight * (
            1 - giou(student.boxes[image, location].tolist(), teacher.boxes[image, location].tolist())
        )
        weights += weight
    assert losses["box"].item() == pytest.approx(total / weights, rel=1e-6)
    assert losses["total"].item() == pytest.approx(losses["cls"].item() + losses["box"].item())


def test_the_teacher_gets_no_gradient_and_an_equal_student_no_loss():
    student, teacher = output(0), output(1)
    assignment = assign_targets(GRID, TARGETS)
    distillation_loss(student, teacher, assignment)["total"].backward()
    assert teacher.logits.grad is None
    assert teacher.ltrb.grad is None
    assert float(gradient(student.logits).abs().max()) > 0
    assert float(gradient(student.ltrb).abs().max()) > 0
    same = distillation_loss(student, student, assignment)
    assert same["total"].item() == pytest.approx(0, abs=1e-6)


def test_gradients_match_finite_differences():
    grid = make_grid((16, 16), (8, 16))
    targets = [Target(torch.tensor([[2.0, 3, 13, 12]]), torch.tensor([1]), torch.zeros(0, 4))]
    assignment = assign_targets(grid, targets)
    base, teacher = output(3, grid=grid, num_images=1), output(4, grid=grid, num_images=1)

    def losses(logits, ltrb, centerness):
        out = DetectorOutput(logits, ltrb, centerness, grid)
        hard, soft = detection_loss(out, assignment), distillation_loss(out, teacher, assignment)
        return hard["total"] + soft["total"]

    assert torch.autograd.gradcheck(losses, (base.logits, base.ltrb, base.centerness))


def test_gradient_descent_on_the_outputs_finds_the_boxes():
    out = output(5, dtype=torch.float32)
    raw = out.ltrb.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([raw], lr=0.3)
    assignment = assign_targets(GRID, TARGETS)
    for _ in range(300):
        now = DetectorOutput(out.logits, torch.nn.functional.softplus(raw), out.centerness, GRID)
        optimizer.zero_grad()
        detection_loss(now, assignment)["box"].backward()
        optimizer.step()
    now = DetectorOutput(out.logits, torch.nn.functional.softplus(raw), out.centerness, GRID)
    found = now.boxes[assignment.image_index, assignment.location]
    assert (found - assignment.boxes).abs().max() < 0.5


def test_images_without_objects_give_a_finite_loss_and_gradient():
    out = output(6)
    losses = detection_loss(out, [Target.empty(), Target.empty()])
    losses["total"].backward()
    assert losses["box"].item() == 0
    assert losses["centerness"].item() == 0
    assert torch.isfinite(gradient(out.logits)).all()
    assert float(gradient(out.logits).abs().max()) > 0
    assert float(gradient(out.ltrb).abs().max()) == 0


def test_ignored_locations_do_not_count():
    whole = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.tensor([[-1.0, -1, 99, 99]]))
    out = output(7)
    assert detection_loss(out, [whole, whole])["cls"].item() == 0
    assert detection_loss(out, [whole, Target.empty()])["cls"].item() > 0


def test_the_loss_starts_near_its_known_value():
    """With the focal prior and no object, only the background term is left: 0.75 p^2 (-log(1 - p))."""
    size = GRID.num_locations
    logits = torch.full((1, size, 3), math.log(0.01 / 0.99))
    out = DetectorOutput(logits, torch.ones(1, size, 4), torch.zeros(1, size), GRID)
    expected = size * 3 * 0.75 * 0.01**2 * -math.log(0.99)
    assert detection_loss(out, [Target.empty()])["cls"].item() == pytest.approx(expected, rel=1e-4)


def test_nan_predictions_give_a_nan_loss():
    out = output(8)
    with torch.no_grad():
        out.logits[0, 0, 0] = torch.nan
    assert torch.isnan(detection_loss(out, TARGETS)["total"])


@pytest.mark.parametrize(
    ("label", "text"),
    [
        (3, r"^detection_loss: expected labels below 3 for targets, got 3$"),
        (-1, r"^detection_loss: expected labels >= 0 for targets, got a negative one$"),
    ],
)
def test_wrong_labels(label, text):
    bad = Target(torch.tensor([[8.0, 8, 30, 26]]), torch.tensor([label]), torch.zeros(0, 4))
    with pytest.raises(InputError, match=text):
        detection_loss(output(0), [bad, Target.empty()])


def test_wrong_number_of_targets_and_other_grids():
    with pytest.raises(
        InputError, match=r"^detection_loss: expected \[images, locations\] = \(2, 64\) for targets"
    ):
        detection_loss(output(0), TARGETS[:1])
    other = output(1, grid=make_grid((96, 128), (8, 16, 32)))
    with pytest.raises(
        InputError, match=r"^distillation_loss: expected logits of one shape for student and teacher"
    ):
        distillation_loss(output(0), other, assign_targets(GRID, TARGETS))

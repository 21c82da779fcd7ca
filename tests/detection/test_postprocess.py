# SPDX-License-Identifier: Apache-2.0
"""Post-processing: selection, suppression, clipping, limits."""

import math

import pytest
import torch
from torchvision.ops import box_iou

from pfnas_fast.detection import Detection, DetectorOutput, make_grid, postprocess
from pfnas_fast.errors import InputError

GRID = make_grid((48, 64), (8, 16))


def logit(p):
    return math.log(p / (1 - p))


def blank(num_images=1, num_classes=2):
    size = GRID.num_locations
    return DetectorOutput(
        torch.full((num_images, size, num_classes), -20.0),
        torch.full((num_images, size, 4), 4.0),
        torch.zeros(num_images, size),
        GRID,
    )


def put(out, image, location, label, box, score, centerness=0.5):
    x, y = GRID.points[location].tolist()
    out.ltrb[image, location] = torch.tensor([x - box[0], y - box[1], box[2] - x, box[3] - y])
    out.logits[image, location, label] = logit(score)
    out.centerness[image, location] = logit(centerness)


def test_scores_boxes_and_order():
    out = blank(num_images=2)
    put(out, 1, 0, 1, (1, 1, 9, 9), 0.4, 0.9)
    put(out, 1, 20, 0, (30, 10, 50, 30), 0.9, 0.9)
    empty, found = postprocess(out)
    assert len(empty) == 0
    assert empty.boxes.shape == (0, 4)
    assert found.labels.tolist() == [0, 1]
    assert found.scores.tolist() == pytest.approx([0.9, math.sqrt(0.4 * 0.9)], rel=1e-5)
    torch.testing.assert_close(found.boxes, torch.tensor([[30.0, 10, 50, 30], [1, 1, 9, 9]]))


def test_suppression_is_per_class():
    out = blank()
    put(out, 0, 0, 0, (0, 0, 20, 20), 0.9)
    put(out, 0, 1, 0, (0, 0, 20, 19), 0.8)  # IoU 0.95 with the first
    put(out, 0, 2, 1, (0, 0, 20, 19), 0.7)
    (found,) = postprocess(out)
    assert found.labels.tolist() == [0, 1]
    (all_of_them,) = postprocess(out, iou_threshold=0.96)
    assert all_of_them.labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize("max_detections", [1, 3, 10, 200])
@pytest.mark.parametrize("spread_px", [0.5, 4.0, 30.0])
def test_suppression_equals_one_pass_over_all_candidates(max_detections, spread_px):
    generator = torch.Generator().manual_seed(int(spread_px))
    out = blank(num_classes=5)
    out.logits.copy_(torch.randn(out.logits.shape, generator=generator))
    out.ltrb.copy_(spread_px * torch.rand(out.ltrb.shape, generator=generator) + 8)
    (found,) = postprocess(out, max_detections=max_detections)
    (every,) = postprocess(out, max_detections=10**6, iou_threshold=1.0)  # candidates, best first
    kept: list[int] = []
    for i in range(len(every)):
        rivals = [k for k in kept if every.labels[k] == every.labels[i]]
        overlap = box_iou(every.boxes[rivals].double(), every.boxes[i : i + 1].double())
        if not (overlap > 0.6).any():
            kept.append(i)
    kept = kept[:max_detections]
    assert len(kept) > 0
    assert torch.equal(found.boxes, every.boxes[kept])
    assert torch.equal(found.labels, every.labels[kept])


def test_boxes_are_clipped_to_the_canvas():
    out = blank()
    put(out, 0, 0, 0, (-30, -5, 100, 70), 0.9)
    (found,) = postprocess(out)
    assert found.boxes.tolist() == [[0, 0, 64, 48]]


def test_limits():
    out = blank()
    for location in range(12):
        x, y = GRID.points[location].tolist()
        put(out, 0, location, 0, (x - 3, y - 3, x + 3, y + 3), 0.9 - 0.05 * location)
    assert len(postprocess(out, score_threshold=0.5)[0]) == sum(
        math.sqrt((0.9 - 0.05 * i) * 0.5) >= 0.5 for i in range(12)
    )
    best = postprocess(out)[0]
    for limits in ({"max_detections": 4}, {"pre_nms_top_k": 4}):
        (found,) = postprocess(out, **limits)
        assert torch.equal(found.boxes, best.boxes[:4])


def test_batch_equals_single_images():
    generator = torch.Generator().manual_seed(0)
    size = GRID.num_locations
    out = DetectorOutput(
        torch.randn(3, size, 2, generator=generator),
        torch.rand(3, size, 4, generator=generator) * 12,
        torch.randn(3, size, generator=generator),
        GRID,
    )
    for i, found in enumerate(postprocess(out)):
        (single,) = postprocess(out.select(i))
        assert len(found) > 10
        # close, not equal: torch's vectorised exp rounds otherwise at the ends of a tensor
        torch.testing.assert_close(found.boxes, single.boxes)
        torch.testing.assert_close(found.scores, single.scores)
        assert (found.scores.diff() <= 0).all()


def test_a_diverged_net_finds_nothing():
    out = blank()
    out.logits[:] = torch.nan
    assert len(postprocess(out)[0]) == 0


@pytest.mark.parametrize(
    ("argument", "value", "text"),
    [
        (
            "score_threshold",
            1.5,
            r"^postprocess: expected a number in \[0, 1\] for score_threshold, got 1.5$",
        ),
        ("iou_threshold", -0.1, r"^postprocess: expected a number in \[0, 1\] for iou_threshold, got -0.1$"),
        ("max_detections", 0, r"^postprocess: expected at least 1 for max_detections, got 0$"),
        ("pre_nms_top_k", 0, r"^postprocess: expected at least 1 for pre_nms_top_k, got 0$"),
    ],
)
def test_wrong_arguments(argument, value, text):
    with pytest.raises(InputError, match=text):
        postprocess(blank(), **{argument: value})


def test_boxes_in_original_pixels():
    one = Detection(torch.tensor([[3.0, 6.0, 30.0, 60.0]]), torch.tensor([0.5]), torch.tensor([1]))
    mapped = one.to_original(0.3, (150, 80))
    torch.testing.assert_close(mapped.boxes, torch.tensor([[10.0, 20.0, 80.0, 150.0]]))
    assert mapped.labels.tolist() == [1]

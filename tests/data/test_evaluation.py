# SPDX-License-Identifier: Apache-2.0
"""The twelve COCO numbers against an oracle, the fast evaluator against pycocotools, VOC AP by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from data_helpers import Found, nothing, perturbed

from pfnas_fast.data import (
    METRIC_NAMES,
    DetectionDataset,
    Evaluator,
    Record,
    evaluate,
    load_detection,
    voc_ap50,
)
from pfnas_fast.data.coco import read_coco
from pfnas_fast.errors import InputError


def dataset_of(
    images: Sequence[Sequence[tuple[tuple[float, ...], int, bool]]], num_classes: int = 2
) -> DetectionDataset:
    """A dataset without pixels from (box, label, ignore) per image."""
    records = []
    for n, items in enumerate(images):
        boxes = np.array([box for box, _, _ in items], dtype=np.float64).reshape(-1, 4)
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        labels = np.array([label for _, label, _ in items], dtype=np.int64)
        ignore = np.array([flag for _, _, flag in items], dtype=bool)
        records.append(Record(str(n), str(n), 300, 300, boxes, labels, ignore, areas))
    names = tuple(f"class {i}" for i in range(num_classes))
    return DetectionDataset("made", names, tuple(records), lambda record: torch.zeros(3, 300, 300))


def found(*items: tuple[tuple[float, ...], float, int]) -> Found:
    """Detections from (box, score, label)."""
    if not items:
        return nothing()
    boxes, scores, labels = zip(*items, strict=True)
    return Found(np.array(boxes, dtype=float), np.array(scores), np.array(labels))


def oracle(folder) -> tuple[DetectionDataset, list[Found]]:
    dataset = read_coco(folder / "gt.json", folder, check_files=False)
    truth = json.loads((folder / "gt.json").read_text())
    labels = {c: i for i, c in enumerate(sorted(c["id"] for c in truth["categories"]))}
    by_image = {i["id"]: [] for i in sorted(truth["images"], key=lambda i: i["id"])}
    for item in json.loads((folder / "dt.json").read_text()):
        x, y, w, h = item["bbox"]
        by_image[item["image_id"]].append(((x, y, x + w, y + h), item["score"], labels[item["category_id"]]))
    return dataset, [found(*items) for items in by_image.values()]


def test_twelve_numbers_equal_the_oracle(shared_data):
    folder = shared_data / "coco_eval_oracle"
    dataset, detections = oracle(folder)
    expected = list(json.loads((folder / "expected.json").read_text()).values())
    for numbers in (evaluate(dataset, detections), Evaluator(dataset).evaluate(detections)):
        assert tuple(numbers) == METRIC_NAMES
        np.testing.assert_allclose(list(numbers.values()), expected, rtol=0, atol=1e-6)


def test_fast_evaluator_equals_pycocotools_on_real_truth(shared_data):
    label = load_detection(shared_data / "bccd").label
    detections = perturbed(label, np.random.default_rng(0), 120)  # more than the 100 that count
    matches = Evaluator(label).match(detections)
    expected = evaluate(label, detections)
    assert 0.05 < expected["ap"] < 0.6
    np.testing.assert_allclose(list(matches.metrics().values()), list(expected.values()), rtol=0, atol=1e-12)
    half = list(range(0, len(label), 2))
    expected = evaluate(label, [detections[i] for i in half], half)
    np.testing.assert_allclose(
        list(matches.metrics(images=half).values()), list(expected.values()), rtol=0, atol=1e-12
    )
    per_class = matches.class_ap()
    assert tuple(per_class) == label.class_names
    assert np.mean(list(per_class.values())) == pytest.approx(matches.metrics()["ap"], abs=1e-12)


@pytest.mark.parametrize("seed", range(60))
def test_fast_evaluator_equals_pycocotools_on_crowded_scenes(seed):
    """Corners on a coarse grid, few scores: equal IoUs, equal scores and thresholds hit exactly do occur."""
    rng = np.random.default_rng(seed)

    def box() -> tuple[float, ...]:
        x, y = rng.integers(0, 3, 2) * 20.0
        return x, y, x + 20.0 * rng.integers(1, 6), y + 20.0 * rng.integers(1, 6)

    def truth() -> tuple[tuple[float, ...], int, bool]:
        return box(), int(rng.integers(2)), bool(rng.random() < 0.3)

    def detection() -> tuple[tuple[float, ...], float, int]:
        return box(), float(rng.integers(1, 4)) / 4, int(rng.integers(2))

    dataset = dataset_of([[truth() for _ in range(rng.integers(0, 7))] for _ in range(3)])
    detections = [found(*[detection() for _ in range(rng.integers(0, 12))]) for _ in range(3)]
    expected = evaluate(dataset, detections)
    actual = Evaluator(dataset).evaluate(detections)
    np.testing.assert_allclose(list(actual.values()), list(expected.values()), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("truth", "detections", "ap50"),
    [
        # Equal IoU with both: the later one is taken, which leaves the second detection without a match.
        (
            [((0, 0, 100, 100), 0, False), ((40, 0, 140, 100), 0, False)],
            [((20, 0, 120, 100), 0.9, 0), ((40, 0, 140, 100), 0.8, 0)],
            51 / 101,
        ),
        # A proper box of smaller IoU comes before a crowd of larger.
        ([((0, 0, 100, 100), 0, False), ((0, 0, 150, 150), 0, True)], [((0, 0, 100, 130), 0.9, 0)], 1.0),
        # A crowd swallows any number of detections.
        (
            [((0, 0, 50, 50), 0, False), ((100, 100, 200, 200), 0, True)],
            [((100, 100, 150, 150), 0.9, 0), ((120, 120, 150, 150), 0.8, 0), ((0, 0, 50, 50), 0.7, 0)],
            1.0,
        ),
    ],
)
def test_the_rules_of_matching(truth, detections, ap50):
    dataset = dataset_of([truth])
    for judge in (evaluate, lambda d, f: Evaluator(d).evaluate(f)):
        assert judge(dataset, [found(*detections)])["ap50"] == pytest.approx(ap50)


def test_an_image_named_twice_counts_twice():
    truth = [[((0, 0, 50, 50), 0, False)], [((0, 0, 50, 50), 0, False)]]
    right, wrong = found(((0, 0, 50, 50), 0.9, 0)), found(((200, 200, 250, 250), 0.8, 0))
    matches = Evaluator(dataset_of(truth)).match([right, wrong])
    tripled = Evaluator(dataset_of([truth[0], *[truth[1]] * 3])).match([right, wrong, wrong, wrong])
    assert matches.metrics(images=[0, 1, 1, 1]) == tripled.metrics()
    assert matches.metrics(images=[0])["ap"] == pytest.approx(1.0)
    with pytest.raises(InputError, match=r"0\.\.1 for images"):
        matches.metrics(images=[2])


def test_no_detections_give_zero_and_no_truth_minus_one():
    dataset = dataset_of([[((0, 0, 50, 50), 0, False)], []])
    for numbers in (
        evaluate(dataset, [nothing(), nothing()]),
        Evaluator(dataset).evaluate([nothing(), nothing()]),
    ):
        assert numbers["ap"] == 0.0
        assert numbers["ar_100"] == 0.0
        assert numbers["ap_large"] == -1.0  # the only box is of medium size
    empty = dataset_of([[], []])
    hit = found(((0, 0, 9, 9), 0.5, 1))
    assert evaluate(empty, [hit, hit])["ap"] == -1.0
    assert Evaluator(empty).evaluate([hit, hit])["ap"] == -1.0


def test_evaluation_is_quiet(capfd):
    dataset = dataset_of([[((0, 0, 50, 50), 0, False)]])
    evaluate(dataset, [nothing()])
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_tensors_and_arrays_are_equal():
    dataset = dataset_of([[((0, 0, 50, 50), 0, False)]])
    one = found(((2, 0, 50, 49), 0.5, 0))
    tensors = Found(*(torch.from_numpy(v) for v in one))  # pyright: ignore[reportArgumentType]
    assert evaluate(dataset, [one]) == evaluate(dataset, [tensors])


@pytest.mark.parametrize(
    ("detections", "message"),
    [
        ([], "1 entries, one per image, for detections, got 0"),
        ([found(((0, 0, 1, 1), 0.5, 2))], r"labels in 0\.\.1 for detections\[0\], got 2\.\.2"),
        ([found(((0, 0, float("nan"), 1), 0.5, 0))], r"finite boxes and scores for detections\[0\]"),
        ([Found(np.zeros((2, 4)), np.zeros(1), np.zeros(2))], r"as many boxes as scores .* got 2, 1, 2"),
    ],
)
def test_bad_detections_are_refused(detections, message):
    dataset = dataset_of([[((0, 0, 50, 50), 0, False)]])
    for judge in (evaluate, voc_ap50, lambda d, f: Evaluator(d).match(f)):
        with pytest.raises(InputError, match=message):
            judge(dataset, detections)


def test_voc_ap_by_hand():
    """Four objects: right, wrong, right: recall 0.25, 0.25, 0.5 with precision 1, 1/2, 2/3."""
    boxes = [
        (0.0, 0.0, 50.0, 50.0),
        (100.0, 0.0, 150.0, 50.0),
        (0.0, 100.0, 50.0, 150.0),
        (200.0, 200.0, 250.0, 250.0),
    ]
    dataset = dataset_of([[(box, 0, False) for box in boxes]], num_classes=1)
    detections = [found((boxes[0], 0.9, 0), ((260, 0, 290, 30), 0.8, 0), (boxes[1], 0.7, 0))]
    assert voc_ap50(dataset, detections, form="voc12") == pytest.approx(0.25 * 1 + 0.25 * 2 / 3)
    # recalls 0, .1, .2 have precision 1; .3, .4, .5 have 2/3; the other five none
    assert voc_ap50(dataset, detections, form="voc07") == pytest.approx((3 * 1 + 3 * 2 / 3) / 11)


def test_voc_area_is_under_the_rising_envelope():
    """Wrong, right, right of two objects: precision 1/2 at recall 1/2, but 2/3 further right counts there."""
    boxes = [(0.0, 0.0, 50.0, 50.0), (100.0, 0.0, 150.0, 50.0)]
    dataset = dataset_of([[(box, 0, False) for box in boxes]])
    detections = [found(((200, 200, 250, 250), 0.9, 0), (boxes[0], 0.8, 0), (boxes[1], 0.7, 0))]
    assert voc_ap50(dataset, detections, form="voc12") == pytest.approx(2 / 3)
    assert voc_ap50(dataset, detections, form="voc07") == pytest.approx(2 / 3)


def test_voc_ap_of_doubles_difficult_and_misses():
    box, other = (0.0, 0.0, 50.0, 50.0), (100.0, 100.0, 150.0, 150.0)
    dataset = dataset_of([[(box, 0, False), (other, 0, True)]], num_classes=2)
    assert voc_ap50(dataset, [found((box, 0.9, 0), (other, 0.95, 0), (other, 0.94, 0))]) == pytest.approx(1.0)
    assert voc_ap50(dataset, [found((box, 0.9, 0), (box, 0.95, 0))]) == pytest.approx(
        1.0
    )  # the second is wrong, later
    late = found(((200, 200, 250, 250), 0.99, 0), (box, 0.5, 0))
    assert voc_ap50(dataset, [late]) == pytest.approx(0.5)
    assert voc_ap50(dataset, [nothing()]) == 0.0
    assert voc_ap50(dataset_of([[(other, 0, True)]]), [nothing()]) == -1.0  # nothing to find
    with pytest.raises(InputError, match="'voc07' or 'voc12' for form, got 'coco'"):
        voc_ap50(dataset, [nothing()], form="coco")


def test_voc_ap_of_a_subset_equals_the_subset():
    truth = [[((0.0, 0.0, 50.0, 50.0), 0, False)], [((0.0, 0.0, 50.0, 50.0), 1, False)]]
    dataset = dataset_of(truth)
    hit = found(((0, 0, 50, 50), 0.5, 1))
    assert voc_ap50(dataset, [nothing(), hit]) == pytest.approx(0.5)
    assert voc_ap50(dataset, [hit], [1]) == pytest.approx(1.0)
    with pytest.raises(InputError, match=r"0\.\.1 for indices"):
        voc_ap50(dataset, [hit], [5])

# SPDX-License-Identifier: Apache-2.0
"""Subnets as plain detectors: same output, files, prediction on raw images; transfer of backbone weights."""

import io
import pathlib

import numpy as np
import pytest
import torch
from torch import nn

from pfnas_fast.data import letterbox, normalize
from pfnas_fast.detection import DenseScores, DetectionSupernet, Detector, postprocess
from pfnas_fast.errors import InputError
from pfnas_fast.space import load_space, uniform_population
from pfnas_fast.supernet import BNStatistics, ClassificationSupernet, recalibrate, use_statistics

SPACE = load_space("tiny")
NAMES = ("RBC", "WBC", "Platelets")


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = DetectionSupernet(SPACE, num_classes=3)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "matrix" in name or "bn" in name:  # leave the start values, at which mistakes could hide
                parameter += 0.1 * torch.randn_like(parameter)
        net.head.predictor.weight.mul_(30)
        net.head.scale.weight.copy_(torch.tensor([0.8, 1.0, 1.3]))
    return net.eval()


def statistics_of(net, path):
    images = torch.randn(4, 3, *SPACE.canvas(path.resolution), generator=torch.Generator().manual_seed(1))
    return recalibrate(net, path, [images])


@pytest.fixture(scope="module")
def detector(net):
    path = SPACE.path(ks=5, e=3, d=2, resolution=160)
    return net.extract(path, statistics_of(net, path), class_names=NAMES)


def assert_same_output(a, b):
    for name in ("logits", "ltrb", "centerness"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("index", range(4))
def test_extracted_detector_predicts_the_same(net, index):
    path = SPACE.decode(uniform_population(SPACE, np.random.default_rng(5), 4))[index]
    statistics = statistics_of(net, path)
    images = torch.randn(2, 3, *SPACE.canvas(path.resolution))
    with torch.no_grad(), use_statistics(net, statistics):
        expected = net(images, path)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    detector = net.extract(path, statistics, class_names=NAMES)
    with torch.no_grad():
        assert_same_output(detector.dense(images), expected)
    kinds = {type(m) for m in detector.modules()}
    assert not any("Dynamic" in kind.__name__ for kind in kinds)
    assert nn.BatchNorm2d in kinds
    assert sum(p.numel() for p in detector.parameters()) == round(float(net.cost.params_m([path])[0]) * 1e6)
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_statistics_matter_and_must_belong_to_the_path(net):
    path = SPACE.min_path()
    statistics = statistics_of(net, path)
    images = torch.randn(1, 3, *SPACE.canvas(128))
    with torch.no_grad():
        with_own, with_shared = (net.extract(path, s).dense(images) for s in (statistics, None))
    assert (with_own.logits - with_shared.logits).abs().max() > 1e-3
    with pytest.raises(InputError, match="expected statistics of"):
        net.extract(SPACE.max_path(), statistics)


def test_active_subnet(net):
    path = net.set_active_subnet(ks=3, e=2, d=1, resolution=128)
    images = torch.randn(1, 3, *SPACE.canvas(128))
    subnet = net.get_active_subnet()
    assert subnet.path == path
    with torch.no_grad():
        assert_same_output(subnet.dense(images), net(images))
    fresh = net.get_active_subnet(preserve_weight=False)
    assert not torch.equal(fresh.head.predictor.weight, subnet.head.predictor.weight)
    net.set_max_net()


def test_save_and_load(detector, tmp_path: pathlib.Path):
    file = tmp_path / "new" / "12m.pt"
    detector.save(file)
    assert [p.name for p in file.parent.iterdir()] == ["12m.pt"]
    content = torch.load(file, weights_only=True)
    assert content["class_names"] == list(NAMES)
    loaded = Detector.load(file)
    assert not loaded.training
    assert (loaded.path, loaded.class_names, loaded.canvas) == (detector.path, NAMES, (120, 160))
    images = torch.randn(1, 3, 120, 160)
    with torch.no_grad():
        assert torch.equal(loaded.dense(images).logits, detector.dense(images).logits)


def test_a_failed_save_leaves_the_old_file(detector, tmp_path, monkeypatch):
    file = tmp_path / "a.pt"
    detector.save(file)
    before = file.read_bytes()

    def fail(*_args):
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        detector.save(file)
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize("content", ["absent", "damaged", "code", "other"])
def test_load_refuses(content, tmp_path, capsys):
    file = tmp_path / "x.pt"
    if content == "damaged":
        file.write_bytes(b"PK\x03\x04 not really")
    elif content == "code":
        torch.save({"format": Evil()}, file)
    elif content == "other":
        torch.save({"model": {}}, file)
    with pytest.raises(InputError, match=r"^Detector.load: expected"):
        Detector.load(file)
    assert capsys.readouterr().out == ""


def test_predict_returns_boxes_in_original_pixels(detector):
    image = torch.randint(
        0, 256, (3, 480, 640), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)
    )
    found = detector.predict(image, score_threshold=0.0, max_detections=30)
    canvas, scale = letterbox(image, detector.canvas)
    assert scale == 0.25
    with torch.no_grad():
        (expected,) = postprocess(
            detector.dense(normalize(canvas[None])), score_threshold=0.0, max_detections=30
        )
    assert len(found) == 30
    assert len(expected) == 30
    torch.testing.assert_close(found.boxes, expected.boxes * 4, rtol=0, atol=1e-5 * 640)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-5)
    assert torch.equal(found.labels, expected.labels)
    assert found.boxes.max() > 300


def test_predict_on_other_aspects_stays_inside_the_image(detector):
    image = torch.randint(0, 256, (3, 300, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    found = detector.predict(image, score_threshold=0.0)
    assert len(found) > 0
    assert (found.boxes >= 0).all()
    assert (found.boxes[:, 2] <= 90).all()
    assert (found.boxes[:, 3] <= 300).all()


def test_predict_refuses(detector):
    with pytest.raises(TypeError, match=r"^predict: expected a uint8 tensor for image, got torch.float32$"):
        detector.predict(torch.rand(3, 10, 10))
    with pytest.raises(InputError, match=r"expected the shape \[3, H, W\] for image, got \[10, 10, 3\]$"):
        detector.predict(torch.zeros(10, 10, 3, dtype=torch.uint8))
    detector.train()
    try:
        with pytest.raises(InputError, match="eval mode"):
            detector.predict(torch.zeros(3, 10, 10, dtype=torch.uint8))
    finally:
        detector.eval()


def test_forward_returns_one_detection_per_image(detector):
    with torch.no_grad():
        found = detector(torch.randn(3, 3, 120, 160))
    assert len(found) == 3


def test_class_names_are_checked(net):
    with pytest.raises(InputError, match=r"^Detector: expected 3 names for class_names, got 1$"):
        net.extract(SPACE.min_path(), None, class_names=["cell"])
    assert net.extract(SPACE.min_path(), None).class_names == ("0", "1", "2")


def test_dense_scores_can_be_exported(detector):
    images = torch.randn(1, 3, 120, 160)
    module = DenseScores(detector).eval()
    program = torch.export.export(module, (images,))
    with torch.no_grad():
        expected, got = module(images), program.module()(images)
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1])
    assert expected[1].shape == (1, expected[0].shape[1], 4)


@pytest.mark.parametrize("form", ["net", "state", "backbone", "file", "checkpoint"])
def test_backbone_transfer(form, tmp_path):
    torch.manual_seed(1)
    classifier = ClassificationSupernet(SPACE, num_classes=10)
    net = DetectionSupernet(SPACE, num_classes=3)
    neck = net.neck.state_dict()["lateral_convs.0.weight"].clone()
    source = {
        "net": classifier,
        "state": classifier.state_dict(),
        "backbone": classifier.backbone.state_dict(),
        "file": tmp_path / "a.pt",
        "checkpoint": str(tmp_path / "b.pt"),
    }[form]
    torch.save(classifier.state_dict(), tmp_path / "a.pt")
    torch.save({"step": 3, "model": classifier.state_dict()}, tmp_path / "b.pt")
    net.load_backbone(source)
    for name, value in classifier.backbone.state_dict().items():
        assert torch.equal(net.backbone.state_dict()[name], value), name
    assert torch.equal(net.neck.state_dict()["lateral_convs.0.weight"], neck)


def test_backbone_transfer_refuses(tmp_path):
    net = DetectionSupernet(SPACE, num_classes=3)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = ClassificationSupernet(SPACE, num_classes=10).state_dict()
    del state["backbone.stem.conv.weight"]
    with pytest.raises(InputError, match=r"differs in 1 entries, the first being 'stem.conv.weight'$"):
        net.load_backbone(state)
    with pytest.raises(InputError, match=r"^load_backbone: expected an existing file, got "):
        net.load_backbone(tmp_path / "absent.pt")
    with pytest.raises(InputError, match=r"^load_backbone: expected weights of a backbone of space 'tiny'"):
        net.load_backbone({})
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_statistics_survive_a_file(net, detector):
    statistics = statistics_of(net, detector.path)
    buffer = io.BytesIO()
    torch.save(statistics.to_dict(), buffer)
    buffer.seek(0)
    again = BNStatistics.from_dict(torch.load(buffer, weights_only=True))
    images = torch.randn(1, 3, 120, 160)
    with torch.no_grad():
        assert_same_output(net.extract(detector.path, again).dense(images), detector.dense(images))

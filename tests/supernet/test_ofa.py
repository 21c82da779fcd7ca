# SPDX-License-Identifier: Apache-2.0
"""Our supernet computes what Once-for-All's own code computes from the same weights."""

import copy
import random
from typing import Any

import pytest
import torch

from pfnas_fast.errors import InputError
from pfnas_fast.space import load_space
from pfnas_fast.supernet import (
    Backbone,
    ClassificationSupernet,
    load_ofa_weights,
    recalibrate,
    use_statistics,
)

NUM_CLASSES = 10


@pytest.fixture(scope="module")
def ofa_net():
    """An OFAMobileNetV3 with matrices off identity, statistics set, and logits that differ by about 1."""
    pytest.importorskip("ofa", reason="needs the PyPI package ofa (pip install --no-deps ofa)")
    from ofa.imagenet_classification.elastic_nn.networks import OFAMobileNetV3
    from ofa.imagenet_classification.elastic_nn.utils import set_running_statistics

    torch.manual_seed(0)
    random.seed(0)
    choices: dict[str, Any] = {"ks_list": [3, 5, 7], "expand_ratio_list": [3, 4, 6], "depth_list": [2, 3, 4]}
    net = OFAMobileNetV3(n_classes=NUM_CLASSES, **choices)
    images = torch.randn(8, 3, 64, 64)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("matrix"):
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif ".bn." in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
        net.eval()
        set_running_statistics(net, [(images, None)])
        logits = net(images)
        net.classifier.linear.weight.div_((logits - logits.mean(0)).std())
    return net


@pytest.fixture
def net(ofa_net) -> ClassificationSupernet:
    ours = ClassificationSupernet(load_space("ofa_mbv3_w1.0"), num_classes=NUM_CLASSES).eval()
    load_ofa_weights(ours, ofa_net.state_dict())
    return ours


def test_fifty_random_paths_agree(ofa_net, net) -> None:
    random.seed(1)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    worst, spread = 0.0, 0.0
    with torch.no_grad():
        for _ in range(50):
            net.set_active_subnet(**ofa_net.sample_active_subnet())
            theirs, ours = ofa_net(images), net(images)
            worst = max(worst, float((theirs - ours).abs().max()))
            spread = max(spread, float((theirs[0] - theirs[1]).abs().max()))
    assert spread > 0.1, "the outputs must depend on the images, or agreement means nothing"
    assert worst <= 1e-5


def test_paths_agree_to_rounding_in_float64(ofa_net, net) -> None:
    random.seed(4)
    theirs, ours = copy.deepcopy(ofa_net).double(), net.double()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        for _ in range(5):
            ours.set_active_subnet(**theirs.sample_active_subnet())
            torch.testing.assert_close(ours(images), theirs(images), rtol=1e-12, atol=1e-12)


def test_recalibration_agrees_on_one_batch(ofa_net, net) -> None:
    """On one batch pooling and averaging are the same, so each path's statistics must be too."""
    from ofa.imagenet_classification.elastic_nn.utils import set_running_statistics

    random.seed(2)
    images = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    theirs = copy.deepcopy(ofa_net)
    with torch.no_grad():
        for _ in range(4):
            path = net.set_active_subnet(**theirs.sample_active_subnet())
            set_running_statistics(theirs, [(images, None)])
            with use_statistics(net, recalibrate(net, path, [images])):
                ours = net(images[:3])
            expected = theirs(images[:3])
            assert float(expected.std(0).max()) > 0.1
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_checkpoint_file_in_the_old_spelling(ofa_net, net, tmp_path) -> None:
    old = {}
    for name, value in ofa_net.state_dict().items():
        name = name.replace(".conv.inverted_bottleneck.", ".mobile_inverted_conv.inverted_bottleneck.")
        old["module." + name] = value
    file = tmp_path / "ofa.pth"
    torch.save({"epoch": 3, "state_dict": old}, file)
    loaded = ClassificationSupernet(load_space("ofa_mbv3_w1.0"), num_classes=NUM_CLASSES)
    load_ofa_weights(loaded, file)
    for name, value in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_static_net_leaves_the_matrices_alone(ofa_net) -> None:
    """The subnet of the largest path has the static net's names: no matrices, no doubled module names."""
    ofa_net.set_max_net()
    static = ofa_net.get_active_subnet().eval()
    ours = ClassificationSupernet(load_space("ofa_mbv3_w1.0"), num_classes=NUM_CLASSES).eval()
    load_ofa_weights(ours, static.state_dict())
    assert torch.equal(getattr(ours.backbone.blocks[3].depth_conv, "5to3_matrix"), torch.eye(9))
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = static.double()(images)
        torch.testing.assert_close(ours.double()(images), expected, rtol=1e-12, atol=1e-12)


def test_backbone_alone_ignores_the_tail(ofa_net, net) -> None:
    backbone = Backbone(load_space("ofa_mbv3_w1.0"))
    load_ofa_weights(backbone, ofa_net.state_dict())
    for name, value in net.backbone.state_dict().items():
        assert torch.equal(backbone.state_dict()[name], value), name


def test_misfits_are_refused_and_nothing_is_copied(ofa_net, tmp_path) -> None:
    state = ofa_net.state_dict()
    wrong_classes = ClassificationSupernet(load_space("ofa_mbv3_w1.0"), num_classes=7)
    before = wrong_classes.backbone.stem.conv.weight.clone()
    with pytest.raises(
        InputError, match=r"expected shape \(7, 1280\) for classifier.linear.weight, got \(10, 1280\)"
    ):
        load_ofa_weights(wrong_classes, state)
    assert torch.equal(wrong_classes.backbone.stem.conv.weight, before)
    with pytest.raises(InputError, match=r"expected shape \(8, 3, 3, 3\) for first_conv.conv.weight"):
        load_ofa_weights(Backbone(load_space("tiny")), state)
    missing = {name: value for name, value in state.items() if "blocks.20" not in name}
    with pytest.raises(
        InputError, match=r"expected blocks\.20\.conv.inverted_bottleneck.conv.weight in source"
    ):
        load_ofa_weights(Backbone(load_space("ofa_mbv3_w1.0")), missing)
    extra = {**state, "blocks.21.conv.depth_conv.conv.weight": torch.zeros(1)}
    with pytest.raises(
        InputError, match=r"got blocks\.21.conv.depth_conv.conv.weight, which it does not have"
    ):
        load_ofa_weights(Backbone(load_space("ofa_mbv3_w1.0")), extra)


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint"])
def test_unreadable_files_are_refused(tmp_path, content) -> None:
    file = tmp_path / "broken.pth"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=r"expected a checkpoint for source, got .*broken\.pth"):
        load_ofa_weights(Backbone(load_space("tiny")), file)


def test_other_sources_and_models_are_refused() -> None:
    with pytest.raises(InputError, match="expected a dict of tensors for source, got dict"):
        load_ofa_weights(Backbone(load_space("tiny")), {"state_dict": {"a": 1}})
    with pytest.raises(
        TypeError, match="expected a ClassificationSupernet or a Backbone for model, got Linear"
    ):
        load_ofa_weights(torch.nn.Linear(1, 1), {})

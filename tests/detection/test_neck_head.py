# SPDX-License-Identifier: Apache-2.0
"""Neck and head: structure, start values, costs, level-wise normalisation."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pfnas_fast.detection import DetectionSupernet, Head, Neck, postprocess
from pfnas_fast.detection.neck_head import BOX_PRIOR, CLASS_PRIOR
from pfnas_fast.errors import InputError
from pfnas_fast.space import CostModel, load_space
from pfnas_fast.supernet import DynamicBatchNorm2d

SPACE = load_space("tiny")


def count_macs(module, *inputs):
    """MACs of all convolutions and linear layers that run, by hooks."""
    total = 0

    def hook(layer, args, result):
        nonlocal total
        if isinstance(layer, nn.Linear):
            total += result.numel() * layer.in_features
        else:
            total += result.numel() * layer.weight[0].numel()

    kinds = (nn.Linear, nn.Conv2d)
    handles = [m.register_forward_hook(hook) for m in module.modules() if isinstance(m, kinds)]
    with torch.no_grad():
        result = module(*inputs)
    for handle in handles:
        handle.remove()
    return total, result


@pytest.mark.parametrize("resolution", [128, 160])
def test_neck_and_head_cost_what_the_cost_model_says(resolution):
    neck = Neck(SPACE.tap_channels, SPACE.head.channels, plain=True).eval()
    head = Head(
        SPACE.head.channels, SPACE.head.num_convs, num_classes=3, strides=SPACE.tap_strides, plain=True
    ).eval()
    features = [
        torch.randn(1, c, *size)
        for c, size in zip(SPACE.tap_channels, SPACE.tap_sizes(resolution), strict=True)
    ]
    neck_macs, pyramid = count_macs(neck, features)
    head_macs, _ = count_macs(head, pyramid, SPACE.canvas(resolution))
    index = SPACE.resolutions.index(resolution)
    whole = CostModel(SPACE, num_classes=3)
    backbone = CostModel(SPACE, task="backbone")
    assert neck_macs + head_macs == whole.macs_constant[index] - backbone.macs_constant[index]
    num_params = sum(p.numel() for p in [*neck.parameters(), *head.parameters()])
    assert num_params == whole.params_constant[index] - backbone.params_constant[index]


def test_neck_adds_the_upsampled_level_above():
    neck = Neck((4, 6), 8, plain=True).eval()
    fine, coarse = torch.randn(2, 4, 5, 7), torch.randn(2, 6, 3, 4)
    with torch.no_grad():
        low, high = neck([fine, coarse])
        top = F.hardswish(neck.lateral_bns[1](neck.lateral_convs[1](coarse)))
        bottom = neck.lateral_bns[0](neck.lateral_convs[0](fine)) + F.interpolate(top, size=(5, 7))
    torch.testing.assert_close(high, top)
    torch.testing.assert_close(low, F.hardswish(bottom))


def test_every_level_has_its_own_normalisation():
    net = DetectionSupernet(SPACE, num_classes=3)
    names = [
        n
        for n, m in net.named_modules()
        if isinstance(m, DynamicBatchNorm2d) and not n.startswith("backbone")
    ]
    levels, convs = len(SPACE.taps), SPACE.head.num_convs
    assert len(names) == levels * (1 + convs)
    for module in net.modules():
        if isinstance(module, DynamicBatchNorm2d):
            module.momentum = 1.0
    net.train()
    net(torch.randn(4, 3, *SPACE.canvas(128)), SPACE.min_path())
    means = [net.state_dict()[f"head.convs.0.bns.{level}.running_mean"] for level in range(levels)]
    assert not torch.allclose(means[0], means[1])
    assert not torch.allclose(means[1], means[2])


def test_start_values():
    torch.manual_seed(0)
    net = DetectionSupernet(SPACE, num_classes=3).train()
    with torch.no_grad():
        out = net(torch.randn(2, 3, *SPACE.canvas(160)), SPACE.max_path(160))
    assert out.logits.shape == (2, out.grid.num_locations, 3)
    assert out.strides == (8, 16, 32)
    assert out.grid.sizes == SPACE.tap_sizes(160)
    assert out.logits.sigmoid().mean().item() == pytest.approx(CLASS_PRIOR, rel=0.2)
    sides = out.ltrb / out.grid.stride_px[:, None]
    assert sides.mean().item() == pytest.approx(BOX_PRIOR, rel=0.1)
    assert (out.ltrb > 0).all()


def test_every_parameter_of_neck_and_head_gets_a_gradient():
    net = DetectionSupernet(SPACE, num_classes=3).train()
    out = net(torch.randn(2, 3, *SPACE.canvas(128)), SPACE.min_path())
    (out.logits.square().sum() + out.ltrb.square().sum() + out.centerness.square().sum()).backward()
    for name, parameter in net.named_parameters():
        if name.startswith(("neck", "head")):
            assert parameter.grad is not None, name
            assert float(parameter.grad.abs().max()) > 0, name


def test_fast_backend_equals_the_reference():
    torch.manual_seed(0)
    reference = DetectionSupernet(SPACE, num_classes=3)
    fast = DetectionSupernet(SPACE, num_classes=3, backend="fast")
    fast.load_state_dict(reference.state_dict())
    images = torch.randn(2, 3, *SPACE.canvas(160))
    path = SPACE.path(ks=5, e=3, d=2, resolution=160)
    outs = [net.train()(images, path) for net in (reference, fast)]
    for name in ("logits", "ltrb", "centerness"):
        torch.testing.assert_close(getattr(outs[1], name), getattr(outs[0], name), atol=1e-4, rtol=1e-4)
    for out in outs:
        (out.logits.square().mean() + out.ltrb.mean()).backward()
    for (name, a), (_, b) in zip(reference.named_parameters(), fast.named_parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, atol=1e-4, rtol=1e-2, msg=name)


def test_an_empty_batch():
    net = DetectionSupernet(SPACE, num_classes=3).eval()
    with torch.no_grad():
        out = net(torch.zeros(0, 3, *SPACE.canvas(128)), SPACE.min_path())
    assert out.logits.shape[0] == 0
    assert postprocess(out) == []


def test_wrong_arguments():
    with pytest.raises(
        InputError, match=r"^DetectionSupernet: expected at least 1 class for num_classes, got 0$"
    ):
        DetectionSupernet(SPACE, num_classes=0)
    with pytest.raises(InputError, match="for backend, got 'quick'"):
        DetectionSupernet(SPACE, num_classes=3, backend="quick")

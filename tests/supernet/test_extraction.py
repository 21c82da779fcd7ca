# SPDX-License-Identifier: Apache-2.0
"""Subnets as plain modules compute what the supernet computes on their path."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from pfnas_fast.errors import InputError
from pfnas_fast.space import Space, load_space, uniform_population
from pfnas_fast.supernet import (
    Backbone,
    BNStatistics,
    ClassificationSubnet,
    ClassificationSupernet,
    PlainBackbone,
    copy_active_weights,
    recalibrate,
    use_statistics,
)


@pytest.fixture(scope="module", params=["reference", "fast"])
def net(request) -> ClassificationSupernet:
    torch.manual_seed(0)
    net = ClassificationSupernet(load_space("tiny"), num_classes=4, backend=request.param)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("matrix") or ".bn" in name or "_bn" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
        nn.init.normal_(net.tail.classifier.weight, std=0.3)
    return net


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_subnets_with_statistics_compute_the_same(net, images) -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        path = net.sample_active_subnet(rng)
        statistics = recalibrate(net, path, [images])
        subnet = net.get_active_subnet(statistics=statistics).eval()
        with torch.no_grad(), use_statistics(net, statistics):
            ours, theirs = net(images), subnet(images)
            exact = copy.deepcopy(subnet).double()(images.double())
            scale = exact.abs().max()
            assert float(exact.std()) > 0.1
            subnet_error = float((theirs.double() - exact).abs().max() / scale)
            assert subnet_error <= 1e-5
            assert float((ours.double() - exact).abs().max() / scale) <= max(1e-5, 4 * subnet_error)


def test_subnets_without_statistics_take_the_running_buffers(net, images) -> None:
    net.set_max_net()
    for mode in (True, False):
        subnet = net.train(mode).get_active_subnet()
        assert subnet.training is mode
    with torch.no_grad():
        torch.testing.assert_close(subnet(images), net(images), rtol=1e-5, atol=1e-5)


def test_a_subnet_is_plain_and_shares_no_memory(net, images) -> None:
    path = net.set_active_subnet(ks=3, e=2, d=[2, 1, 2, 1])
    subnet = net.get_active_subnet()
    kinds = {
        type(module).__module__.split(".")[0] for module in subnet.modules() if not list(module.children())
    }
    assert kinds == {"torch"}
    assert not any("Dynamic" in type(module).__name__ for module in subnet.modules())
    own = {tensor.data_ptr() for tensor in subnet.state_dict().values()}
    assert own.isdisjoint({tensor.data_ptr() for tensor in net.state_dict().values()})
    depthwise = [m for m in subnet.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert len(depthwise) == 1 + sum(path.depths)
    assert all(parameter.requires_grad for parameter in subnet.parameters())


def test_a_subnet_is_rebuilt_from_space_path_and_state(net, images) -> None:
    path = net.set_active_subnet(ks=[5, 3, 3, 3, 5, 3, 7, 3, 3, 5, 3, 3], e=3, d=2)
    subnet = net.get_active_subnet().eval()
    space = Space.from_dict(net.space.to_dict())
    again = ClassificationSubnet(space, space.path_from_json(path.to_json()), num_classes=4).eval()
    again.load_state_dict(subnet.state_dict())
    assert torch.equal(again(images), subnet(images))


def test_fresh_weights_on_request(net) -> None:
    fresh, kept = net.get_active_subnet(preserve_weight=False), net.get_active_subnet()
    assert {n: v.shape for n, v in fresh.state_dict().items()} == {
        n: v.shape for n, v in kept.state_dict().items()
    }
    assert not torch.equal(fresh.backbone.stem.conv.weight, kept.backbone.stem.conv.weight)


def test_wrong_statistics_are_refused(net, images) -> None:
    net.set_active_subnet(ks=3, e=2, d=1)
    statistics = recalibrate(net, None, [images])
    net.set_active_subnet(ks=3, e=3, d=1)
    with pytest.raises(
        InputError, match=r"expected statistics of 24 channels for backbone\.blocks\.0\.expand_bn"
    ):
        net.get_active_subnet(statistics=statistics)
    with pytest.raises(InputError, match=r"channels for backbone\.stem\.bn"):
        net.get_active_subnet(statistics=BNStatistics({}))


def test_tapped_backbones() -> None:
    space = load_space("tiny")
    torch.manual_seed(2)
    backbone = Backbone(space).eval()
    x = torch.randn(2, 3, 48, 64)
    for path in space.decode(uniform_population(space, np.random.default_rng(5), 5)):
        plain = PlainBackbone(space, path).eval()
        copy_active_weights(backbone, plain)
        with torch.no_grad():
            for ours, theirs in zip(plain(x), backbone(x, path), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

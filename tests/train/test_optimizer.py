# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
import torch
from torch import nn

from pfnas_fast.errors import InputError
from pfnas_fast.train.optimizer import WeightAverage, learning_rate_at, make_optimizer


def test_learning_rate_rises_then_falls() -> None:
    rates = [learning_rate_at(step, 100, 1.0) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:50] == [1.0] * 45
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))
    assert 0.02 <= rates[-1] < 0.03


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_parameter_without_gradient_does_not_move(kind: str) -> None:
    net = nn.ModuleList([nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)])
    before = [p.clone() for p in net.parameters()]
    optimizer = make_optimizer(net, kind=kind, learning_rate=0.1, weight_decay=0.5)
    net[0](torch.ones(1, 2, 3, 3)).sum().backward()
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True)]
    assert moved == [True, True, False, False]
    net[1](torch.ones(1, 2, 3, 3)).sum().backward()  # its first gradient, when others have had theirs
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(InputError, match="expected one of sgd, adamw for optimizer, got 'lion'"):
        make_optimizer(nn.Linear(1, 1), kind="lion", learning_rate=0.1, weight_decay=0.0)


def test_biases_norms_and_kernel_matrices_do_not_decay() -> None:
    net = nn.Module()
    net.register_parameter("weight", nn.Parameter(torch.ones(2, 2)))
    net.register_parameter("5to3_matrix", nn.Parameter(torch.eye(9)))
    net.register_parameter("bias", nn.Parameter(torch.ones(2)))
    groups = make_optimizer(net, learning_rate=0.1, weight_decay=0.5).param_groups
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(1, 0.5), (2, 0.0)]


def test_weight_average() -> None:
    net = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        net.weight.fill_(0.0)
    average = WeightAverage(net, decay=0.5)
    with torch.no_grad():
        net.weight.fill_(1.0)
    average.update(net, step=1000)
    assert average.state_dict()["weight"].item() == pytest.approx(0.5)
    copy = WeightAverage(net, decay=0.5)
    copy.load_state_dict(average.state_dict())
    copy.copy_to(net)
    assert net.weight.item() == pytest.approx(0.5)

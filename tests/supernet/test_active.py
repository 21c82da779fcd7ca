# SPDX-License-Identifier: Apache-2.0
"""The names of Once-for-All: choosing, sampling and running the active path."""

import numpy as np
import pytest
import torch

from pfnas_fast.errors import InputError
from pfnas_fast.space import load_space
from pfnas_fast.supernet import ClassificationSupernet


@pytest.fixture
def net() -> ClassificationSupernet:
    torch.manual_seed(0)
    return ClassificationSupernet(load_space("ofa_mbv3_w1.0"), num_classes=3).eval()


def test_starts_as_the_largest_and_returns_to_it(net) -> None:
    assert net.active_path == net.space.max_path()
    net.set_active_subnet(ks=3, e=3, d=2, resolution=128)
    assert net.active_path != net.space.max_path()
    assert net.set_max_net() == net.active_path == net.space.max_path()


def test_ints_broadcast_and_lists_go_by_block(net) -> None:
    path = net.set_active_subnet(ks=[3, 5] * 10, e=4, d=[2, 3, 4, 2, 3])
    assert path is net.active_path
    assert path.kernel_sizes[:4] == (3, 5, 0, 0)
    assert path.depths == (2, 3, 4, 2, 3)
    assert set(path.expand_ratios) == {0, 4}


def test_none_keeps_what_is_active_and_revived_blocks_take_their_largest(net) -> None:
    net.set_active_subnet(ks=3, e=3, d=2, resolution=160)
    path = net.set_active_subnet(d=3)
    assert path.kernel_sizes[:4] == (3, 3, 7, 0)
    assert path.expand_ratios[:4] == (3, 3, 6, 0)
    assert path.resolution == 160
    assert net.set_active_subnet(e=4).kernel_sizes == path.kernel_sizes


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"ks": 4}, "ks at block 0"),
        ({"e": [6] * 19 + [5]}, "e at block 19"),
        ({"d": [2, 2, 5, 2, 2]}, "d at stage 2"),
        ({"ks": [3, 3]}, "expected 20 values for ks"),
        ({"resolution": 100}, "for resolution, got 100"),
    ],
)
def test_bad_choices_name_the_block_and_change_nothing(net, choice, message: str) -> None:
    before = net.active_path
    with pytest.raises(InputError, match=message):
        net.set_active_subnet(**choice)
    assert net.active_path == before


def test_assigning_a_path_validates_it(net) -> None:
    path = net.space.path(ks=5, e=4, d=3)
    net.active_path = path
    assert net.active_path == path
    with pytest.raises(InputError):
        net.active_path = load_space("tiny").max_path()
    assert net.active_path == path


def test_sampling_is_governed_by_its_generator_or_by_torchs_seed(net) -> None:
    drawn = [net.sample_active_subnet(np.random.default_rng(7)) for _ in range(2)]
    assert drawn[0] == drawn[1] == net.active_path
    torch.manual_seed(3)
    first = [net.sample_active_subnet() for _ in range(8)]
    torch.manual_seed(3)
    assert [net.sample_active_subnet() for _ in range(8)] == first
    assert len(set(first)) > 1
    assert net.space.path_from_json(first[0].to_json()) == first[0]


def test_forward_runs_the_active_path_unless_told(net) -> None:
    x = torch.randn(2, 3, 64, 64)
    small = net.set_active_subnet(ks=3, e=3, d=2)
    with torch.no_grad():
        by_default, told = net(x), net(x, small)
        net.set_max_net()
        assert torch.equal(by_default, told)
        assert torch.equal(net(x, small), told)
        assert not torch.equal(net(x), told)


def test_the_active_path_is_no_part_of_the_state(net) -> None:
    state = net.state_dict()
    net.set_active_subnet(ks=3, e=3, d=2)
    assert state.keys() == net.state_dict().keys()
    net.load_state_dict(state)
    assert net.active_path.depths == (2, 2, 2, 2, 2)


def test_a_classifier_needs_a_class() -> None:
    with pytest.raises(InputError, match="expected at least 1 class for num_classes, got 0"):
        ClassificationSupernet(load_space("tiny"), num_classes=0)

# SPDX-License-Identifier: Apache-2.0
"""Channel sorting keeps the wide nets' functions and puts the important channels first."""

import pytest
import torch

from pfnas_fast.errors import InputError
from pfnas_fast.space import load_space, se_channels
from pfnas_fast.supernet import ClassificationSupernet


@pytest.fixture
def net() -> ClassificationSupernet:
    """Random everything, float64, so that a permutation may differ by rounding of sums only."""
    torch.manual_seed(0)
    net = ClassificationSupernet(load_space("tiny"), num_classes=3).double().eval()
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if tensor.is_floating_point() and ("bn" in name or "se." in name):
                tensor.add_(torch.rand_like(tensor))
    return net


def outputs(net: ClassificationSupernet) -> dict[int, torch.Tensor]:
    """Logits of the deepest nets with every kernel at its largest, by expand ratio."""
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    largest = [block.kernel_sizes[-1] for block in net.space.blocks]
    with torch.no_grad():
        return {e: net(x, net.space.path(ks=largest, e=e, d=3)) for e in (2, 3, 4)}


@pytest.mark.parametrize(("stage", "unchanged"), [(0, (4,)), (1, (4, 3)), (2, (4, 3, 2))])
def test_nets_at_least_as_wide_keep_their_function(net, stage: int, unchanged: tuple[int, ...]) -> None:
    before, bank = outputs(net), net.backbone.blocks[5].depth_conv.weight.clone()
    net.re_organize_middle_weights(expand_ratio_stage=stage)
    after = outputs(net)
    assert not torch.equal(net.backbone.blocks[5].depth_conv.weight, bank), "nothing was sorted"
    for ratio in (2, 3, 4):
        same = torch.allclose(after[ratio], before[ratio], rtol=1e-10, atol=1e-12)
        assert same == (ratio in unchanged), f"expand ratio {ratio}"


@pytest.mark.parametrize("stage", [0, 1])
def test_importance_falls_over_the_sorted_channels(net, stage: int) -> None:
    before = [block.project_conv.weight.clone() for block in net.backbone.blocks]
    net.re_organize_middle_weights(stage)
    for block, old in zip(net.backbone.blocks, before, strict=True):
        width = block.block.mid_channels((4, 3)[stage])
        importance = block.project_conv.weight.abs().sum((0, 2, 3))
        assert bool((importance[:width].diff() <= 0).all())
        assert torch.equal(block.project_conv.weight[:, width:], old[:, width:])
        if block.se is not None:
            hidden = block.se.expand.weight.abs().sum(0)[: se_channels(width)]
            assert bool((hidden.diff() <= 1e-12).all())


def test_parameters_stay_the_same_objects(net) -> None:
    """An optimiser that holds them goes on working."""
    before = {name: id(parameter) for name, parameter in net.named_parameters()}
    net.re_organize_middle_weights()
    assert {name: id(parameter) for name, parameter in net.named_parameters()} == before


def test_sorting_twice_changes_nothing_more(net) -> None:
    net.re_organize_middle_weights()
    once = {name: value.clone() for name, value in net.state_dict().items()}
    net.re_organize_middle_weights()
    assert all(torch.equal(value, once[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("stage", [-1, 3])
def test_stages_beyond_the_widths_are_refused(net, stage: int) -> None:
    with pytest.raises(InputError, match=f"expected 0 to 2 for expand_ratio_stage, got {stage}"):
        net.re_organize_middle_weights(stage)

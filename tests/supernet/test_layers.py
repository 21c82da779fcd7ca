# SPDX-License-Identifier: Apache-2.0
"""Dynamic layers against torch's static ones and against the formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pfnas_fast.errors import InputError
from pfnas_fast.space import load_space
from pfnas_fast.supernet import (
    Backbone,
    DynamicBatchNorm2d,
    DynamicDepthwiseConv2d,
    DynamicMBConv,
    DynamicPointwiseConv2d,
    DynamicSE,
)
from pfnas_fast.supernet.layers import activate, pixel_mean


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def images(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def randomise(module: nn.Module) -> None:
    """Move every parameter and buffer off its initial value."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for name, buffer in module.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer))


@pytest.mark.parametrize(("in_channels", "out_channels"), [(16, 24), (8, 24), (16, 8), (1, 1)])
def test_pointwise_uses_the_corner_of_its_weight(in_channels: int, out_channels: int) -> None:
    layer = DynamicPointwiseConv2d(16, 24)
    x = images(2, in_channels, 5, 6)
    y = layer(x, out_channels)
    torch.testing.assert_close(y, F.conv2d(x, layer.weight[:out_channels, :in_channels]))
    y.square().sum().backward()
    gradient = layer.weight.grad
    assert gradient is not None
    assert gradient.shape == layer.weight.shape
    assert bool((gradient[:out_channels, :in_channels] != 0).all())
    inside = gradient[:out_channels, :in_channels].abs().sum()
    assert torch.isclose(gradient.abs().sum(), inside)


def test_identity_matrices_cut_the_centre_out_of_the_bank() -> None:
    layer = DynamicDepthwiseConv2d(12, (3, 5, 7))
    assert torch.equal(layer.active_weight(12, 7), layer.weight)
    assert torch.equal(layer.active_weight(5, 5), layer.weight[:5, :, 1:6, 1:6])
    assert torch.equal(layer.active_weight(5, 3), layer.weight[:5, :, 2:5, 2:5])


def test_kernel_transform_chains_the_matrices() -> None:
    layer = DynamicDepthwiseConv2d(6, (3, 5, 7)).double()
    randomise(layer)
    matrix_5, matrix_3 = (dict(layer.named_parameters())[name] for name in ("7to5_matrix", "5to3_matrix"))
    for channel in range(6):
        five = (matrix_5 @ layer.weight[channel, 0, 1:6, 1:6].flatten()).view(5, 5)
        three = (matrix_3 @ five[1:4, 1:4].flatten()).view(3, 3)
        torch.testing.assert_close(layer.active_weight(6, 5)[channel, 0], five)
        torch.testing.assert_close(layer.active_weight(6, 3)[channel, 0], three)


@pytest.mark.parametrize(
    ("sizes", "names"),
    [
        ((3, 5, 7), {"weight", "7to5_matrix", "5to3_matrix"}),
        ((3, 7), {"weight", "7to5_matrix", "5to3_matrix"}),
        ((5, 7), {"weight", "7to5_matrix"}),
        ((3, 5), {"weight", "5to3_matrix"}),
        ((3,), {"weight"}),
    ],
)
def test_a_bank_owns_the_matrices_of_its_sizes(sizes: tuple[int, ...], names: set[str]) -> None:
    assert {name for name, _ in DynamicDepthwiseConv2d(4, sizes).named_parameters()} == names


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(7, 9), (8, 6)])
@pytest.mark.parametrize("kernel_size", [3, 5, 7])
def test_depthwise_equals_a_grouped_convolution(stride: int, size: tuple[int, int], kernel_size: int) -> None:
    layer = DynamicDepthwiseConv2d(10, (3, 5, 7), stride=stride)
    randomise(layer)
    x = images(2, 6, *size)
    y = layer(x, kernel_size)
    weight = layer.active_weight(6, kernel_size)
    torch.testing.assert_close(y, F.conv2d(x, weight, stride=stride, padding=kernel_size // 2, groups=6))
    assert y.shape[2:] == (-(-size[0] // stride), -(-size[1] // stride))


def test_matrices_that_take_no_part_get_no_gradient() -> None:
    layer = DynamicDepthwiseConv2d(4, (3, 5, 7))
    layer(images(1, 4, 6, 6), 5).sum().backward()
    gradients = {name: parameter.grad is not None for name, parameter in layer.named_parameters()}
    assert gradients == {"weight": True, "7to5_matrix": True, "5to3_matrix": False}


@pytest.mark.parametrize("backend", ["reference", "fast"])
def test_depthwise_refuses_sizes_that_it_does_not_offer(backend: str) -> None:
    layer = DynamicDepthwiseConv2d(4, (3, 7), backend=backend)
    with pytest.raises(InputError, match=r"expected one of \(3, 7\) for kernel_size, got 5"):
        layer(images(1, 4, 6, 6), 5)


def test_constructors_refuse_what_they_cannot_do() -> None:
    with pytest.raises(InputError, match=r"expected odd sizes for kernel_sizes, got \(3, 4\)"):
        DynamicDepthwiseConv2d(4, (3, 4))
    with pytest.raises(InputError, match="expected one of reference, fast for backend, got 'quick'"):
        Backbone(load_space("tiny"), backend="quick")
    with pytest.raises(InputError, match=r"expected sizes out of 3, 5, 7 .* got \(3, 9\)"):
        DynamicDepthwiseConv2d(4, (3, 9), backend="fast")


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_batch_norm_behaves_as_torchs(momentum: float | None) -> None:
    ours, theirs = DynamicBatchNorm2d(6, momentum=momentum), nn.BatchNorm2d(6, momentum=momentum)
    randomise(ours)
    theirs.load_state_dict(ours.state_dict())
    for training in (True, True, False, True, False):
        x = images(3, 6, 4, 5) + 1
        for layer in (ours, theirs):
            layer.train(training).zero_grad()
        assert torch.equal(ours(x), theirs(x))
        ours(x).square().sum().backward()
        theirs(x).square().sum().backward()
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name
        assert torch.equal(ours.weight.grad, theirs.weight.grad)  # type: ignore[arg-type]


def test_narrow_batch_norm_touches_its_channels_only() -> None:
    wide, narrow = DynamicBatchNorm2d(8), nn.BatchNorm2d(5)
    randomise(wide)
    narrow.load_state_dict({n: v[:5] if v.dim() else v for n, v in wide.state_dict().items()})
    before = {name: value.clone() for name, value in wide.state_dict().items()}
    x = images(3, 5, 4, 4) + 2
    torch.testing.assert_close(wide(x), narrow(x))
    for name in ("running_mean", "running_var"):
        after = wide.state_dict()[name]
        torch.testing.assert_close(after[:5], narrow.state_dict()[name])
        assert not torch.equal(after[:5], before[name][:5])
        assert torch.equal(after[5:], before[name][5:])


def test_batch_norm_refuses_one_value_per_channel_in_training() -> None:
    layer = DynamicBatchNorm2d(4)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        layer(images(1, 3, 1, 1))
    layer.eval()
    assert layer(images(1, 3, 1, 1)).shape == (1, 3, 1, 1)


@pytest.mark.parametrize("channels", [32, 40, 72])
def test_excitation_equals_its_formula(channels: int) -> None:
    se = DynamicSE(72).double()
    randomise(se)
    reduced = {32: 8, 40: 16, 72: 24}[channels]  # a quarter, rounded to a multiple of 8 within 10 %
    x = images(2, channels, 3, 5, dtype=torch.float64)
    hidden = x.mean((2, 3)) @ se.reduce.weight[:reduced, :channels].T + se.reduce.bias[:reduced]
    gate = hidden.clamp(min=0) @ se.expand.weight[:channels, :reduced].T + se.expand.bias[:channels]
    expected = x * ((gate + 3).clamp(0, 6) / 6)[:, :, None, None]
    torch.testing.assert_close(se(x), expected)


def test_pixel_mean_takes_any_layout() -> None:
    x = images(2, 3, 4, 5)
    for layout in (x, x.contiguous(memory_format=torch.contiguous_format), x[:, :, ::2]):
        torch.testing.assert_close(pixel_mean(layout), layout.mean((2, 3)))


@pytest.mark.parametrize("activation", ["relu", "hswish"])
def test_activation_may_overwrite_but_gradients_stay_right(activation: str) -> None:
    x = torch.linspace(-5, 5, 40, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: activate(t * 1.07, activation), (x,))
    plain = {"relu": F.relu, "hswish": F.hardswish}[activation]
    assert torch.equal(activate(x.detach().clone(), activation), plain(x.detach()))


@pytest.mark.parametrize(("index", "kernel_size", "ratio"), [(0, 7, 4), (4, 3, 2), (7, 5, 3), (10, 3, 3)])
def test_block_gradients(index: int, kernel_size: int, ratio: int) -> None:
    """Every block kind of `tiny`: the in-place steps must not spoil what autograd saved."""
    block = DynamicMBConv(load_space("tiny").blocks[index]).double()
    randomise(block)
    x = images(2, block.block.in_channels, 3, 4, dtype=torch.float64).requires_grad_()
    projection = torch.randn(
        3, 2 * block.block.out_channels * (3 * 4 if block.block.stride == 1 else 2 * 2)
    ).double()

    def few_outputs(t: torch.Tensor) -> torch.Tensor:
        return projection @ block(t, kernel_size, ratio).flatten()

    assert torch.autograd.gradcheck(few_outputs, (x,), fast_mode=True)


def test_residual_exactly_where_shapes_agree() -> None:
    for spec in load_space("ofa_mbv3_w1.0").blocks:
        assert spec.has_residual == (spec.stride == 1 and spec.in_channels == spec.out_channels)
    block = DynamicMBConv(load_space("tiny").blocks[1])
    nn.init.zeros_(block.project_bn.weight)
    x = images(2, block.block.in_channels, 6, 6)
    assert torch.equal(block(x, 3, 2), x)

# SPDX-License-Identifier: Apache-2.0
"""Blocks that train through one op do what their layers do one by one, and only when they may."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from pfnas_fast.errors import InputError
from pfnas_fast.space import BlockSpec, load_space
from pfnas_fast.supernet import Backbone, set_training_plan
from pfnas_fast.supernet.fused import trains_fused
from pfnas_fast.supernet.layers import DynamicMBConv


def make_pair() -> tuple[Backbone, Backbone]:
    torch.manual_seed(0)
    space = load_space("tiny")
    reference = Backbone(space)
    fast = Backbone(space, backend="fast")
    fast.load_state_dict(reference.state_dict())
    return reference, fast


def images() -> torch.Tensor:
    return torch.rand(4, 3, 48, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_move_alike(momentum: float | None) -> None:
    nets = make_pair()
    for net in nets:
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = momentum
        for _ in range(2):
            net(images(), net.space.min_path())
    for (name, expected), actual in zip(nets[0].named_buffers(), nets[1].buffers(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_plan_memory_changes_no_bit() -> None:
    _, net = make_pair()
    results = []
    for plan in ("speed", "memory"):
        set_training_plan(net, plan)
        net.zero_grad(set_to_none=True)
        features = net(images(), net.space.max_path())
        torch.stack([f.square().mean() for f in features]).sum().backward()
        results.append([*features, *(p.grad for p in net.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 100
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_unknown_plans_and_nets_without_plans_are_refused() -> None:
    reference, fast = make_pair()
    with pytest.raises(InputError, match="expected one of 'speed', 'memory' for plan, got 'small'"):
        set_training_plan(fast, "small")
    with pytest.raises(InputError, match="expected a net with backend='fast'"):
        set_training_plan(reference, "memory")


def test_unsampled_blocks_keep_no_gradient() -> None:
    _, net = make_pair()
    net(images(), net.space.min_path(), taps=False).sum().backward()
    first, second, *_ = net.blocks  # the smallest depth of the first stage is 1
    assert all(p.grad is not None for name, p in first.named_parameters() if "matrix" not in name)
    assert all(p.grad is None for p in second.parameters())


@pytest.mark.parametrize("mode", ["eval", "frozen", "hooked norm", "hooked excitation"])
def test_other_modes_run_layer_by_layer(mode: str) -> None:
    nets = make_pair()
    outputs = []
    for net in nets:
        block = net.blocks[3]  # with excitation and without a residual
        assert isinstance(block, DynamicMBConv)
        assert block.se is not None
        norms = (block.expand_bn, block.depth_bn, block.project_bn)
        x = torch.rand(2, 16, 6, 6, generator=torch.Generator().manual_seed(2))
        assert trains_fused(x, block, norms)
        if mode == "eval":
            net.eval()
        elif mode == "frozen":
            block.depth_bn.eval()
        else:
            layer = block.se if mode == "hooked excitation" else block.depth_bn
            layer.register_forward_hook(lambda *_: None)
        assert not trains_fused(x, block, norms)
        outputs.append(block(x, 3, 4))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)


def test_fifty_steps_agree() -> None:
    """The loss of the two backends from one seed, with two paths in turn and SGD.

    With ten times the rate even the reference in float32 leaves the one in float64 by 4e-2.
    """
    losses = []
    for net in make_pair():
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
        paths = [net.space.max_path(), net.space.min_path()]
        generator = torch.Generator().manual_seed(3)
        sizes = zip(net.space.tap_channels, net.space.tap_strides, strict=True)
        targets = [torch.rand(4, c, 48 // s, 64 // s, generator=generator) for c, s in sizes]
        curve = []
        for step in range(50):
            optimizer.zero_grad(set_to_none=True)
            features = net(images(), paths[step % 2])
            loss = torch.stack(
                [(f - t).square().mean() for f, t in zip(features, targets, strict=True)]
            ).mean()
            loss.backward()
            optimizer.step()
            curve.append(loss.detach())
        losses.append(torch.stack(curve))
    assert losses[0][-1] < 0.7 * losses[0][0]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=0)


def test_one_block_compiles_for_all_expand_ratios() -> None:
    """A block with excitation is one graph, running statistics included; widths do not compile it anew."""
    torch.manual_seed(0)
    spec = BlockSpec(0, 0, 0, 24, 24, 1, "hswish", True, (3, 5, 7), tuple(range(2, 8)))
    eager = DynamicMBConv(spec, backend="fast")
    other = copy.deepcopy(eager)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(other, backend=counter, fullgraph=True)
    x = torch.randn(2, 24, 6, 6).contiguous(memory_format=torch.channels_last)
    for expand_ratio in range(2, 8):
        for block in (eager, compiled):
            y = block(x, 5, expand_ratio)
            y.square().sum().backward()
    for (name, expected), actual in zip(eager.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(actual, expected), name
    for (name, parameter), twin in zip(eager.named_parameters(), other.parameters(), strict=True):
        assert (parameter.grad is None) == (twin.grad is None), name
        if parameter.grad is not None and twin.grad is not None:
            assert torch.equal(twin.grad, parameter.grad), name
    assert counter.frame_count <= 3

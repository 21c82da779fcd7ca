# SPDX-License-Identifier: Apache-2.0
"""The elastic backbone: shapes, layout, which parameters a path touches, and equal backends."""

from typing import Any

import numpy as np
import pytest
import torch

from pfnas_fast.errors import InputError
from pfnas_fast.space import Path, Space, load_space, uniform_population
from pfnas_fast.supernet import Backbone, ClassificationSupernet, recalibrate, use_statistics


@pytest.fixture(scope="module")
def tiny() -> Space:
    return load_space("tiny")


def random_paths(space: Space, count: int, seed: int = 0) -> list[Path]:
    return space.decode(uniform_population(space, np.random.default_rng(seed), count))


def test_taps_have_the_shapes_that_the_space_announces(tiny: Space) -> None:
    backbone = Backbone(tiny).eval()
    for path in random_paths(tiny, 4):
        features = backbone(torch.randn(1, 3, *tiny.canvas(path.resolution)), path)
        assert [tuple(f.shape[2:]) for f in features] == list(tiny.tap_sizes(path.resolution))
        assert tuple(f.shape[1] for f in features) == tiny.tap_channels
        last = backbone(torch.zeros(1, 3, *tiny.canvas(path.resolution)), path, taps=False)
        assert last.shape == features[-1].shape


def test_taps_are_the_outputs_of_the_last_kept_blocks(tiny: Space) -> None:
    backbone = Backbone(tiny).eval()
    path = tiny.path(ks=3, e=2, d=[2, 1, 3, 2])
    outputs = {}
    for index, block in enumerate(backbone.blocks):
        block.register_forward_hook(lambda _module, _inputs, y, index=index: outputs.__setitem__(index, y))
    features = backbone(torch.randn(1, 3, 48, 64), path)
    assert sorted(outputs) == [0, 1, 3, 6, 7, 8, 9, 10]
    assert all(torch.equal(f, outputs[i]) for f, i in zip(features, (3, 8, 10), strict=True))


@pytest.mark.parametrize("backend", ["reference", "fast"])
def test_channels_last_throughout(tiny: Space, backend: str) -> None:
    backbone = Backbone(tiny, backend=backend)
    strays = []

    def check(module: torch.nn.Module, _inputs: Any, y: Any) -> None:
        for tensor in y if isinstance(y, list) else [y]:
            if not tensor.is_contiguous(memory_format=torch.channels_last):
                strays.append(type(module).__name__)
            if tensor.requires_grad:
                tensor.register_hook(lambda g: strays.append("gradient") if not is_last(g) else None)

    def is_last(gradient: torch.Tensor) -> bool:
        return gradient.is_contiguous(memory_format=torch.channels_last)

    for module in backbone.modules():
        if not isinstance(module, torch.nn.Linear):
            module.register_forward_hook(check)
    features = backbone(torch.randn(2, 3, 48, 64), tiny.max_path())
    torch.stack([(f * torch.randn_like(f)).sum() for f in features]).sum().backward()
    assert strays == []


def test_layers_off_the_path_get_no_gradient_and_slices_get_full_shapes(tiny: Space) -> None:
    backbone = Backbone(tiny)
    path = tiny.path(ks=3, e=2, d=[1, 2, 1, 3])
    features = backbone(torch.randn(2, 3, 48, 64), path)
    torch.stack([f.square().sum() for f in features]).sum().backward()
    for block in tiny.blocks:
        kept = block.position < path.depths[block.stage]
        for name, parameter in backbone.blocks[block.index].named_parameters():
            assert (parameter.grad is not None) == kept, f"block {block.index} {name}"
        if kept:
            bank = backbone.get_parameter(f"blocks.{block.index}.depth_conv.weight")
            assert bank.grad is not None
            assert bank.grad.shape == bank.shape
            assert bool(bank.grad[: block.mid_channels(2)].any())
            assert not bool(bank.grad[block.mid_channels(2) :].any())


def test_paths_do_not_interfere(tiny: Space) -> None:
    """What a path computes in evaluation does not depend on which paths ran before."""
    backbone = Backbone(tiny).eval()
    first, second = random_paths(tiny, 2, seed=3)
    x = torch.randn(1, 3, 48, 64)
    before = backbone(x, first, taps=False)
    backbone(x, second)
    assert torch.equal(backbone(x, first, taps=False), before)


def test_foreign_paths_are_refused(tiny: Space) -> None:
    with pytest.raises(InputError, match="expected 4 stages and 12 blocks for path, got 5 and 20"):
        Backbone(tiny)(torch.zeros(1, 3, 32, 32), load_space("ofa_mbv3_w1.0").min_path())


@pytest.mark.parametrize("name", ["tiny", "ofa_mbv3_w1.0"])
def test_backends_agree_on_outputs_and_gradients(name: str) -> None:
    space = load_space(name)
    torch.manual_seed(0)
    nets = {b: ClassificationSupernet(space, num_classes=5, backend=b) for b in ("reference", "fast")}
    with torch.no_grad():
        for key, parameter in nets["reference"].named_parameters():
            if key.endswith("matrix"):
                parameter.add_(0.05 * torch.randn_like(parameter))
    nets["fast"].load_state_dict(nets["reference"].state_dict())
    space = nets["fast"].space
    x = torch.randn(4, 3, 64, 64)
    for path in [space.max_path(), space.min_path(), *random_paths(space, 3)]:
        outputs = {}
        statistics = recalibrate(nets["reference"], path, [x])
        for backend, net in nets.items():
            net.zero_grad()
            # A batch's own statistics would amplify rounding where a channel is nearly constant.
            with use_statistics(net, statistics):
                y = net(x, path)
            y.square().sum().backward()
            outputs[backend] = y.detach()
        assert float(outputs["reference"].std(0).max()) > 1e-2
        torch.testing.assert_close(outputs["fast"], outputs["reference"], rtol=1e-4, atol=1e-5)
        theirs = dict(nets["reference"].named_parameters())
        for key, parameter in nets["fast"].named_parameters():
            expected = theirs[key].grad
            assert (parameter.grad is None) == (expected is None), key
            if parameter.grad is not None and expected is not None:
                scale = float(expected.abs().max()) + 1e-12
                torch.testing.assert_close(
                    parameter.grad / scale, expected / scale, rtol=0, atol=1e-4, msg=key
                )


def test_backends_train_alike(tiny: Space) -> None:
    """In training mode logits and running statistics of both backends agree."""
    torch.manual_seed(1)
    nets = [ClassificationSupernet(tiny, num_classes=5, backend=b) for b in ("reference", "fast")]
    torch.nn.init.normal_(nets[0].tail.classifier.weight, std=0.3)
    nets[1].load_state_dict(nets[0].state_dict())
    x = torch.randn(8, 3, 96, 96)
    for net in nets:
        net.tail.dropout.p = 0.0
    logits = [net(x, net.space.max_path()).detach() for net in nets]
    assert float(logits[0].std()) > 0.1
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-3)
    for (name, ours), theirs in zip(nets[1].named_buffers(), nets[0].buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=name)

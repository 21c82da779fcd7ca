# SPDX-License-Identifier: Apache-2.0
"""The cost tables against what the real modules do: MACs, parameters, and bytes that autograd keeps."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from pfnas_fast.detection import DetectionSupernet
from pfnas_fast.space import CostModel, Path, Space, load_space, preset_names, uniform_population
from pfnas_fast.supernet import Backbone, ClassificationSupernet

NUM_RANDOM_PATHS = {"tiny": 6, "ofa_mbv3_w1.0": 2, "small": 4}


def some_paths(space: Space) -> list[Path]:
    """The smallest path, the largest at the smallest resolution, random ones."""
    population = uniform_population(space, np.random.default_rng(3), NUM_RANDOM_PATHS[space.name])
    if space.name == "ofa_mbv3_w1.0":
        population[1:, -1] = 1  # one random path at its own resolution; the others small, for time's sake
    return [space.min_path(), space.max_path(space.resolutions[0]), *space.decode(population)]


def saved_and_macs(forward: Callable[[Tensor], object], canvas: tuple[int, int]) -> tuple[int, int]:
    """Bytes saved for backward, and MACs of all convolutions and linear layers, for one image more.

    The difference between three images and two, so that whatever does not grow with the batch (parameters,
    kernels derived from them, per-channel statistics) drops out.
    """
    totals = []
    for batch in (2, 3):
        storages: dict[int, torch.UntypedStorage] = {}
        macs: list[int] = []

        def pack(tensor: Tensor, storages: dict = storages) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage  # kept alive, so that no address comes twice
            return tensor

        def counted(function: Callable, macs: list[int] = macs) -> Callable:
            def wrapped(x: Tensor, weight: Tensor, *args: object, **kwargs: object) -> Tensor:
                y = function(x, weight, *args, **kwargs)
                macs.append(y.numel() * weight[0].numel())
                return y

            return wrapped

        with pytest.MonkeyPatch.context() as patch, saved_tensors_hooks(pack, lambda t: t):
            patch.setattr(F, "conv2d", counted(F.conv2d))
            patch.setattr(F, "linear", counted(F.linear))
            forward(torch.zeros(batch, 3, *canvas))
        totals.append((sum(s.nbytes() for s in storages.values()), sum(macs)))
    return totals[1][0] - totals[0][0], totals[1][1] - totals[0][1]


def check_supernet(net: Callable, space: Space, cost: CostModel, **kwargs: object) -> None:
    for path in some_paths(space):
        saved, macs = saved_and_macs(lambda x, p=path: net(x, p, **kwargs), space.canvas(path.resolution))
        assert macs == round(cost.path_macs_m(path) * 1e6)
        assert saved == cost.saved_bytes([path])[0]


def modules_macs(net: nn.Module, image: Tensor) -> int:
    """MACs per image of plain convolution and linear modules, by forward hooks."""
    total = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            total += output.numel() * module.in_features

    handles = [m.register_forward_hook(count) for m in net.modules()]  # type: ignore[arg-type]
    with torch.no_grad():
        net(image)
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize("name", preset_names())
def test_detector(name: str) -> None:
    space = load_space(name)
    net = DetectionSupernet(space, num_classes=20).train()
    check_supernet(net, space, CostModel(space, num_classes=20))


@pytest.mark.parametrize("name", preset_names())
def test_classifier(name: str) -> None:
    space = load_space(name).for_classification()
    net = ClassificationSupernet(space, num_classes=10).train()
    check_supernet(net, space, CostModel(space, num_classes=10, task="classification"))


@pytest.mark.parametrize("name", preset_names())
def test_backbone(name: str) -> None:
    space = load_space(name)
    check_supernet(Backbone(space).train(), space, CostModel(space, task="backbone"), taps=False)


def test_detector_without_first_block_or_head_convolutions(small_description: dict) -> None:
    small_description["head"]["num_convs"] = 0
    space = Space.from_dict(small_description)
    check_supernet(DetectionSupernet(space, num_classes=1).train(), space, CostModel(space, num_classes=1))


@pytest.mark.parametrize("name", preset_names())
def test_stand_alone_detector(name: str) -> None:
    space = load_space(name)
    cost = CostModel(space, num_classes=5)
    net = DetectionSupernet(space, num_classes=5)
    for path in some_paths(space):
        detector = net.extract(path, None)
        assert sum(p.numel() for p in detector.parameters()) == round(cost.params_m([path])[0] * 1e6)
        macs = modules_macs(detector, torch.zeros(1, 3, *space.canvas(path.resolution)))
        assert macs == round(cost.path_macs_m(path) * 1e6)


@pytest.mark.parametrize("name", preset_names())
def test_stand_alone_classifier(name: str) -> None:
    space = load_space(name).for_classification()
    cost = CostModel(space, num_classes=10, task="classification")
    net = ClassificationSupernet(space, num_classes=10).eval()
    for path in some_paths(space):
        genes = {"ks": path.kernel_sizes, "e": path.expand_ratios, "d": path.depths}
        net.set_active_subnet(**genes, resolution=path.resolution)
        subnet = net.get_active_subnet()
        assert sum(p.numel() for p in subnet.parameters()) == round(cost.params_m([path])[0] * 1e6)
        macs = modules_macs(subnet, torch.zeros(1, 3, *space.canvas(path.resolution)))
        assert macs == round(cost.path_macs_m(path) * 1e6)

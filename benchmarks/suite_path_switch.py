# SPDX-License-Identifier: Apache-2.0
"""What choosing another path costs before its first image, ofa_mbv3_w1.0.

Ours: ``net.prepare(path)`` with the weights packed and the running statistics folded: of a path that is new,
and (`known`) of one that was prepared before. Theirs: slicing every weight and deriving every kernel of the
path, as the reference does in each forward (``slice+transform``), and copying them into a net of their own
(``copy``: `get_active_subnet`).
"""

import itertools
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from harness import Comparison

from pfnas_fast.space import Path, load_space
from pfnas_fast.supernet import ClassificationSupernet

__all__ = ["comparisons"]

PATHS = {"max": (7, 6, 4), "mid": (5, 4, 3), "min": (3, 3, 2)}


@lru_cache(maxsize=1)
def net() -> ClassificationSupernet:
    torch.manual_seed(0)
    return ClassificationSupernet(load_space("ofa_mbv3_w1.0"), num_classes=1000).eval()


def slice_and_transform(path: Path) -> list[Any]:
    """Every active weight of the blocks, as the reference forward makes it."""
    backbone, weights = net().backbone, []
    for block_spec in net().space.blocks:
        if block_spec.position >= path.depths[block_spec.stage]:
            continue
        block: Any = backbone.blocks[block_spec.index]
        mid = block_spec.mid_channels(path.expand_ratios[block_spec.index])
        weights.append(block.expand_conv.active_weight(block_spec.in_channels, mid))
        weights.append(block.depth_conv.active_weight(mid, path.kernel_sizes[block_spec.index]))
        weights.append(block.project_conv.active_weight(mid, block_spec.out_channels))
        weights.append(block.expand_bn.active_affine(mid))
        weights.append(block.depth_bn.active_affine(mid))
    return weights


def switch(name: str, path_name: str, *, known: bool, baseline: str) -> Comparison:
    """One row."""
    kernel, expand, depth = PATHS[path_name]
    path = net().set_active_subnet(ks=kernel, e=expand, d=depth)
    packed = net()._packed_weights()
    net().prepare(path)

    def ours() -> Any:
        if not known:
            packed.subnets.clear()
        return net().prepare(path)

    @torch.no_grad()
    def theirs() -> Any:
        return slice_and_transform(path) if baseline == "slice+transform" else net().get_active_subnet()

    def check() -> None:
        images = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            net().active_path = path
            expected = net().get_active_subnet().eval()(images)
            assert float((ours()(images) - expected).abs().max() / expected.abs().max()) < 1e-3

    return Comparison(name, ours, theirs, check, baseline)


def comparisons() -> Iterator[tuple[str, Callable[[], Comparison]]]:
    """Every row's name with the function that prepares it."""
    for path_name, baseline in itertools.product(PATHS, ("slice+transform", "copy")):
        name = f"path_switch/{path_name}"
        yield name, partial(switch, name, path_name, known=False, baseline=baseline)
    for path_name in PATHS:
        name = f"path_switch/known/{path_name}"
        yield name, partial(switch, name, path_name, known=True, baseline="slice+transform")

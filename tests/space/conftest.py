# SPDX-License-Identifier: Apache-2.0
"""A space small enough to be written out in full."""

import copy
import itertools
from collections.abc import Callable

import numpy as np
import pytest

from pfnas_fast.space import Path, Space


def _small_description() -> dict:
    """Two stages of at most two blocks: (4 + 16) * (2 + 4) = 120 subnets, two resolutions."""
    stage = {"stride": 2, "activation": "relu", "se": False, "depths": [1, 2], "kernel_sizes": [3, 5]}
    return {
        "name": "small",
        "stem": {"channels": 8, "activation": "hswish"},
        "first_block": None,
        "stages": [
            {**stage, "out_channels": 16, "expand_ratios": [2, 3]},
            {**stage, "out_channels": 24, "se": True, "activation": "hswish", "expand_ratios": [2]},
        ],
        "taps": [0, 1],
        "head": {"channels": 16, "num_convs": 1},
        "tail": {"feature_channels": 32, "hidden_channels": 32, "dropout": 0.0},
        "resolutions": [32, 48],
        "aspect": [4, 3],
        "classification_resolutions": [32],
    }


@pytest.fixture(scope="session")
def small_space() -> Space:
    return Space.from_dict(_small_description())


def _all_paths(space: Space, resolution: int) -> list[Path]:
    """Every subnet once, by brute force over all genes, dead ones included."""
    kernels = itertools.product(*(b.kernel_sizes for b in space.blocks))
    expands = list(itertools.product(*(b.expand_ratios for b in space.blocks)))
    depths = list(itertools.product(*(s.depths for s in space.stages)))
    genes = itertools.product(kernels, expands, depths)
    return list(dict.fromkeys(space.path(ks=k, e=e, d=d, resolution=resolution) for k, e, d in genes))


def _gene_measure(space: Space, paths: list[Path]) -> np.ndarray:
    """Chance of each path [num_paths] when depths, then active genes, are uniform."""
    chances = []
    for path in paths:
        active = [b for b in space.blocks if path.kernel_sizes[b.index]]
        choices = [len(s.depths) for s in space.stages]
        choices += [len(b.kernel_sizes) * len(b.expand_ratios) for b in active]
        chances.append(1 / np.prod(choices))
    return np.array(chances)


@pytest.fixture
def small_description() -> dict:
    return copy.deepcopy(_small_description())


@pytest.fixture(scope="session")
def all_paths() -> Callable[[Space, int], list[Path]]:
    """Enumerates a small space at one resolution."""
    return _all_paths


@pytest.fixture(scope="session")
def gene_measure() -> Callable[[Space, list[Path]], np.ndarray]:
    """The chance of each path under Once-for-All's gene measure."""
    return _gene_measure

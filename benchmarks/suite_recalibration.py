# SPDX-License-Identifier: Apache-2.0
"""Batch statistics of one path on calibration images: the fast backend against the reference one.

`recalibration/tiny` and `recalibration/ofa`: whole detectors of the two spaces, the path in the middle, 64
images in batches of 32 at the resolution of the path. `.../x4`: four random paths in one pass over the images
(`recalibrate_paths`) against four passes of the reference.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from harness import Comparison

from pfnas_fast import DetectionSupernet
from pfnas_fast.space import load_space, uniform_population
from pfnas_fast.supernet import BNStatistics, recalibrate, recalibrate_paths

__all__ = ["comparisons"]

SPACES = {"tiny": "tiny", "ofa": "ofa_mbv3_w1.0"}


TOLERANCE = 2e-3  # torch adds up to 819,200 values one after another in float32, which costs it up to 1e-3


def assert_same(ours: BNStatistics, theirs: BNStatistics) -> None:
    assert ours.layers.keys() == theirs.layers.keys()
    for name, (mean, var) in theirs.layers.items():
        mean_error = float((ours.layers[name][0] - mean).abs().max() / var.max().sqrt())
        var_error = float((ours.layers[name][1] - var).abs().max() / var.max())
        assert max(mean_error, var_error) <= TOLERANCE, f"{name}: {mean_error:.1e}, {var_error:.1e}"


def recalibration(name: str, space_name: str, num_paths: int) -> Comparison:
    """One row."""
    nets: list[Any] = []
    for backend in ("fast", "reference"):
        torch.manual_seed(0)
        nets.append(DetectionSupernet(load_space(space_name), num_classes=10, backend=backend).eval())
    fast, reference = nets
    space = fast.space
    if num_paths == 1:
        paths = [space.path(ks=5, e=space.blocks[0].expand_ratios[1], d=3)]
    else:
        resolution = space.resolutions[len(space.resolutions) // 2]
        drawn = space.decode(uniform_population(space, np.random.default_rng(0), num_paths))
        paths = [dataclasses.replace(path, resolution=resolution) for path in drawn]
    batches = [torch.randn(32, 3, *space.canvas(paths[0].resolution)) for _ in range(2)]

    def ours() -> list[BNStatistics]:
        return recalibrate_paths(fast, paths, batches)

    def theirs() -> list[BNStatistics]:
        return [recalibrate(reference, path, batches) for path in paths]

    def check() -> None:
        for mine, expected in zip(ours(), theirs(), strict=True):
            assert_same(mine, expected)

    return Comparison(name, ours, theirs, check, "reference")


def comparisons() -> Iterator[tuple[str, Callable[[], Comparison]]]:
    """Every row's name with the function that prepares it."""
    for short, space_name in SPACES.items():
        for suffix, num_paths in (("", 1), ("/x4", 4)):
            name = f"recalibration/{short}{suffix}"
            yield name, partial(recalibration, name, space_name, num_paths)

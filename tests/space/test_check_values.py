# SPDX-License-Identifier: Apache-2.0
"""The published and derived numbers that the cost tables must hit exactly."""

import pytest
from pfnas_fast.space import CostModel, load_space


@pytest.mark.parametrize(
    ("task", "genes", "resolution", "macs_m"),
    [
        ("classification", {"ks": 7, "e": 6, "d": 4}, 224, 566.170656),
        ("classification", {"ks": 3, "e": 3, "d": 4}, 224, 226.193808),
        ("classification", {"ks": 3, "e": 3, "d": 2}, 224, 121.278672),
        ("backbone", {"ks": 7, "e": 6, "d": 4}, 224, 556.135456),
        ("backbone", {"ks": 3, "e": 3, "d": 2}, 224, 111.243472),
        ("backbone", {"ks": 7, "e": 6, "d": 4}, 320, 1132.363648),
        ("backbone", {"ks": 3, "e": 3, "d": 2}, 320, 226.740928),
    ],
)
def test_macs_of_ofa_mobilenet_v3(task: str, genes: dict, resolution: int, macs_m: float) -> None:
    space = load_space("ofa_mbv3_w1.0")
    space = space.for_classification() if resolution == 224 else space
    cost = CostModel(space, num_classes=1000, task=task)
    assert cost.path_macs_m(space.path(**genes, resolution=resolution)) == macs_m

# SPDX-License-Identifier: Apache-2.0
"""Cost tables: the published numbers, hand counts, ranges and refusals."""

from collections.abc import Callable

import numpy as np
import pytest

from pfnas_fast.errors import InputError
from pfnas_fast.space import CostModel, Space, load_space, preset_names, uniform_population

# MACs of Once-for-All's MobileNetV3, in millions; the paper quotes 226 M for (3, 3, 4) at 224 px.
OFA_MACS_M = [
    ("classification", 7, 6, 4, 224, 566.170656),
    ("classification", 3, 3, 4, 224, 226.193808),
    ("classification", 3, 3, 2, 224, 121.278672),
    ("backbone", 7, 6, 4, 224, 556.135456),
    ("backbone", 3, 3, 2, 224, 111.243472),
    ("backbone", 7, 6, 4, 320, 1132.363648),
    ("backbone", 3, 3, 2, 320, 226.740928),
]


@pytest.mark.parametrize(("task", "ks", "e", "d", "resolution", "macs_m"), OFA_MACS_M)
def test_macs_of_ofa(task: str, ks: int, e: int, d: int, resolution: int, macs_m: float) -> None:
    space = load_space("ofa_mbv3_w1.0")
    space = space.for_classification() if resolution == 224 else space
    cost = CostModel(space, num_classes=1000, task=task)
    assert cost.path_macs_m(space.path(ks=ks, e=e, d=d, resolution=resolution)) == macs_m


def test_params_of_ofa() -> None:
    space = load_space("ofa_mbv3_w1.0").for_classification()
    cost = CostModel(space, num_classes=1000, task="classification")
    assert cost.params_m([space.max_path()]).tolist() == [7.66476]
    at_128, at_224 = cost.params_m([space.max_path(128), space.max_path(224)])
    assert at_128 == at_224


def test_tiny_detectors_span_about_4_to_50_million_macs() -> None:
    low, high = CostModel(load_space("tiny"), num_classes=3).range_m()
    assert (low, high) == (3.899072, 49.65344)


@pytest.mark.parametrize("name", preset_names())
def test_neck_and_head_are_a_small_part_of_the_smallest_path(name: str) -> None:
    space = load_space(name)
    detector = CostModel(space, num_classes=20).range_m()[0]
    backbone = CostModel(space, task="backbone").range_m()[0]
    assert (detector - backbone) / detector < 0.3


def test_hand_count_of_one_small_detector(small_space: Space) -> None:
    # 32 x 24 px: stem 16 x 12; stage 0 8 x 6 (16 channels); stage 1 4 x 3 (24 channels).
    stem = 192 * 8 * 27
    block_0 = 192 * 8 * 24 + 48 * 24 * 25 + 48 * 24 * 16  # k 5, e 3
    block_2 = 48 * 16 * 32 + 12 * 32 * 9 + 2 * 32 * 8 + 12 * 32 * 24  # k 3, e 2, SE 32 -> 8 -> 32
    neck = 48 * 16 * 16 + 12 * 24 * 16
    head = (48 + 12) * (16 * 9 + 16 * 16 + 16 * (7 + 4 + 1))
    path = small_space.path(ks=[5, 3, 3, 3], e=[3, 2, 2, 2], d=1, resolution=32)
    cost = CostModel(small_space, num_classes=7)
    assert cost.path_macs_m(path) * 1e6 == stem + block_0 + block_2 + neck + head
    params = (
        (8 * 27 + 16)
        + (8 * 24 + 24 * 25 + 24 * 16 + 2 * (24 + 24 + 16))
        + (16 * 32 + 32 * 9 + 2 * 32 * 8 + 8 + 32 + 32 * 24 + 2 * (32 + 32 + 24))
        + (16 * 16 + 24 * 16 + 2 * 32)
        + (16 * 9 + 16 * 16 + 2 * 32 + 16 * 12 + 12 + 2)
    )
    assert cost.params_m([path])[0] * 1e6 == pytest.approx(params, abs=1e-6)


def test_table_layout(small_space: Space) -> None:
    cost = CostModel(small_space, num_classes=7)
    for table, constant in (
        (cost.macs_table, cost.macs_constant),
        (cost.params_table, cost.params_constant),
        (cost.saved_bytes_table, cost.saved_bytes_constant),
    ):
        assert table.shape == (2, 4, 5)
        assert constant.shape == (2,)
        assert (table[:, :, 0] == 0).all()
        assert (table[:, 2:, 3:] == 0).all()  # stage 1 has two choices only
        assert (table[:, :2, 1:] > 0).all()
        assert (table == np.rint(table)).all()


@pytest.mark.parametrize("name", preset_names())
def test_population_sums_equal_path_by_path_sums(name: str) -> None:
    space = load_space(name)
    cost = CostModel(space, num_classes=3)
    population = uniform_population(space, np.random.default_rng(0), 300)
    paths = space.decode(population)
    expected = []
    for row in population:
        r = row[-1] - 1
        expected.append(cost.macs_constant[r] + sum(cost.macs_table[r, b, c] for b, c in enumerate(row[:-1])))
    assert (cost.macs_m(population) == np.array(expected) / 1e6).all()
    assert (cost.macs_m(paths) == cost.macs_m(population)).all()
    assert cost.path_macs_m(paths[7]) == cost.macs_m(population)[7]


def test_population_longer_than_a_chunk() -> None:
    space = load_space("tiny")
    cost = CostModel(space, num_classes=3)
    population = uniform_population(space, np.random.default_rng(0), 20000)
    for function in (cost.macs_m, cost.params_m, cost.saved_bytes):
        whole = function(population)
        assert whole.shape == (20000,)
        assert (whole[8000:8400] == function(population[8000:8400])).all()


def test_empty_population(small_space: Space) -> None:
    cost = CostModel(small_space, num_classes=1)
    assert cost.macs_m([]).shape == (0,)
    assert cost.macs_m(np.zeros((0, 5), np.uint8)).shape == (0,)


def test_costs_check_their_population(small_space: Space) -> None:
    cost = CostModel(small_space, num_classes=1)
    with pytest.raises(InputError, match="expected codes 0 to 4 at block 0, got 9 in row 0"):
        cost.macs_m(np.array([[9, 0, 1, 0, 1]], np.uint8))


def test_range_equals_enumeration(small_space: Space, all_paths: Callable) -> None:
    cost = CostModel(small_space, num_classes=2)
    for resolution in small_space.resolutions:
        macs = cost.macs_m(all_paths(small_space, resolution))
        assert cost.range_m(resolution) == (macs.min(), macs.max())
    assert cost.range_m() == (cost.range_m(32)[0], cost.range_m(48)[1])


def test_ends_of_the_range_are_the_extreme_paths() -> None:
    space = load_space("ofa_mbv3_w1.0")
    cost = CostModel(space, num_classes=20)
    assert cost.range_m() == (cost.path_macs_m(space.min_path()), cost.path_macs_m(space.max_path()))
    with pytest.raises(InputError, match=r"range_m: expected one of .* for resolution, got 224"):
        cost.range_m(224)


def test_budgets_outside_the_space_are_refused_with_the_range() -> None:
    cost = CostModel(load_space("ofa_mbv3_w1.0"), num_classes=20)
    for macs_m in (20, 2000, float("nan")):
        with pytest.raises(InputError) as caught:
            cost.check_budget_m(macs_m)
        assert str(caught.value) == (
            f"ofa_mbv3_w1.0: expected 158.02 to 1945.76 million MACs for max_macs_m, got {macs_m:g}"
        )
    with pytest.raises(InputError, match="for budgets_macs_m, got 20"):
        cost.check_budget_m(20, argument="budgets_macs_m")


def test_the_printed_range_is_accepted() -> None:
    cost = CostModel(load_space("ofa_mbv3_w1.0"), num_classes=20)
    cost.check_budget_m(158.02)
    cost.check_budget_m(1945.76)
    cost.check_budget_m(cost.range_m()[0])
    cost.check_budget_m(cost.range_m()[1])


@pytest.mark.parametrize("num_classes", [0, -1, None, 2.0, True])
def test_bad_class_counts_are_refused(num_classes: object) -> None:
    with pytest.raises(InputError, match="CostModel: expected an int >= 1 for num_classes"):
        CostModel(load_space("tiny"), num_classes=num_classes)  # type: ignore[arg-type]


def test_unknown_task_is_refused() -> None:
    with pytest.raises(InputError, match=r"CostModel: expected one of .* for task, got 'segmentation'"):
        CostModel(load_space("tiny"), num_classes=1, task="segmentation")


def test_backbone_needs_no_classes() -> None:
    space = load_space("tiny")
    backbone = CostModel(space, task="backbone")
    assert backbone.range_m()[0] < CostModel(space, num_classes=1).range_m()[0]

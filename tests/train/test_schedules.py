# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest

from pfnas_fast.errors import InputError
from pfnas_fast.filter import Balanced, Uniform
from pfnas_fast.space import CostModel, load_space
from pfnas_fast.train.schedules import (
    PathSource,
    equal_compute_steps,
    make_phases,
    plan_paths,
    restrict_space,
    step_macs_m,
)

SPACE = load_space("tiny")
COST = CostModel(SPACE, num_classes=3)
BALANCED = Balanced(SPACE).bind(COST)


@pytest.mark.parametrize("schedule", ["sandwich", "progressive", "single"])
@pytest.mark.parametrize("num_steps", [6, 7, 100, 1001])
def test_phases_cover_the_steps(schedule: str, num_steps: int) -> None:
    phases = make_phases(schedule, SPACE, num_steps)
    assert sum(phase.num_steps for phase in phases) == num_steps
    assert min(phase.num_steps for phase in phases) >= 1


def test_progressive_opens_one_gene_after_the_other() -> None:
    phases = make_phases("progressive", SPACE, 600)
    assert [phase.name for phase in phases] == ["full", "kernel", "depth-1", "depth-2", "width-1", "width-2"]
    assert phases[0].space.num_paths == 1
    assert phases[-1].space == SPACE
    sizes = [phase.space.num_paths for phase in phases]
    assert sizes == sorted(set(sizes))
    assert [phase.sort_channels for phase in phases] == [None, None, None, None, 0, 1]


def test_schedule_errors() -> None:
    with pytest.raises(InputError, match="sandwich, progressive or single for schedule, got 'spiral'"):
        make_phases("spiral", SPACE, 10)
    with pytest.raises(InputError, match="at least 6 steps"):
        make_phases("progressive", SPACE, 5)


def test_sandwich_step_has_the_extremes_first_and_one_resolution() -> None:
    phase = make_phases("sandwich", SPACE, 1)[0]
    seen = set()
    for step in range(40):
        paths = plan_paths(phase, SPACE, BALANCED, 0, step)
        resolution = paths[0].resolution
        seen.add(resolution)
        assert paths[:2] == [SPACE.max_path(resolution), SPACE.min_path(resolution)]
        assert len(paths) == 4
        assert {path.resolution for path in paths} == {resolution}
    assert seen == set(SPACE.resolutions)


def test_steps_are_a_function_of_seed_and_step() -> None:
    phase = make_phases("sandwich", SPACE, 1)[0]
    assert plan_paths(phase, SPACE, BALANCED, 3, 17) == plan_paths(phase, SPACE, BALANCED, 3, 17)
    assert plan_paths(phase, SPACE, BALANCED, 3, 17) != plan_paths(phase, SPACE, BALANCED, 3, 18)


def test_restricted_paths_are_paths_of_the_space() -> None:
    restricted = restrict_space(SPACE, 1, 2, 1)
    for phase in make_phases("progressive", SPACE, 12):
        for path in plan_paths(phase, SPACE, Uniform(SPACE).bind(COST), 0, 5):
            assert SPACE.path_from_json(path.to_json()) == path
    assert all(len(stage.kernel_sizes) == 1 and len(stage.depths) == 2 for stage in restricted.stages)


def test_step_macs_count_forward_backward_and_teacher() -> None:
    sandwich, progressive = make_phases("sandwich", SPACE, 1)[0], make_phases("progressive", SPACE, 12)
    paths = [SPACE.max_path(128), SPACE.min_path(128)]
    both = sum(COST.path_macs_m(path) for path in paths)
    assert step_macs_m(sandwich, COST, paths) == pytest.approx(3 * both)
    assert step_macs_m(progressive[1], COST, paths) == pytest.approx(3 * both + COST.path_macs_m(paths[0]))


@pytest.mark.parametrize("schedule", ["sandwich", "progressive"])
def test_no_teacher_is_charged_without_distillation(schedule: str) -> None:
    phases = make_phases(schedule, SPACE, 12, distill=False)
    paths = [SPACE.max_path(128)]
    assert {phase.teacher for phase in phases} == {"none"}
    assert step_macs_m(phases[-1], COST, paths) == pytest.approx(3 * COST.path_macs_m(paths[0]))


@pytest.mark.parametrize(
    ("ratios", "expected"), [((3,), [None, None]), ((3, 4), [0, None]), ((2, 3, 4), [0, 1])]
)
def test_channels_are_sorted_only_for_widths_that_exist(
    ratios: tuple[int, ...], expected: list[int | None]
) -> None:
    stages = tuple(dataclasses.replace(stage, expand_ratios=ratios) for stage in SPACE.stages)
    phases = make_phases("progressive", dataclasses.replace(SPACE, stages=stages), 12)
    assert [phase.sort_channels for phase in phases[4:]] == expected


def _planned_macs_m(schedule: str, sampler: PathSource, num_steps: int, distill: bool) -> float:
    """What training would execute per image, from the paths it would really draw."""
    total, step = 0.0, 0
    for phase in make_phases(schedule, SPACE, num_steps, distill=distill):
        for _ in range(phase.num_steps):
            total += step_macs_m(phase, COST, plan_paths(phase, SPACE, sampler, 7, step))
            step += 1
    return total


@pytest.fixture(scope="module")
def sandwich_macs_m() -> float:
    """Per step; 8000 steps leave a standard error of half a percent, well below the tolerance."""
    return _planned_macs_m("sandwich", BALANCED, 8000, True) / 8000


@pytest.mark.parametrize(
    ("schedule", "distill"), [("progressive", True), ("progressive", False), ("single", True)]
)
def test_equal_compute(schedule: str, distill: bool, sandwich_macs_m: float) -> None:
    uniform = Uniform(SPACE).bind(COST)
    steps = equal_compute_steps(schedule, COST, uniform, BALANCED, 500, distill=distill)
    spent_m = _planned_macs_m(schedule, uniform, steps, distill)
    assert spent_m == pytest.approx(500 * sandwich_macs_m, rel=0.03)

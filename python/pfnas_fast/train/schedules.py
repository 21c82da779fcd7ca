# SPDX-License-Identifier: Apache-2.0
"""Which genes are open, how many paths a step trains, and where distillation comes from.

- `sandwich` (BigNAS, arXiv:2003.11142): largest + smallest + two free paths a step; the largest teaches the
  others.
- `progressive` (Once-for-All, arXiv:1908.09791, sec. 3.2): full net; elastic kernel; depth in two phases;
  width in two phases, with channels sorted on entering a width phase; a frozen copy of the trained full net
  teaches.
- `single`: one free path a step (single-path one-shot, DetNAS, arXiv:1903.10979); no teacher.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from pfnas_fast.errors import InputError
from pfnas_fast.space import CostModel, Path, Space, uniform_population

# Shares of the steps and learning-rate factors of OFA's phases (180 / 120 / 25 / 120 / 25 / 120 epochs; sec.
# 4.1 and the published training scripts), with one path a step in the first two phases, then 2, 2, 4, 4.
_OFA_SHARES = (180, 120, 25, 120, 25, 120)
_OFA_PATHS = (1, 1, 2, 2, 4, 4)
_OFA_RATES = (1.0, 0.4, 0.1, 0.3, 0.1, 0.3)
_EXPECTATION_DRAWS = 4096
_EXPECTATION_SEED = 0xE9
_DRAWS = 8  # paths drawn at once, enough for one resolution to come up twice
_ATTEMPT_SEED = 1_000_003


class PathSource(Protocol):
    """Where free paths come from (`pfnas_fast.filter.samplers`)."""

    def population_for_step(self, seed: int, step: int, n: int) -> np.ndarray: ...

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Phase:
    """A run of steps with the same open genes.

    Attributes:
        space: The search space reduced to the open choices.
        num_free_paths: Paths drawn each step.
        extremes: Whether the largest and the smallest path are trained as well.
        teacher: "largest" = this step's largest path; "frozen" = the net as the first phase left it.
        sort_channels: Width phase number (0, 1) whose channel sorting comes first, or None.
    """

    name: str
    num_steps: int
    space: Space
    num_free_paths: int
    rate_scale: float = 1.0
    extremes: bool = False
    teacher: Literal["largest", "frozen", "none"] = "none"
    sort_channels: int | None = None
    restricted: bool = False


def make_phases(schedule: str, space: Space, num_steps: int, *, distill: bool = True) -> list[Phase]:
    """Split `num_steps` into the phases of `schedule`.

    Args:
        schedule: "sandwich", "progressive" or "single".
        space: The whole search space.
        num_steps: Steps of all phases together.
        distill: Whether there are teachers at all; without distillation none is run, nor charged for.

    Raises:
        InputError: unknown schedule, or fewer steps than phases.
    """
    if schedule == "sandwich":
        teacher = "largest" if distill else "none"
        return [Phase("sandwich", num_steps, space, 2, extremes=True, teacher=teacher)]
    if schedule == "single":
        return [Phase("single", num_steps, space, 1)]
    if schedule != "progressive":
        raise InputError(f"train: expected sandwich, progressive or single for schedule, got {schedule!r}")
    if num_steps < len(_OFA_SHARES):
        raise InputError(
            f"train: expected at least {len(_OFA_SHARES)} steps for schedule 'progressive', got {num_steps}"
        )
    bounds = np.round(np.cumsum((0, *_OFA_SHARES)) / sum(_OFA_SHARES) * num_steps).astype(int)
    lengths = np.maximum(np.diff(bounds), 1)
    while lengths.sum() > num_steps:
        lengths[lengths.argmax()] -= 1
    opened = [(1, 1, 1), (9, 1, 1), (9, 2, 1), (9, 9, 1), (9, 9, 2), (9, 9, 9)]
    names = ("full", "kernel", "depth-1", "depth-2", "width-1", "width-2")
    # Phase -> width whose channels are sorted on entering it; useless where no block has a narrower one.
    num_widths = max(len(stage.expand_ratios) for stage in space.stages)
    sorted_widths = {phase: width for phase, width in ((4, 0), (5, 1)) if num_widths > width + 1}
    return [
        Phase(
            name,
            int(lengths[i]),
            restrict_space(space, *opened[i]),
            _OFA_PATHS[i],
            _OFA_RATES[i],
            teacher="frozen" if i and distill else "none",
            sort_channels=sorted_widths.get(i),
            restricted=i < len(names) - 1,
        )
        for i, name in enumerate(names)
    ]


def refresh_steps(phases: list[Phase], num_times: int) -> tuple[int, ...]:
    """Steps that cut the part of the training whose paths the sampler draws into equal pieces.

    Args:
        phases: Of the whole stage.
        num_times: Cuts; fewer come out where there are fewer steps.

    Returns:
        Steps in order, none of them the first or the last of that part.

    Example:
        >>> from pfnas_fast.space import load_space
        >>> refresh_steps(make_phases("sandwich", load_space("tiny"), 90), 2)
        (30, 60)
    """
    total = sum(phase.num_steps for phase in phases)
    begin = sum(phase.num_steps for phase in phases if phase.restricted)
    cuts = {begin + round((total - begin) * (index + 1) / (num_times + 1)) for index in range(num_times)}
    return tuple(sorted(cuts - {begin, total}))


def restrict_space(space: Space, num_kernel_sizes: int, num_depths: int, num_expand_ratios: int) -> Space:
    """Keep only the largest choices of every gene; paths of the result are paths of `space`."""
    stages = tuple(
        dataclasses.replace(
            stage,
            kernel_sizes=stage.kernel_sizes[-num_kernel_sizes:],
            depths=stage.depths[-num_depths:],
            expand_ratios=stage.expand_ratios[-num_expand_ratios:],
        )
        for stage in space.stages
    )
    return dataclasses.replace(space, stages=stages)


def plan_paths(phase: Phase, full_space: Space, sampler: PathSource, seed: int, step: int) -> list[Path]:
    """Draw the paths of one step, all of one resolution; with extremes, the largest comes first.

    One resolution a step lets the largest path teach the others without a forward pass of its own, because
    the locations of teacher and student coincide. The first free path fixes the resolution and the others
    are drawn from the sampler conditional on it, so each free path alone follows the sampler's distribution.
    """
    paths: list[Path] = []
    resolution = None
    attempt = 0
    while len(paths) < phase.num_free_paths:
        attempt_seed = seed + attempt * _ATTEMPT_SEED
        if phase.restricted:
            rng = np.random.default_rng([attempt_seed, step])
            drawn = phase.space.decode(uniform_population(phase.space, rng, _DRAWS))
        else:
            drawn = full_space.decode(sampler.population_for_step(attempt_seed, step, _DRAWS))
        for path in drawn:
            if resolution is None:
                resolution = path.resolution
            if path.resolution == resolution and len(paths) < phase.num_free_paths:
                paths.append(path)
        attempt += 1
    if phase.extremes:
        paths = [full_space.max_path(resolution), full_space.min_path(resolution), *paths]
    return paths


def expected_step_macs_m(phase: Phase, cost: CostModel, sampler: PathSource) -> float:
    """Mean MACs that one step executes per image, in millions, from 4096 drawn paths.

    The first free path is a draw of the sampler and fixes the resolution; the others are draws given that
    resolution, so all of them have the mean of the sampler.
    """
    rng = np.random.default_rng([0, _EXPECTATION_SEED])
    if phase.restricted:
        drawn = uniform_population(phase.space, rng, _EXPECTATION_DRAWS)
        drawn_cost = CostModel(phase.space, num_classes=cost.num_classes, task=cost.task)
    else:
        drawn, drawn_cost = sampler.sample(rng, _EXPECTATION_DRAWS), cost
    macs_m = 3.0 * phase.num_free_paths * float(drawn_cost.macs_m(drawn).mean())
    counts = np.bincount(drawn[:, -1].astype(np.int64) - 1, minlength=len(cost.space.resolutions))
    for share, resolution in zip(counts / len(drawn), cost.space.resolutions, strict=True):
        smallest_m, largest_m = cost.range_m(resolution)
        if phase.extremes:
            macs_m += share * 3.0 * (largest_m + smallest_m)
        if phase.teacher == "frozen":
            macs_m += share * largest_m
    return macs_m


def step_macs_m(phase: Phase, cost: CostModel, paths: list[Path]) -> float:
    """MACs per image of a planned step, in millions.

    Forward and backward count as three forward passes; a frozen teacher adds one forward pass of the largest
    path.
    """
    macs_m = 3.0 * float(cost.macs_m(paths).sum())
    if phase.teacher == "frozen":
        macs_m += cost.path_macs_m(cost.space.max_path(paths[0].resolution))
    return macs_m


def equal_compute_steps(
    schedule: str,
    cost: CostModel,
    sampler: PathSource,
    reference: PathSource,
    sandwich_steps: int,
    *,
    distill: bool = True,
) -> int:
    """Steps of `schedule` that execute as many MACs as `sandwich_steps` sandwich steps.

    Args:
        schedule: "sandwich", "progressive" or "single".
        cost: Counts the MACs.
        sampler: Bound sampler of `schedule`.
        reference: Bound sampler of the sandwich steps.
        sandwich_steps: Steps to compare with.
        distill: Whether a frozen teacher runs, and is charged for.
    """
    budget_m = sandwich_steps * expected_step_macs_m(
        make_phases("sandwich", cost.space, 1)[0], cost, reference
    )
    probe = 1000
    phases = make_phases(schedule, cost.space, probe, distill=distill)
    mean_m = sum(phase.num_steps * expected_step_macs_m(phase, cost, sampler) for phase in phases) / probe
    return max(round(budget_m / mean_m), len(phases))

# SPDX-License-Identifier: Apache-2.0
"""The training loop that classification and detection share: phases, checkpoints, exact resume.

Everything random in a step comes from (seed, stage, step), so a run that was killed goes on from its last
checkpoint to the very numbers of an uninterrupted run.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from pfnas_fast.errors import InputError
from pfnas_fast.run.folder import Run
from pfnas_fast.space import CostModel, Path
from pfnas_fast.train.distributed import average_gradients, broadcast_parameters, rank_and_size
from pfnas_fast.train.optimizer import WeightAverage, learning_rate_at, make_optimizer, set_learning_rate
from pfnas_fast.train.schedules import (
    PathSource,
    Phase,
    make_phases,
    plan_paths,
    refresh_steps,
    step_macs_m,
)

Progress = Callable[[str, int, int, dict[str, float]], None]
_GRADIENT_NORM_LIMIT = 5.0
_LOG_EVERY_STEPS = 10


class Task(Protocol):
    """What is trained: batches, and the losses of one step's paths."""

    def batches(self, start_step: int, num_steps: int) -> Iterator[Any]:
        """One batch a step, a function of (seed, step) alone."""
        ...

    def backward(self, net: nn.Module, batch: Any, paths: list[Path], teacher: Teacher) -> dict[str, float]:
        """Run every path forward and backward, each with weight 1 / len(paths).

        Returns:
            Mean losses for the log.
        """
        ...


@dataclass(frozen=True)
class Teacher:
    """Who teaches in this step: `net` is a frozen copy, or None when the step's largest path does."""

    kind: str  # "largest" | "frozen" | "none"
    net: nn.Module | None
    weight: float


@dataclass(frozen=True)
class Refresh:
    """Something that is done in mid-training, evenly spaced over the steps that the sampler draws for.

    Attributes:
        num_times: How often.
        call: Called on every rank as `call(index, step, net)` before step `step` is drawn; `net` is a copy in
            eval mode that holds the averaged weights. A resumed stage that is already past that step calls
            with net=None: what the first call did to the sampler has to be done again.
    """

    num_times: int
    call: Callable[[int, int, nn.Module | None], None]


@dataclass(frozen=True)
class TrainOptions:
    """Settings of the loop; see `pfnas_fast.train.train` for their meaning."""

    schedule: str
    num_steps: int
    batch_size: int
    optimizer: str
    learning_rate: float
    weight_decay: float
    distill_after: float
    distill_weight: float
    ema_decay: float
    checkpoint_every: int
    seed: int
    stage: str
    sampler: str  # which, and with what settings
    augmentation: str
    num_refreshes: int = 0
    steps_before: int = 0  # of the same training, made in an earlier stage
    steps_after: int = 0  # ... and in a later one

    @property
    def whole_steps(self) -> int:
        """Steps that one curve of the learning rate spans."""
        return self.steps_before + self.num_steps + self.steps_after

    @property
    def stream_seed(self) -> int:
        """Start of the stage's own random streams."""
        return (self.seed * 1_000_003 + stream_id(self.stage)) % 2**31

    def to_dict(self) -> dict[str, Any]:
        """The settings that decide the result, under the names that `train` gives them."""
        settings = dataclasses.asdict(self)
        del settings["checkpoint_every"]
        settings["steps"] = settings.pop("num_steps")
        return settings


@dataclass
class _LoopState:
    step: int
    optimizer: torch.optim.Optimizer
    average: WeightAverage
    teacher_net: nn.Module | None
    macs_t: float
    seconds: float


@dataclass(frozen=True)
class _MidTraining:
    refresh: Refresh | None
    steps: tuple[int, ...]

    def restore(self, step: int) -> None:
        """Do again what was done before a resumed stage came to `step`."""
        for index, place in enumerate(self.steps):
            if self.refresh is not None and place < step:
                self.refresh.call(index, place, None)

    def before(self, step: int, net: nn.Module, average: WeightAverage) -> None:
        """Call with the averaged weights; the weights that are trained stay as they are."""
        if self.refresh is None:
            return
        averaged = copy.deepcopy(net)
        average.copy_to(averaged)
        self.refresh.call(self.steps.index(step), step, averaged.eval())


def fit(
    net: nn.Module,
    task: Task,
    *,
    cost: CostModel,
    sampler: PathSource,
    options: TrainOptions,
    run: Run | None,
    progress: Progress | None,
    refresh: Refresh | None = None,
) -> dict[str, float]:
    """Train `net` in place; on return it holds the averaged weights and is in eval mode.

    Returns:
        `{"steps", "macs_t" (executed, in 10^12), "seconds"}`.

    Raises:
        InputError: the loss is no longer finite (with advice), the settings are impossible, or the stage's
            checkpoint was made with others.
    """
    phases = make_phases(options.schedule, cost.space, options.num_steps, distill=options.distill_weight != 0)
    if len(phases) > 1 and options.whole_steps != options.num_steps:
        raise InputError(
            "train: expected a schedule of one phase with steps_before or steps_after, "
            f"got {options.schedule!r}"
        )
    saved = _load(run, options)
    if saved is not None and saved["finished"]:
        net.load_state_dict(saved["model"])
        net.eval()
        return {"steps": options.num_steps, "macs_t": saved["macs_t"], "seconds": saved["seconds"]}
    state = _start(net, saved, options)
    hook = _MidTraining(refresh, refresh_steps(phases, 0 if refresh is None else refresh.num_times))
    hook.restore(state.step)
    begin = 0
    for phase in phases:
        end = begin + phase.num_steps
        if state.step < end:
            if state.step == begin:
                _enter_phase(net, phase, state, options, is_first=begin == 0)
            _train_phase(net, task, phase, begin, state, cost, sampler, options, run, progress, hook)
            state.average.copy_to(net)
        begin = end
    net.eval()
    _save(net, state, options, run, finished=True)
    if run is not None and rank_and_size()[0] == 0:
        run.log(
            "stage",
            stage=options.stage,
            macs_t=state.macs_t,
            seconds=round(state.seconds, 2),
            steps=state.step,
        )
    return {"steps": state.step, "macs_t": state.macs_t, "seconds": state.seconds}


def describe(settings: object) -> str:
    """Class and plain settings (numbers, texts, pairs of them) of a sampler or an augmentation, as text.

    What is None, set or not, is left out: a sampler is described alike before and after it is bound.
    """
    plain = {key: value for key, value in sorted(vars(settings).items()) if _is_plain(value)}
    parts = (f"{key}={value!r}" for key, value in plain.items() if not key.startswith("_"))
    return f"{type(settings).__name__}({', '.join(parts)})"


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(item) for item in value)
    return isinstance(value, (bool, int, float, str))


def stream_id(stage: str) -> int:
    """A fixed number for a stage's random streams."""
    return zlib.crc32(stage.encode())


def _load(run: Run | None, options: TrainOptions) -> dict[str, Any] | None:
    """The stage's checkpoint, if there is one; it must have been made with the same settings."""
    if run is None or not run.has_checkpoint(options.stage):
        return None
    saved = run.load(options.stage)
    earlier = {"num_refreshes": 0, "steps_before": 0, "steps_after": 0}  # which earlier versions did not have
    old = {**earlier, **saved.get("options", {})}
    for key, value in options.to_dict().items():
        if old.get(key) != value:
            raise InputError(
                f"train: expected {key}={old.get(key)!r} (checkpoint {options.stage!r} in {run.folder} was "
                f"made with it), got {value!r}; give another stage= or run="
            )
    return saved


def _start(net: nn.Module, saved: dict[str, Any] | None, options: TrainOptions) -> _LoopState:
    if saved is not None:
        net.load_state_dict(saved["model"])
    broadcast_parameters(net)  # before the average is cloned, so that all ranks average the same weights
    optimizer = _make_optimizer(net, options)
    average = WeightAverage(net, decay=options.ema_decay)
    if saved is None:
        return _LoopState(0, optimizer, average, None, 0.0, 0.0)
    optimizer.load_state_dict(saved["optimizer"])
    average.load_state_dict(saved["average"])
    teacher_net = None
    if saved["teacher"] is not None:
        teacher_net = copy.deepcopy(net)
        teacher_net.load_state_dict(saved["teacher"])
    return _LoopState(saved["step"], optimizer, average, teacher_net, saved["macs_t"], saved["seconds"])


def _make_optimizer(net: nn.Module, options: TrainOptions) -> torch.optim.Optimizer:
    return make_optimizer(
        net,
        kind=options.optimizer,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
    )


def _enter_phase(
    net: nn.Module, phase: Phase, state: _LoopState, options: TrainOptions, *, is_first: bool
) -> None:
    """A phase starts from the averaged weights of the one before, with a fresh optimizer (as in OFA)."""
    if is_first:
        return
    if phase.teacher == "frozen" and state.teacher_net is None:
        state.teacher_net = copy.deepcopy(net)
    if phase.sort_channels is not None:
        net.re_organize_middle_weights(expand_ratio_stage=phase.sort_channels)  # type: ignore[operator]
    state.optimizer = _make_optimizer(net, options)
    state.average = WeightAverage(net, decay=options.ema_decay)


def _train_phase(
    net: nn.Module,
    task: Task,
    phase: Phase,
    begin: int,
    state: _LoopState,
    cost: CostModel,
    sampler: PathSource,
    options: TrainOptions,
    run: Run | None,
    progress: Progress | None,
    hook: _MidTraining,
) -> None:
    end = begin + phase.num_steps
    rank, size = rank_and_size()
    clock = time.perf_counter()
    for batch in task.batches(state.step, end - state.step):
        step = state.step
        if step in hook.steps:
            state.seconds += time.perf_counter() - clock
            hook.before(step, net, state.average)
            clock = time.perf_counter()  # what the refresh takes is written down by itself
        torch.manual_seed(options.stream_seed + step * size + rank)
        paths = plan_paths(phase, cost.space, sampler, options.stream_seed, step)
        whole = options.steps_before + phase.num_steps + options.steps_after
        place = options.steps_before + step - begin
        rate = learning_rate_at(place, whole, options.learning_rate * phase.rate_scale)
        set_learning_rate(state.optimizer, rate)
        net.train()
        state.optimizer.zero_grad(set_to_none=True)
        losses = task.backward(net, batch, paths, _teacher_at(step, phase, state, options))
        if not math.isfinite(losses["total"]):
            raise InputError(
                f"train: expected a finite loss, got {losses['total']} at step {step} of {options.stage}; "
                f"try a lower learning_rate than {options.learning_rate}"
            )
        average_gradients(net)
        nn.utils.clip_grad_norm_(net.parameters(), _GRADIENT_NORM_LIMIT, foreach=True)
        state.optimizer.step()
        state.average.update(net, step - begin)
        state.step = step + 1
        state.macs_t += step_macs_m(phase, cost, paths) * options.batch_size * size / 1e6
        state.seconds, clock = state.seconds + time.perf_counter() - clock, time.perf_counter()
        _report_step(state, phase, losses, rate, options, run, progress)
        if state.step % options.checkpoint_every == 0 and state.step < options.num_steps:
            if state.step == end:
                state.average.copy_to(net)  # the next phase starts from here, also after a resume
            _save(net, state, options, run, finished=False)


def _teacher_at(step: int, phase: Phase, state: _LoopState, options: TrainOptions) -> Teacher:
    """Distillation starts after a fifth of the steps: a teacher that knows nothing does harm."""
    place = options.steps_before + step
    started = phase.teacher == "frozen" or place >= options.distill_after * options.whole_steps
    if phase.teacher == "none" or not started or options.distill_weight == 0:
        return Teacher("none", None, 0.0)
    return Teacher(phase.teacher, state.teacher_net, options.distill_weight)


def _report_step(
    state: _LoopState,
    phase: Phase,
    losses: dict[str, float],
    rate: float,
    options: TrainOptions,
    run: Run | None,
    progress: Progress | None,
) -> None:
    if rank_and_size()[0] != 0:
        return
    if progress is not None:
        progress(options.stage, state.step, options.num_steps, {"loss": losses["total"]})
    if run is not None and (state.step % _LOG_EVERY_STEPS == 0 or state.step == options.num_steps):
        rounded = {key: round(value, 5) for key, value in losses.items()}
        run.log(
            "step",
            stage=options.stage,
            phase=phase.name,
            step=state.step,
            learning_rate=rate,
            macs_t=state.macs_t,
            **rounded,
        )


def _save(
    net: nn.Module, state: _LoopState, options: TrainOptions, run: Run | None, *, finished: bool
) -> None:
    rank, _ = rank_and_size()
    if run is None or rank != 0:
        return
    content: dict[str, Any] = {
        "step": state.step,
        "finished": finished,
        "options": options.to_dict(),
        "model": net.state_dict(),
        "macs_t": state.macs_t,
        "seconds": state.seconds,
    }
    if not finished:
        content["optimizer"] = state.optimizer.state_dict()
        content["average"] = state.average.state_dict()
        content["teacher"] = None if state.teacher_net is None else state.teacher_net.state_dict()
    run.save(options.stage, content)

# SPDX-License-Identifier: Apache-2.0
import contextlib
import dataclasses
import importlib
import json
import re
from pathlib import Path

import pytest
import torch

import pfnas_fast as pf

STEPS = 6


def _net() -> pf.DetectionSupernet:
    torch.manual_seed(0)
    return pf.DetectionSupernet(pf.load_space("tiny"), num_classes=2, backend="reference")


def _train(
    net: pf.DetectionSupernet, data: pf.DetectionData, run: pf.Run | None, **options: object
) -> dict[str, float]:
    settings = {"steps": STEPS, "batch_size": 2, "checkpoint_every": 2, "learning_rate": 1e-3, **options}
    return pf.train(net, data.fit, run=run, **settings)  # type: ignore[arg-type]


class Stop(Exception):
    pass


def _stop_at(step: int):
    def progress(stage: str, done: int, total: int, info: dict[str, float]) -> None:
        if done == step:
            raise Stop

    return progress


@pytest.mark.parametrize(("schedule", "stop"), [("sandwich", 5), ("progressive", 3), ("single", 2)])
def test_resume_gives_the_weights_of_an_uninterrupted_run(
    toy_detection: Path, tmp_path: Path, schedule: str, stop: int
) -> None:
    data = pf.load_detection(toy_detection)
    whole = _net()
    _train(whole, data, pf.Run(tmp_path / "whole"), schedule=schedule)
    with pytest.raises(Stop):
        _train(_net(), data, pf.Run(tmp_path / "cut"), schedule=schedule, progress=_stop_at(stop))
    resumed = _net()
    result = _train(resumed, data, pf.Run(tmp_path / "cut"), schedule=schedule)
    assert result["steps"] == STEPS
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_finished_stage_is_loaded_not_repeated(toy_detection: Path, tmp_path: Path) -> None:
    data = pf.load_detection(toy_detection)
    first = _net()
    _train(first, data, pf.Run(tmp_path), steps=2)
    again = _net()
    result = _train(again, data, pf.Run(tmp_path), steps=2, progress=_stop_at(1))
    assert result["steps"] == 2
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("stop", [3, None])
@pytest.mark.parametrize(
    ("key", "value", "old"),
    [
        ("learning_rate", 2e-3, "0.001"),
        ("steps", 8, "6"),
        ("schedule", "single", "'san"),
        ("sampler", pf.Uniform(pf.load_space("tiny")), "'Balanced"),
        ("augmentation", pf.Augmentation(scale=(0.9, 1.1)), "'Augmentation"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(
    toy_detection: Path, tmp_path: Path, stop: int | None, key: str, value: object, old: str
) -> None:
    data = pf.load_detection(toy_detection)
    got = re.escape(repr(value)) if isinstance(value, (float, int, str)) else f"'{type(value).__name__}.*'"
    with contextlib.suppress(Stop):
        _train(_net(), data, pf.Run(tmp_path), progress=_stop_at(stop) if stop else None)
    with pytest.raises(pf.InputError, match=f"expected {key}={old}.*'train' in .*, got {got}; give another"):
        _train(_net(), data, pf.Run(tmp_path), **{key: value})
    assert _train(_net(), data, pf.Run(tmp_path), checkpoint_every=5)["steps"] == STEPS


def test_successive_calls_on_one_run_have_checkpoints_of_their_own(
    toy_detection: Path, tmp_path: Path
) -> None:
    data, run = pf.load_detection(toy_detection), pf.Run(tmp_path)
    for steps in (2, 3):
        assert _train(_net(), data, run, steps=steps)["steps"] == steps
    assert [run.load(stage)["step"] for stage in ("train", "train-2")] == [2, 3]


def test_two_calls_share_the_curves_of_one_training(
    toy_detection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = importlib.import_module("pfnas_fast.train.engine")
    teacher_at, kinds = engine._teacher_at, []
    monkeypatch.setattr(
        engine, "_teacher_at", lambda *args: kinds.append(teacher_at(*args).kind) or teacher_at(*args)
    )
    data, run, net = pf.load_detection(toy_detection), pf.Run(tmp_path), _net()
    _train(net, data, run, steps=2, stage="first", steps_after=4)
    _train(net, data, run, steps=4, stage="second", steps_before=2)
    assert kinds == ["none"] * 2 + ["largest"] * 4  # distillation starts after a fifth of all six steps
    _train(_net(), data, run, steps=6, stage="whole")
    assert kinds[6:] == kinds[:6]
    lines = [json.loads(line) for line in run.path("log.jsonl").read_text().splitlines()]
    first, second, whole = (
        [line["learning_rate"] for line in lines if line["event"] == "step" and line["stage"] == stage]
        for stage in ("first", "second", "whole")
    )
    assert (first, second) == ([1e-3], whole)  # logged at the last step of each
    with pytest.raises(pf.InputError, match="at least 0 for steps_before, got -1"):
        _train(net, data, None, steps_before=-1)
    with pytest.raises(pf.InputError, match="one phase with steps_before or steps_after, got 'progressive'"):
        _train(net, data, None, schedule="progressive", steps_after=1)


def test_progressive_on_one_width_without_a_teacher(
    toy_detection: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # By name: the attribute `pfnas_fast.train` is the function.
    detection = importlib.import_module("pfnas_fast.train.detection")
    monkeypatch.setattr(detection, "_teach", lambda *_: pytest.fail("a teacher ran"))
    tiny = pf.load_space("tiny")
    stages = tuple(dataclasses.replace(stage, expand_ratios=(3,)) for stage in tiny.stages)
    space, data = dataclasses.replace(tiny, stages=stages), pf.load_detection(toy_detection)
    net = pf.DetectionSupernet(space, num_classes=2, backend="reference")
    result = _train(net, data, None, schedule="progressive", distill_weight=0.0)
    assert result["steps"] == STEPS
    with pytest.raises(pytest.fail.Exception, match="a teacher ran"):
        _train(net, data, None, schedule="progressive")


def test_training_learns(toy_detection: Path) -> None:
    data = pf.load_detection(toy_detection)
    losses: list[float] = []
    pf.train(
        _net(),
        data.fit,
        steps=90,
        batch_size=4,
        schedule="single",
        distill_weight=0.0,
        progress=lambda stage, done, total, info: losses.append(info["loss"]),
    )
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "at least 1 for steps, got 0"),
        ({"batch_size": 1}, "at least 2 for batch_size"),
        ({"schedule": "zigzag"}, "for schedule, got 'zigzag'"),
        ({"learning_rate": 1e30, "steps": 6}, "expected a finite loss"),
    ],
)
def test_mistakes_are_named(toy_detection: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(pf.InputError, match=message):
        _train(_net(), pf.load_detection(toy_detection), None, **options)


def test_class_mismatch(toy_detection: Path) -> None:
    net = pf.DetectionSupernet(pf.load_space("tiny"), num_classes=5, backend="reference")
    with pytest.raises(pf.InputError, match="expected 5 classes"):
        _train(net, pf.load_detection(toy_detection), None)


def test_pretrain_and_accuracy(toy_classification: Path) -> None:
    from pfnas_fast.train import classification_accuracy

    data = pf.load_classification(toy_classification)
    space = pf.load_space("tiny").for_classification()
    torch.manual_seed(0)
    net = pf.ClassificationSupernet(space, num_classes=2, backend="reference")
    pf.pretrain(net, data, steps=15, batch_size=8, learning_rate=3e-3)
    assert classification_accuracy(net, data, space.max_path(), num_calib=16) > 0.9

# SPDX-License-Identifier: Apache-2.0
"""The whole job on toy data: what it writes, what it may look at, and that a killed run goes on exactly."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from toy_settings import TOY_SETTINGS

import pfnas_fast as pf
from pfnas_fast.run.job import open_job, run_all, run_stage, stage_names
from pfnas_fast.train.optimizer import learning_rate_at

SETTINGS = [
    *TOY_SETTINGS,
    "pretrain_steps=2",
    "pretrain_batch_size=4",
    "checkpoint_every=2",
    "search_flood=500",
    "num_budgets=3",
    "candidates_per_budget=2",
]


def _config(toy_detection: Path, toy_classification: Path, *extra: str) -> pf.RunConfig:
    overrides = {"data": str(toy_detection), "pretrain_data": str(toy_classification)}
    return pf.make_config(overrides=overrides, assignments=[*SETTINGS, *extra])


def test_no_stage_looks_at_images_of_a_later_role(
    toy_detection: Path, toy_classification: Path, tmp_path: Path
) -> None:
    config = _config(toy_detection, toy_classification)
    job = open_job(tmp_path / "run", config)
    data = job.data
    opened: dict[str, set[str]] = {}
    for stage in stage_names(config):
        assert run_stage(job, stage)
        opened[stage] = {role for role, dataset in data.roles().items() if dataset.reads}
    assert opened["warmup"] <= {"fit"}
    assert opened["train"] <= {"fit", "calib", "label"}
    assert "select" not in opened["train"]
    assert "select" in opened["search"]
    assert "test" not in opened["search"]
    assert "test" in opened["report"]
    _check_outputs(job.run)


def _check_outputs(run: pf.Run) -> None:
    expected = (
        "config.yaml splits.json log.jsonl labels.csv filter/report.json filter/thresholds.json "
        "filter/drift.json pareto.json pareto.png report.json detections/small.png"
    )
    assert [name for name in expected.split() if not run.has(name)] == []
    splits = run.read_json("splits.json")
    assert not set(splits["fit"]) & set(splits["label"])
    front = run.read_json("pareto.json")
    assert front
    for entry in front:
        assert set(entry) == {"path", "macs_m", "params_m", "ap", "ap50"}
    floods = run.read_log("flood")
    assert [flood["num_drawn"] for flood in floods] == [500] * 3
    assert all(flood["num_kept"] >= 1 for flood in floods)
    report = run.read_json("report.json")
    assert {"pretrain", "warmup", "train", "labels", "candidates", "total"} <= set(report["compute"])
    for entry in report["front"]:
        detector = pf.Detector.load(run.folder / entry["model"])
        detection = detector.predict(torch.zeros(3, 72, 96, dtype=torch.uint8))
        assert detection.boxes.shape[1] == 4


@pytest.mark.parametrize(
    "extra",
    [
        ("schedule=progressive", "sampler=uniform"),
        ("sampler=balanced",),
        ("sampler=bestup",),
        ("sampler=random_prune", "pretrain=false"),
        ("sampler=filter_unconditioned", "schedule=single"),
    ],
)
def test_other_strategies_run(
    toy_detection: Path, toy_classification: Path, tmp_path: Path, extra: tuple[str, ...]
) -> None:
    job = open_job(tmp_path / "run", _config(toy_detection, toy_classification, *extra))
    run_all(job)
    assert job.run.read_json("pareto.json")
    ran: list[bool] = []
    run_all(job, on_stage=lambda name, did: ran.append(did))
    assert not any(ran)


def test_joint_rate_curve(toy_detection: Path, toy_classification: Path, tmp_path: Path) -> None:
    settings = ("rate_curve=joint", "warmup_steps=10", "train_steps=10")
    job = open_job(tmp_path / "run", _config(toy_detection, toy_classification, *settings))
    for stage in ("pretrain", "transfer", "warmup", "label", "filter", "prune", "train"):
        run_stage(job, stage)
    steps = job.run.read_log("step")
    peak = job.config.learning_rate
    assert [s["learning_rate"] for s in steps if s["stage"] == "warmup"] == [peak]  # its tenth step
    last = [s for s in steps if s["stage"] == "train"][-1]
    assert last["learning_rate"] == learning_rate_at(9 + last["step"], 10 + last["step"], peak)


def test_killed_while_training_ends_like_an_uninterrupted_run(
    toy_detection: Path, toy_classification: Path, tmp_path: Path
) -> None:
    arguments = ["run", "--data", str(toy_detection), "--pretrain-data", str(toy_classification)]
    for setting in [*SETTINGS, "train_steps=40"]:
        arguments += ["--set", setting]
    program = [sys.executable, "-c", "from pfnas_fast.cli import main; main()", *arguments]
    subprocess.run([*program, "--out", str(tmp_path / "whole")], check=True, capture_output=True, timeout=300)

    with subprocess.Popen(
        [*program, "--out", str(tmp_path / "cut")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        checkpoint = tmp_path / "cut" / "checkpoints" / "train.pt"
        for _ in range(3000):
            if checkpoint.exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not torch.load(checkpoint, weights_only=True)["finished"]
    subprocess.run([*program, "--out", str(tmp_path / "cut")], check=True, capture_output=True, timeout=300)
    texts = [(tmp_path / name / "pareto.json").read_text() for name in ("whole", "cut")]
    assert texts[0] == texts[1]
    assert json.loads(texts[0])


def test_compare(toy_detection: Path, toy_classification: Path, tmp_path: Path) -> None:
    from pfnas_fast.report.compare import compare_runs

    for name, extra in (("a", "sampler=balanced"), ("b", "sampler=uniform")):
        run_all(open_job(tmp_path / name, _config(toy_detection, toy_classification, extra)))
    comparison = compare_runs([tmp_path / "a", tmp_path / "b"], png=tmp_path / "compare.png")
    assert [run["sampler"] for run in comparison["runs"]] == ["balanced", "uniform"]
    assert comparison["baseline"] == "a"
    assert list(comparison["macs_saved"]) == ["b"]
    assert (tmp_path / "compare.png").stat().st_size > 1000
    with pytest.raises(pf.InputError, match="at least two run folders, got 1"):
        compare_runs([tmp_path / "a"])

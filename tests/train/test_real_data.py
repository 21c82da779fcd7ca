# SPDX-License-Identifier: Apache-2.0
"""Real photographs in the layouts that users have: they load, and a step of training runs."""

import shutil
from pathlib import Path

import pytest
import torch

import pfnas_fast as pf
from pfnas_fast.run import make_config
from pfnas_fast.run.job import open_job, run_stage


@pytest.mark.parametrize("name", ["cards", "voc100"])
def test_a_step_of_the_tiny_space(shared_data: Path, name: str) -> None:
    data = pf.load_detection(shared_data / name)
    torch.manual_seed(0)
    net = pf.DetectionSupernet(pf.load_space("tiny"), num_classes=data.num_classes, backend="reference")
    assert pf.train(net, data.fit, steps=2, batch_size=2)["steps"] == 2


@pytest.mark.parametrize(("recipe", "name"), [("voc", "voc100"), ("coco", "coco_mini")])
def test_a_step_of_the_large_recipes(shared_data: Path, tmp_path: Path, recipe: str, name: str) -> None:
    settings = ["pretrain=false", "warmup_steps=1", "batch_size=2", "num_workers=0"]
    config = make_config(recipe=recipe, overrides={"data": str(shared_data / name)}, assignments=settings)
    job = open_job(tmp_path, config)
    assert job.space.name == "ofa_mbv3_w1.0"
    assert run_stage(job, "transfer")
    assert run_stage(job, "warmup")
    assert job.run.load("warmup")["finished"]


def test_a_truncated_photograph_is_refused_by_name(
    shared_data: Path, toy_detection: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(toy_detection, folder)
    broken = folder / "images" / "train" / "train_3.png"
    shutil.copy(shared_data / "broken" / "truncated.jpg", broken)
    settings = ["pretrain=false", "warmup_steps=1", "batch_size=2"]
    job = open_job(tmp_path / "run", make_config(overrides={"data": str(folder)}, assignments=settings))
    run_stage(job, "transfer")
    with pytest.raises(pf.InputError, match=r"train_3\.png"):
        run_stage(job, "warmup")

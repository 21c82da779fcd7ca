# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
import torch

from pfnas_fast.errors import InputError
from pfnas_fast.run import Run, make_config


def _write_half(file: Path) -> None:
    file.write_text("half")
    raise KeyError("stopped half way")


def test_files_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.write_json("a.json", [1])
    with pytest.raises(TypeError, match="not JSON serializable"):
        run.write_json("a.json", [2, object()])
    with pytest.raises(KeyError), run.atomic("a.json") as temporary:
        _write_half(temporary)
    assert run.read_json("a.json") == [1]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "checkpoints", "run.json"]


def test_checkpoints_hold_no_code(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save("x", {"step": 3, "weights": {"w": torch.ones(2)}})
    assert run.load("x")["step"] == 3
    torch.save({"step": Path("code")}, run.path("checkpoints/bad.pt"))
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        run.load("bad")


def test_a_folder_holds_one_run(tmp_path: Path) -> None:
    Run(tmp_path, config=make_config(recipe="demo"))
    Run(tmp_path, config=make_config(recipe="demo", assignments=["num_workers=2"]))  # changes no result
    with pytest.raises(InputError, match=r"expected seed=0 .* got 1; choose another --out"):
        Run(tmp_path, config=make_config(recipe="demo", overrides={"seed": 1}))


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a run folder \(with config.yaml\)"):
        Run.open(tmp_path)
    with pytest.raises(InputError, match=r"run `pfnas warmup --out .*` first"):
        Run(tmp_path).load("warmup")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match="expected a folder for out"):
        Run(file)


def test_log_survives_a_cut_line(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.log("step", loss=1.0)
    with run.path("log.jsonl").open("a") as file:
        file.write('{"event": "st')
    assert [line["loss"] for line in run.read_log("step")] == [1.0]

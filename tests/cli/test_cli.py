# SPDX-License-Identifier: Apache-2.0
import json
import sys
from pathlib import Path

import pytest
import torch

import pfnas_fast as pf
from pfnas_fast.cli import main


def _call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["pfnas", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        main()
    return int(exit_info.value.code or 0)


def test_budget_outside_the_space_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _call(monkeypatch, "search", "--space", "ofa_mbv3_w1.0", "--max-macs-m", "20") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    low, high = pf.CostModel(pf.load_space("ofa_mbv3_w1.0"), num_classes=1).range_m()
    assert "20" in error
    assert f"{low:.1f}"[:3] in error
    assert f"{high:.1f}"[:3] in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--space", "tinny", "--dry-run"], "tinny"),
        (["run", "--data", "no/such/folder", "--dry-run"], "no/such/folder"),
        (["run", "--set", "colour=red", "--dry-run"], "colour"),
        (["run", "--max-macs-m", "1", "--dry-run"], "max_macs_m"),
        (["demo", "--preset", "bignas", "--dry-run"], "bignas"),
        (["search", "--out", "no/such/run"], "no/such/run"),
        (["predict", "no_model.pt", "no_image.jpg"], "no_model.pt"),
        (["compare", "no/run"], "at least two"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _call(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_dry_run_prints_the_plan_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _call(monkeypatch, "demo", "--dry-run", "--preset", "ofa") == 0
    text = capsys.readouterr().out
    for word in ("pretrain", "progressive", "M MACs", "MB", "label", "search"):
        assert word in text
    assert list(tmp_path.iterdir()) == []


def test_checks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _call(monkeypatch, "checks") == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("model") / "m.pt"
    torch.manual_seed(0)
    space = pf.load_space("tiny")
    pf.Detector(space, space.min_path(), num_classes=2, class_names=["red", "green"]).save(file)
    return file


def test_predict_and_val(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    model: Path,
    toy_detection: Path,
) -> None:
    images = toy_detection / "images" / "test"
    assert (
        _call(monkeypatch, "predict", str(model), str(images), "--out", str(tmp_path), "--threshold", "0.01")
        == 0
    )
    assert len(json.loads((tmp_path / "detections.json").read_text())) == 6
    assert len(list(tmp_path.glob("*.png"))) == 6
    assert _call(monkeypatch, "val", str(model), "--data", str(toy_detection)) == 0
    assert "ap50" in capsys.readouterr().out


def test_export_is_verified(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path) -> None:
    assert _call(monkeypatch, "export", str(model), "--out", str(tmp_path / "m.pt2")) == 0
    assert (tmp_path / "m.pt2").stat().st_size > 10_000
    assert _call(monkeypatch, "export", str(model), "--out", str(tmp_path / "m.tflite")) == 2

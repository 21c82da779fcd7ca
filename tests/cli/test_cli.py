# SPDX-License-Identifier: Apache-2.0
import json
import math
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from PIL import Image

import pfnas_fast as pf
from pfnas_fast.cli import main
from pfnas_fast.cli.models import validate
from pfnas_fast.run.plan import check_search_limits


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
        (["run", "--pretrain-data", "no/pictures", "--dry-run"], "no/pictures"),
        (["run", "--set", "search_resolution=100", "--dry-run"], "got 100"),
        (["search", "--max-macs-m", "1000"], "--max-macs-m, got 1000"),
        (["search", "--set", "search_resolution=100"], "got 100"),
        (["run", "--set", "data=[a"], "expected YAML"),
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


def test_device_that_is_absent_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _call(monkeypatch, "run", "--device", "cuda", "--backend", "reference") == 2
    assert "for device, got 'cuda' and none" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_budget_is_checked_at_the_search_resolution() -> None:
    space = pf.load_space("tiny")
    cost = pf.CostModel(space, num_classes=2)
    low, high = cost.range_m(space.resolutions[0])
    settings = [f"search_resolution={space.resolutions[0]}", f"max_macs_m={cost.range_m()[1]}"]
    with pytest.raises(pf.InputError, match=f"to {math.floor(high * 100) / 100:.2f} million MACs"):
        check_search_limits(pf.make_config(assignments=settings), cost)
    check_search_limits(pf.make_config(assignments=[settings[0], f"max_macs_m={(low + high) / 2}"]), cost)


def test_search_checks_the_budget_of_a_started_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pf.Run(tmp_path, config=pf.make_config(overrides={"space": "ofa_mbv3_w1.0"}))
    assert _call(monkeypatch, "search", "--out", str(tmp_path), "--max-macs-m", "20") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "for --max-macs-m, got 20" in error


def test_predict_names_are_distinct(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path, toy_detection: Path
) -> None:
    image = next((toy_detection / "images" / "test").iterdir())
    for name in ("a/x.png", "b/x.png", "b/x-2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(image.read_bytes())
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    out = tmp_path / "out"
    assert _call(monkeypatch, "predict", str(model), *folders, "--out", str(out)) == 0
    assert len(list(out.glob("*.png"))) == 3
    assert (out / "x-2.png").is_file()
    assert _call(monkeypatch, "predict", str(model), *folders, "--out", folders[1]) == 2
    assert (tmp_path / "b" / "x.png").read_bytes() == image.read_bytes()


def test_val_adds_the_voc_numbers(tmp_path: Path) -> None:
    for index in range(8):
        _add_voc_image(tmp_path / "VOCdevkit" / "VOC2012", str(index), "train" if index < 6 else "val")
    file = tmp_path / "m.pt"
    space = pf.load_space("tiny")
    pf.Detector(space, space.min_path(), num_classes=1, class_names=["bolt"]).save(file)
    values = validate(file, str(tmp_path), "test", 0, 0.4)
    assert {"ap", "ap50", "ap50_voc07", "ap50_voc12"} <= set(values)
    with pytest.raises(pf.InputError, match="for label, got 2"):
        validate(file, str(tmp_path), "test", 0, 2.0)


def _add_voc_image(year: Path, name: str, split: str) -> None:
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (year / part).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (96, 72), (90, 90, 90)).save(year / "JPEGImages" / f"{name}.jpg")
    box = "<bndbox><xmin>9</xmin><ymin>9</ymin><xmax>60</xmax><ymax>50</ymax></bndbox>"
    size = "<size><width>96</width><height>72</height><depth>3</depth></size>"
    (year / "Annotations" / f"{name}.xml").write_text(
        f"<annotation>{size}<object><name>bolt</name><difficult>0</difficult>{box}</object></annotation>"
    )
    with (year / "ImageSets" / "Main" / f"{split}.txt").open("a") as file:
        file.write(f"{name}\n")


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
    assert metadata.version("torch") in text
    assert "active ISA" in text
    assert "SystemReport(" not in text


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

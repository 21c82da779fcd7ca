# SPDX-License-Identifier: Apache-2.0
"""The Python example of the README runs, with fewer steps and paths than it asks for."""

import re
from pathlib import Path

import pytest
import torch

import pfnas_fast as pf

README = Path(__file__).resolve().parents[2] / "README.md"
SMALLER = {  # what a test has no time for; each must occur
    "steps=1500": "steps=2, batch_size=2",
    "steps=3000": "steps=2, batch_size=2",
    "per_bin=24, num_bins=8": "per_bin=3, num_bins=4",
    "budgets_macs_m=[5, 8, 12, 20, 30, 45]": "budgets_macs_m=[5, 12], candidates_per_budget=1",
}


def test_python_example(toy_detection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    code = next(block for block in blocks if "pf.search(" in block)
    for old, new in {**SMALLER, "path/to/detection": str(toy_detection)}.items():
        assert old in code, f"the README has no {old!r} any more"
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    classifier = pf.ClassificationSupernet(pf.load_space("tiny").for_classification(), num_classes=3)
    checkpoint = Path("runs/mine/checkpoints/pretrain.pt")
    checkpoint.parent.mkdir(parents=True)
    torch.save({"model": classifier.state_dict(), "finished": True}, checkpoint)
    names: dict[str, object] = {}
    exec(compile(code, str(README), "exec"), names)
    detector = names["detector"]
    assert isinstance(detector, pf.Detector)
    assert len(detector.predict(torch.zeros(3, 96, 72, dtype=torch.uint8)).boxes) >= 0

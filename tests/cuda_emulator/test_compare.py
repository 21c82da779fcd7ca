# SPDX-License-Identifier: Apache-2.0
"""The comparison that users with a GPU run: its rows on emulated kernels, and what it says without a GPU."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from emulated_ops import emulated_ops

from pfnas_fast.ops._library import _C

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import suite_cuda

    return suite_cuda


def test_both_sides_of_every_kind_of_row_agree(suite: ModuleType, plain: ModuleType) -> None:
    """With a clock that counts calls; ours runs on the emulator."""
    from cuda_harness import compare_on_gpu
    from harness import Effort

    calls = []

    def clock(call: object) -> float:
        calls.append(call)
        assert callable(call)
        call()
        return 2.0

    setting = suite.Setting(torch.device("cpu"), torch.float32, batch=2, compiled=False)
    rows = [
        suite.depthwise(setting, 6, 7, stride, k, step)
        for stride in (1, 2)
        for k in (3, 5, 7)
        for step in (False, True)
    ]
    rows += [suite.pointwise(setting, 8, 20, 5, step) for step in (False, True)]
    before = plain.statistics()["launches"]
    with emulated_ops(plain):
        found = [
            row for r in rows for row in compare_on_gpu(r, clock, Effort(min_blocks=2, calls_per_block=3))
        ]
    assert plain.statistics()["launches"] > before
    assert [row.baseline for row in found] == ["eager", "cudnn_autotuned"] * len(rows)
    assert len(calls) == len(found) * 2 * 2 * 3
    assert all(row.ratio_min == row.ratio_median == 1 for row in found)
    assert len({row.name for row in found}) == len(rows)


def test_path_filter_row(suite: ModuleType, plain: ModuleType) -> None:
    """Ours on the emulator against torch's three ways, and against paths that are others'."""
    setting = suite.Setting(torch.device("cpu"), compiled=False)
    row = suite.path_filter(setting, num_paths=600, module=plain)
    assert row.name == "cuda/path_filter/21x10-128-64-1/600"
    assert list(row.baselines) == ["embedding_bag", "one_hot"]
    before = plain.statistics()["launches"]
    for theirs in row.baselines.values():
        row.check(theirs)
    assert plain.statistics()["launches"] == before + 2
    with pytest.raises(AssertionError, match="the two sides differ"):
        row.check(lambda: 1.01 * row.baselines["one_hot"]())  # type: ignore[operator]


def test_unequal_work_is_an_error(suite: ModuleType, plain: ModuleType) -> None:
    setting = suite.Setting(torch.device("cpu"), torch.float32, batch=1, compiled=False)
    with emulated_ops(plain):
        row = suite.pointwise(setting, 8, 20, 5, False)
        with pytest.raises(AssertionError, match="the two sides differ"):
            row.check(lambda: 1.01 * row.ours())


def test_without_a_gpu() -> None:
    if _C.cuda_built and _C.cuda_device_count() > 0:
        pytest.skip("this machine has a CUDA device")
    for suite, message in (("all", "CUDA"), ("search", "search has no rows for a GPU")):
        done = subprocess.run(
            [sys.executable, str(BENCHMARKS / "compare.py"), suite, "--device", "cuda", "--json"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith("compare: --device cuda: ")
        assert message in done.stderr

# SPDX-License-Identifier: Apache-2.0
"""The self-test that users with a GPU run: on the CPU, on emulated kernels, and on kernels that are wrong."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from emulated_ops import emulated_ops

from pfnas_fast.errors import InputError
from pfnas_fast.ops._library import _C
from pfnas_fast.selftest import Verdict, selftest


def test_cpu() -> None:
    verdicts = selftest("cpu")
    ops = {"dynamic_depthwise_conv", "dynamic_pointwise_conv", "path_filter"}
    assert {verdict.op for verdict in verdicts} == ops
    assert all(verdict.ok for verdict in verdicts), verdicts


def test_emulated_kernels(plain: ModuleType) -> None:
    before = plain.statistics()["launches"]
    with emulated_ops(plain):
        verdicts = selftest("cpu")
    assert all(verdict.ok for verdict in verdicts), verdicts
    assert plain.statistics()["launches"] > before + 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_emulated_gradients(dtype: torch.dtype, plain: ModuleType) -> None:
    """What the self-test adds on a CUDA device."""
    import pfnas_fast.selftest as module

    with emulated_ops(plain):
        for sizes in ((1, 1, 1, 1, 1), (2, 24, 12, 12, 96), (1, 40, 9, 5, 97)):
            results = module.pointwise_gradients(torch.device("cpu"), dtype, sizes)
            assert len(results) == 4
            for name, actual, expected, length in results:
                assert module._relative_error(actual, expected, length) <= 1, name


def test_emulated_path_filter(plain: ModuleType) -> None:
    """The branch of the CUDA device, and a kernel that draws one wrong code or scores badly."""
    import pfnas_fast.selftest as module

    class Wrong:
        """The emulator's kernel, with one field spoiled afterwards."""

        def __init__(self, spoil: Callable[[dict[str, Any]], None]) -> None:
            self._spoil = spoil

        def __getattr__(self, name: str) -> Any:
            return getattr(plain, name)

        def path_filter_cuda(self, fields: dict[str, Any]) -> None:
            plain.path_filter_cuda(fields)
            self._spoil(fields)

    def verdict(compiled: Any) -> Verdict:
        cases = module.path_filter_cases(torch.device("cpu"), compiled)
        return module.judge("path_filter", torch.float32, cases)

    before = plain.statistics()["launches"]
    right = verdict(plain)
    assert right.ok, right
    assert right.cases == 12
    assert plain.statistics()["launches"] == before + right.cases
    assert verdict(Wrong(lambda f: f["all_codes"][5, 1].add_(1))).message == "case 1: draw differs"
    assert verdict(Wrong(lambda f: f["costs"].mul_(1 + 1e-15))).message == "case 1: cost of the best differs"
    message = verdict(Wrong(lambda f: f["all_scores"].mul_(1.001))).message
    assert message.startswith("case 1: score is ")
    message = verdict(Wrong(lambda f: f["scores"].copy_(f["scores"].flip(1)))).message
    assert "of the best is " in message


def test_wrong_results_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import pfnas_fast.selftest as module

    right = module.dynamic_pointwise_conv
    monkeypatch.setattr(module, "dynamic_pointwise_conv", lambda **kw: right(**kw) * 1.001)
    wrong = [verdict for verdict in selftest("cpu") if not verdict.ok]
    assert [verdict.op for verdict in wrong] == ["dynamic_pointwise_conv"]
    assert "times as far off as rounding allows" in wrong[0].message

    monkeypatch.setattr(module, "dynamic_pointwise_conv", lambda **kw: right(**kw) * torch.nan)
    assert not all(verdict.ok for verdict in selftest("cpu"))


def test_without_a_device() -> None:
    if _C.cuda_built and _C.cuda_device_count() > 0:
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(InputError, match=r"selftest: expected a (build with CUDA|CUDA device)"):
        selftest("cuda")
    with pytest.raises(InputError, match="expected cpu or cuda for device, got 'tpu'"):
        selftest("tpu")

# SPDX-License-Identifier: Apache-2.0
"""The self-test that users with a GPU run: on the CPU, on emulated kernels, and on kernels that are wrong."""

from types import ModuleType

import pytest
import torch
from emulated_ops import emulated_ops

from pfnas_fast.errors import InputError
from pfnas_fast.ops._library import _C
from pfnas_fast.selftest import selftest


def test_cpu() -> None:
    verdicts = selftest("cpu")
    assert {verdict.op for verdict in verdicts} == {"dynamic_depthwise_conv", "dynamic_pointwise_conv"}
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

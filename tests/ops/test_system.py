# SPDX-License-Identifier: Apache-2.0
"""Tiers, OpenMP runtimes, fork and the report behind `pfnas checks`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pfnas_fast._system import (
    cpu_isa,
    force_cpu_isa,
    supported_cpu_isas,
    system_report,
)
from pfnas_fast.errors import InputError


def test_best_tier_is_active() -> None:
    assert cpu_isa() == supported_cpu_isas()[-1]
    assert supported_cpu_isas()[0] == "portable"


def test_force_and_release(tier: str) -> None:
    assert cpu_isa() == tier
    force_cpu_isa(None)
    assert cpu_isa() == supported_cpu_isas()[-1]


def test_unknown_tier_is_refused() -> None:
    with pytest.raises(InputError, match=r"force_cpu_isa: expected one of portable.* for tier, got sse9"):
        force_cpu_isa("sse9")
    assert cpu_isa() == supported_cpu_isas()[-1]


def test_one_openmp_runtime() -> None:
    """torch ships libgomp.so.1 under its plain name since 2.13: then both must share it.

    Asked in a fresh process: in this one other tests have loaded scikit-learn, which brings a libgomp of its
    own.
    """
    bundled = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    if not bundled.exists():
        pytest.skip("this torch does not ship libgomp under its plain name")
    program = "import pfnas_fast; from pfnas_fast._system import openmp_runtimes; print(openmp_runtimes())"
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == str((str(bundled.resolve()),))


def test_report() -> None:
    report = system_report()
    assert report.active_isa == cpu_isa()
    assert report.versions["torch"].startswith(torch.__version__.split("+")[0])
    assert ("active ISA", cpu_isa()) in report.rows()
    assert not any("slower tier" in advice for advice in report.advice)


def test_report_advises_on_a_forced_tier() -> None:
    best = supported_cpu_isas()[-1]
    if best == "portable":
        pytest.skip("this CPU has one tier only")
    force_cpu_isa("portable")
    advice = system_report().advice
    force_cpu_isa(None)
    assert any(f"goes back to {best}" in line for line in advice)


FORK = """
import os, sys, torch
from pfnas_fast.ops import dynamic_depthwise_conv
torch.set_num_threads(2)
x = torch.randn(4, 64, 20, 20).to(memory_format=torch.channels_last)
bank = torch.randn(64, 1, 7, 7)
before = dynamic_depthwise_conv(x, bank, kernel_size=7).numpy().tobytes()
child = os.fork()
if child == 0:  # no torch op with threads of its own here: those would hang
    os._exit(0 if dynamic_depthwise_conv(x, bank, kernel_size=7).numpy().tobytes() == before else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_forked_child_does_not_hang() -> None:
    """A data loader's worker forks after the parent has used its threads."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", FORK], timeout=60, env=environment, check=False)
    assert done.returncode == 0

# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the op tests: every compiled tier of this machine, and scratch memory that starts as NaN."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from pfnas_fast import _C
from pfnas_fast._system import force_cpu_isa, supported_cpu_isas

CPU_TIERS = ["portable", "avx2", "avx512"]
sys.path.append(str(Path(__file__).resolve().parents[1] / "cuda_emulator"))


@contextmanager
def _forced(tier: str) -> Iterator[str]:
    if tier not in supported_cpu_isas():
        pytest.skip(f"this CPU (or this build) does not run the {tier} tier")
    force_cpu_isa(tier)
    yield tier
    force_cpu_isa(None)


@pytest.fixture(params=CPU_TIERS)
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per instruction-set tier; skips those that this CPU cannot run."""
    with _forced(request.param) as name:
        yield name


@pytest.fixture(params=[*CPU_TIERS, "cuda-emulated"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """As `tier`, and the op's CUDA kernels, which tests/cuda_emulator runs on CPU tensors."""
    if request.param != "cuda-emulated":
        with _forced(request.param) as name:
            yield name
        return
    from emulated_ops import emulated_ops
    from emulator_build import PLAIN, build_module, compiler, load_module

    if compiler() is None:
        pytest.skip("the CUDA emulator needs g++ on x86-64 Linux")
    with emulated_ops(load_module(build_module(PLAIN))):
        yield request.param


@pytest.fixture(autouse=True)
def poisoned_scratch() -> None:
    """A kernel that reads scratch memory it has not written sees NaN, not the zeros of a fresh page."""
    _C.poison_thread_scratch()
    _C.poison_tensor_pool()


@pytest.fixture
def num_threads() -> Iterator[None]:
    """Restores torch's number of threads after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)

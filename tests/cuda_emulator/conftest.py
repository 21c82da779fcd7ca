# SPDX-License-Identifier: Apache-2.0
"""Emulated builds of the CUDA kernels, made once per session, and the orders in which threads run."""

import shutil
from collections.abc import Iterator
from types import ModuleType

import pytest
from emulated_ops import ORDERS, emulated_ops
from emulator_build import PLAIN, TRACED, build_module, compiler, load_module


@pytest.fixture(scope="session")
def emulator() -> str:
    """The compiler; tests that need the emulator are skipped where it does not run."""
    found = compiler()
    if found is None:
        pytest.skip("the CUDA emulator needs g++ on x86-64 Linux")
    return found


@pytest.fixture(scope="session")
def plain(emulator: str) -> ModuleType:
    """All CUDA ops, emulated, at full speed."""
    return load_module(build_module(PLAIN))


@pytest.fixture(params=ORDERS, ids=lambda order: f"{order[0]}-{order[1]}")
def ordered(request: pytest.FixtureRequest, plain: ModuleType) -> Iterator[ModuleType]:
    """The plain build, running threads and blocks in one of the orders; the ops run on it."""
    plain.set_order(*request.param)
    with emulated_ops(plain):
        yield plain
    plain.set_order("forward")


@pytest.fixture
def emulated(plain: ModuleType) -> Iterator[ModuleType]:
    """The plain build, with the ops running on it, as sm_80 unless a test sets another."""
    with emulated_ops(plain):
        yield plain
    plain.set_compute_capability(80)


@pytest.fixture(scope="session")
def traced(emulator: str) -> ModuleType:
    """All CUDA ops, emulated, with every access watched."""
    return load_module(build_module(TRACED))


@pytest.fixture(scope="session")
def nvcc() -> str:
    """The CUDA compiler; tests that need it are skipped where it is absent."""
    found = shutil.which("nvcc")
    if found is None:
        pytest.skip("needs nvcc on the PATH")
    return found

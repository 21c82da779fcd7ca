# SPDX-License-Identifier: Apache-2.0
"""Emulated builds of the CUDA kernels, made once per session, and the orders in which threads run."""

import shutil
from collections.abc import Iterator
from types import ModuleType

import pytest
from emulated_ops import ORDERS, SEEDS, emulated_ops
from emulator_build import PLAIN, SANITIZED, TRACED, build_module, compiler, load_module


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sanitized", action="store_true", help="kernels under ASan and UBSan (test_sanitized.py)"
    )


def _sanitized(config: pytest.Config) -> bool:
    return bool(config.getoption("--sanitized", default=False))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under the sanitizers, only what runs kernels from their source."""
    if not _sanitized(config):
        return
    names = [set(getattr(item, "fixturenames", ())) for item in items]
    kept = [item for item, n in zip(items, names, strict=True) if "plain" in n and not n & {"nvcc", "traced"}]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@pytest.fixture(scope="session")
def emulator() -> str:
    """The compiler; tests that need the emulator are skipped where it does not run."""
    found = compiler()
    if found is None:
        pytest.skip("the CUDA emulator needs g++ on x86-64 Linux")
    return found


@pytest.fixture(scope="session")
def plain(emulator: str, pytestconfig: pytest.Config) -> ModuleType:
    """All CUDA ops, emulated, at full speed; with --sanitized, every access checked."""
    return load_module(build_module(SANITIZED if _sanitized(pytestconfig) else PLAIN))


@pytest.fixture(params=SEEDS, ids=lambda seed: f"seed{seed}")
def seed(request: pytest.FixtureRequest) -> int:
    """Of the inputs, and of the random order."""
    return request.param


@pytest.fixture(params=ORDERS)
def ordered(request: pytest.FixtureRequest, plain: ModuleType, seed: int) -> Iterator[ModuleType]:
    """The plain build, running threads and blocks in one of the orders; the ops run on it."""
    plain.set_order(request.param, seed)
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

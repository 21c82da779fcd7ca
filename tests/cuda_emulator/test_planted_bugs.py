# SPDX-License-Identifier: Apache-2.0
"""The harness catches every planted bug by name. A layer that stops seeing its bugs fails here."""

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from emulator_build import PLAIN, SANITIZED, TRACED, load_module, sanitizer_environment
from samples import BUGS, KERNELS, SOURCE, build, kernel_of, prepare
from traces import Trace, trace

ORDERS = ("forward", "reverse", "random")


@pytest.fixture(scope="module")
def plain_samples(emulator: str) -> ModuleType:
    return load_module(build(PLAIN))


@pytest.fixture(scope="module")
def traced_samples(emulator: str) -> ModuleType:
    return load_module(build(TRACED))


@pytest.fixture(scope="module", params=[80, 90])
def translated_samples(request: pytest.FixtureRequest, emulator: str, nvcc: str) -> ModuleType:
    from cuda_compiler import translated_object

    ptx = translated_object(SOURCE, request.param)
    return load_module(build(PLAIN, extra_objects=[ptx], name=f"_samples_sm{request.param}"))


def line_of(text: str, occurrence: int = 0) -> int:
    """Line of the samples that contains a text."""
    lines = [i for i, line in enumerate(SOURCE.read_text().splitlines(), 1) if text in line]
    return lines[occurrence]


def outcomes(module: ModuleType, bug: str) -> list[str]:
    """Per order: "right", "wrong" or the emulator's message."""
    results = []
    for order in ORDERS:
        module.set_order(order, 3)
        sample = prepare(module, kernel_of(bug), BUGS[bug])
        try:
            sample.launch()
            results.append("right" if sample.error() == 0 else "wrong")
        except module.EmulatorError as error:
            results.append(str(error))
    module.set_order("forward")
    return results


def traced(module: ModuleType, kernel: str, bug: str) -> Trace:
    sample = prepare(module, kernel, BUGS[bug])
    return trace(module, {n: (b.address, b.size) for n, b in sample.buffers.items()}, sample.launch)


@pytest.mark.parametrize("kernel", KERNELS)
def test_samples_without_bugs_pass_every_layer(
    kernel: str, plain_samples: ModuleType, traced_samples: ModuleType
) -> None:
    for order in ORDERS:
        plain_samples.set_order(order, 3)
        sample = prepare(plain_samples, kernel, 0)
        sample.launch()
        assert sample.error() == 0
    plain_samples.set_order("forward")
    found = traced(traced_samples, kernel, "none")
    assert found.clean, found
    assert found.conflicts() == 1


@pytest.mark.parametrize("kernel", KERNELS)
def test_translated_samples_are_exact(kernel: str, translated_samples: ModuleType) -> None:
    before = sum(translated_samples.translated_kernels().values())
    sample = prepare(translated_samples, kernel, 0)
    sample.launch()
    assert sample.error() == 0
    assert sum(translated_samples.translated_kernels().values()) == before + 1
    counts = translated_samples.instruction_counts()
    if kernel == "tile_multiply":  # 64^3 products, and nothing else is a float fma
        assert counts["fma.rn.f32"] == 64**3


@pytest.mark.parametrize(
    ("bug", "expected"),
    [
        ("no barrier before overwrite", ["wrong"]),
        ("shared out of bounds", ["wrong"]),
        ("no barrier between warps", ["wrong"]),
        (
            "partial shuffle",
            [r"deadlock: warp collective with mask ffffffff but only lanes 0000ffff there: .*samples\.cu"],
        ),
        ("one group too few", ["wrong"]),
        ("global off by one", ["wrong"]),
        ("misaligned vector", [r"misaligned 16-byte access: .*samples\.cu:"]),
        ("uninitialised shared", ["wrong"]),
    ],
)
def test_orders_catch(bug: str, expected: list[str], plain_samples: ModuleType) -> None:
    """Layer 1: a wrong or NaN result in some order, or a message that names the place."""
    results = outcomes(plain_samples, bug)
    for pattern in expected:
        assert any(re.fullmatch(f"{pattern}.*", result) for result in results), results


@pytest.mark.parametrize("bug", ["shared out of bounds", "global off by one"])
def test_address_sanitizer_catches(bug: str, emulator: str) -> None:
    """Layer 1 under ASan and UBSan: the line of the access."""
    text = {"shared out of bounds": "sums[warp +", "global off by one": "y[0] = value.x"}[bug]
    done = run_sanitized(build(SANITIZED), bug)
    assert done.returncode != 0
    reports = {"shared out of bounds": "out of bounds for type", "global off by one": "heap-buffer-overflow"}
    assert reports[bug] in done.stderr, done.stderr[:3000]
    assert f"samples.cu:{line_of(text)}" in done.stderr, done.stderr[:3000]


def test_address_sanitizer_is_quiet_without_bugs(emulator: str) -> None:
    done = run_sanitized(build(SANITIZED), "bank conflict")  # slow on a GPU, but right
    assert done.returncode == 0, done.stderr[:3000]


def run_sanitized(module: Path, bug: str) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).with_name("samples.py")
    return subprocess.run(
        [sys.executable, str(script), str(module), bug],
        capture_output=True,
        text=True,
        env=sanitizer_environment(),
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("bug", "pattern"),
    [
        ("no barrier before overwrite", r"(write|read) of shared memory at samples\.cu:\d+"),
        ("no barrier between warps", r"(write|read) of shared memory at samples\.cu:\d+"),
        ("plain add across blocks", r"(write|read) of total at samples\.cu:{add}"),
    ],
)
def test_tracer_finds_the_race(bug: str, pattern: str, traced_samples: ModuleType) -> None:
    """Layer 2: independent of the schedule."""
    found = traced(traced_samples, kernel_of(bug), bug)
    pattern = pattern.replace("{add}", str(line_of("*p.total += sum")))
    assert any(re.match(pattern, race) for race in found.races), found.races


@pytest.mark.parametrize(
    ("bug", "text"), [("shared out of bounds", "sums[warp +"), ("global off by one", "y[0] = value.x")]
)
def test_tracer_finds_the_access_out_of_bounds(bug: str, text: str, traced_samples: ModuleType) -> None:
    found = traced(traced_samples, kernel_of(bug), bug)
    assert f"samples.cu:{line_of(text)}" in found.out_of_bounds


def test_tracer_counts_bank_conflicts(traced_samples: ModuleType) -> None:
    """Without padding the 32 lanes of a store down a column share one bank."""
    line = f"samples.cu:{line_of('a[column * pitch + r] =')}"
    good = traced(traced_samples, "tile_multiply", "none")
    bad = traced(traced_samples, "tile_multiply", "bank conflict")
    assert good.units_per_request("shared", "store", line) == 1
    assert bad.units_per_request("shared", "store", line) == 32


def test_tracer_counts_sectors(traced_samples: ModuleType) -> None:
    """Rows of 32 floats are four sectors; the footprint is the matrices, read once per block row."""
    found = traced(traced_samples, "tile_multiply", "none")
    assert found.units_per_request("global", "load") == 4
    assert found.units_per_request("global", "store") == 4
    sectors = 64 * 64 * 4 // 32
    assert found.buffers["a"].read_footprint == sectors
    assert found.buffers["a"].block_reads == 2 * sectors
    assert found.buffers["c"].write_footprint == found.buffers["c"].block_writes == sectors


@pytest.mark.parametrize(
    "bug",
    [
        "no barrier before overwrite",
        "no barrier between warps",
        "partial shuffle",
        "one group too few",
        "misaligned vector",
        "uninitialised shared",
    ],
)
def test_translated_ptx_catches(bug: str, translated_samples: ModuleType) -> None:
    """Layer 3: what the compiler made of the bug is wrong too."""
    assert set(outcomes(translated_samples, bug)) != {"right"}


def test_every_planted_bug_is_listed() -> None:
    names = re.findall(r"k(\w+) = (\d+),", (SOURCE.parent / "samples.h").read_text())
    assert {int(number) for _, number in names} == set(BUGS.values())
    assert {bug for bugs in KERNELS.values() for bug in bugs} == set(BUGS) - {"none"}

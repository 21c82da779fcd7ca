# SPDX-License-Identifier: Apache-2.0
"""train_mbconv against its float64 twin: values, moments, gradients, determinism, errors."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from train_mbconv_cases import CASES, HSWISH, Arguments, Case

from pfnas_fast.errors import InputError
from pfnas_fast.ops import reference, train_mbconv

# Sums over all pixels and channels, in float32 and in another order than the twin's.
TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert actual.shape == expected.shape, what
    error = float((actual.detach().double() - expected.detach()).abs().max())
    scale = float(expected.detach().abs().max())
    assert error <= tolerance * scale, f"{what}: error {error:.2e} of {scale:.2e}"


def compare(ours: Arguments, theirs: Arguments, tolerance: float = GRADIENT_TOLERANCE) -> None:
    y, moments, grads = ours.gradients(train_mbconv)
    expected, expected_moments, expected_grads = theirs.gradients(reference.train_mbconv)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert not moments.requires_grad
    assert_close(y, expected, TOLERANCE, "y")
    present = ~expected_moments[0].isnan()
    assert moments[:, ~present].isnan().all()
    for row, name in enumerate(("mean", "variance", "invstd")):
        assert_close(moments[row][present], expected_moments[row][present], TOLERANCE, name)
    for name, wanted in expected_grads.items():
        got = grads[name]
        assert (got is None) == (wanted is None), name
        if got is not None and wanted is not None:
            assert_close(got, wanted, tolerance, name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients(case: Case, tier: str) -> None:
    ours = Arguments(case)
    compare(ours, ours.double())


@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[8]], ids=lambda case: case.name)
def test_same_bits_for_any_number_of_threads(case: Case, num_threads: None) -> None:
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        y, moments, grads = Arguments(case).gradients(train_mbconv)
        results.append([y, moments, *(g for g in grads.values() if g is not None)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_plans_compute_the_same_bits(case: Case, tier: str) -> None:
    speed, memory = (Arguments(case).gradients(train_mbconv, plan=plan) for plan in ("speed", "memory"))
    assert torch.equal(speed[0], memory[0])
    assert torch.equal(speed[1].nan_to_num(), memory[1].nan_to_num())
    for name, grad in speed[2].items():
        other = memory[2][name]
        assert (grad is None) == (other is None), name
        assert grad is None or other is None or torch.equal(grad, other), name


def test_gradients_are_written_beyond_the_part_in_use(tier: str) -> None:
    """Uninitialised memory is filled with NaN, so that what nobody writes shows."""
    case = Case(2, 17, 49, 18, 4, 3, kernel_size=3, se=9, spare=3)
    expected = Arguments(case).gradients(train_mbconv)[2]
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore
        grads = Arguments(case).gradients(train_mbconv)[2]
    finally:
        torch.use_deterministic_algorithms(False)
    for name, grad in grads.items():
        wanted = expected[name]
        assert grad is not None, name
        assert wanted is not None, name
        assert torch.equal(grad, wanted), name
    for name, used in (("expand", (49, 17)), ("project", (18, 49)), ("w1", (9, 49)), ("w2", (49, 9))):
        grad = grads[name]
        assert grad is not None
        assert not grad[used[0] :].any(), name
        assert not grad[:, used[1] :].any(), name
        assert grad[: used[0], : used[1]].any(), name


def assert_as_good_as_torch(make: Any) -> None:
    """Errors against float64 of at most four times those of the twin in float32, or 1e-5 (gradients 1e-4)."""
    ours, torchs, exact = make(), make(), make().double()
    results = [a.gradients(op) for a, op in ((ours, train_mbconv), (torchs, reference.train_mbconv))]
    y, moments, grads = exact.gradients(reference.train_mbconv)
    values = [(r[0], r[1][0], r[1][1] + 1e-5) for r in results]
    named = zip(("y", "mean", "variance"), *values, (y, moments[0], moments[1] + 1e-5), strict=True)
    checks = [(name, mine, theirs, wanted, TOLERANCE) for name, mine, theirs, wanted in named]
    for name, wanted in grads.items():
        mine, theirs = (r[2][name] for r in results)
        if wanted is not None and mine is not None and theirs is not None:
            checks.append((name, mine, theirs, wanted, GRADIENT_TOLERANCE))
    for name, mine, theirs, wanted, tolerance in checks:
        error, torch_error = (float((t.detach().double() - wanted).abs().max()) for t in (mine, theirs))
        limit = max(4 * torch_error, tolerance * float(wanted.abs().max()))
        assert error <= limit, f"{name}: error {error:.2e}, torch {torch_error:.2e}"


@pytest.mark.parametrize("mean", [20.0, -20.0])
def test_large_means(mean: float, tier: str) -> None:
    """mean / std = 20 in x, and once more after the expansion."""

    def make() -> Arguments:
        a = Arguments(Case(4, 16, 32, 16, 12, 12, kernel_size=5, activations=HSWISH))
        with torch.no_grad():
            a.x += mean
        return a

    assert_as_good_as_torch(make)


def test_wide_spread_of_variances(tier: str) -> None:
    """The covariance of x has eigenvalues from 1 to 1e-6."""

    def make() -> Arguments:
        a = Arguments(Case(4, 16, 48, 24, 9, 9, kernel_size=3, se=8, activations=HSWISH))
        g = torch.Generator().manual_seed(5)
        rotation, _ = torch.linalg.qr(torch.randn(16, 16, generator=g))
        with torch.no_grad():
            scaled = a.x.permute(0, 2, 3, 1) * torch.logspace(0, -3, 16)
            a.x.copy_((scaled @ rotation).permute(0, 3, 1, 2))
        return a

    assert_as_good_as_torch(make)


@pytest.mark.parametrize("size", [(2, 1, 1), (1, 1, 2), (3, 1, 1), (1, 2, 2), (1, 1, 17)])
def test_few_values_per_channel(size: tuple[int, int, int], tier: str) -> None:
    n, h, w = size
    assert_as_good_as_torch(lambda: Arguments(Case(n, 16, 40, 16, h, w, kernel_size=5, activations=HSWISH)))


def test_gradient_parallel_to_the_normalised_output(tier: str) -> None:
    """Then next to nothing passes the last normalisation, and what is left must not be rounding."""
    case = Case(4, 16, 32, 24, 12, 12, kernel_size=5, activations=HSWISH)
    grads: list[Tensor] = []
    for parallel in (True, False):
        a = Arguments(case)
        gamma, beta = a.norms[2]
        y, _ = a.run(train_mbconv)
        normalised = (y.detach() - beta.detach()[:, None, None]) / gamma.detach()[:, None, None]
        other = torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
        y.backward(normalised if parallel else other)
        assert a.x.grad is not None
        grads.append(a.x.grad)
    assert float(grads[0].abs().max()) <= 1e-4 * float(grads[1].abs().max())


@pytest.mark.parametrize("case", [CASES[0], CASES[4]], ids=lambda case: case.name)
def test_nan_in_gives_nan_out(case: Case, tier: str) -> None:
    ours = Arguments(case)
    with torch.no_grad():
        ours.x[0, 1, 2, 3] = math.nan
    theirs = ours.double()
    y, moments, grads = ours.gradients(train_mbconv)
    _, _, expected = theirs.gradients(reference.train_mbconv)
    assert y.isnan().all()
    assert moments[:, case.ce :].isnan().all()
    for name, wanted in expected.items():
        grad = grads[name]
        if grad is not None and wanted is not None:
            assert grad[wanted.isnan()].isnan().all(), name


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"n": 1, "h": 1, "w": 1}, InputError, "more than one value per channel for x"),
        ({"max_kernel": 3, "kernel_size": 5}, InputError, "an odd size from 3 to 3 for kernel_size, got 5"),
        ({"stride": 3}, InputError, "1 or 2 for stride, got 3"),
    ],
)
def test_mistakes_are_named(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="train_mbconv: expected ") as caught:
        Arguments(CASES[0]._replace(**change)).run(train_mbconv)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"se_channels": 0}, "0 without excitation and >= 1 with it for se_channels, got 0"),
        ({"se_channels": -1}, "at least 0 for se_channels, got -1"),
        ({"mid_channels": 0}, "at least 1 for mid_channels, got 0"),
        ({"out_channels": -2}, "at least 1 for out_channels, got -2"),
        ({"matrices": (None,)}, "2 entries for matrices, got 1"),
        ({"excitation": ()}, "4 tensors or None for excitation, got 0"),
        ({"norms": [None, (torch.ones(120),), None]}, "each (scale, shift) or None for norms"),
        ({"plan": "small"}, "one of 'speed', 'memory' for plan, got 'small'"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    a = Arguments(CASES[2])
    names = ("x", "expand_weight", "depth_weight", "matrices", "project_weight", "norms", "excitation")
    values = (a.x, a.expand, a.bank, a.matrices, a.project, a.norms, a.excitation)
    c = a.case
    arguments: dict[str, Any] = dict(zip(names, values, strict=True))
    arguments |= {"mid_channels": c.ce, "out_channels": c.co, "se_channels": c.se}
    arguments |= {"kernel_size": c.kernel_size} | change
    with pytest.raises(InputError, match="train_mbconv: expected ") as caught:
        train_mbconv(**arguments)
    assert message in str(caught.value)


def test_half_a_norm_is_refused() -> None:
    a = Arguments(CASES[0])
    norms: Any = a.norms
    norms[1] = (norms[1][0], None)
    with pytest.raises(InputError, match="both scale and shift"):
        a.run(train_mbconv)


def test_wrong_dtypes_and_devices_are_named() -> None:
    a = Arguments(CASES[0])
    a.project = a.project.detach().double()
    with pytest.raises(TypeError, match="train_mbconv: expected float32 for project_weight, got float64"):
        a.run(train_mbconv)
    a.project = a.project.to("meta", torch.float16)  # halves are welcome under autocast only
    with pytest.raises(TypeError, match="train_mbconv: expected float32 for project_weight, got float16"):
        a.run(train_mbconv)

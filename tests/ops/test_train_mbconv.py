# SPDX-License-Identifier: Apache-2.0
"""train_mbconv against its float64 twin: values, moments, gradients, determinism, errors."""

import math
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from pfnas_fast.errors import InputError
from pfnas_fast.ops import reference, train_mbconv


class Case(NamedTuple):
    """Sizes of one call."""

    n: int
    ci: int
    ce: int
    co: int
    h: int
    w: int
    kernel_size: int = 3
    stride: int = 1
    max_kernel: int = 7
    activations: tuple[str | None, ...] = ("relu", "relu", None)
    se: int = 0
    spare: int = 0  # rows and columns of the weights beyond those in use
    expand: bool = True
    depth_norm: bool = True

    @property
    def residual(self) -> bool:
        return self.stride == 1 and self.ci == self.co

    @property
    def name(self) -> str:
        acts = "".join("0" if a is None else a[0] for a in self.activations)
        flags = f"{'' if self.expand else '-noexpand'}{'' if self.depth_norm else '-nonorm'}"
        return (
            f"{self.n}x{self.h}x{self.w}-{self.ci}-{self.ce}-{self.co}-k{self.kernel_size}of{self.max_kernel}"
            f"s{self.stride}{acts}se{self.se}+{self.spare}{flags}"
        )


HSWISH = ("hswish", "hswish", None)
CASES = [
    Case(2, 8, 24, 8, 9, 7, kernel_size=5, spare=8),
    Case(3, 24, 72, 40, 10, 10, kernel_size=7, stride=2, activations=HSWISH),
    Case(5, 40, 120, 40, 5, 5, kernel_size=3, se=32, spare=16),
    Case(2, 16, 40, 24, 13, 11, kernel_size=5, stride=2, se=16, activations=HSWISH, max_kernel=5),
    Case(9, 8, 16, 8, 7, 7, kernel_size=7, activations=HSWISH, se=8),
    Case(2, 3, 5, 7, 2, 2, kernel_size=3),  # channels that fill no vector, one pixel per corner
    Case(2, 17, 49, 18, 4, 3, kernel_size=5, se=9, spare=1),
    Case(1, 8, 16, 8, 1, 9, kernel_size=3, max_kernel=3),  # flat
    Case(1, 16, 33, 16, 40, 41, kernel_size=7),  # more pixels than a tile and a slab
    Case(2, 112, 336, 112, 6, 6, kernel_size=5, se=88, activations=HSWISH),  # small tiles
    Case(2, 16, 16, 16, 9, 8, expand=False, activations=(None, "relu", None), max_kernel=3),
    Case(2, 24, 24, 16, 6, 5, expand=False, depth_norm=False, activations=(None, None, "hswish")),
]
# Sums over all pixels and channels, in float32 and in another order than the twin's.
TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4


class Arguments:
    """Leaves of one call."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)

        def rand(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=g) * scale).requires_grad_()

        def norm(channels: int) -> tuple[Tensor, Tensor]:
            return (rand(channels, scale=0.3).detach() + 1).requires_grad_(), rand(channels, scale=0.3)

        ci, ce, co, r, s = case.ci, case.ce, case.co, case.se, case.spare
        k = case.max_kernel
        self.case = case
        x = rand(case.n, ci, case.h, case.w).detach()
        self.x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        self.expand = rand(ce + s, ci + s, 1, 1, scale=ci**-0.5) if case.expand else None
        self.bank = rand(ce + s, 1, k, k, scale=1 / k)
        self.matrices = tuple(
            (torch.eye(m) + torch.randn(m, m, generator=g) / m).requires_grad_() for m in (25, 9)
        )
        self.project = rand(co + s, ce + s, 1, 1, scale=ce**-0.5)
        self.norms = [
            norm(ce + s) if case.expand else None,
            norm(ce + s) if case.depth_norm else None,
            norm(co + s),
        ]
        self.excitation = None
        if r:
            self.excitation = (
                rand(r + s, ce + s, scale=2 * ce**-0.5),
                rand(r + s, scale=0.5),
                rand(ce + s, r + s, scale=2 * r**-0.5),
                rand(ce + s),
            )

    def leaves(self) -> dict[str, Tensor]:
        leaves = {"x": self.x, "bank": self.bank, "project": self.project}
        if self.expand is not None:
            leaves["expand"] = self.expand
        leaves |= dict(zip(("matrix_5", "matrix_3"), self.matrices, strict=True))
        for stage, norm in enumerate(self.norms):
            if norm is not None:
                leaves |= {f"gamma_{stage}": norm[0], f"beta_{stage}": norm[1]}
        if self.excitation is not None:
            leaves |= dict(zip(("w1", "b1", "w2", "b2"), self.excitation, strict=True))
        return leaves

    def double(self) -> "Arguments":
        other = Arguments(self.case)
        mine = self.leaves()
        for name, leaf in other.leaves().items():
            leaf.data = mine[name].detach().double()
        return other

    def run(self, op: Any, **options: Any) -> tuple[Tensor, Tensor]:
        c = self.case
        return op(
            *(self.x, self.expand, self.bank, self.matrices, self.project, self.norms, self.excitation),
            mid_channels=c.ce,
            out_channels=c.co,
            se_channels=c.se,
            kernel_size=c.kernel_size,
            stride=c.stride,
            residual=c.residual,
            activations=c.activations,
            **options,
        )

    def gradients(self, op: Any, **options: Any) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
        y, moments = self.run(op, **options)
        g = torch.Generator().manual_seed(7)
        y.backward(torch.randn(y.shape, generator=g).to(y.dtype))
        return y.detach(), moments, {name: leaf.grad for name, leaf in self.leaves().items()}


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


def test_plan_memory_keeps_thin_tensors_only() -> None:
    case, kept = Case(2, 8, 48, 8, 12, 12, kernel_size=5), []
    for plan in ("speed", "memory"):
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        a = Arguments(case)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            a.run(train_mbconv, plan=plan)
        own = {leaf.untyped_storage().data_ptr() for leaf in a.leaves().values()}
        kept.append(sum(size for pointer, size in sizes.items() if pointer not in own))
    pixels = 2 * 12 * 12
    assert kept[0] >= (48 + 48 + 16) * pixels * 4
    assert kept[1] <= 3 * (48 + 48 + 8) * 4


def test_nothing_is_kept_without_gradients() -> None:
    sizes: list[int] = []

    class Outputs(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.pfnas_fast.train_mbconv.default:
                sizes.append(sum(t.numel() for t in result[1:]))
            return result

    a = Arguments(CASES[0])
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), Outputs():
            y, _ = a.run(train_mbconv)
    assert y.grad_fn is None
    assert sizes[1] == 3 * (2 * 24 + 8) < sizes[0]


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


class Witness(TorchDispatchMode):
    """Counts the calls of ops of this package; its presence takes them through the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "pfnas_fast":
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


def test_calls_with_and_without_the_dispatcher_agree() -> None:
    direct = Arguments(CASES[2]).gradients(train_mbconv)
    with Witness() as witness:
        watched = Arguments(CASES[2]).gradients(train_mbconv)
    assert witness.seen == ["train_mbconv", "train_mbconv_backward"]
    assert torch.equal(direct[0], watched[0])
    assert torch.equal(direct[1], watched[1])
    for name, grad in direct[2].items():
        other = watched[2][name]
        assert (grad is None) == (other is None), name
        assert grad is None or other is None or torch.equal(grad, other), name


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


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[11]], ids=lambda case: case.name)
def test_opcheck(case: Case) -> None:
    a = Arguments(case)
    norms = [part for norm in a.norms for part in (norm or (None, None))]
    tensors = (a.x, a.expand, a.bank, *a.matrices, a.project, *norms, *(a.excitation or (None,) * 4))
    codes = [{None: 0, "relu": 1, "hswish": 2}[name] for name in case.activations]
    options = (
        case.ce,
        case.co,
        case.se,
        case.kernel_size,
        case.stride,
        case.residual,
        codes,
        [1e-5] * 3,
        True,
    )
    ops = torch.ops.pfnas_fast
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.train_mbconv.default, (*tensors, *options), test_utils=utils)
    plain = tuple(None if t is None else t.detach() for t in tensors)
    y, *kept = ops.train_mbconv(*plain, *options)
    torch.library.opcheck(
        ops.train_mbconv_backward.default, (y, *plain, *kept, *options, True), test_utils=utils
    )


def test_second_derivatives_raise() -> None:
    a = Arguments(CASES[0])
    y, _ = a.run(train_mbconv)
    (grad_x,) = torch.autograd.grad(y.square().sum(), a.x, create_graph=True)
    with pytest.raises(NotImplementedError, match="gradient cannot be differentiated again"):
        grad_x.sum().backward()


def test_frozen_parameters_get_no_gradient() -> None:
    a, full = Arguments(CASES[2]), Arguments(CASES[2])
    for name in ("x", "expand", "w1", "beta_2"):
        a.leaves()[name].requires_grad_(False)
    _, _, grads = a.gradients(train_mbconv)
    _, _, wanted = full.gradients(train_mbconv)
    for name, grad in grads.items():
        if name in ("x", "expand", "w1", "beta_2"):
            assert grad is None
        elif grad is not None:
            full_grad = wanted[name]
            assert full_grad is not None
            assert torch.equal(grad, full_grad), name


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


def test_autocast_computes_in_float32() -> None:
    """The one rule: what arrives in half precision is cast up, the result and its gradients are float32."""
    plain, cast = Arguments(CASES[2]), Arguments(CASES[2])
    plain.x = plain.x.detach().bfloat16().float().requires_grad_()
    cast.x = cast.x.detach().bfloat16().requires_grad_()
    expected, expected_moments, wanted = plain.gradients(train_mbconv)
    with torch.autocast("cpu", torch.bfloat16):
        y, moments = cast.run(train_mbconv)
    assert y.dtype == torch.float32
    assert torch.equal(y, expected)
    assert torch.equal(moments, expected_moments)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(7)))
    for name, leaf in cast.leaves().items():
        gradient = wanted[name]
        assert (leaf.grad is None) == (gradient is None), name
        if leaf.grad is not None and gradient is not None:
            assert leaf.grad.dtype == leaf.dtype
            assert torch.equal(leaf.grad, gradient.to(leaf.dtype)), name


def test_compile_once_for_all_widths() -> None:
    """Forward and backward are one graph, and 50 widths of a block cost three compilations at most."""
    counter = CompileCounterWithBackend("aot_eager")  # no code is generated, to keep this fast
    compiled, eager = Arguments(Case(2, 16, 96, 16, 6, 6)), Arguments(Case(2, 16, 96, 16, 6, 6))

    def run(a: Arguments, x: Tensor, mid_channels: int) -> tuple[Tensor, Tensor]:
        return train_mbconv(
            *(x, a.expand, a.bank, (a.matrices[0], a.matrices[1]), a.project, a.norms),
            mid_channels=mid_channels,
            out_channels=16,
            kernel_size=3,
            residual=True,
        )

    block = torch.compile(partial(run, compiled), backend=counter, fullgraph=True)
    for mid_channels in range(24, 74):
        results = []
        for a, call in ((compiled, block), (eager, partial(run, eager))):
            for leaf in a.leaves().values():
                leaf.grad = None
            y, moments = call(a.x, mid_channels)
            y.square().sum().backward()
            results.append([y.detach(), moments, *(leaf.grad for leaf in a.leaves().values())])
        for actual, expected in zip(*results, strict=True):
            assert torch.equal(actual, expected)
    assert counter.frame_count <= 3

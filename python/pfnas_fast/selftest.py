# SPDX-License-Identifier: Apache-2.0
"""Runs the ops that have CUDA kernels on this machine's own device and compares them with their twins.

For those who have a GPU: the CUDA kernels are proven on a CPU emulator, so this is the first thing to run.
"""

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pfnas_fast.errors import InputError
from pfnas_fast.ops import (
    BudgetRanker,
    KernelTables,
    NetworkTables,
    PackedRanker,
    RankerTables,
    SearchSpace,
    dynamic_depthwise_conv,
    dynamic_pointwise_conv,
    pack_pointwise_weight,
    path_filter,
    reference,
)
from pfnas_fast.ops._library import _C
from pfnas_fast.ops.path_filter import CudaPathFilter
from pfnas_fast.space import AdditiveCost, BudgetSampler, CostModel, load_space

__all__ = ["Verdict", "selftest"]

_DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.bfloat16, torch.float16)}
_MAPS = ((1, 1, 1, 1), (2, 24, 28, 28), (3, 17, 9, 5), (2, 72, 20, 20), (1, 240, 14, 14))  # N, C, H, W
_WIDTHS = ((1, 1, 1, 1, 1), (2, 24, 28, 28, 96), (1, 40, 9, 5, 97), (2, 112, 14, 14, 672))  # and O
_PRESETS = ("tiny", "ofa_mbv3_w1.0")  # spaces that paths are drawn from
_EXACT = 0  # as the length of a sum: the bits must agree


@dataclass(frozen=True)
class Verdict:
    """What one op did in one storage type.

    Attributes:
        op: Name of the op.
        dtype: Storage type.
        cases: Calls compared.
        worst: Largest error over the error that rounding allows; at most 1 is right, NaN or more is wrong.
            Infinite where bits must agree and do not.
        message: First thing that went wrong, empty where nothing did.
    """

    op: str
    dtype: str
    cases: int
    worst: float
    message: str

    @property
    def ok(self) -> bool:
        """True where every result is within rounding of its twin."""
        return not self.message and self.worst <= 1


def selftest(device: str = "cuda") -> tuple[Verdict, ...]:
    """Compare the convolutions and the path filter with their twins.

    Values and gradients may differ by rounding; codes and costs of drawn paths must be the CPU engine's bits.

    Args:
        device: ``"cuda"``, ``"cuda:1"`` or ``"cpu"``.

    Returns:
        One verdict per op and storage type.

    Raises:
        InputError: An unknown device, a build without CUDA kernels, or no CUDA device (a ValueError).

    Example:
        >>> from pfnas_fast.selftest import selftest
        >>> all(verdict.ok for verdict in selftest("cpu"))
        True
    """
    kind = device.partition(":")[0]
    if kind not in _DTYPES:
        raise InputError(f"selftest: expected cpu or cuda for device, got {device!r}")
    if kind == "cuda" and not _C.cuda_built:
        raise InputError(
            "selftest: expected a build with CUDA kernels for device 'cuda', got one for the CPU only;"
            " reinstall with -C cmake.define.PFNAS_CUDA=ON"
        )
    if kind == "cuda" and _C.cuda_device_count() == 0:
        raise InputError("selftest: expected a CUDA device for device 'cuda', got none (no driver or no GPU)")
    where = torch.device(device)
    convolutions = {"dynamic_depthwise_conv": _depthwise, "dynamic_pointwise_conv": _pointwise}
    verdicts = [
        judge(op, dtype, cases(where, dtype)) for op, cases in convolutions.items() for dtype in _DTYPES[kind]
    ]
    return (*verdicts, judge("path_filter", torch.float32, path_filter_cases(where)))


Result = tuple[str, Tensor, Tensor, int]
"""Name, result, expectation in float64, length of the sums (0: the bits must agree)."""
Case = Callable[[], list[Result]]
"""Runs one call."""


def judge(op: str, dtype: torch.dtype, cases: Iterator[Case]) -> Verdict:
    """Run an op's cases until one fails to launch.

    Args:
        op: Its name.
        dtype: Storage type.
        cases: Calls, each with its expectations.
    """
    worst, count, message = 0.0, 0, ""
    for case in cases:
        count += 1
        try:
            for name, actual, expected, length in case():
                error = _relative_error(actual, expected, length)
                if not error <= 1 and not message:
                    off = f"is {error:.1f} times as far off as rounding allows"
                    message = f"case {count}: {name} {'differs' if length == _EXACT else off}"
                worst = error if not error <= worst else worst
        except RuntimeError as error:  # a launch that failed: the device takes no more work
            message = message or f"case {count}: {error}"
            break
    return Verdict(op, str(dtype).removeprefix("torch."), count, worst, message)


def _relative_error(actual: Tensor, expected: Tensor, length: int) -> float:
    """Largest error over the allowed one: a float32 sum of `length` terms, rounded once when stored."""
    if length == _EXACT:
        return 0.0 if torch.equal(actual.cpu(), expected) else math.inf
    if expected.numel() == 0:
        return 0.0
    stored = actual.dtype
    actual, expected = actual.detach().double().cpu(), expected.detach().cpu()
    eps = torch.finfo(torch.float32).eps
    allowed = 4 * eps * (1 + length**0.5 / 4) * expected.abs().max() + 2.0**-25
    if stored != torch.float32:
        allowed = allowed + torch.finfo(stored).eps / 2 * expected.abs()
    return float(((actual - expected).abs() / allowed).max())


def _generator(*sizes: int) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(repr(sizes).encode()))


def _depthwise(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    for n, c, h, w in _MAPS:
        for kernel_size in (3, 5, 7):
            for stride in (1, 2):

                def case(sizes: tuple[int, ...] = (n, c, h, w), k: int = kernel_size, s: int = stride) -> Any:
                    return _depthwise_call(device, dtype, sizes, k, s)

                yield case


def _depthwise_call(
    device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...], kernel_size: int, stride: int
) -> list[tuple[str, Tensor, Tensor, int]]:
    g = _generator(*sizes, kernel_size, stride)
    n, c = sizes[:2]
    given = (
        torch.randn(sizes, generator=g),
        torch.randn(c + 3, 1, 7, 7, generator=g),
        torch.eye(25) + torch.randn(25, 25, generator=g) / 25,
        torch.eye(9) + torch.randn(9, 9, generator=g) / 9,
    )
    ours = [t.to(device, dtype).detach().requires_grad_() for t in given]
    wide = [t.to(dtype).double().detach().requires_grad_() for t in given]
    y = dynamic_depthwise_conv(*ours, kernel_size=kernel_size, stride=stride)
    expected = reference.dynamic_depthwise_conv(*wide, kernel_size=kernel_size, stride=stride)
    grad_y = torch.randn(expected.shape, generator=g).to(dtype)
    y.backward(grad_y.to(device))
    expected.backward(grad_y.double())
    pixels = n * expected.shape[2] * expected.shape[3]
    lengths = (kernel_size**2 + 25, pixels + 25, pixels * c + 25, pixels * c + 25)
    results = [("y", y, expected, kernel_size**2 + 25)]
    for name, a, b, length in zip(("x", "weight", "matrix_5", "matrix_3"), ours, wide, lengths, strict=True):
        if a.grad is not None and b.grad is not None:
            results.append((f"gradient of {name}", a.grad, b.grad, length))
    return results


def _pointwise(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    for n, c, h, w, out in _WIDTHS:
        for activation in (None, "relu", "hswish"):

            def case(sizes: tuple[int, ...] = (n, c, h, w, out), act: str | None = activation) -> Any:
                return _pointwise_call(device, dtype, sizes, act)

            yield case
        if device.type == "cuda":  # on the CPU the op is for inference
            yield partial(pointwise_gradients, device, dtype, (n, c, h, w, out))


def _pointwise_call(
    device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...], activation: str | None
) -> list[tuple[str, Tensor, Tensor, int]]:
    g = _generator(*sizes)
    n, c, h, w, out = sizes
    stored = {
        "x": torch.randn(n, c, h, w, generator=g),
        "panels": pack_pointwise_weight(torch.randn(out + 5, c + 3, 1, 1, generator=g) / c**0.5),
        "residual": torch.randn(n, out, h, w, generator=g),
    }
    single = {"scale": torch.rand(out, generator=g) + 0.5, "shift": torch.randn(out, generator=g)}
    ours = {name: t.to(device, dtype) for name, t in stored.items()}
    ours |= {name: t.to(device) for name, t in single.items()}
    wide = {name: t.to(dtype).double() for name, t in stored.items()}
    wide |= {name: t.double() for name, t in single.items()}
    options: dict[str, Any] = {"out_channels": out, "activation": activation}
    y = dynamic_pointwise_conv(**ours, **options)
    return [("y", y, reference.dynamic_pointwise_conv(**wide, **options), c + 3)]


def pointwise_gradients(
    device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]
) -> list[tuple[str, Tensor, Tensor, int]]:
    """One call's gradients and moments: name, result, float64 expectation, length of the sums.

    Args:
        device: Where the op has gradients.
        dtype: Storage type.
        sizes: N, C, H, W and outputs.
    """
    g = _generator(*sizes, 1)
    n, c, h, w, out = sizes
    panels = pack_pointwise_weight(torch.randn(out + 5, c + 3, 1, 1, generator=g) / c**0.5)
    given = (torch.randn(n, c, h, w, generator=g), panels)
    ours = [t.to(device, dtype).detach().requires_grad_() for t in given]
    wide = [t.to(dtype).double().detach().requires_grad_() for t in given]
    grad_y = torch.randn(n, out, h, w, generator=g).to(dtype)
    ops = torch.ops.pfnas_fast
    ops.dynamic_pointwise_conv(*ours, None, None, None, out, 0).backward(grad_y.to(device))
    reference.dynamic_pointwise_conv(*wide, out_channels=out).backward(grad_y.double())
    results = []
    for name, a, b, length in zip(("x", "panels"), ours, wide, (out, n * h * w), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        results.append((f"gradient of {name}", a.grad, b.grad, length))
    y, mean, variance = ops.dynamic_pointwise_conv_moments(*(t.detach() for t in ours), out)
    stored = y.detach().double().cpu().transpose(0, 1).flatten(1)  # [out, pixels]
    results.append(("mean", mean, stored.mean(dim=1), n * h * w))
    results.append(("variance", variance, stored.var(dim=1, unbiased=False), n * h * w))
    return results


def path_filter_cases(device: torch.device, module: Any = None) -> Iterator[Case]:
    """Paths of three windows of two spaces, by a network and by a ranker with every part there is.

    Args:
        device: Where to draw and score.
        module: The compiled module with the CUDA kernel; None: this package's, or the engine on the CPU.
    """
    for preset in _PRESETS:
        for full in (False, True):
            search, scorer = _filter_problem(preset, full)
            ranges = [search.cost.range(resolution) for resolution in search.space.resolutions]
            low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
            middle = (low * high) ** 0.5
            for window in ((low, high), (0.99 * middle, 1.01 * middle), (0.9 * high, high)):
                yield partial(_path_filter_call, search, scorer, window, device, module)


def _filter_problem(preset: str, full: bool) -> tuple[SearchSpace, BudgetRanker]:
    model = CostModel(load_space(preset), num_classes=3)
    search = SearchSpace(model.space, AdditiveCost.macs(model))
    sampler = BudgetSampler(model)
    search.use_walks([sampler.walker(resolution) for resolution in model.space.resolutions])
    g = _generator(len(preset), full)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=g) * scale

    slots, codes = search.space.num_slots, search.cost.table.shape[2]
    rows, members = slots * codes, 3
    networks = NetworkTables(
        normal(rows, 2, 40, scale=slots**-0.5),
        normal(2, 40),
        normal(2, 40),
        ((normal(2, 40, 24, scale=0.2), normal(2, 24)),),
        normal(2, 24, scale=0.2),
    )
    if not full:
        return search, BudgetRanker(PackedRanker(RankerTables(slots, codes, normal(2), networks)), 2.0, 0.7)
    kernels = KernelTables(
        normal(rows, 1, 70, scale=0.1),
        normal(1, 70) - 2,
        normal(1, 70, scale=0.3),
        -normal(1, 70, scale=0.3).abs(),
        normal(1, 70),
    )
    tables = RankerTables(
        slots,
        codes,
        normal(members),
        networks,
        kernels,
        linear=normal(rows, members, scale=slots**-0.5),
        linear_offset=normal(members),
        linear_budget=normal(members),
        curve=normal(9),
        curve_range=(-1.5, 2.0),
    )
    return search, BudgetRanker(PackedRanker(tables), 2.0, 0.7)


def _path_filter_call(
    search: SearchSpace,
    scorer: BudgetRanker,
    window: tuple[float, float],
    device: torch.device,
    module: Any,
) -> list[Result]:
    """Codes and costs against the engine's draws, scores against the twin, the best against a sort."""
    n, top_k, seed = 700, 16, 2**40 + 3
    drawn = search.draw(n, *window, seed=seed)[0]
    length = search.space.num_slots + 40 + 70

    def twin(codes: np.ndarray) -> Tensor:
        z = ((np.log(search.cost.of(codes)) - scorer.log_mean) / scorer.log_scale).astype(np.float32)
        return reference.path_score(scorer.ranker.tables, torch.from_numpy(codes), torch.from_numpy(z))[0]

    results: list[Result] = []
    if device.type == "cpu" and module is None:
        found = path_filter(search, scorer, [window], n, seed=seed, top_k=top_k)[0]
    else:
        ours = CudaPathFilter(search, scorer, device=device, module=_C if module is None else module)
        found, codes, scores = ours.run(n, *window, seed=seed, top_k=top_k, everything=True)
        results.append(("draw", torch.from_numpy(codes), torch.from_numpy(drawn), _EXACT))
        results.append(("score", torch.from_numpy(scores), twin(drawn), length))
    best = twin(np.unique(drawn, axis=0)).sort(descending=True).values[:top_k]
    kept = torch.from_numpy(found.scores).float()
    results.append(("number of the best", torch.tensor(len(kept)), torch.tensor(len(best)), _EXACT))
    costs = torch.from_numpy(search.cost.of(found.codes))
    results.append(("cost of the best", torch.from_numpy(found.costs), costs, _EXACT))
    results.append(("score of the best", kept, twin(found.codes), length))
    if len(kept) == len(best):
        results.append(("choice of the best", kept, best, length))
    return results

# SPDX-License-Identifier: Apache-2.0
"""dynamic_depthwise_conv against its float64 twin: values, gradients, layouts, errors, determinism."""

import math
from typing import NamedTuple

import pytest
import torch
from closeness import assert_close_to_reference
from torch import Tensor

from pfnas_fast import _C
from pfnas_fast.errors import InputError
from pfnas_fast.ops import dynamic_depthwise_conv, reference


class Case(NamedTuple):
    """Sizes of one call."""

    n: int
    c: int
    h: int
    w: int
    max_kernel: int = 7
    spare: int = 0  # channels of the bank beyond those of x

    @property
    def name(self) -> str:
        return f"{self.n}x{self.c}x{self.h}x{self.w}k{self.max_kernel}+{self.spare}"


CASES = [
    Case(0, 8, 6, 6),  # empty batch
    Case(1, 1, 1, 1, spare=2),
    Case(2, 1, 9, 7, max_kernel=5),
    Case(3, 17, 5, 5, spare=3),  # ragged channels: one full block of 16 and one lane
    Case(2, 24, 13, 11, spare=8),  # odd sizes, half a block
    Case(2, 72, 10, 10, max_kernel=5),
    Case(1, 20, 56, 2, max_kernel=3),  # narrower than the filter
    Case(1, 16, 2, 61),  # flatter than the filter, ragged width
    Case(9, 32, 7, 7, spare=16),  # several images per step
    Case(1, 16, 90, 131),  # several bands per image
    Case(2, 48, 11, 20),  # k3 without packing: several tiles per row, an odd height
    Case(1, 32, 5, 15, spare=1),  # the same where stride 2 has an odd width
]
KERNELS = [3, 5, 7]


class Arguments(NamedTuple):
    """float32 leaves that require gradients."""

    x: Tensor  # [N, C, H, W]
    weight: Tensor  # [C_max, 1, K_max, K_max]
    matrix_5: Tensor  # [25, 25]
    matrix_3: Tensor  # [9, 9]

    def double(self) -> "Arguments":
        return Arguments(*(t.detach().double().requires_grad_() for t in self))


def make(case: Case, seed: int = 0) -> Arguments:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(case.n, case.c, case.h, case.w, generator=g).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(case.c + case.spare, 1, case.max_kernel, case.max_kernel, generator=g)
    matrices = (torch.eye(m) + torch.randn(m, m, generator=g) / m for m in (25, 9))
    return Arguments(*(t.requires_grad_() for t in (x, weight, *matrices)))


def gradient_like(y: Tensor, seed: int = 1) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel_size", KERNELS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients(case: Case, kernel_size: int, stride: int, backend: str) -> None:
    if kernel_size > case.max_kernel:
        pytest.skip("the bank holds no filter of this size")
    ours = make(case)
    theirs = ours.double()
    y = dynamic_depthwise_conv(*ours, kernel_size=kernel_size, stride=stride)
    expected = reference.dynamic_depthwise_conv(*theirs, kernel_size=kernel_size, stride=stride)
    grad_y = gradient_like(y)
    y.backward(grad_y)
    expected.backward(grad_y.double())

    derivation = 25 * (case.max_kernel > kernel_size)
    over_images = case.n * y.shape[2] * y.shape[3]
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close_to_reference(y, expected, kernel_size**2 + derivation, "y")
    reductions = (
        kernel_size**2 + derivation,
        over_images + derivation,
        *2 * [over_images * case.c + derivation],
    )
    for name, actual, wanted, length in zip(Arguments._fields, ours, theirs, reductions, strict=True):
        assert (actual.grad is None) == (wanted.grad is None), name
        if actual.grad is not None and wanted.grad is not None:
            assert_close_to_reference(actual.grad, wanted.grad, length, name)
    assert ours.weight.grad is not None
    assert not ours.weight.grad[case.c :].any()


@pytest.mark.parametrize("max_kernel", [3, 5, 7])
@pytest.mark.parametrize("kernel_size", KERNELS)
def test_reference_gradients(kernel_size: int, max_kernel: int) -> None:
    if kernel_size > max_kernel:
        pytest.skip("the bank holds no filter of this size")
    arguments = make(Case(1, 2, 4, 5, max_kernel=max_kernel, spare=1)).double()

    def conv(x: Tensor, weight: Tensor, matrix_5: Tensor, matrix_3: Tensor) -> Tensor:
        return reference.dynamic_depthwise_conv(
            x, weight, matrix_5, matrix_3, kernel_size=kernel_size, stride=2
        )

    assert torch.autograd.gradcheck(conv, tuple(arguments), fast_mode=True)


def test_reference_chains_the_matrices() -> None:
    """The 3x3 filter comes from the centre of the *transformed* 5x5 filter, not from the bank's."""
    _, weight, matrix_5, matrix_3 = make(Case(1, 3, 1, 1)).double()
    five = (matrix_5 @ weight[:, 0, 1:6, 1:6].reshape(-1, 25).T).T.reshape(-1, 5, 5)
    three = (matrix_3 @ five[:, 1:4, 1:4].reshape(-1, 9).T).T.reshape(-1, 1, 3, 3)
    torch.testing.assert_close(reference.derive_filter(weight, matrix_5, matrix_3, 3), three)


def test_identity_matrices_crop_the_bank(backend: str) -> None:
    x, weight, _, _ = make(Case(2, 16, 9, 9))
    y = dynamic_depthwise_conv(x, weight, torch.eye(25), torch.eye(9), kernel_size=3)
    cropped = weight[:, :, 2:5, 2:5].detach()
    assert torch.equal(y, dynamic_depthwise_conv(x, cropped, kernel_size=3))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize("kernel_size", KERNELS)
def test_opcheck(kernel_size: int) -> None:
    arguments = make(Case(2, 5, 6, 7, spare=1))
    torch.library.opcheck(torch.ops.pfnas_fast.dynamic_depthwise_conv.default, (*arguments, kernel_size, 2))
    plain = [t.detach() for t in arguments]
    grad_y = torch.randn(2, 5, 3, 4).contiguous(memory_format=torch.channels_last)
    for need_x, need_filter in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            torch.ops.pfnas_fast.dynamic_depthwise_conv_backward.default,
            (grad_y, *plain, kernel_size, 2, need_x, need_filter),
        )


@pytest.mark.parametrize("shape", [(2, 8, 10, 12), (1, 8, 7, 5)])
def test_compile(shape: tuple[int, int, int, int]) -> None:
    """Nothing of the op breaks the graph, forward or backward; no code is generated, to keep this fast."""
    arguments = make(Case(*shape))
    eager = make(Case(*shape))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def conv(x: Tensor, weight: Tensor, matrix_5: Tensor, matrix_3: Tensor) -> Tensor:
        return dynamic_depthwise_conv(x, weight, matrix_5, matrix_3, kernel_size=5, stride=2)

    y = conv(*arguments)
    expected = dynamic_depthwise_conv(*eager, kernel_size=5, stride=2)
    y.sum().backward()
    expected.sum().backward()
    assert torch.equal(y, expected)
    for name, actual, wanted in zip(Arguments._fields, arguments, eager, strict=True):
        assert (actual.grad is None) == (wanted.grad is None), name
        if actual.grad is not None:
            torch.testing.assert_close(actual.grad, wanted.grad)


@pytest.mark.parametrize("layout", ["nchw", "transposed", "sliced"])
def test_any_layout_is_accepted(layout: str) -> None:
    x, weight, matrix_5, matrix_3 = make(Case(2, 16, 8, 8))
    wide = torch.randn(2, 24, 8, 8, generator=torch.Generator().manual_seed(3))
    other = {
        "nchw": x.detach().contiguous(),
        "transposed": x.detach().transpose(2, 3),
        "sliced": wide.contiguous(memory_format=torch.channels_last)[:, :16],
    }[layout].requires_grad_()
    y = dynamic_depthwise_conv(other, weight, matrix_5, matrix_3, kernel_size=5)
    y.backward(gradient_like(y).contiguous())
    plain = other.detach().clone(memory_format=torch.channels_last).requires_grad_()
    expected = dynamic_depthwise_conv(plain, weight, matrix_5, matrix_3, kernel_size=5)
    expected.backward(gradient_like(y).contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, expected)
    assert other.grad is not None
    assert plain.grad is not None
    assert torch.equal(other.grad, plain.grad)


@pytest.mark.parametrize("frozen", ["x", "weight", "matrix_5", "matrix_3", "all but x", "all but weight"])
def test_frozen_arguments_get_no_gradient(frozen: str) -> None:
    arguments, full = make(Case(2, 16, 6, 6)), make(Case(2, 16, 6, 6))
    names = set(Arguments._fields)
    names = names - {frozen.removeprefix("all but ")} if frozen.startswith("all but") else {frozen}
    for name in names:
        getattr(arguments, name).requires_grad_(False)
    for leaves in (arguments, full):
        y = dynamic_depthwise_conv(*leaves, kernel_size=3)
        y.backward(gradient_like(y))
    for name in Arguments._fields:
        gradient, wanted = getattr(arguments, name).grad, getattr(full, name).grad
        if name in names:
            assert gradient is None
        else:
            assert torch.equal(gradient, wanted), name


def test_no_graph_without_gradients() -> None:
    x, weight, matrix_5, matrix_3 = make(Case(1, 4, 5, 5))
    with torch.no_grad():
        assert not dynamic_depthwise_conv(x, weight, matrix_5, matrix_3, kernel_size=5).requires_grad


def test_second_derivatives_raise() -> None:
    x, weight, matrix_5, matrix_3 = make(Case(1, 4, 5, 5))
    y = dynamic_depthwise_conv(x, weight, matrix_5, matrix_3, kernel_size=5)
    (grad_x,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="gradient cannot be differentiated again"):
        grad_x.sum().backward()


def test_autocast_runs_in_float32() -> None:
    x, weight, matrix_5, matrix_3 = (t.detach() for t in make(Case(1, 8, 6, 6)))
    expected = dynamic_depthwise_conv(x.bfloat16().float(), weight, matrix_5, matrix_3, kernel_size=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = dynamic_depthwise_conv(x.bfloat16(), weight, matrix_5, matrix_3, kernel_size=3)
    assert y.dtype == torch.float32
    assert torch.equal(y, expected)


# The second case takes the way of k3 without packing.
@pytest.mark.parametrize("case", [Case(6, 40, 23, 22), Case(6, 48, 24, 20)], ids=lambda case: case.name)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel_size", KERNELS)
def test_same_bits_for_any_number_of_threads(
    kernel_size: int, stride: int, case: Case, num_threads: None
) -> None:
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        arguments = make(case)
        y = dynamic_depthwise_conv(*arguments, kernel_size=kernel_size, stride=stride)
        y.backward(gradient_like(y))
        results.append([y, *(t.grad for t in arguments if t.grad is not None)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# The second case takes the way of k3 without packing.
@pytest.mark.parametrize("case", [Case(2, 20, 9, 9), Case(2, 32, 10, 10)], ids=lambda case: case.name)
@pytest.mark.parametrize("kernel_size", KERNELS)
def test_nan_in_gives_nan_out(kernel_size: int, case: Case, backend: str) -> None:
    x, weight, matrix_5, matrix_3 = make(case)
    with torch.no_grad():
        x[1, 18, 4, 5] = math.nan
        weight[3] = math.nan
    y = dynamic_depthwise_conv(x, weight, matrix_5, matrix_3, kernel_size=kernel_size)
    half = kernel_size // 2
    hit = torch.zeros_like(y, dtype=torch.bool)
    hit[1, 18, 4 - half : 5 + half, max(0, 5 - half) : 6 + half] = True
    hit[:, 3] = True
    assert torch.equal(y.isnan(), hit)
    y.backward(gradient_like(y))
    assert x.grad is not None
    assert weight.grad is not None
    assert x.grad[:, 3].isnan().all()
    assert not x.grad[:, :3].isnan().any()
    assert weight.grad[18].isnan().any()
    assert not weight.grad[4:18].isnan().any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"x": torch.zeros(2, 8, 6)},
            InputError,
            "shape [N, C, H, W] with C, H, W >= 1 for x, got [2, 8, 6]",
        ),
        ({"x": torch.zeros(2, 8, 0, 6)}, InputError, "for x, got [2, 8, 0, 6]"),
        (
            {"x": torch.zeros(2, 9, 6, 6)},
            InputError,
            "at least 9 filters (the channels of x) for weight, got 8",
        ),
        ({"x": torch.zeros(2, 8, 6, 6).double()}, TypeError, "float32 for x, got float64"),
        ({"x": [1, 2]}, TypeError, "a torch.Tensor for x, got list"),
        ({"weight": torch.zeros(8, 1, 7, 5)}, InputError, "K 3, 5 or 7 for weight, got [8, 1, 7, 5]"),
        ({"weight": torch.zeros(8, 1, 9, 9)}, InputError, "for weight, got [8, 1, 9, 9]"),
        ({"weight": torch.zeros(8, 2, 7, 7)}, InputError, "for weight, got [8, 2, 7, 7]"),
        ({"weight": torch.zeros(8, 1, 7, 7).half()}, TypeError, "float32 for weight, got float16"),
        ({"kernel_size": 4}, InputError, "an odd size from 3 to 7 for kernel_size, got 4"),
        (
            {"kernel_size": 7, "weight": torch.zeros(8, 1, 5, 5)},
            InputError,
            "from 3 to 5 for kernel_size, got 7",
        ),
        ({"stride": 3}, InputError, "1 or 2 for stride, got 3"),
        (
            {"matrix_5": None},
            InputError,
            "a [25, 25] tensor (kernel_size 3 of a 7x7 bank) for matrix_5, got None",
        ),
        ({"matrix_3": torch.zeros(3, 3)}, InputError, "shape [9, 9] for matrix_3, got [3, 3]"),
    ],
)
def test_mistakes_are_named(change: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "x": torch.zeros(2, 8, 6, 6),
        "weight": torch.zeros(8, 1, 7, 7),
        "matrix_5": torch.eye(25),
        "matrix_3": torch.eye(9),
        "kernel_size": 3,
        "stride": 1,
    }
    with pytest.raises(error) as caught:
        dynamic_depthwise_conv(**{**arguments, **change})
    assert str(caught.value).startswith("dynamic_depthwise_conv: expected ")
    assert message in str(caught.value)


def test_compiled_module_checks_its_caller() -> None:
    x, weight = torch.zeros(1, 4, 5, 5), torch.zeros(4, 1, 3, 3)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match=r"defect: view\.is_float32"):
        _C.dynamic_depthwise_conv_forward(x, weight, None, None, 3, 1, channels_last)  # NCHW
    with pytest.raises(TypeError, match=r"expected a torch\.Tensor of torch 2\.10 or newer for x, got int"):
        _C.dynamic_depthwise_conv_forward(1, weight, None, None, 3, 1, channels_last)


def test_kernel_selection(tier: str) -> None:
    """Sizes and tier alone choose; the register tile fits the map and the register file."""
    lanes = {"portable": 4, "avx2": 8, "avx512": 16}[tier]
    for width in (1, 5, 7, 10, 14, 20, 28, 40, 56, 80):
        for kernel_size in KERNELS:
            name = _C.select_dynamic_depthwise_conv_kernel(5, width, kernel_size, 1)
            assert name.startswith(f"f32_k{kernel_size}_s1_l{lanes}_fwd")
    if tier == "avx2":
        assert _C.select_dynamic_depthwise_conv_kernel(5, 5, 7, 1) == "f32_k7_s1_l8_fwd5_gin5_gw5"
        assert _C.select_dynamic_depthwise_conv_kernel(40, 40, 7, 1) == "f32_k7_s1_l8_fwd8_gin8_gw8"

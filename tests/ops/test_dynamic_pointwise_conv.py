# SPDX-License-Identifier: Apache-2.0
"""dynamic_pointwise_conv against its float64 twin: widths, epilogues, layouts, errors, determinism."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from closeness import assert_close_to_reference
from torch import Tensor

from pfnas_fast.errors import InputError
from pfnas_fast.ops import (
    dynamic_pointwise_conv,
    dynamic_pointwise_conv_moments,
    pack_pointwise_weight,
    reference,
)


class Case(NamedTuple):
    """Sizes of one call."""

    n: int
    c: int
    h: int
    w: int
    out: int
    spare_in: int = 0  # inputs of the packed weight beyond those of x
    spare_out: int = 0

    @property
    def name(self) -> str:
        return f"{self.n}x{self.c}x{self.h}x{self.w}to{self.out}+{self.spare_in}+{self.spare_out}"


CASES = [
    Case(0, 8, 3, 3, 16),  # empty batch
    Case(1, 1, 1, 1, 1, spare_out=7),
    Case(1, 3, 1, 7, 8, spare_in=5),
    Case(2, 16, 5, 5, 24),  # 50 pixels: uneven tiles
    Case(1, 24, 9, 13, 72, spare_in=8, spare_out=72),  # one and a half panels of three
    Case(1, 40, 10, 10, 120, spare_out=120),
    Case(1, 7, 3, 5, 97),  # ragged in every direction
    Case(3, 112, 7, 7, 33),
    Case(1, 1152, 2, 3, 56),
    Case(1, 16, 11, 31, 1152),
]


def make(case: Case, seed: int = 0) -> dict[str, Any]:
    """Fresh float32 arguments; scale, shift and residual present."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(case.out + case.spare_out, case.c + case.spare_in, 1, 1, generator=g)
    return {
        "x": torch.randn(case.n, case.c, case.h, case.w, generator=g),
        "panels": pack_pointwise_weight(weight / case.c**0.5),
        "out_channels": case.out,
        "scale": torch.rand(case.out, generator=g) + 0.5,
        "shift": torch.randn(case.out, generator=g),
        "residual": torch.randn(case.n, case.out, case.h, case.w, generator=g),
    }


def changed(arguments: dict[str, Any], **change: Any) -> dict[str, Any]:
    return {**arguments, **change}


def double(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: v.double() if isinstance(v, Tensor) else v for name, v in arguments.items()}


@pytest.mark.parametrize("activation", [None, "relu", "hswish"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values(case: Case, activation: str | None, backend: str) -> None:
    arguments = changed(make(case, seed=case.out), activation=activation)
    y = dynamic_pointwise_conv(**arguments)
    assert y.is_contiguous(memory_format=torch.channels_last)
    expected = reference.dynamic_pointwise_conv(**double(arguments))
    assert_close_to_reference(y, expected, case.c + 3, "y")


@pytest.mark.parametrize("left_out", ["scale", "shift", "residual"])
def test_epilogue_parts_are_optional(left_out: str, backend: str) -> None:
    arguments: dict[str, Any] = changed(make(Case(2, 20, 4, 7, 56)), **{left_out: None})
    expected = reference.dynamic_pointwise_conv(**double(arguments))
    assert_close_to_reference(dynamic_pointwise_conv(**arguments), expected, 23, "y")


def test_every_width_is_a_prefix(backend: str) -> None:
    """All widths of one packed weight give the outputs of the largest."""
    arguments = changed(make(Case(1, 24, 5, 5, 144)), scale=None, shift=None, residual=None)
    full = dynamic_pointwise_conv(**arguments)
    for width in range(8, 145, 8):
        assert torch.equal(dynamic_pointwise_conv(**changed(arguments, out_channels=width)), full[:, :width])


def test_packing_pads_with_zeros() -> None:
    weight = torch.randn(50, 3, 1, 1)
    panels = pack_pointwise_weight(weight)
    assert panels.shape == (2, 3, 48)
    assert torch.equal(panels.transpose(1, 2).flatten(0, 1)[:50], weight[:, :, 0, 0])
    assert not panels[1, :, 2:].any()


@pytest.mark.parametrize("layout", ["nchw", "sliced"])
def test_any_layout_is_accepted(layout: str) -> None:
    arguments = make(Case(2, 16, 6, 5, 40))
    expected = dynamic_pointwise_conv(**arguments)
    x = arguments["x"].contiguous()
    if layout == "sliced":
        wide = torch.cat([x, x], dim=1).contiguous(memory_format=torch.channels_last)
        x = wide[:, :16]
    assert torch.equal(dynamic_pointwise_conv(**changed(arguments, x=x)), expected)


def test_same_bits_for_any_number_of_threads(num_threads: None) -> None:
    arguments = make(Case(3, 64, 23, 22, 200))
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(dynamic_pointwise_conv(**arguments, activation="hswish"))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("activation", [None, "relu", "hswish"])
def test_nan_in_gives_nan_out(activation: str | None, backend: str) -> None:
    arguments = make(Case(1, 20, 5, 6, 56))
    arguments["x"][0, 3, 2, 4] = math.nan
    arguments["shift"][7] = math.nan
    arguments["residual"][0, 50, 0, 0] = math.nan
    y = dynamic_pointwise_conv(**arguments, activation=activation)
    hit = torch.zeros_like(y, dtype=torch.bool)
    hit[0, :, 2, 4] = hit[:, 7] = hit[0, 50, 0, 0] = True
    assert torch.equal(y.isnan(), hit)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"x": torch.zeros(2, 8, 6)},
            InputError,
            "shape [N, C, H, W] with C, H, W >= 1 for x, got [2, 8, 6]",
        ),
        (
            {"x": torch.zeros(1, 9, 2, 2)},
            InputError,
            "at least 9 inputs (the channels of x) for panels, got 8",
        ),
        ({"x": torch.zeros(1, 8, 2, 2).double()}, TypeError, "float32 for x, got float64"),
        ({"panels": torch.zeros(1, 8, 16)}, InputError, "shape [P, I_max, 48] for panels, got [1, 8, 16]"),
        ({"out_channels": 49}, InputError, "a number from 1 to 48 for out_channels, got 49"),
        ({"out_channels": 0}, InputError, "a number from 1 to 48 for out_channels, got 0"),
        ({"activation": "gelu"}, InputError, "'relu', 'hswish' or None for activation, got 'gelu'"),
        ({"scale": torch.zeros(9)}, InputError, "shape [16] for scale, got [9]"),
        ({"shift": [1.0]}, TypeError, "a torch.Tensor for shift, got list"),
        ({"residual": torch.zeros(1, 16, 2, 3)}, InputError, "shape [1, 16, 2, 2] for residual"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(1, 8, 2, 2),
        "panels": torch.zeros(1, 8, 48),
        "out_channels": 16,
    }
    with pytest.raises(error) as caught:
        dynamic_pointwise_conv(**changed(arguments, **change))
    assert str(caught.value).startswith("dynamic_pointwise_conv: expected ")
    assert message in str(caught.value)


def test_packing_names_mistakes() -> None:
    with pytest.raises(InputError, match="expected shape"):
        pack_pointwise_weight(torch.zeros(8, 8, 3, 3))
    with pytest.raises(TypeError, match="expected float32 for weight, got float64"):
        pack_pointwise_weight(torch.zeros(8, 8, 1, 1).double())


@pytest.mark.parametrize(
    ("epilogue", "message"), [({}, "no gradient on the CPU"), ({"activation": "relu"}, "with an epilogue")]
)
def test_has_no_gradient(epilogue: dict[str, Any], message: str) -> None:
    x, panels = torch.randn(1, 8, 2, 2, requires_grad=True), pack_pointwise_weight(torch.randn(16, 8, 1, 1))
    y = dynamic_pointwise_conv(x, panels, out_channels=16, **epilogue)
    with pytest.raises(NotImplementedError, match=message):
        y.sum().backward()


def test_moments_need_a_gpu() -> None:
    panels = pack_pointwise_weight(torch.randn(16, 8, 1, 1))
    with pytest.raises(NotImplementedError, match=r"moments: expected a CUDA tensor for x, got one on cpu"):
        dynamic_pointwise_conv_moments(torch.randn(1, 8, 2, 2), panels, out_channels=16)
    with pytest.raises(InputError, match="expected at least one image for x"):
        dynamic_pointwise_conv_moments(torch.randn(0, 8, 2, 2), panels, out_channels=16)


def test_opcheck() -> None:
    a = make(Case(2, 8, 3, 4, 40))
    values = [a[name] for name in ("x", "panels", "scale", "shift", "residual", "out_channels")]
    torch.library.opcheck(torch.ops.pfnas_fast.dynamic_pointwise_conv.default, (*values, 2))


def test_compile() -> None:
    arguments = make(Case(1, 8, 3, 4, 40))
    compiled = torch.compile(dynamic_pointwise_conv, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**arguments), dynamic_pointwise_conv(**arguments))

# SPDX-License-Identifier: Apache-2.0
"""The fused block kernel against `DynamicMBConv` in float64: ragged shapes, every tier, NaN-filled memory."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pfnas_fast import _C
from pfnas_fast._system import force_cpu_isa, supported_cpu_isas
from pfnas_fast.space import BlockSpec, se_channels
from pfnas_fast.supernet import DynamicMBConv
from pfnas_fast.supernet.packing import BLOCK, Packer, pack_mbconv


class Case(NamedTuple):
    """One call; the block's middle width is in_channels * expand (rounded to 8)."""

    n: int
    c: int
    h: int
    w: int
    out: int
    kernel: int
    stride: int = 1
    expand: int = 4
    spare: int = 0  # how much larger the block's largest expand ratio is
    se: bool = False
    activation: str = "relu"

    @property
    def name(self) -> str:
        kind = ("se" if self.se else "") + self.activation
        return (
            f"{self.n}x{self.c}x{self.h}x{self.w}to{self.out}k{self.kernel}s{self.stride}e{self.expand}{kind}"
        )


# Every kernel and stride on one pixel, one row, one column, whole-row tiles, odd sizes and rings of rows.
SHAPES = [(1, 1), (1, 9), (11, 1), (5, 5), (7, 7), (10, 10), (9, 13), (4, 6), (33, 41)]
CASES = [
    *(
        Case(
            1 + i % 3,
            8 + 8 * (i % 4),
            h,
            w,
            (8, 24, 40, 56)[i % 4],
            kernel,
            stride,
            1 + i % 5,
            i % 2,
            i % 3 == 0,
        )
        for i, (h, w, kernel, stride) in enumerate(
            (h, w, kernel, stride) for h, w in SHAPES for kernel in (3, 5, 7) for stride in (1, 2)
        )
    ),
    Case(1, 24, 70, 60, 24, 7, activation="hswish"),  # rings of rows, residual
    Case(1, 16, 90, 131, 24, 5, 2),
    Case(9, 32, 5, 5, 32, 7, se=True, activation="hswish"),  # several images at a time
    *(Case(2, 24, 20, 20, 40, kernel, expand=5) for kernel in (3, 5, 7)),  # one tile of 20 columns
    Case(1, 24, 6, 40, 24, 3, expand=3),  # two of them; 72 middle channels: two vectors, the last half used
    Case(0, 8, 5, 5, 8, 3),
]
WIDTHS = list(range(8, 1153, 8))  # middle widths


@pytest.fixture(params=["portable", "avx2", "avx512"])
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in supported_cpu_isas():
        pytest.skip(f"this CPU (or this build) does not run the {request.param} tier")
    force_cpu_isa(request.param)
    _C.poison_thread_scratch()
    yield request.param
    force_cpu_isa(None)


def make_block(case: Case, seed: int) -> DynamicMBConv:
    torch.manual_seed(seed)
    sizes, ratios = (3, 5, 7), tuple(sorted({case.expand, case.expand + case.spare}))
    spec = BlockSpec(0, 0, 0, case.c, case.out, case.stride, case.activation, case.se, sizes, ratios)
    block = DynamicMBConv(spec).eval()
    for module in block.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values, low in (
                (module.running_var, 0.5),
                (module.weight.data, 0.5),
                (module.bias.data, -0.5),
            ):
                assert values is not None
                values.uniform_(low, low + 1)
    for name, parameter in block.depth_conv.named_parameters():
        if "matrix" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return block


def run_fused(block: DynamicMBConv, x: Tensor, kernel: int, expand: int) -> Tensor:
    """[N, C, H, W] -> [N, O, Ho, Wo] through the compiled block; memory that must not be read is NaN."""
    packer, spec = Packer(), block.block
    layout = pack_mbconv(packer, "block", block)
    weights = packer.weights()
    folded = torch.full((packer.folded_size,), math.nan)
    net = packer.finish({"stem": layout_of_no_stem(weights), "blocks": [layout], **NO_TAIL})
    net.fold([n.running_mean for n in packer.norms], [n.running_var for n in packer.norms], folded)
    rows = x.permute(0, 2, 3, 1)
    rows = F.pad(rows, (0, -rows.shape[3] % BLOCK), value=math.nan).contiguous()
    size = [-(-length // spec.stride) for length in x.shape[2:]]
    y = torch.full((x.shape[0], *size, -(-spec.out_channels // BLOCK) * BLOCK), math.nan)
    mid = spec.mid_channels(expand)
    _C.fused_mbconv(weights, layout, folded, kernel, mid, se_channels(mid) if spec.se else 0, rows, y)
    return y[..., : spec.out_channels].permute(0, 3, 1, 2)


def layout_of_no_stem(weights: Tensor) -> dict[str, object]:
    """The compiled net wants a stem; this one is never run."""
    return {"weight": 0, "out_channels": 8, "activation": 0, "affine": (0, 1)}


_NONE = {"in_channels": 1, "out_channels": 1, "panels": 0, "bias": -1, "affine": (-1, -1), "activation": 0}
NO_TAIL = {"laterals": [], "convs": [], "predictor_affines": [], "tail": [_NONE] * 3}


@torch.no_grad()
def check(case: Case, seed: int) -> None:
    block = make_block(case, seed)
    x = torch.randn(case.n, case.c, case.h, case.w)
    actual = run_fused(block, x, case.kernel, case.expand)
    if case.n == 0:
        assert actual.shape[0] == 0
        return
    expected = block.double()(x.double(), case.kernel, case.expand)
    error = (actual.double() - expected).abs().max() / expected.abs().max()
    assert float(error) < 5e-6, case.name  # NaN fails as well


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values(case: Case, tier: str) -> None:
    check(case, seed=case.h)


def test_every_middle_width(tier: str) -> None:
    for width in WIDTHS if tier == "avx512" else WIDTHS[::7]:
        check(Case(1, width, 3, 4, 16, 3, 1 + width % 2, expand=1, se=width % 3 == 0), seed=width)


@torch.no_grad()
def test_nan_stays_where_its_window_is(tier: str) -> None:
    block = make_block(Case(2, 16, 9, 9, 24, 5), seed=0)
    x = torch.randn(2, 16, 9, 9)
    x[1, 3, 4, 4] = math.nan
    y = run_fused(block, x, 5, 4)
    hit = torch.zeros_like(y, dtype=torch.bool)
    hit[1, :, 2:7, 2:7] = True
    assert torch.equal(y.isnan(), hit)


@torch.no_grad()
def test_same_bits_for_any_number_of_threads() -> None:
    before = torch.get_num_threads()
    try:
        for case in (Case(9, 24, 10, 10, 40, 5, se=True), Case(3, 24, 40, 40, 24, 7)):
            block, x = make_block(case, seed=1), torch.randn(case.n, case.c, case.h, case.w)
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(run_fused(block, x, case.kernel, case.expand))
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])
    finally:
        torch.set_num_threads(before)

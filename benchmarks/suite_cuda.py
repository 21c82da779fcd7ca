# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels against torch: convolutions, channels_last, 16-bit storage. `compare.py --device cuda`.

Baselines: "eager" (cuDNN's heuristic choice), "cudnn_autotuned" (torch.backends.cudnn.benchmark), "compiled"
(torch.compile of the static shape; its graph is made before timing).

depthwise: Ours derives the filter from the 7x7 bank in every call and, where gradients are timed, returns
    those of bank and matrices. Theirs: F.conv2d with groups = C on a ready filter. This leans towards torch.
pointwise: Ours reads a prefix of panels packed beforehand. Theirs: F.conv2d on a ready weight.
path_filter: Ours draws 2^20 paths of one window of Once-for-All's space, looks up their costs, scores them
    by 21 slots of 10 codes and a budget -> 128 -> 64 -> 1, keeps the best 32 and hands them to the host.
    Theirs: scores and `topk` of ready-made codes and budgets, to the host; nothing is drawn, which leans
    towards torch. First layer: "embedding_bag", the same through torch.compile ("compiled"), or "one_hot"
    (made in the call) and `F.linear`.

`forward` is one call without gradients; `step` is forward and both gradients through autograd.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from cuda_harness import CudaComparison
from suite_path_filter import random_network
from torch import Tensor

from pfnas_fast.ops import (
    BudgetRanker,
    PackedRanker,
    SearchSpace,
    dynamic_depthwise_conv,
    dynamic_pointwise_conv,
    pack_pointwise_weight,
    reference,
)
from pfnas_fast.ops._library import _C
from pfnas_fast.ops.path_filter import CudaPathFilter
from pfnas_fast.space import AdditiveCost, BudgetSampler, CostModel, load_space

__all__ = ["Setting", "comparisons"]


class Setting(NamedTuple):
    """What all rows share."""

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    batch: int = 128
    compiled: bool = True  # whether to time torch.compile


DEPTHWISE = [(96, 56, 1), (240, 28, 1), (672, 14, 1), (144, 40, 2)]  # channels, size, stride
POINTWISE = [(24, 96, 56), (96, 24, 56), (112, 672, 14), (672, 112, 14)]  # inputs, outputs, size


def _dense(*shape: int, setting: Setting, seed: int = 0) -> Tensor:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return tensor.to(setting.device, setting.dtype).contiguous(memory_format=torch.channels_last)


def _step(product: Callable[..., Tensor], leaves: tuple[Tensor, ...], grad_y: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(product(*leaves), leaves, grad_y)


def _without_gradients(product: Callable[..., Tensor], leaves: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        return product(*leaves)


def _tuned(call: Callable[[], object], *, benchmark: bool) -> object:
    on_gpu = torch.backends.cudnn.is_available()
    with torch.backends.cudnn.flags(enabled=True, benchmark=benchmark) if on_gpu else nullcontext():
        return call()


def _baselines(
    run: Callable[[Callable[..., Tensor]], Callable[[], object]],
    product: Callable[..., Tensor],
    compiled: bool,
) -> dict[str, Callable[[], object]]:
    eager = run(product)
    baselines: dict[str, Callable[[], object]] = {
        "eager": partial(_tuned, eager, benchmark=False),
        "cudnn_autotuned": partial(_tuned, eager, benchmark=True),
    }
    if compiled:
        baselines["compiled"] = run(torch.compile(product, fullgraph=True, dynamic=False))
    return baselines


def _assert_same_first(ours: Callable[[], object], tolerance: float, theirs: Callable[[], object]) -> None:
    """Compares y, or the gradient to x: what both sides return first."""
    mine, other = (
        result if isinstance(result, Tensor) else result[0]  # type: ignore[index]
        for result in (ours(), theirs())
    )
    error = (mine.float() - other.float()).abs().max()
    assert float(error) <= tolerance * float(other.float().abs().max()), "the two sides differ"


def _comparison(
    name: str,
    setting: Setting,
    ours: tuple[Callable[..., Tensor], tuple[Tensor, ...]],
    theirs: tuple[Callable[..., Tensor], tuple[Tensor, ...]],
    grad_y: Tensor | None,
) -> CudaComparison:
    def run(product: Callable[..., Tensor], leaves: tuple[Tensor, ...]) -> Callable[[], object]:
        if grad_y is None:
            return partial(_without_gradients, product, leaves)
        return partial(_step, product, leaves, grad_y)

    call = run(*ours)
    tolerance = 1e-4 if setting.dtype == torch.float32 else 3e-2  # theirs may sum in 16 bits
    return CudaComparison(
        name,
        call,
        partial(_assert_same_first, call, tolerance),
        _baselines(lambda product: run(product, theirs[1]), theirs[0], setting.compiled),
    )


def depthwise(
    setting: Setting, channels: int, size: int, stride: int, kernel_size: int, step: bool
) -> CudaComparison:
    """One row: the op from the 7x7 bank."""
    x = _dense(setting.batch, channels, size, size, setting=setting).requires_grad_(step)
    given = (torch.randn(channels, 1, 7, 7), torch.eye(25), torch.eye(9))
    bank, matrix_5, matrix_3 = (t.to(setting.device, setting.dtype).requires_grad_(step) for t in given)
    weight = reference.derive_filter(bank, matrix_5, matrix_3, kernel_size).detach().requires_grad_(step)
    used = {7: (), 5: (matrix_5,), 3: (matrix_5, matrix_3)}[kernel_size]

    def ours(x: Tensor, bank: Tensor, *matrices: Tensor) -> Tensor:
        fill = (*matrices, None, None)[:2]
        return dynamic_depthwise_conv(x, bank, *fill, kernel_size=kernel_size, stride=stride)

    def theirs(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, stride=stride, padding=kernel_size // 2, groups=x.shape[1])

    out = -(-size // stride)
    grad_y = _dense(setting.batch, channels, out, out, setting=setting, seed=1) if step else None
    name = f"cuda/depthwise/{'step' if step else 'forward'}/k{kernel_size}/{size}x{size}x{channels}"
    name += "/s2" if stride == 2 else ""
    return _comparison(name, setting, (ours, (x, bank, *used)), (theirs, (x, weight)), grad_y)


def pointwise(setting: Setting, inputs: int, outputs: int, size: int, step: bool) -> CudaComparison:
    """One row: a 1x1 convolution."""
    x = _dense(setting.batch, inputs, size, size, setting=setting).requires_grad_(step)
    weight = torch.randn(outputs, inputs, 1, 1) / inputs**0.5
    panels = pack_pointwise_weight(weight).to(setting.device, setting.dtype).requires_grad_(step)
    ready = weight.to(setting.device, setting.dtype).contiguous(memory_format=torch.channels_last)
    grad_y = _dense(setting.batch, outputs, size, size, setting=setting, seed=1) if step else None

    def ours(x: Tensor, panels: Tensor) -> Tensor:
        return dynamic_pointwise_conv(x, panels, out_channels=outputs)

    name = f"cuda/pointwise/{'step' if step else 'forward'}/{inputs}-{outputs}/{size}x{size}"
    return _comparison(
        name, setting, (ours, (x, panels)), (F.conv2d, (x, ready.requires_grad_(step))), grad_y
    )


def _torch_filter(
    scorer: BudgetRanker, codes: np.ndarray, costs: np.ndarray, setting: Setting, top_k: int
) -> dict[str, Callable[[], object]]:
    """Baselines over ready-made codes: the best scores, on the host."""
    net = scorer.ranker.tables.networks
    assert net is not None
    assert net.budget is not None
    there = partial(torch.Tensor.to, device=setting.device)
    rows, offset = there(net.table[:, 0].contiguous()), there(net.offset[0])
    budget, head = there(net.budget[0]), there(net.head[0])
    layers = [(there(weight[0].t().contiguous()), there(bias[0])) for weight, bias in net.dense]
    slots, num_codes = codes.shape[1], rows.shape[0] // codes.shape[1]
    index = there(torch.from_numpy(codes).long() + torch.arange(slots) * num_codes)
    z = there(torch.from_numpy((np.log(costs) - scorer.log_mean) / scorer.log_scale).float())
    first = rows.t().contiguous()  # [128, slots * codes]

    def rest(hidden: Tensor, z: Tensor) -> Tensor:
        hidden = torch.addr(hidden + offset, z, budget).relu()
        for weight, bias in layers:
            hidden = F.linear(hidden, weight, bias).relu()
        return torch.topk(hidden @ head, top_k).values

    def bag(index: Tensor, z: Tensor) -> Tensor:
        return rest(F.embedding_bag(index, rows, mode="sum"), z)

    def one_hot(index: Tensor, z: Tensor) -> Tensor:
        features = index.new_zeros(index.shape[0], first.shape[1], dtype=first.dtype)
        return rest(F.linear(features.scatter_(1, index, 1.0), first), z)

    def run(best: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        return lambda: _without_gradients(best, (index, z)).cpu()

    baselines = {"embedding_bag": run(bag), "one_hot": run(one_hot)}
    if setting.compiled:
        baselines["compiled"] = run(torch.compile(bag, fullgraph=True, dynamic=False))
    return baselines


def path_filter(setting: Setting, num_paths: int = 1 << 20, module: Any = _C) -> CudaComparison:
    """One row: draw, score, keep the best, against torch scoring the same paths; `module` has our kernel."""
    top_k = 32
    model = CostModel(load_space("ofa_mbv3_w1.0"), num_classes=20)
    search = SearchSpace(model.space, AdditiveCost.macs(model))
    sampler = BudgetSampler(model)
    search.use_walks([sampler.walker(resolution) for resolution in model.space.resolutions])
    ranges = [search.cost.range(resolution) for resolution in search.space.resolutions]
    middle = (min(r[0] for r in ranges) * max(r[1] for r in ranges)) ** 0.5
    window = (0.99 * middle, 1.01 * middle)
    num_codes = search.cost.table.shape[2]
    tables = random_network((128, 64), budget=True, num_codes=num_codes)
    scorer = BudgetRanker(PackedRanker(tables), float(np.log(middle)), 0.5)
    ours = CudaPathFilter(search, scorer, device=setting.device, module=module)
    codes = search.draw(num_paths, *window, seed=0)[0]  # what ours draws too

    def call() -> Any:
        return ours.run(num_paths, *window, seed=0, top_k=top_k)

    def check(theirs: Callable[[], object]) -> None:
        mine, other = torch.from_numpy(call().scores).float(), theirs()
        assert isinstance(other, Tensor)
        assert mine.shape == other.shape, "paths repeat in this window"
        assert float((mine - other).abs().max()) <= 1e-3 * float(other.abs().max()), "the two sides differ"

    return CudaComparison(
        f"cuda/path_filter/{tables.num_slots}x{num_codes}-128-64-1/{num_paths}",
        call,
        check,
        _torch_filter(scorer, codes, search.cost.of(codes), setting, top_k),
    )


def comparisons(setting: Setting) -> Iterator[tuple[str, Callable[[], CudaComparison]]]:
    """Every row's op ("depthwise", "pointwise" or "path_filter") with the function that prepares it."""
    for step in (False, True):
        for channels, size, stride in DEPTHWISE:
            for kernel_size in (3, 5, 7):
                yield (
                    "depthwise",
                    partial(depthwise, setting, channels, size, stride, kernel_size, step),
                )
        for inputs, outputs, size in POINTWISE:
            yield "pointwise", partial(pointwise, setting, inputs, outputs, size, step)
    yield "path_filter", partial(path_filter, setting)

# SPDX-License-Identifier: Apache-2.0
"""Statistics of batch normalisation per path.

The layers of a supernet are shared by all paths, their statistics are not: a path evaluated with the running
buffers sees means and variances of a mixture of paths. So the statistics of a path are measured before it is
evaluated (`recalibrate`), kept apart from the model (`BNStatistics`), and lent to it for the evaluation
(`use_statistics`). The shared buffers are never touched, except by `set_running_statistics`, which exists for
users of Once-for-All.

Source: Once-for-All (arXiv:1908.09791), whose code averages the variances of the batches; the pooled variance
here also holds the variance of their means.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pfnas_fast.errors import InputError
from pfnas_fast.space import Path
from pfnas_fast.supernet.fused import MomentsCollector
from pfnas_fast.supernet.layers import DynamicBatchNorm2d


@dataclass(frozen=True)
class BNStatistics:
    """Mean and variance of every batch normalisation that one path uses, for one version of the weights.

    Attributes:
        layers: Module name in the model -> (mean, variance), float32 [active channels] each, on the CPU or a
            device.
    """

    layers: Mapping[str, tuple[Tensor, Tensor]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))

    def __reduce__(self) -> tuple[Any, ...]:
        return (BNStatistics, (dict(self.layers),))

    def __len__(self) -> int:
        return len(self.layers)

    def within(self, prefix: str) -> BNStatistics:
        """The statistics of the submodule called `prefix`, under its own names."""
        start = prefix + "."
        return BNStatistics({n[len(start) :]: s for n, s in self.layers.items() if n.startswith(start)})

    def to_dict(self) -> dict[str, dict[str, Tensor]]:
        """Plain dictionaries of tensors, which `torch.load(weights_only=True)` accepts."""
        return {
            "mean": {name: mean for name, (mean, _) in self.layers.items()},
            "var": {name: var for name, (_, var) in self.layers.items()},
        }

    @staticmethod
    def from_dict(entries: Mapping[str, Mapping[str, Tensor]]) -> BNStatistics:
        """Inverse of `to_dict`.

        Raises:
            InputError: not a dictionary that `to_dict` made.
        """
        mean, var = entries.get("mean"), entries.get("var")
        if mean is None or var is None or mean.keys() != var.keys():
            raise InputError(
                "BNStatistics.from_dict: expected 'mean' and 'var' with the same layers for entries, "
                f"got the keys {sorted(entries)}"
            )
        return BNStatistics({name: (mean[name], var[name]) for name in mean})


@dataclass
class _Pool:
    """Running mean and sum of squared deviations over all values seen, float64 [C] (Chan et al., 1979).

    Counts are numbers, or float64 [C] where channels have seen different numbers of values.
    """

    count: int | Tensor = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    deviation: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def add(self, count: int | Tensor, mean: Tensor, unbiased_var: Tensor) -> None:
        self.merge(count, mean.double(), unbiased_var.double() * (count - 1))

    def merge(self, count: int | Tensor, mean: Tensor, deviation: Tensor) -> None:
        delta = mean - self.mean.to(mean.device)
        total = self.count + count
        self.mean = self.mean.to(mean.device) + delta * (count / total)
        self.deviation = (
            self.deviation.to(mean.device) + deviation + delta * delta * (self.count * count / total)
        )
        self.count = total

    def result(self) -> tuple[Tensor, Tensor]:
        return self.mean.float(), (self.deviation / self.count).float()


class LayerMoments(NamedTuple):
    """Where one layer's moments stand in the vectors of all layers' moments.

    Attributes:
        name: Module name.
        count: Values per channel of this batch.
        start: Place of the first channel.
        stop: Behind the last.
    """

    name: str
    count: int
    start: int
    stop: int


@dataclass
class _JointPool:
    """Pools the moments of all layers of a path as one vector, as `_calibrate_prepared` hands them over."""

    pool: _Pool = field(default_factory=_Pool)
    layers: list[LayerMoments] = field(default_factory=list)
    counts: Tensor = field(default_factory=lambda: torch.empty(0))

    def add(self, layers: list[LayerMoments], mean: Tensor, unbiased_var: Tensor) -> None:
        if layers != self.layers:
            self.layers = layers
            self.counts = torch.ones(mean.shape, dtype=torch.float64)
            for layer in layers:
                self.counts[layer.start : layer.stop] = layer.count
        self.pool.add(self.counts, mean, unbiased_var)

    def hand_over(self, collectors: Mapping[str, _Collector]) -> None:
        for layer in self.layers:
            assert isinstance(self.pool.count, Tensor)
            of_layer = slice(layer.start, layer.stop)
            collectors[layer.name].merge(
                int(self.pool.count[layer.start]), self.pool.mean[of_layer], self.pool.deviation[of_layer]
            )


class _Collector(MomentsCollector):
    """Stands in for `DynamicBatchNorm2d.forward`: normalises with the batch's statistics and pools them.

    Blocks that run as one op normalise by themselves and only report their moments (`take`).
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.pool: _Pool | None = None

    def __call__(self, layer: DynamicBatchNorm2d, x: Tensor) -> Tensor:
        channels = x.shape[1]
        count = x.numel() // channels
        if count < 2:
            raise InputError(
                f"recalibrate: expected batches with more than one value per channel for batches, got input "
                f"{tuple(x.shape)} at {self.name}"
            )
        # With momentum 1 the native kernel hands over mean and unbiased variance at no extra pass.
        mean, var = x.new_zeros(channels), x.new_zeros(channels)
        weight, bias = layer.active_affine(channels)
        y = F.batch_norm(x, mean, var, weight, bias, True, 1.0, layer.eps)
        self.take(count, mean, var)
        return y

    def take(self, count: int, mean: Tensor, unbiased_var: Tensor) -> None:
        self.merge(count, mean.double(), unbiased_var.double() * (count - 1))

    def merge(self, count: int, mean: Tensor, deviation: Tensor) -> None:
        if self.pool is None:
            self.pool = _Pool()
        self.pool.merge(count, mean, deviation)


def dynamic_norms(model: nn.Module) -> dict[str, DynamicBatchNorm2d]:
    """Every `DynamicBatchNorm2d` of `model` by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DynamicBatchNorm2d)}


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`model.eval()` that gives every single module its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        drop = getattr(model, "drop_prepared", None)
        if drop is not None and model.training:
            drop()  # what is trained changes its weights, which not every optimiser tells


def _calibrate_compiled(model: Any, images: Tensor, path: Path | None, pool: _JointPool) -> bool:
    """Measure one batch in one call; False: the model cannot, or something looks inside of it."""
    calibrate = getattr(model, "_calibrate_prepared", None)
    if calibrate is None:
        return False
    measured = calibrate(images, model.active_path if path is None else path)
    if measured is None:
        return False
    layers, mean, unbiased_var = measured
    for layer in layers:
        if layer.count < 2:
            raise InputError(
                f"recalibrate: expected batches with more than one value per channel for batches, got input "
                f"{tuple(images.shape)}, one value at {layer.name}"
            )
    pool.add(layers, mean, unbiased_var)
    return True


def recalibrate(
    model: nn.Module,
    path: Path | None,
    batches: Iterable[Tensor],
    *,
    forward: Callable[[Tensor], Any] | None = None,
) -> BNStatistics:
    """Measure the statistics of every batch normalisation that `path` uses.

    Each layer normalises with the statistics of the current batch while the mean and the variance over all
    batches are pooled in float64 (as if the batches were one). Weights, running buffers and the model's mode
    stay as they are.

    Args:
        model: Any module with `DynamicBatchNorm2d` layers, called as ``model(images, path)``.
        path: The path; None runs the model's active path.
        batches: Normalised images, [N, 3, H, W] each, at the resolution of the evaluation.
        forward: Called with the images instead of ``model(images, path)``.

    Returns:
        Statistics under the names of `model.named_modules()`; layers that the path skips are absent.

    Raises:
        InputError: no batch, no layer to recalibrate, or a batch with one value per channel.

    Example:
        >>> from pfnas_fast.space import load_space
        >>> from pfnas_fast.supernet import Backbone
        >>> space = load_space("tiny")
        >>> backbone, path = Backbone(space), space.min_path()
        >>> statistics = recalibrate(backbone, path, [torch.rand(4, 3, 96, 128)])
        >>> with use_statistics(backbone, statistics):
        ...     features = backbone(torch.rand(1, 3, 96, 128), path)
    """
    (statistics,) = recalibrate_paths(model, (path,), batches, forward=forward)
    return statistics


def recalibrate_paths(
    model: nn.Module,
    paths: Sequence[Path | None],
    batches: Iterable[Tensor],
    *,
    forward: Callable[[Tensor], Any] | None = None,
) -> list[BNStatistics]:
    """As `recalibrate`, for several paths in one pass over the batches: each is loaded once.

    Args:
        model: See `recalibrate`.
        paths: The paths; all see the same images, so they should be of one resolution.
        batches: See `recalibrate`.
        forward: See `recalibrate`; it runs once per path.

    Returns:
        Statistics of each path, the same bits as `recalibrate` gives.

    Raises:
        InputError: as `recalibrate`.

    Example:
        >>> from pfnas_fast.space import load_space
        >>> from pfnas_fast.supernet import Backbone
        >>> space = load_space("tiny")
        >>> images = [torch.rand(4, 3, 96, 128)]
        >>> len(recalibrate_paths(Backbone(space), [space.min_path(), space.max_path()], images))
        2
    """
    norms = dynamic_norms(model)
    if not norms:
        raise InputError(f"recalibrate: expected a model with DynamicBatchNorm2d, got {type(model).__name__}")
    collectors = [{name: _Collector(name) for name in norms} for _ in paths]
    joint = [_JointPool() for _ in paths]
    previous = {name: norm.collector for name, norm in norms.items()}
    num_batches = 0
    with torch.no_grad(), _evaluation_mode(model):
        try:
            for images in batches:
                num_batches += 1
                for path, of_path, pool in zip(paths, collectors, joint, strict=True):
                    if forward is None and _calibrate_compiled(model, images, path, pool):
                        continue
                    for name, norm in norms.items():
                        norm.collector = of_path[name]
                    forward(images) if forward is not None else model(images, path)
        finally:
            for name, norm in norms.items():
                norm.collector = previous[name]
    if num_batches == 0:
        raise InputError("recalibrate: expected at least one batch for batches, got none")
    for of_path, pool in zip(collectors, joint, strict=True):
        pool.hand_over(of_path)
    return [
        BNStatistics({n: c.pool.result() for n, c in of_path.items() if c.pool is not None})
        for of_path in collectors
    ]


@contextlib.contextmanager
def use_statistics(model: nn.Module, statistics: BNStatistics) -> Iterator[None]:
    """Evaluate `model` with `statistics` in place of its running buffers.

    Inside, the model is in evaluation mode; afterwards, also after an exception, every module has its own
    mode and statistics back. Contexts nest. A layer that runs without an entry raises instead of falling back
    to the shared buffers. The state lives on the model, so two threads must not use one model so.

    Args:
        model: The module that `recalibrate` was called with.
        statistics: Its result, for the path that will run.

    Raises:
        InputError: `statistics` names layers that the model does not have.
    """
    norms = dynamic_norms(model)
    unknown = [name for name in statistics.layers if name not in norms]
    if unknown:
        raise InputError(
            f"use_statistics: expected statistics of this model for statistics, got the layer {unknown[0]!r}"
        )
    previous = {name: norm.statistics for name, norm in norms.items()}
    nothing = torch.empty(0)
    with _evaluation_mode(model):
        try:
            for name, norm in norms.items():
                mean, var = statistics.layers.get(name, (nothing, nothing))
                norm.statistics = (mean.to(norm.weight.device), var.to(norm.weight.device))
            yield
        finally:
            for name, norm in norms.items():
                norm.statistics = previous[name]


def set_running_statistics(model: nn.Module, loader: Iterable[Any]) -> BNStatistics:
    """Write the statistics of the active path into the running buffers, as Once-for-All does.

    The buffers are shared by all paths: call it again after choosing another path, or use `recalibrate`,
    which leaves them alone. The variance is the pooled one.

    Args:
        model: A supernet with an active path.
        loader: Batches of images [N, 3, H, W], or tuples that begin with them, for example (images, labels).

    Returns:
        What was written.

    Raises:
        InputError: as `recalibrate`.

    Example:
        >>> from pfnas_fast.space import load_space
        >>> from pfnas_fast.supernet import ClassificationSupernet
        >>> net = ClassificationSupernet(load_space("tiny"), num_classes=10)
        >>> statistics = set_running_statistics(net, [(torch.rand(4, 3, 96, 96), None)])
    """
    batches = (batch if isinstance(batch, Tensor) else batch[0] for batch in loader)
    device = next(model.parameters()).device
    statistics = recalibrate(model, None, (images.to(device) for images in batches), forward=model)
    write_running_statistics(model, statistics)
    return statistics


@torch.no_grad()
def write_running_statistics(model: nn.Module, statistics: BNStatistics) -> None:
    """Copy `statistics` into the first channels of the running buffers of `model`."""
    norms = dynamic_norms(model)
    for name, (mean, var) in statistics.layers.items():
        running_mean, running_var = norms[name].running_mean, norms[name].running_var
        if running_mean is None or running_var is None:
            raise RuntimeError(f"write_running_statistics: {name} has no running buffers")
        running_mean[: mean.shape[0]].copy_(mean)
        running_var[: var.shape[0]].copy_(var)

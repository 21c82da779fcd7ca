# SPDX-License-Identifier: Apache-2.0
"""Subnets that run as one compiled call: weights packed once for all paths, normalisation folded per path.

A net packs its weights when a path is first prepared, and all its paths read that one copy: preparing another
path chooses widths, kernels and blocks, and copies no weight. The copy is dropped when the net is trained or
its weights change.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from pfnas_fast.errors import InputError
from pfnas_fast.ops._library import _C
from pfnas_fast.space import BlockSpec, Path, Space, se_channels
from pfnas_fast.supernet.layers import DynamicBatchNorm2d
from pfnas_fast.supernet.packing import Packer
from pfnas_fast.supernet.recalibration import BNStatistics, LayerMoments

Output = TypeVar("Output")
_CACHED_PATHS = 256


class PackedWeights:
    """One version of a net's weights, packed.

    Args:
        net: The net.
        packer: Its batch normalisations.
        layout: Where its parts are.
        version: `weights_version` of the net, taken before it was packed: a write in between must show.
    """

    def __init__(self, net: Any, packer: Packer, layout: dict[str, Any], version: int) -> None:
        self.compiled, self.folded_size = packer.finish(layout), packer.folded_size
        self.norm_names, self.norms, self.norm_places = packer.norm_names, packer.norms, packer.norm_places
        self.norm_widths = {
            name: norm.num_features for name, norm in zip(packer.norm_names, packer.norms, strict=True)
        }
        self.modules = list(net.modules())
        keys = [key for key, _ in net.backbone.blocks.named_children()]
        self.block_names = {int(key): f"backbone.blocks.{key}" for key in keys}
        self.places = {int(key): place for place, key in enumerate(keys)}
        self.has_levels = bool(layout["laterals"])
        entries = layout["blocks"][-len(keys) :]
        self.kernel_sizes = {int(key): tuple(e["filters"]) for key, e in zip(keys, entries, strict=True)}
        self.max_mid_channels = {
            int(key): e["max_mid_channels"] for key, e in zip(keys, entries, strict=True)
        }
        self._owners = _C.SameEntries(
            [
                (entries, name, value)
                for module in self.modules
                for entries in (module._parameters, module._buffers, module._modules)
                for name, value in entries.items()
            ]
        )
        self._versions = _versions_of(net)
        self.version = version
        self._running: Tensor | None = None
        self.subnets: dict[Path, Any] = {}

    def current_version(self) -> int:
        """Grows with every in-place change of a parameter or buffer that goes through torch."""
        return self._versions.sum()

    def is_of_same_parts(self) -> bool:
        """Whether every parameter, buffer and submodule is still the object that was packed."""
        return self._owners.all()

    def folded(self, statistics: BNStatistics | None) -> Tensor:
        """Scales and shifts of every batch normalisation, one flat tensor; None: the running statistics."""
        if statistics is None and self._running is not None:
            return self._running
        means: list[Tensor | None] = []
        variances: list[Tensor | None] = []
        for name, norm in zip(self.norm_names, self.norms, strict=True):
            pair = statistics.layers.get(name) if statistics is not None else None
            if statistics is None:
                means.append(norm.running_mean)
                variances.append(norm.running_var)
            else:
                means.append(None if pair is None else pair[0].contiguous())
                variances.append(None if pair is None else pair[1].contiguous())
        folded = torch.full((self.folded_size,), torch.nan)
        self.compiled.fold(means, variances, folded)
        if statistics is None:
            self._running = folded
        return folded


def _versions_of(net: nn.Module) -> Any:
    """What sums the versions of all parameters and buffers."""
    return _C.VersionSum([*net.parameters(), *net.buffers()], Tensor._version)


def weights_version(net: nn.Module) -> int:
    """Sum of the versions of all parameters and buffers."""
    return _versions_of(net).sum()


def _why_not_compiled(net: nn.Module) -> str | None:
    """What keeps a net from being packed, as the end of a sentence; None: nothing."""
    for tensor in (*net.parameters(), *net.buffers()):
        if tensor.is_floating_point() and (tensor.dtype != torch.float32 or tensor.device.type != "cpu"):
            return f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device.type}"
        if tensor.is_inference():
            return "tensors made in inference mode, whose changes cannot be seen"
    return None


class PreparedSubnet(Generic[Output]):
    """One path of a net, ready to run in one compiled call; `net.prepare(path)` makes it.

    It computes what ``net(images, path)`` computes in eval mode without gradients, in float32 on the CPU, to
    rounding. Any number of threads may call it. It can be pickled and copied (with its net).

    Attributes:
        path: The path.
        statistics: What batch normalisation uses; None: the net's running statistics when it was prepared.
    """

    def __init__(
        self,
        net: PreparableMixin[Output],
        path: Path,
        statistics: BNStatistics | None,
        packed: PackedWeights,
        compiled: Any,
    ) -> None:
        self.path, self.statistics = path, statistics
        self._net, self._packed, self._compiled = net, packed, compiled

    def __call__(self, images: Tensor) -> Output:
        """Run the path.

        Args:
            images: Normalised images, [N, 3, H, W], float32, on the CPU, any strides.

        Returns:
            What the net's forward returns.

        Raises:
            InputError: the shape is another, or the net's weights have changed since (prepare again).
            TypeError: not float32.
        """
        packed = self._packed
        if self._net.__dict__.get("_packed") is not packed or packed.version != packed.current_version():
            raise InputError(
                "PreparedSubnet: expected the weights it was prepared with, got a net that was trained,"
                " loaded or changed since: call prepare() again"
            )
        _check_images(images)
        return self._net._finish_prepared(images, self._compiled)

    def __reduce__(self) -> tuple[Any, ...]:
        return _prepare_again, (self._net, self.path, self.statistics)


def _prepare_again(net: Any, path: Path, statistics: BNStatistics | None) -> Any:
    return net.prepare(path, statistics)


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.float32 or images.device.type != "cpu":
        got = f"{str(images.dtype).removeprefix('torch.')} on {images.device.type}"
        raise TypeError(f"PreparedSubnet: expected float32 on the CPU for images, got {got}")
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise InputError(
            f"PreparedSubnet: expected shape [N, 3, H, W] with H, W >= 1 for images, got {list(images.shape)}"
        )


class PreparableMixin(nn.Module, Generic[Output]):
    """Gives a net `prepare`. A subclass says how it is packed and what its outputs are."""

    space: Space
    backbone: Any

    def _pack(self) -> tuple[Packer, dict[str, Any]]:
        raise NotImplementedError

    def _finish_prepared(self, images: Tensor, compiled: Any) -> Output:
        raise NotImplementedError

    def prepare(self, path: Path, statistics: BNStatistics | None = None) -> PreparedSubnet[Output]:
        """Make one path ready to run in one compiled call, for inference.

        The first call packs the weights of the net; later calls choose among them. Everything prepared is
        dropped by `train()`, by loading a state dict, and by the next `prepare` after an in-place change of
        weights or buffers that torch sees (writes through ``.data`` are not seen: call `drop_prepared`).

        Args:
            path: A path of the net's space.
            statistics: BN statistics of this path, from `recalibrate`; None takes the running buffers.

        Returns:
            A callable from images to what forward returns.

        Raises:
            InputError: the net is in training mode, `path` has other blocks, or `statistics` lack a layer
                that the path uses or have another width.
            TypeError: the net is not float32 on the CPU.

        Source:
            Elastic weights as prefixes: Once-for-All, arXiv:1908.09791, section 3.

        Example:
            >>> from pfnas_fast.space import load_space
            >>> from pfnas_fast.supernet import ClassificationSupernet
            >>> net = ClassificationSupernet(load_space("tiny"), num_classes=10).eval()
            >>> subnet = net.prepare(net.space.min_path())
            >>> subnet(torch.rand(2, 3, 64, 64)).shape
            torch.Size([2, 10])
        """
        return self._prepare(self._packed_weights(), path, statistics)

    def _prepare(
        self, packed: PackedWeights, path: Path, statistics: BNStatistics | None
    ) -> PreparedSubnet[Output]:
        if statistics is None:
            found = packed.subnets.get(path)
            if found is not None:
                return found
        choices = _choices(self.space, packed, path)
        if statistics is not None:
            _check_statistics(self.space, statistics, packed, path)
        compiled = _C.Subnet(packed.compiled, choices, packed.folded(statistics))
        subnet = PreparedSubnet(self, path, statistics, packed, compiled)
        if statistics is None and len(packed.subnets) < _CACHED_PATHS:
            packed.subnets[path] = subnet
        return subnet

    def drop_prepared(self) -> None:
        """Forget the packed weights; what was prepared must be prepared again."""
        self.__dict__["_packed"] = None

    def _packed_weights(self) -> PackedWeights:
        if self.training:
            raise InputError("prepare: expected a net in eval mode, got one in training mode")
        packed = self.__dict__.get("_packed")
        if packed is None or packed.version != packed.current_version():
            problem = _why_not_compiled(self)
            if problem is not None:
                raise TypeError(f"prepare: expected a net of float32 on the CPU, got {problem}")
            for name, module in self.named_modules():
                if module.training:
                    raise InputError(f"prepare: expected a net in eval mode, got {name!r} in training mode")
            with _PACKING, torch.no_grad():
                newest = self.__dict__.get("_packed")  # another thread may have been faster
                if newest is not packed and newest is not None:
                    return newest
                version = weights_version(self)
                packed = PackedWeights(self, *self._pack(), version)
                self.__dict__["_packed"] = packed
        return packed

    def _run_prepared(self, images: Tensor, path: Path) -> Output | None:
        """What forward returns, from the compiled subnet: in eval mode, without gradients, hooks or tracing.

        Only float32 on the CPU is compiled; None for everything else, which the layers then compute.
        """
        packed = self._packed_for(images)
        if packed is None:
            return None
        statistics: dict[str, tuple[Tensor, Tensor]] | None = None
        for name, norm in zip(packed.norm_names, packed.norms, strict=True):
            if isinstance(norm, DynamicBatchNorm2d):
                if norm.collector is not None:
                    return None
                if norm.statistics is not None:
                    statistics = {} if statistics is None else statistics
                    if norm.statistics[0].numel() > 0:
                        statistics[name] = norm.statistics
                elif statistics is not None:
                    return None  # lent to a part of the net only
        if statistics is not None and len(packed.norms) > 0:
            first = packed.norms[0]
            if isinstance(first, DynamicBatchNorm2d) and first.statistics is None:
                return None
        subnet = self._prepare(packed, path, None if statistics is None else BNStatistics(statistics))
        return self._finish_prepared(images, subnet._compiled)  # the weights were compared above

    def _calibrate_prepared(
        self, images: Tensor, path: Path
    ) -> tuple[list[LayerMoments], Tensor, Tensor] | None:
        """Moments of one batch in every layer that the path uses, each normalised with them.

        Returns:
            Which layers have moments, and where in the mean and the unbiased variance, float32 [all
            channels]; other places hold any number. None where `_run_prepared` would give None.
        """
        packed = self._packed_for(images) if self.backbone.backend == "fast" else None
        if packed is None or images.shape[0] == 0:
            return None
        folded = torch.full((packed.folded_size,), torch.nan)
        mean, var = torch.zeros_like(folded), torch.zeros_like(folded)
        subnet = _C.Subnet(packed.compiled, _choices(self.space, packed, path), folded)
        layers = [
            LayerMoments(
                packed.norm_names[index], count, place := packed.norm_places[index], place + channels
            )
            for index, count, channels in subnet.calibrate(images, mean, var)
        ]
        return layers, mean, var

    def _packed_for(self, images: Tensor) -> PackedWeights | None:
        """The packed weights, if compiled code may stand in for the layers on these images."""
        if (
            self.training
            or torch.is_grad_enabled()
            or images.device.type != "cpu"
            or images.dtype != torch.float32
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        ):
            return None
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
            return None  # forward names the mistake
        packed = self.__dict__.get("_packed")
        if packed is not None and not packed.is_of_same_parts():
            self.drop_prepared()  # a parameter or layer was replaced
            packed = None
        if packed is None or packed.version != packed.current_version():
            if _why_not_compiled(self) is not None or any(module.training for module in self.modules()):
                return None
            packed = self._packed_weights()
        for module in packed.modules:
            if module._forward_hooks or module._forward_pre_hooks or module.training:
                return None
        return packed

    def train(self, mode: bool = True) -> Any:
        """As `torch.nn.Module.train`; entering training mode drops what was prepared."""
        if mode:
            self.drop_prepared()
        return super().train(mode)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As `torch.nn.Module.load_state_dict`; drops what was prepared."""
        self.drop_prepared()
        return super().load_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        self.drop_prepared()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_packed", None)
        return state


_PACKING = threading.Lock()


def _active_blocks(space: Space, path: Path) -> list[BlockSpec]:
    return [block for block in space.blocks if block.position < path.depths[block.stage]]


def _choices(space: Space, packed: PackedWeights, path: Path) -> list[tuple[int, int, int, int, int]]:
    """(place, kernel size, middle channels, reduced channels, tapped level) of every block that runs."""
    if len(path.depths) != len(space.stages) or len(path.kernel_sizes) != len(space.blocks):
        raise InputError(
            f"prepare: expected {len(space.stages)} stages and {len(space.blocks)} blocks for path, "
            f"got {len(path.depths)} and {len(path.kernel_sizes)}"
        )
    choices: list[tuple[int, int, int, int, int]] = []
    if space.first_block is not None:
        choices.append((0, space.first_block.kernel_size, space.first_block.in_channels, 0, -1))
    offset = len(choices)
    taps = {stage: level for level, stage in enumerate(space.taps)} if packed.has_levels else {}
    for block in _active_blocks(space, path):
        mid = block.mid_channels(path.expand_ratios[block.index])
        kernel_sizes = packed.kernel_sizes.get(block.index, ())
        if path.kernel_sizes[block.index] not in kernel_sizes:
            raise InputError(
                f"prepare: expected one of the kernel sizes {list(kernel_sizes)} of block {block.index} in"
                f" path, got {path.kernel_sizes[block.index]}"
            )
        if mid > packed.max_mid_channels[block.index]:
            raise InputError(
                f"prepare: expected at most {packed.max_mid_channels[block.index]} middle channels of block "
                f"{block.index} in path, got {mid}"
            )
        is_last = block.position == path.depths[block.stage] - 1
        choices.append(
            (
                packed.places[block.index] + offset,
                path.kernel_sizes[block.index],
                mid,
                se_channels(mid) if block.se else 0,
                taps.get(block.stage, -1) if is_last else -1,
            )
        )
    return choices


def _check_statistics(space: Space, statistics: BNStatistics, packed: PackedWeights, path: Path) -> None:
    """Every layer that runs must have statistics of its width."""
    unknown = [name for name in statistics.layers if name not in packed.norm_widths]
    if unknown:
        raise InputError(f"prepare: expected statistics of this net, got the layer {unknown[0]!r}")
    widths = dict(packed.norm_widths)
    for block in space.blocks:
        name = packed.block_names.get(block.index)
        if name is None:
            continue
        if block.position >= path.depths[block.stage]:
            for part in ("expand", "depth", "project"):
                del widths[f"{name}.{part}_bn"]
        else:
            mid = block.mid_channels(path.expand_ratios[block.index])
            widths[f"{name}.expand_bn"] = widths[f"{name}.depth_bn"] = mid
    for name, channels in widths.items():
        pair = statistics.layers.get(name)
        if pair is None or pair[0].shape[0] != channels:
            got = "none" if pair is None else f"{pair[0].shape[0]} channels"
            raise InputError(f"prepare: expected statistics of {channels} channels for {name}, got {got}")

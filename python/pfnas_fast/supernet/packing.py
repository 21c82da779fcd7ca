# SPDX-License-Identifier: Apache-2.0
"""The weights of a whole net in one tensor, laid out for the kernels (csrc/bindings/subnet.cpp reads it).

Packed are: 1x1 weights as panels of 48 outputs, of which every width is a prefix; depthwise filters once per
kernel size, derived from the bank, in blocks of 16 channels; the parameters of batch normalisation, to be
folded with the statistics of a path. Dynamic nets and plain ones (extracted subnets) are packed alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pfnas_fast.ops import pack_pointwise_weight
from pfnas_fast.ops._library import _C
from pfnas_fast.ops.dynamic_pointwise_conv import ACTIVATIONS, PANEL_WIDTH
from pfnas_fast.supernet.layers import DynamicDepthwiseConv2d

BLOCK = 16  # floats that every part is aligned to, and channels per block of depthwise filters
NOTHING = (-1, -1)  # in place of a folded batch normalisation that is not there


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


class Packer:
    """Collects the parts of one net.

    Attributes:
        norm_names: Module names of the batch normalisations, in the order of the layout.
        norms: The modules.
        norm_places: Where the folded scale of each is.
    """

    def __init__(self) -> None:
        self.norm_names: list[str] = []
        self.norms: list[nn.BatchNorm2d] = []
        self.norm_places: list[int] = []
        self._norm_layout: list[dict[str, Any]] = []
        self._parts: list[tuple[int, Tensor]] = []
        self._size = 0
        self._folded_size = 0

    def add(self, values: Tensor, *, width: int | None = None) -> int:
        """Append `values`, any shape, padded with zeros to `width` floats, and return their offset."""
        values = values.detach().float().flatten()
        offset = self._size
        self._parts.append((offset, values))
        self._size += _round_up(max(values.numel(), width or 0), BLOCK)
        return offset

    def panels(self, weight: Tensor) -> int:
        """A 1x1 weight, [O, I] or [O, I, 1, 1]."""
        return self.add(pack_pointwise_weight(weight.detach().float().reshape(*weight.shape[:2], 1, 1)))

    def filters(self, weight: Tensor) -> int:
        """Depthwise filters, [C, 1, k, k], as [ceil(C / 16), k * k, 16]."""
        taps = weight.detach().flatten(1)  # [C, k * k]
        taps = F.pad(taps, (0, 0, 0, -taps.shape[0] % BLOCK))
        return self.add(taps.view(-1, BLOCK, taps.shape[1]).transpose(1, 2))

    def norm(self, name: str, module: nn.BatchNorm2d) -> tuple[int, int]:
        """A batch normalisation; returns where its folded scale and shift will be."""
        channels = module.num_features
        width = _round_up(channels, PANEL_WIDTH)
        folded = (self._folded_size, self._folded_size + width)
        self._folded_size += 2 * width
        self.norm_names.append(name)
        self.norms.append(module)
        self.norm_places.append(folded[0])
        self._norm_layout.append(
            {
                "gamma": self.add(module.weight),
                "beta": self.add(module.bias),
                "eps": module.eps,
                "channels": channels,
                "folded": folded,
            }
        )
        return folded

    @property
    def folded_size(self) -> int:
        """Number of floats of a folded tensor."""
        return self._folded_size

    def weights(self) -> Tensor:
        """Everything that was added, one flat float32 tensor on huge pages."""
        weights = torch.zeros(self._size)
        _C.advise_huge_pages(weights)
        for offset, values in self._parts:
            weights[offset : offset + values.numel()] = values
        return weights

    def finish(self, layout: dict[str, Any]) -> Any:
        """The compiled net."""
        weights = self.weights()
        layout = {"folded_size": self._folded_size, "norms": self._norm_layout, **layout}
        return _C.PackedNet(weights, layout)


def _activation(name: str | None) -> int:
    return ACTIVATIONS.index(name)


def _derived_filters(conv: DynamicDepthwiseConv2d) -> Iterator[Tensor]:
    """The filters [C, 1, k, k] of every size, largest first.

    As `DynamicDepthwiseConv2d.active_weight`, but without a matrix product, whose bits may depend on the
    number of threads.
    """
    filters = conv.weight.detach()
    yield filters
    for size, name in conv.transform_names:
        centre = filters[:, :, 1:-1, 1:-1].reshape(filters.shape[0], 1, -1)  # [C, 1, (size - 2) ** 2]
        filters = (centre * getattr(conv, name).detach()).sum(-1).view(-1, 1, size - 2, size - 2)
        yield filters


def _depthwise(packer: Packer, conv: nn.Module) -> tuple[dict[int, int], int, int]:
    """(offset by kernel size, stride, channels) of a dynamic or a plain depthwise convolution."""
    if isinstance(conv, DynamicDepthwiseConv2d):
        offsets = {filters.shape[-1]: packer.filters(filters) for filters in _derived_filters(conv)}
        return {k: offsets[k] for k in conv.kernel_sizes}, conv.stride, conv.weight.shape[0]
    assert isinstance(conv, nn.Conv2d)
    return {conv.kernel_size[0]: packer.filters(conv.weight)}, conv.stride[0], conv.out_channels


def _block(
    packer: Packer, depth_conv: nn.Module, project: Tensor, *, has_residual: bool, in_channels: int
) -> dict[str, Any]:
    """What all blocks share; without expansion, normalisation and excitation."""
    filters, stride, channels = _depthwise(packer, depth_conv)
    return {
        "in_channels": in_channels,
        "out_channels": project.shape[0],
        "max_mid_channels": channels,
        "max_reduced_channels": 0,
        "stride": stride,
        "has_residual": has_residual,
        "filters": filters,
        "project_panels": packer.panels(project),
        "expand_panels": -1,
        "expand_activation": 0,
        "depth_activation": 0,
        "out_activation": 0,
        "expand_affine": NOTHING,
        "depth_affine": NOTHING,
        "project_affine": NOTHING,
    }


def pack_mbconv(packer: Packer, name: str, block: Any) -> dict[str, Any]:
    """A `DynamicMBConv` or `PlainMBConv`."""
    spec = getattr(block, "block", block)  # the dynamic one keeps these two in its description
    expand = block.expand_conv.weight
    entry = _block(
        packer,
        block.depth_conv,
        block.project_conv.weight,
        has_residual=spec.has_residual,
        in_channels=expand.shape[1],
    )
    entry["expand_panels"] = packer.panels(expand)
    entry["expand_activation"] = entry["depth_activation"] = _activation(spec.activation)
    for part in ("expand", "depth", "project"):
        entry[f"{part}_affine"] = packer.norm(f"{name}.{part}_bn", getattr(block, f"{part}_bn"))
    if block.se is not None:
        reduce, excite = block.se.reduce, block.se.expand
        entry["max_reduced_channels"] = reduce.out_features
        entry["reduce_panels"] = packer.panels(reduce.weight)
        entry["reduce_bias"] = packer.add(reduce.bias, width=_round_up(reduce.out_features, PANEL_WIDTH))
        entry["excite_panels"] = packer.panels(excite.weight)
        entry["excite_bias"] = packer.add(excite.bias, width=_round_up(excite.out_features, PANEL_WIDTH))
    return entry


def pack_static_block(packer: Packer, name: str, block: Any) -> dict[str, Any]:
    """A `StaticBlock` or `PlainStaticBlock`: depthwise and projection."""
    depth, project = block.depth, block.project
    entry = _block(
        packer,
        depth.conv,
        project.conv.weight,
        has_residual=block.has_residual,
        in_channels=depth.conv.in_channels,
    )
    entry["depth_activation"] = _activation(depth.activation)
    entry["depth_affine"] = packer.norm(f"{name}.depth.bn", depth.bn)
    entry["project_affine"] = packer.norm(f"{name}.project.bn", project.bn)
    return entry


def pack_stem(packer: Packer, name: str, stem: Any) -> dict[str, Any]:
    """The dense 3x3 convolution, [O, 3, 3, 3] as [27 taps, O padded to 16]."""
    weight = stem.conv.weight.detach()
    width = weight.shape[0]
    taps = F.pad(weight.flatten(1).T, (0, -width % BLOCK))
    return {
        "weight": packer.add(taps),
        "out_channels": width,
        "activation": _activation(stem.activation),
        "affine": packer.norm(f"{name}.bn", stem.bn),
    }


def pack_dense(
    packer: Packer,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    affine: tuple[int, int] = NOTHING,
    activation: str | None = None,
) -> dict[str, Any]:
    """A 1x1 convolution or linear layer that is the same in all paths."""
    out_channels, in_channels = weight.shape[:2]
    width = _round_up(out_channels, PANEL_WIDTH)
    return {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "panels": packer.panels(weight),
        "bias": -1 if bias is None else packer.add(bias, width=width),
        "affine": affine,
        "activation": _activation(activation),
    }


def pack_backbone(packer: Packer, name: str, backbone: Any) -> dict[str, Any]:
    """Stem and blocks; the first block, where there is one, has index 0 and moves the others up by one."""
    blocks: list[dict[str, Any]] = []
    stem = pack_stem(packer, f"{name}.stem", backbone.stem)
    if backbone.first_block is not None:
        blocks.append(pack_static_block(packer, f"{name}.first_block", backbone.first_block))
    for key, block in named_blocks(backbone):
        blocks.append(pack_mbconv(packer, f"{name}.blocks.{key}", block))
    return {"stem": stem, "blocks": blocks}


def named_blocks(backbone: Any) -> Iterator[tuple[str, nn.Module]]:
    """(index in the space, block) of a dynamic or plain backbone."""
    yield from backbone.blocks.named_children()


def pack_detector(net: Any) -> tuple[Packer, dict[str, Any]]:
    """A `DetectionSupernet` or a `Detector`."""
    packer = Packer()
    layout = pack_backbone(packer, "backbone", net.backbone)
    neck, head = net.neck, net.head
    levels = range(len(head.strides))
    laterals = [
        pack_dense(
            packer,
            neck.lateral_convs[i].weight,
            affine=packer.norm(f"neck.lateral_bns.{i}", neck.lateral_bns[i]),
            activation="hswish",
        )
        for i in levels
    ]
    convs = [_pack_separable(packer, f"head.convs.{i}", conv, levels) for i, conv in enumerate(head.convs)]
    predictor = pack_dense(packer, head.predictor.weight)
    width = _round_up(head.predictor.out_features, PANEL_WIDTH)
    affines = []
    for level in levels:
        scale = torch.ones(head.predictor.out_features)
        scale[head.num_classes : head.num_classes + 4] = head.scale.weight.detach()[level]
        shift = head.predictor.bias.detach() * scale
        affines.append((packer.add(scale, width=width), packer.add(shift, width=width)))
    return packer, layout | {
        "laterals": laterals,
        "convs": convs,
        "predictor_affines": affines,
        "tail": [predictor],
    }


def _pack_separable(packer: Packer, name: str, conv: Any, levels: Sequence[int]) -> list[dict[str, Any]]:
    channels = conv.point_conv.in_channels
    shared = _block(packer, conv.depth_conv, conv.point_conv.weight, has_residual=False, in_channels=channels)
    shared["out_activation"] = _activation("hswish")
    return [
        shared | {"project_affine": packer.norm(f"{name}.bns.{level}", conv.bns[level])} for level in levels
    ]


def pack_classifier(net: Any) -> tuple[Packer, dict[str, Any]]:
    """A `ClassificationSupernet` or a `ClassificationSubnet`."""
    packer = Packer()
    layout = pack_backbone(packer, "backbone", net.backbone)
    tail = net.tail
    feature = pack_dense(
        packer,
        tail.feature.conv.weight,
        affine=packer.norm("tail.feature.bn", tail.feature.bn),
        activation="hswish",
    )
    hidden = pack_dense(packer, tail.hidden.weight, activation="hswish")
    classifier = pack_dense(packer, tail.classifier.weight, bias=tail.classifier.bias)
    return packer, layout | {
        "laterals": [],
        "convs": [],
        "predictor_affines": [],
        "tail": [feature, hidden, classifier],
    }

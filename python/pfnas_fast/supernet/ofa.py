# SPDX-License-Identifier: Apache-2.0
"""Weights of Once-for-All's `OFAMobileNetV3` (arXiv:1908.09791) in this package's supernet."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pfnas_fast.errors import InputError
from pfnas_fast.supernet.backbone import Backbone

# Spellings of older checkpoints and of the static net, in the order in which they are replaced.
_SPELLINGS = (
    (re.compile(r"^module\."), ""),
    (re.compile(r"\.mobile_inverted_conv\."), ".conv."),
    (re.compile(r"\.bn\.bn\."), ".bn."),
    (re.compile(r"\.conv\.conv\.weight$"), ".conv.weight"),
    (re.compile(r"\.linear\.linear\."), ".linear."),
)

# Our module path -> theirs; {0} is the block's number.
_MODULES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(ours), theirs)
    for ours, theirs in (
        (r"^backbone\.stem\.(conv|bn)\.", r"first_conv.\1."),
        (r"^backbone\.first_block\.depth\.(conv|bn)\.", r"blocks.0.conv.depth_conv.\1."),
        (r"^backbone\.first_block\.project\.(conv|bn)\.", r"blocks.0.conv.point_linear.\1."),
        (r"^backbone\.blocks\.(\d+)\.expand_(conv|bn)\.", r"blocks.{\1}.conv.inverted_bottleneck.\2."),
        (r"^backbone\.blocks\.(\d+)\.depth_(conv|bn)\.", r"blocks.{\1}.conv.depth_conv.\2."),
        (r"^backbone\.blocks\.(\d+)\.project_(conv|bn)\.", r"blocks.{\1}.conv.point_linear.\2."),
        (r"^backbone\.blocks\.(\d+)\.se\.(reduce|expand)\.", r"blocks.{\1}.conv.depth_conv.se.fc.\2."),
        (r"^tail\.feature\.(conv|bn)\.", r"final_expand_layer.\1."),
        (r"^tail\.hidden\.", r"feature_mix_layer.conv."),
        (r"^tail\.classifier\.", r"classifier.linear."),
    )
)
_TAIL = ("final_expand_layer.", "feature_mix_layer.", "classifier.")
_OPTIONAL = re.compile(r"(num_batches_tracked|\dto\d_matrix)$")


def load_ofa_weights(model: nn.Module, source: str | os.PathLike[str] | Mapping[str, Any]) -> None:
    """Copy the weights of an `OFAMobileNetV3` into `model`, which then computes the same on every path.

    Also takes the static largest net (``MobileNetV3``) that Once-for-All's training starts from; the kernel
    matrices, which it lacks, stay as they are. Nothing is copied if anything does not fit.

    Args:
        model: A `ClassificationSupernet`, or a `Backbone`, which leaves out the classification tail. The
            space must have Once-for-All's shape, as the preset ``ofa_mbv3_w1.0`` does.
        source: A checkpoint file, or a state dict, possibly inside ``{"state_dict": ...}``.

    Raises:
        InputError: the file cannot be read, or its weights do not fit the model; the text names the first
            that does not.
        TypeError: another kind of model.

    Example:
        >>> from pfnas_fast.space import load_space
        >>> from pfnas_fast.supernet import ClassificationSupernet
        >>> net = ClassificationSupernet(load_space("ofa_mbv3_w1.0"), num_classes=1000)
        >>> load_ofa_weights(net, "ofa_mbv3_d234_e346_k357_w1.0")  # doctest: +SKIP
    """
    backbone = model if isinstance(model, Backbone) else getattr(model, "backbone", None)
    with_tail = not isinstance(model, Backbone)
    if not isinstance(backbone, Backbone) or (with_tail and not hasattr(model, "tail")):
        raise TypeError(
            "load_ofa_weights: expected a ClassificationSupernet or a Backbone for model, "
            f"got {type(model).__name__}"
        )
    theirs = _read(source)
    prefix = "" if with_tail else "backbone."
    shift = 0 if backbone.first_block is None else 1  # their block 0 is our static first block
    pairs: list[tuple[Tensor, Tensor]] = []
    used: set[str] = set()
    for name, target in model.state_dict(keep_vars=True).items():
        key = _their_name(prefix + name, shift)
        if key not in theirs:
            if _OPTIONAL.search(key):
                continue
            raise InputError(f"load_ofa_weights: expected {key} in source, got a state dict without it")
        used.add(key)
        pairs.append((target, _fitting(theirs[key], target, key)))
    unknown = [key for key in theirs if key not in used and (with_tail or not key.startswith(_TAIL))]
    if unknown:
        raise InputError(
            f"load_ofa_weights: expected weights of {backbone.space.name} in source, got {unknown[0]}, "
            "which it does not have"
        )
    with torch.no_grad():
        for target, values in pairs:
            target.copy_(values)


def _read(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict under the spelling that `_MODULES` uses."""
    if isinstance(source, (str, os.PathLike)):
        try:
            source = torch.load(source, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise InputError(
                f"load_ofa_weights: expected a checkpoint for source, got {os.fspath(source)!r} ({error})"
            ) from error
    state = source.get("state_dict", source) if isinstance(source, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(
            f"load_ofa_weights: expected a dict of tensors for source, got {type(source).__name__}"
        )
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        for pattern, replacement in _SPELLINGS:
            key = pattern.sub(replacement, key)
        renamed[key] = value
    return renamed


def _their_name(name: str, shift: int) -> str:
    for pattern, replacement in _MODULES:
        translated, count = pattern.subn(replacement, name)
        if count:
            return re.sub(r"\{(\d+)\}", lambda match: str(int(match[1]) + shift), translated)
    raise RuntimeError(f"load_ofa_weights: no counterpart for {name}")


def _fitting(values: Tensor, target: Tensor, key: str) -> Tensor:
    """`values` in the target's shape; 1x1 convolutions on pooled features are linear layers here."""
    shape = tuple(values.shape)
    if values.dim() == 4 and target.dim() == 2 and shape[2:] == (1, 1):
        values = values.flatten(1)
    if values.shape != target.shape:
        hint = (
            "; for another number of classes load the backbone alone" if key.startswith("classifier.") else ""
        )
        raise InputError(
            f"load_ofa_weights: expected shape {tuple(target.shape)} for {key}, got {shape}{hint}"
        )
    return values

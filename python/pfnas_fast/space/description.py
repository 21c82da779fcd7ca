# SPDX-License-Identifier: Apache-2.0
"""Spaces as data: reading, validating and writing their descriptions (YAML or plain dicts)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import resources
from itertools import pairwise
from pathlib import Path as FilePath
from typing import Any

import yaml

from pfnas_fast.errors import InputError
from pfnas_fast.space.space import Space
from pfnas_fast.space.specs import HeadSpec, StageSpec, StaticBlockSpec, TailSpec

_ACTIVATIONS = ("relu", "hswish")
_KERNEL_SIZES = (3, 5, 7)
_MAX_CHANNELS = 1 << 16
_MAX_CODE = 255


def preset_names() -> tuple[str, ...]:
    """Names of the spaces that come with the package."""
    folder = resources.files("pfnas_fast.space") / "presets"
    return tuple(sorted(f.name[: -len(".yaml")] for f in folder.iterdir() if f.name.endswith(".yaml")))


def load_space(source: str | FilePath) -> Space:
    """Load a search space.

    Args:
        source: Name of a preset ("ofa_mbv3_w1.0", "tiny") or path of a YAML file of the same form.

    Returns:
        The validated space.

    Raises:
        ValueError: No such preset or file, not YAML, or the description is wrong; the text names the field.

    Example:
        >>> from pfnas_fast.space import load_space
        >>> load_space("tiny").tap_strides
        (8, 16, 32)
    """
    if not isinstance(source, (str, FilePath)):
        raise TypeError(
            f"load_space: expected a preset name or a YAML file for source, got {type(source).__name__}"
        )
    if str(source) in preset_names():
        text = (resources.files("pfnas_fast.space") / "presets" / f"{source}.yaml").read_text(
            encoding="utf-8"
        )
        return from_dict(yaml.safe_load(text))
    file = FilePath(source)
    if not file.is_file():
        raise InputError(
            f"load_space: expected a preset ({', '.join(preset_names())}) or a YAML file for source, "
            f"got {str(source)!r}"
        )
    try:
        description = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = " ".join(str(error).split())
        raise InputError(f"load_space: expected YAML in {file}, got {line}") from None
    try:
        return from_dict(description)
    except InputError as error:
        raise InputError(f"{error} (in {file})") from None


def to_dict(space: Space) -> dict[str, Any]:
    """See `Space.to_dict`."""
    first = space.first_block
    return {
        "name": space.name,
        "stem": {"channels": space.stem_channels, "activation": space.stem_activation},
        "first_block": first
        and {
            "out_channels": first.out_channels,
            "kernel_size": first.kernel_size,
            "activation": first.activation,
        },
        "stages": [
            {
                "out_channels": s.out_channels,
                "stride": s.stride,
                "activation": s.activation,
                "se": s.se,
                "depths": list(s.depths),
                "expand_ratios": list(s.expand_ratios),
                "kernel_sizes": list(s.kernel_sizes),
            }
            for s in space.stages
        ],
        "taps": list(space.taps),
        "head": {"channels": space.head.channels, "num_convs": space.head.num_convs},
        "tail": {
            "feature_channels": space.tail.feature_channels,
            "hidden_channels": space.tail.hidden_channels,
            "dropout": space.tail.dropout,
        },
        "resolutions": list(space.resolutions),
        "aspect": list(space.aspect),
        "classification_resolutions": list(space.classification_resolutions),
    }


def from_dict(description: Any) -> Space:
    """See `Space.from_dict`."""
    top = _Section("", description)
    stem = top.section("stem")
    stem_channels = stem.integer("channels", 1, _MAX_CHANNELS)
    stem_activation = stem.choice("activation", _ACTIVATIONS)
    stem.close()
    space = Space(
        name=top.text("name"),
        stem_channels=stem_channels,
        stem_activation=stem_activation,
        first_block=_first_block(top, stem_channels),
        stages=tuple(_stage(section) for section in top.sections("stages")),
        taps=top.ascending("taps", 0, 1 << 10),
        head=_head(top.section("head")),
        tail=_tail(top.section("tail")),
        resolutions=top.ascending("resolutions", 16, 1 << 14),
        aspect=_aspect(top),
        classification_resolutions=top.ascending("classification_resolutions", 16, 1 << 14),
    )
    top.close()
    _check_whole(space)
    return space


def _first_block(top: _Section, in_channels: int) -> StaticBlockSpec | None:
    if top.is_null("first_block"):
        return None
    section = top.section("first_block")
    block = StaticBlockSpec(
        in_channels=in_channels,
        out_channels=section.width("out_channels"),
        kernel_size=section.choice("kernel_size", _KERNEL_SIZES),
        activation=section.choice("activation", _ACTIVATIONS),
    )
    section.close()
    return block


def _stage(section: _Section) -> StageSpec:
    stage = StageSpec(
        out_channels=section.width("out_channels"),
        stride=section.choice("stride", (1, 2)),
        activation=section.choice("activation", _ACTIVATIONS),
        se=section.choice("se", (False, True)),
        depths=section.ascending("depths", 1, 64),
        expand_ratios=section.ascending("expand_ratios", 1, 64),
        kernel_sizes=section.ascending("kernel_sizes", 1, 99),
    )
    section.close()
    if not set(stage.kernel_sizes) <= set(_KERNEL_SIZES):
        section.refuse("kernel_sizes", f"sizes from {list(_KERNEL_SIZES)}", list(stage.kernel_sizes))
    if len(stage.kernel_sizes) * len(stage.expand_ratios) >= _MAX_CODE:
        section.refuse("expand_ratios", f"fewer than {_MAX_CODE} choices a block", list(stage.expand_ratios))
    return stage


def _head(section: _Section) -> HeadSpec:
    head = HeadSpec(
        channels=section.integer("channels", 1, _MAX_CHANNELS), num_convs=section.integer("num_convs", 0, 16)
    )
    section.close()
    return head


def _tail(section: _Section) -> TailSpec:
    tail = TailSpec(
        feature_channels=section.integer("feature_channels", 1, _MAX_CHANNELS),
        hidden_channels=section.integer("hidden_channels", 1, _MAX_CHANNELS),
        dropout=section.fraction("dropout"),
    )
    section.close()
    return tail


def _aspect(top: _Section) -> tuple[int, int]:
    value = top.take("aspect")
    if not (
        isinstance(value, (list, tuple)) and len(value) == 2 and all(_is_int(v) and v >= 1 for v in value)
    ):
        top.refuse("aspect", "[width, height], two positive ints", value)
    return (value[0], value[1])


def _check_whole(space: Space) -> None:
    """Conditions that involve more than one field."""
    last = len(space.stages) - 1
    if space.taps[-1] != last:
        raise InputError(
            f"from_dict: expected stage indices from 0 that end with the last stage ({last}) for taps, "
            f"got {list(space.taps)}"
        )
    strides = space.tap_strides
    if any(b != 2 * a for a, b in pairwise(strides)):
        raise InputError(
            f"from_dict: expected stages whose strides double from one to the next for taps, "
            f"got {list(space.taps)} with strides {list(strides)}"
        )
    for field in ("resolutions", "classification_resolutions"):
        if len(getattr(space, field)) > _MAX_CODE - 1:
            raise InputError(f"from_dict: expected fewer than {_MAX_CODE} values for {field}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class _Section:
    """One mapping of a description, read field by field; `close` refuses what nobody asked for."""

    def __init__(self, name: str, value: Any) -> None:
        self.name = name
        if not isinstance(value, Mapping):
            what = name or "the space"
            raise InputError(f"from_dict: expected a mapping for {what}, got {value!r}")
        self.rest: dict[Any, Any] = dict(value)

    def label(self, field: str) -> str:
        return f"{self.name}.{field}" if self.name else field

    def refuse(self, field: str, expected: str, value: Any) -> None:
        raise InputError(f"from_dict: expected {expected} for {self.label(field)}, got {value!r}")

    def take(self, field: str) -> Any:
        if field not in self.rest:
            raise InputError(f"from_dict: expected a value for {self.label(field)}, got nothing")
        return self.rest.pop(field)

    def close(self) -> None:
        if self.rest:
            unknown = ", ".join(repr(key) for key in self.rest)
            raise InputError(
                f"from_dict: expected no further keys in {self.name or 'the space'}, got {unknown}"
            )

    def is_null(self, field: str) -> bool:
        """Whether an optional section is null; takes it if so."""
        return self.rest.get(field, 0) is None and self.rest.pop(field) is None

    def section(self, field: str) -> _Section:
        return _Section(self.label(field), self.take(field))

    def sections(self, field: str) -> list[_Section]:
        value = self.take(field)
        if not isinstance(value, (list, tuple)) or not value:
            self.refuse(field, "a list of at least one stage", value)
        return [_Section(f"{self.label(field)}[{index}]", entry) for index, entry in enumerate(value)]

    def text(self, field: str) -> str:
        value = self.take(field)
        # Names become parts of file names.
        if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9._-]+", value):
            self.refuse(field, "letters, digits, '.', '_' or '-'", value)
        return value

    def integer(self, field: str, low: int, high: int) -> int:
        value = self.take(field)
        if not _is_int(value) or not low <= value <= high:
            self.refuse(field, f"an int from {low} to {high}", value)
        return value

    def width(self, field: str) -> int:
        """A static channel count: elastic widths would make costs depend on pairs of stages."""
        value = self.rest.get(field)
        if isinstance(value, (list, tuple)):
            self.refuse(field, "one static width (an elastic output width is not supported)", value)
        return self.integer(field, 1, _MAX_CHANNELS)

    def fraction(self, field: str) -> float:
        value = self.take(field)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            self.refuse(field, "a number, 0 <= x < 1,", value)
        return float(value)

    def choice(self, field: str, allowed: tuple[Any, ...]) -> Any:
        value = self.take(field)
        if not any(type(value) is type(a) and value == a for a in allowed):
            self.refuse(field, f"one of {list(allowed)}", value)
        return value

    def ascending(self, field: str, low: int, high: int) -> tuple[int, ...]:
        value = self.take(field)
        values = tuple(value) if isinstance(value, (list, tuple)) else ()
        good = len(values) > 0 and all(_is_int(v) and low <= v <= high for v in values)
        if not good or any(a >= b for a, b in pairwise(values)):
            self.refuse(field, f"an ascending list of different ints from {low} to {high}", value)
        return values

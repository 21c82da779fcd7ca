# SPDX-License-Identifier: Apache-2.0
"""The search space: what is elastic, which paths exist, and how populations of paths are coded."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from pfnas_fast.errors import InputError
from pfnas_fast.space import population as coding
from pfnas_fast.space.path import Path
from pfnas_fast.space.specs import BlockSpec, HeadSpec, StageSpec, StaticBlockSpec, TailSpec

Genes = SupportsIndex | Iterable[SupportsIndex]


@dataclass(frozen=True)
class Space:
    """A search space of detectors with a static head, described by data alone.

    Load one with `load_space` or `Space.from_dict`, which validate; the constructor does not.

    Attributes:
        name: Name of the space.
        stem_channels: Width of the 3x3 stride-2 stem.
        stem_activation: "relu" or "hswish".
        first_block: Static block after the stem, or None.
        stages: Elastic stages.
        taps: Ascending stage indices (from 0) whose outputs feed the neck; the last is the last stage.
        head: Neck and head.
        tail: Classification tail.
        resolutions: Ascending longest sides of the input, px.
        aspect: (width, height) of the canvas, as a ratio.
        classification_resolutions: Ascending resolutions, px, of the square canvas for classification.

    Example:
        >>> from pfnas_fast.space import load_space
        >>> space = load_space("tiny")
        >>> path = space.path(ks=3, e=[2, 3, 4] * 4, d=2, resolution=160)
        >>> space.decode(space.encode([path])) == [path]
        True
    """

    name: str
    stem_channels: int
    stem_activation: str
    first_block: StaticBlockSpec | None
    stages: tuple[StageSpec, ...]
    taps: tuple[int, ...]
    head: HeadSpec
    tail: TailSpec
    resolutions: tuple[int, ...]
    aspect: tuple[int, int]
    classification_resolutions: tuple[int, ...]

    @cached_property
    def blocks(self) -> tuple[BlockSpec, ...]:
        """All elastic blocks, stage by stage."""
        blocks: list[BlockSpec] = []
        in_channels = self.first_block.out_channels if self.first_block else self.stem_channels
        for index, stage in enumerate(self.stages):
            for position in range(stage.depths[-1]):
                blocks.append(
                    BlockSpec(
                        index=len(blocks),
                        stage=index,
                        position=position,
                        in_channels=in_channels,
                        out_channels=stage.out_channels,
                        stride=stage.stride if position == 0 else 1,
                        activation=stage.activation,
                        se=stage.se,
                        kernel_sizes=stage.kernel_sizes,
                        expand_ratios=stage.expand_ratios,
                    )
                )
                in_channels = stage.out_channels
        return tuple(blocks)

    @property
    def num_blocks(self) -> int:
        """Number of elastic blocks of the largest path."""
        return len(self.blocks)

    @property
    def num_slots(self) -> int:
        """Columns of a population: one per block and one for the resolution."""
        return len(self.blocks) + 1

    @cached_property
    def slot_sizes(self) -> tuple[int, ...]:
        """Choices of each slot without 'absent': kernel x expand per block, then the resolutions."""
        sizes = [len(b.kernel_sizes) * len(b.expand_ratios) for b in self.blocks]
        return (*sizes, len(self.resolutions))

    @cached_property
    def stage_slices(self) -> tuple[slice, ...]:
        """The slots of each stage's blocks."""
        ends = np.cumsum([stage.depths[-1] for stage in self.stages]).tolist()
        return tuple(slice(end - stage.depths[-1], end) for end, stage in zip(ends, self.stages, strict=True))

    @property
    def num_paths(self) -> int:
        """Exact number of different subnets (dead genes not counted, resolutions excluded)."""
        per_block = [len(s.kernel_sizes) * len(s.expand_ratios) for s in self.stages]
        return math.prod(
            sum(n**d for d in stage.depths) for n, stage in zip(per_block, self.stages, strict=True)
        )

    @property
    def name_and_width(self) -> tuple[str, str]:
        """The name without its width suffix, and the suffix: ("ofa_mbv3", "_w1.0"), ("tiny", "")."""
        match = re.fullmatch(r"(.+)(_w\d+(?:\.\d+)?)", self.name)
        return (match[1], match[2]) if match else (self.name, "")

    @property
    def ofa_id(self) -> str:
        """The whole space's id as Once-for-All writes it, for example "ofa_mbv3_d234_e346_k357_w1.0"."""
        prefix, width = self.name_and_width
        genes = []
        for letter, field in (("d", "depths"), ("e", "expand_ratios"), ("k", "kernel_sizes")):
            values = sorted({v for stage in self.stages for v in getattr(stage, field)})
            genes.append(letter + ("" if values[-1] < 10 else "-").join(map(str, values)))
        return f"{prefix}_{'_'.join(genes)}{width}"

    # Geometry -----------------------------------------------------------------------------------------------

    def canvas(self, resolution: int) -> tuple[int, int]:
        """Height and width of the input, px, whose longest side is `resolution`."""
        width, height = self.aspect
        short = max(1, round(resolution * min(width, height) / max(width, height)))
        return (short, resolution) if width >= height else (resolution, short)

    def stem_size(self, resolution: int) -> tuple[int, int]:
        """Height and width of the stem's output, px (also the first block's)."""
        return _halve(self.canvas(resolution))

    def stage_sizes(self, resolution: int) -> tuple[tuple[int, int], ...]:
        """Height and width of each stage's output, px: a stride of 2 gives ceil(size / 2)."""
        sizes, size = [], self.stem_size(resolution)
        for stage in self.stages:
            size = _halve(size) if stage.stride == 2 else size
            sizes.append(size)
        return tuple(sizes)

    def tap_sizes(self, resolution: int) -> tuple[tuple[int, int], ...]:
        """Height and width of each pyramid level, px, finest first."""
        sizes = self.stage_sizes(resolution)
        return tuple(sizes[tap] for tap in self.taps)

    @property
    def tap_channels(self) -> tuple[int, ...]:
        """Channels of each tapped stage output, finest first."""
        return tuple(self.stages[tap].out_channels for tap in self.taps)

    @property
    def tap_strides(self) -> tuple[int, ...]:
        """Cumulative stride of each tapped stage output, finest first."""
        return tuple(2 * math.prod(s.stride for s in self.stages[: tap + 1]) for tap in self.taps)

    # Paths --------------------------------------------------------------------------------------------------

    def path(self, *, ks: Genes, e: Genes, d: Genes, resolution: SupportsIndex | None = None) -> Path:
        """A validated path, in Once-for-All's dialect.

        Args:
            ks: Kernel size for every block (an int), or one per block, skipped ones included.
            e: Expand ratio for every block (an int), or one per block.
            d: Depth of every stage (an int), or one per stage.
            resolution: Longest side, px; None is the largest.

        Returns:
            The path in canonical form (genes of skipped blocks are 0, so any allowed value or 0 may stand
            there).

        Raises:
            ValueError: A list has the wrong length or a value is not among the choices; the text names the
                block or stage, the value and the allowed values.
            TypeError: A value is not an int.

        Example:
            >>> from pfnas_fast.space import load_space
            >>> load_space("tiny").path(ks=3, e=2, d=1, resolution=128).depths
            (1, 1, 1, 1)
        """
        depths = _gene_list("d", d, len(self.stages), "stages")
        for index, (depth, stage) in enumerate(zip(depths, self.stages, strict=True)):
            _require("d", f"stage {index}", depth, stage.depths)
        genes = {
            "ks": _gene_list("ks", ks, self.num_blocks, "blocks"),
            "e": _gene_list("e", e, self.num_blocks, "blocks"),
        }
        for block in self.blocks:
            skipped = block.position >= depths[block.stage]
            for name, allowed in (("ks", block.kernel_sizes), ("e", block.expand_ratios)):
                value = genes[name][block.index]
                if not (skipped and value == 0):
                    _require(name, f"block {block.index} (stage {block.stage})", value, allowed)
                if skipped:
                    genes[name][block.index] = 0
        chosen = self.resolutions[-1] if resolution is None else _index("resolution", resolution)
        if chosen not in self.resolutions:
            raise InputError(f"path: expected one of {self.resolutions} for resolution, got {chosen}")
        return Path(tuple(genes["ks"]), tuple(genes["e"]), tuple(depths), chosen)

    def max_path(self, resolution: int | None = None) -> Path:
        """The largest path; at the largest resolution if `resolution` is None."""
        return self._extreme_path(-1, self.resolutions[-1] if resolution is None else resolution)

    def min_path(self, resolution: int | None = None) -> Path:
        """The smallest path; at the smallest resolution if `resolution` is None."""
        return self._extreme_path(0, self.resolutions[0] if resolution is None else resolution)

    def _extreme_path(self, choice: int, resolution: int) -> Path:
        return self.path(
            ks=[b.kernel_sizes[choice] for b in self.blocks],
            e=[b.expand_ratios[choice] for b in self.blocks],
            d=[s.depths[choice] for s in self.stages],
            resolution=resolution,
        )

    def path_from_json(self, obj: Mapping[str, Any]) -> Path:
        """Read what `Path.to_json` wrote, validating it against this space.

        Args:
            obj: {"ks", "e", "d"} and optionally "r" (px; default the largest resolution).

        Raises:
            ValueError: Keys are missing or unknown, or the path is not in the space.
        """
        if not isinstance(obj, Mapping) or not {"ks", "e", "d"} <= set(obj) <= {"ks", "e", "d", "r"}:
            raise InputError(
                f"path_from_json: expected an object with keys ks, e, d and r for obj, got {obj!r}"
            )
        return self.path(ks=obj["ks"], e=obj["e"], d=obj["d"], resolution=obj.get("r"))

    # Populations --------------------------------------------------------------------------------------------

    def encode(self, paths: Iterable[Path]) -> NDArray[np.uint8]:
        """Code paths as a population.

        Args:
            paths: Any number of paths of this space.

        Returns:
            [num_paths, num_slots] uint8. Slot b < num_blocks: 0 where the block is skipped, else
            1 + kernel_index * num_expand + expand_index; last slot: 1 + resolution_index.

        Raises:
            ValueError: A path is not in the space.
        """
        return coding.encode(self, list(paths))

    def decode(self, population: NDArray[np.uint8]) -> list[Path]:
        """The paths of a population (inverse of `encode`).

        Raises:
            ValueError: The population is not one of this space.
        """
        return coding.decode(self, population)

    def check_population(self, population: NDArray[np.uint8]) -> None:
        """Refuse an array that is not a population of this space.

        Args:
            population: [num_paths, num_slots] uint8.

        Raises:
            TypeError: Not a uint8 array.
            ValueError: Wrong shape, a code out of range, or a depth that is no choice; the text names row and
                block.
        """
        coding.check(self, population)

    def depths_of(self, population: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Number of blocks kept in each stage, [num_paths, num_stages] uint8, of a valid population."""
        counts = [(population[:, s] != 0).sum(axis=1, dtype=np.uint8) for s in self.stage_slices]
        return np.stack(counts, axis=1)

    # Data ---------------------------------------------------------------------------------------------------

    def for_classification(self) -> Space:
        """The same stages on the square canvas and at the resolutions for classification."""
        return replace(self, aspect=(1, 1), resolutions=self.classification_resolutions)

    def to_dict(self) -> dict[str, Any]:
        """The description that `Space.from_dict` and YAML files use: dicts, lists, numbers and strings."""
        from pfnas_fast.space.description import to_dict

        return to_dict(self)

    @classmethod
    def from_dict(cls, description: Mapping[str, Any]) -> Space:
        """Build and validate a space.

        Args:
            description: What `to_dict` returns; the presets show the form.

        Raises:
            ValueError: Something is missing, unknown or impossible; the text names the field.
        """
        from pfnas_fast.space.description import from_dict

        return from_dict(description)


def _halve(size: tuple[int, int]) -> tuple[int, int]:
    return -(-size[0] // 2), -(-size[1] // 2)


def _index(name: str, value: Any) -> int:
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"path: expected an int for {name}, got {value!r}")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"path: expected an int for {name}, got {value!r}") from None


def _gene_list(name: str, value: Any, length: int, what: str) -> list[int]:
    if isinstance(value, (str, bytes)):
        raise TypeError(f"path: expected an int or a list of {length} ints for {name}, got {value!r}")
    if not isinstance(value, Iterable):
        return [_index(name, value)] * length
    genes = [_index(name, v) for v in value]
    if len(genes) != length:
        raise InputError(
            f"path: expected {length} values for {name} (the space has {length} {what}), got {len(genes)}"
        )
    return genes


def _require(name: str, where: str, value: int, allowed: tuple[int, ...]) -> None:
    if value not in allowed:
        raise InputError(f"path: expected one of {allowed} for {name} at {where}, got {value}")

# SPDX-License-Identifier: Apache-2.0
"""From paths to integer codes, and from codes to the additive features of every ranker in this package.

A path is a row of codes, one per gene slot: 0 = absent (a block skipped by depth), 1 + choice otherwise.
Features are additive over slots, ``x = sum_slot design[slot, code]``, so that the first layer of any network
on top of them can be folded into one lookup table per slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pfnas_fast.errors import InputError
from pfnas_fast.ops.path_cost import as_codes, largest_codes

__all__ = ["GeneEncoding"]


@dataclass(frozen=True)
class GeneEncoding:
    """The slots of a path and the factors that describe each choice.

    Attributes:
        slot_sizes: Number of choices per slot, 'absent' not counted.
        factors: Per slot, the sizes of the factors whose product the choice is, slowest first: ``(3, 3)`` for
            a block whose code is kernel_index * 3 + expand_index, ``(n,)`` for a plain gene. A factor becomes
            its own one-hot group, which needs 6 weights where the joint choice needs 9: worth a lot when
            labels are few.
        space: The space that paths belong to; None for a plain architecture table.
    """

    slot_sizes: tuple[int, ...]
    factors: tuple[tuple[int, ...], ...]
    space: Any = None

    @classmethod
    def of(cls, space: Any = None, num_choices: Sequence[int] | None = None) -> GeneEncoding:
        """Describe a `Space` or a plain list of gene cardinalities.

        Args:
            space: A `pfnas_fast.space.Space`, or None.
            num_choices: Choices per gene, each 1..255, or None. Exactly one of the two is given.

        Returns:
            The encoding.

        Raises:
            InputError: both or neither given, or a cardinality outside 1..255.
        """
        if (space is None) == (num_choices is None):
            raise InputError(
                "PathFilter: expected exactly one of space and num_choices, got "
                + ("neither" if space is None else "both")
            )
        if space is not None:
            sizes = tuple(int(size) for size in space.slot_sizes)
            factors = [(len(block.kernel_sizes), len(block.expand_ratios)) for block in space.blocks]
            return cls(sizes, (*factors, (len(space.resolutions),)), space)
        sizes = tuple(int(size) for size in num_choices or ())
        if not sizes or min(sizes) < 1 or max(sizes) > 254:
            raise InputError(f"PathFilter: expected 1..254 choices for each gene of num_choices, got {sizes}")
        return cls(sizes, tuple((size,) for size in sizes))

    @property
    def num_slots(self) -> int:
        """Gene slots of a path."""
        return len(self.slot_sizes)

    @property
    def max_code(self) -> int:
        """Largest code in any slot."""
        return max(self.slot_sizes)

    def codes(self, paths: Any) -> np.ndarray:
        """Turn paths in any accepted form into codes.

        Args:
            paths: With a space: a list of `Path` or a uint8 population [n, num_slots]. Without: an integer
                array [n, num_genes] of 0-based choices, -1 = absent.

        Returns:
            uint8 [n, num_slots].

        Raises:
            InputError: wrong shape, or a code outside its slot (names row and slot).
            TypeError: not integers.
        """
        if self.space is not None and not isinstance(paths, np.ndarray):
            paths = list(paths)
            if not paths:
                return np.zeros((0, self.num_slots), np.uint8)
            return self.space.encode(paths)
        array = np.asarray(paths)
        if array.ndim != 2 or array.shape[1] != self.num_slots:
            raise InputError(
                f"PathFilter: expected shape [n, {self.num_slots}] for paths, got {list(array.shape)}"
            )
        if not np.issubdtype(array.dtype, np.integer):
            raise TypeError(f"PathFilter: expected an integer array for paths, got dtype {array.dtype}")
        sizes = np.asarray(self.slot_sizes)
        if self.space is None:
            low, high = array.min(0, initial=0), array.max(0, initial=0)
            if (low < -1).any() or (high >= sizes).any():
                row, slot = np.argwhere((array < -1) | (array >= sizes))[0]
                raise InputError(
                    f"PathFilter: expected -1..{sizes[slot] - 1} for gene {slot} of paths, "
                    f"got {array[row, slot]} in row {row}"
                )
            return (array + 1).astype(np.uint8)
        if array.dtype == np.uint8 and len(array):
            low, high = largest_codes(as_codes(array, self.num_slots, "PathFilter"))
        else:
            low, high = array.min(0, initial=0), array.max(0, initial=0)
        if (low < 0).any() or (high > sizes).any():
            row, slot = np.argwhere((array < 0) | (array > sizes))[0]
            raise InputError(
                f"PathFilter: expected code 0..{sizes[slot]} for slot {slot} of paths, "
                f"got {array[row, slot]} in row {row}"
            )
        return array.astype(np.uint8, copy=False)

    def design(self) -> np.ndarray:
        """Features of every (slot, code).

        Returns:
            float32 [num_slots, max_code + 1, num_features], zeros at code 0 and at codes that a slot does not
            have. Per slot: one column per value of each factor, but 'present' alone for a slot with a single
            choice.
        """
        widths = [sum(size for size in factors if size > 1) or 1 for factors in self.factors]
        starts = np.concatenate([[0], np.cumsum(widths)])
        table = np.zeros((self.num_slots, self.max_code + 1, starts[-1]), np.float32)
        for slot, factors in enumerate(self.factors):
            choice = np.arange(self.slot_sizes[slot])
            column, stride = int(starts[slot]), self.slot_sizes[slot]
            if stride == 1:
                table[slot, 1, column] = 1.0
            for size in factors:
                stride //= size
                if size > 1:
                    table[slot, 1 + choice, column + choice // stride % size] = 1.0
                    column += size
        return table

    def feature_groups(self) -> np.ndarray:
        """Which factor each feature belongs to: int64 [num_features], numbered from 0."""
        widths = []
        for factors in self.factors:
            widths += [size for size in factors if size > 1] or [1]
        return np.repeat(np.arange(len(widths)), widths)

    def features(self, codes: np.ndarray) -> np.ndarray:
        """Additive features of a few paths (fits, not floods): float32 [n, num_features]."""
        design = self.design()
        rows = np.zeros((len(codes), design.shape[2]), np.float32)
        for slot in range(self.num_slots):
            rows += design[slot, codes[:, slot]]
        return rows

# SPDX-License-Identifier: Apache-2.0
"""A path through a search space: one subnet at one resolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pfnas_fast.errors import InputError

if TYPE_CHECKING:
    from pfnas_fast.space.space import Space


def _digits(values: tuple[int, ...]) -> str:
    """Genes as OFA writes them: digits in a row, dashes only where a gene has two digits."""
    return ("" if all(v < 10 for v in values) else "-").join(map(str, values))


@dataclass(frozen=True)
class Path:
    """One subnet at one resolution, in canonical form: the genes of skipped blocks are 0.

    Equal subnets are equal objects with equal hashes. Build paths with `Space.path`, which validates them and
    clears dead genes; the constructor itself only checks the form.

    Attributes:
        kernel_sizes: Depthwise kernel size of each block of the space, 0 where the block is skipped.
        expand_ratios: Expand ratio of each block, 0 where the block is skipped.
        depths: Number of blocks kept in each stage.
        resolution: Longest side of the input, px.

    Raises:
        TypeError: A gene is not an int.
        ValueError: Kernel sizes and expand ratios disagree about which blocks are skipped.
    """

    kernel_sizes: tuple[int, ...]
    expand_ratios: tuple[int, ...]
    depths: tuple[int, ...]
    resolution: int

    def __post_init__(self) -> None:
        for field in ("kernel_sizes", "expand_ratios", "depths"):
            values = getattr(self, field)
            if not isinstance(values, tuple) or not all(type(v) is int for v in values):
                raise TypeError(f"Path: expected a tuple of ints for {field}, got {values!r}")
        if type(self.resolution) is not int:
            raise TypeError(f"Path: expected an int for resolution, got {self.resolution!r}")
        same_skipped = [
            (k == 0) == (e == 0) for k, e in zip(self.kernel_sizes, self.expand_ratios, strict=False)
        ]
        if len(self.kernel_sizes) != len(self.expand_ratios) or not all(same_skipped):
            raise InputError(
                "Path: expected kernel_sizes and expand_ratios of one length, 0 at the same blocks, "
                f"got {self.kernel_sizes} and {self.expand_ratios}"
            )

    def to_json(self) -> dict[str, list[int] | int]:
        """The path as JSON data, read back by `Space.path_from_json`.

        Returns:
            {"ks": kernel sizes, "e": expand ratios, "d": depths, "r": resolution in px}.
        """
        return {
            "ks": list(self.kernel_sizes),
            "e": list(self.expand_ratios),
            "d": list(self.depths),
            "r": self.resolution,
        }

    def ofa_id(self, space: Space) -> str:
        """A name in the style of Once-for-All's ids, unique within the space and safe as a file name.

        Args:
            space: The space the path belongs to.

        Returns:
            For example "ofa_mbv3_d22222_e33003300330033003300_k..._w1.0_r256": one digit per stage (d) or
            block (e, k; 0 = skipped), then the resolution.

        Example:
            >>> from pfnas_fast.space import load_space
            >>> space = load_space("tiny")
            >>> space.min_path().ofa_id(space)
            'tiny_d1111_e200200200200_k300300300300_r128'
        """
        prefix, width = space.name_and_width
        genes = f"d{_digits(self.depths)}_e{_digits(self.expand_ratios)}_k{_digits(self.kernel_sizes)}"
        return f"{prefix}_{genes}{width}_r{self.resolution}"

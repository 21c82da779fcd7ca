# SPDX-License-Identifier: Apache-2.0
"""Additive costs of whole populations: one table look-up per block and path, and a sum.

Call path: `path_cost` checks -> _C.path_cost picks the tier. Nothing here is differentiated or traced, so
the op is not registered with torch.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pfnas_fast.errors import InputError
from pfnas_fast.ops._library import _C

__all__ = ["CostTable", "path_cost"]

_WORD_CODES = 16  # codes per row that a vector register holds
_MAX_WORD = 2**32 - 1


class CostTable:
    """An additive cost, packed for `path_cost`.

    Whole numbers are divided by their common divisor and summed in 32 bits where that cannot overflow and no
    slot has more than 15 choices; every other cost is summed in float64.

    Args:
        table: [num_resolutions, num_blocks, num_codes], cost of each choice; code 0 ('absent') costs 0.
        constant: [num_resolutions], added to every path.
        unit: Divides every sum: 1e6 turns MACs into millions.

    Attributes:
        exact_words: Whether sums are 32-bit integers.

    Raises:
        InputError: shapes disagree, or values are negative or not finite.

    Example:
        >>> import numpy as np
        >>> from pfnas_fast.ops import CostTable, path_cost
        >>> table = CostTable(np.array([[[0.0, 2.0, 4.0], [0.0, 6.0, 8.0]]]), np.array([10.0]))
        >>> path_cost(np.array([[2, 1, 1], [1, 0, 1]], np.uint8), table).tolist()
        [20.0, 12.0]
    """

    def __init__(self, table: np.ndarray, constant: np.ndarray, unit: float = 1.0) -> None:
        table, constant = np.asarray(table, np.float64), np.asarray(constant, np.float64)
        if table.ndim != 3 or 0 in table.shape or constant.shape != table.shape[:1]:
            raise InputError(
                "path_cost: expected shapes [num_resolutions, num_blocks, num_codes] and [num_resolutions] "
                f"for table and constant, got {list(table.shape)} and {list(constant.shape)}"
            )
        if (
            not (np.isfinite(table).all() and np.isfinite(constant).all())
            or min(table.min(), constant.min()) < 0
        ):
            raise InputError("path_cost: expected finite values >= 0 for table and constant")
        self.num_resolutions, num_blocks, self.num_codes = table.shape
        self.num_slots = num_blocks + 1
        self.unit = float(unit)
        self.step = _common_step(table, constant)
        self.exact_words = self.step > 0 and self.num_codes <= _WORD_CODES
        if self.exact_words:
            padded = np.zeros((self.num_resolutions, num_blocks, _WORD_CODES))
            padded[..., : self.num_codes] = table / self.step
            self.table = torch.from_numpy(padded.astype(np.uint32))
            self.constant = torch.from_numpy((constant / self.step).astype(np.uint32))
        else:
            self.table = torch.from_numpy(table.copy())
            self.constant = torch.from_numpy(constant.copy())


def _common_step(table: np.ndarray, constant: np.ndarray) -> float:
    """Largest whole number that divides every cost, or 0 where sums of such steps do not fit 32 bits."""
    values = np.concatenate([table.ravel(), constant])
    if (values != np.rint(values)).any() or values.max() >= 2**53:
        return 0.0
    step = float(math.gcd(*(int(value) for value in values))) or 1.0
    largest = constant + table.max(axis=2).sum(axis=1)
    return step if largest.max() / step <= _MAX_WORD else 0.0


def as_codes(codes: np.ndarray | Tensor, num_slots: int, op: str) -> Tensor:
    """A population as a uint8 tensor [n, num_slots] of any strides; shares memory where it can.

    Raises:
        InputError: wrong shape.
        TypeError: not uint8.
    """
    rows = codes
    if isinstance(codes, np.ndarray) and codes.dtype == np.uint8:
        plain = codes.flags.writeable and min(codes.strides, default=0) >= 0  # what torch can share
        rows = torch.from_numpy(codes if plain else codes.copy())
    if not isinstance(rows, Tensor) or rows.dtype != torch.uint8:
        raise TypeError(f"{op}: expected uint8 for codes, got {getattr(rows, 'dtype', type(rows).__name__)}")
    if rows.ndim != 2 or rows.shape[1] != num_slots:
        raise InputError(f"{op}: expected shape [n, {num_slots}] for codes, got {list(rows.shape)}")
    return rows


def largest_codes(rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest code of each slot: two uint8 arrays [num_slots]; 255 and 0 without paths."""
    low = torch.empty(rows.shape[1], dtype=torch.uint8)
    high = torch.empty_like(low)
    _C.code_range(rows, low, high)
    return low.numpy(), high.numpy()


def path_cost(
    codes: np.ndarray | Tensor,
    table: CostTable,
    *,
    dtype: torch.dtype = torch.float64,
    trusted: bool = False,
    allow_vnni: bool = True,
) -> Tensor:
    """Cost of each path of a population.

    Fastest on a structure of arrays, i.e. on the transpose of a contiguous [num_slots, n] array.

    Args:
        codes: [n, num_slots] uint8, any strides: 0 where a block is absent, else 1 + choice; the last slot
            holds 1 + resolution.
        table: The cost.
        dtype: float64, or float32 (one rounding of the exact sum, or of the float64 one).
        trusted: Skip the check of every code (about a fifth of the time). A wrong code then reads other
            memory.
        allow_vnni: Look costs up byte by byte where the CPU has AVX512-VNNI and VBMI; the same sums.

    Returns:
        [n], in the table's unit.

    Raises:
        InputError: wrong shape, or a code beyond the table.
        TypeError: `codes` is not uint8, or another `dtype`.
    """
    rows = as_codes(codes, table.num_slots, "path_cost")
    if dtype not in (torch.float64, torch.float32):
        raise TypeError(f"path_cost: expected float64 or float32 for dtype, got {dtype}")
    if not trusted and len(rows):
        low, high = largest_codes(rows)
        top = high[:-1].max(initial=0)
        if top >= table.num_codes or low[-1] < 1 or high[-1] > table.num_resolutions:
            raise InputError(
                f"path_cost: expected codes below {table.num_codes} for blocks and 1 to "
                f"{table.num_resolutions} for the resolution in codes, got up to {top} and {low[-1]} to "
                f"{high[-1]}"
            )
    cost = torch.empty(len(rows), dtype=dtype)
    _C.path_cost(rows, table.table, table.constant, table.step, table.unit, cost, allow_vnni)
    return cost

# SPDX-License-Identifier: Apache-2.0
"""Scores of whole populations by a ranker whose first layer is one table row per slot.

Call path: `RankerTables` (plain tensors) -> `PackedRanker` pads and interleaves them once -> `path_score`
checks codes -> _C.path_score picks the tier. Nothing here is differentiated or traced, so the op is not
registered with torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pfnas_fast.errors import InputError
from pfnas_fast.ops._library import _C
from pfnas_fast.ops.path_cost import as_codes, largest_codes

__all__ = ["KernelTables", "NetworkTables", "PackedRanker", "RankerTables", "path_score"]

_COLUMNS = 64  # members start at a multiple of this many
_PANEL = 16  # columns per panel of a dense layer
_MAX_DENSE = 3
# A table with a row per pair of codes halves the additions, as long as all of it stays in the second-level
# cache.
_MAX_PAIRED_BYTES = 700_000


@dataclass(frozen=True)
class NetworkTables:
    """Multilayer perceptrons of one shape: ``head . relu(... relu(sum of rows + offset + z * budget))``.

    Attributes:
        table: [num_rows, E, H1] float32, row ``slot * num_codes + code``.
        offset: [E, H1].
        budget: [E, H1], what one unit of the normalised budget adds; None: no input.
        dense: Further layers, at most 3: (weight [E, H_in, H_out], bias [E, H_out]).
        head: [E, H_last].
    """

    table: Tensor
    offset: Tensor
    budget: Tensor | None
    dense: tuple[tuple[Tensor, Tensor], ...]
    head: Tensor


@dataclass(frozen=True)
class KernelTables:
    """Sums of exponentials: ``head . exp(sum of rows + offset + z * budget + z^2 * budget_square)``.

    Attributes:
        table: [num_rows, K, N] float32.
        offset: [K, N].
        budget: [K, N] or None: no input.
        budget_square: [K, N] or None; None where `budget` is.
        head: [K, N].
    """

    table: Tensor
    offset: Tensor
    budget: Tensor | None
    budget_square: Tensor | None
    head: Tensor


@dataclass(frozen=True)
class RankerTables:
    """A ranker: members (networks first, then kernels), a linear part of each, their weights, a budget curve.

    Attributes:
        num_slots: Gene slots of a path.
        num_codes: Rows per slot, 'absent' included.
        networks: Or None.
        kernels: Or None.
        linear: [num_rows, M], what a choice adds to each of the M members; None: nothing.
        linear_offset: [M], read with `linear`.
        linear_budget: [M] or None.
        weights: [M], of the members in the score.
        curve: [num_knots >= 2], added to the score at each budget, linear between knots; None: nothing.
        curve_range: Budgets of the first and the last knot; constant beyond.
    """

    num_slots: int
    num_codes: int
    weights: Tensor
    networks: NetworkTables | None = None
    kernels: KernelTables | None = None
    linear: Tensor | None = None
    linear_offset: Tensor | None = None
    linear_budget: Tensor | None = None
    curve: Tensor | None = None
    curve_range: tuple[float, float] = (0.0, 1.0)

    @property
    def needs_budget(self) -> bool:
        """Whether scoring needs z."""
        inputs = [part.budget for part in (self.networks, self.kernels) if part is not None]
        return any(part is not None for part in (*inputs, self.linear_budget, self.curve))


def _pad_to(tensor: Tensor, multiple: int) -> Tensor:
    return F.pad(tensor, (0, -tensor.shape[-1] % multiple))


class PackedRanker:
    """`RankerTables` as the kernels read them; build once, score often.

    Args:
        tables: The ranker, float32 on the CPU.

    Attributes:
        tables: As given.

    Raises:
        InputError: shapes that disagree, no member, or more than 3 dense layers.

    Example:
        >>> import torch
        >>> from pfnas_fast.ops import NetworkTables, PackedRanker, RankerTables, path_score
        >>> net = NetworkTables(torch.randn(12, 1, 8), torch.zeros(1, 8), None, (), torch.ones(1, 8))
        >>> ranker = PackedRanker(RankerTables(4, 3, torch.ones(1), networks=net))
        >>> path_score(ranker, torch.zeros(5, 4, dtype=torch.uint8)).shape
        torch.Size([5])
    """

    def __init__(self, tables: RankerTables) -> None:
        self.tables = tables
        self._handle = _C.PathScoreModel(pack_ranker(tables))

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedRanker, (self.tables,)

    @property
    def handle(self) -> Any:
        """The compiled module's own object."""
        return self._handle


def _columns(parts: list[Tensor | None], shapes: list[torch.Size]) -> Tensor | None:
    """Padded columns of networks and kernels side by side; zeros for one that has none, None if none has."""
    if all(part is None for part in parts):
        return None
    filled = [torch.zeros(shape) if part is None else part for part, shape in zip(parts, shapes, strict=True)]
    return torch.cat([_pad_to(part, _COLUMNS).flatten(-2) for part in filled], dim=-1)


def lookups(num_slots: int, num_codes: int, width: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What each path looks up ([num_lookups, 4] int32, the kernels' `ScoreLookup`); how to expand a table.

    Slots are joined in pairs where the table of all pairs is small enough; a row then is the sum of two.
    """
    num_pairs = num_slots // 2
    num_rows = num_pairs * num_codes**2 + (num_slots - 2 * num_pairs) * num_codes
    if num_rows * width * 4 > _MAX_PAIRED_BYTES:
        rows = [(slot * num_codes, slot, slot, 0) for slot in range(num_slots)]
        return torch.tensor(rows, dtype=torch.int32), lambda table: table
    rows = [(pair * num_codes**2, 2 * pair, 2 * pair + 1, num_codes) for pair in range(num_pairs)]
    if num_slots % 2:
        rows.append((num_pairs * num_codes**2, num_slots - 1, num_slots - 1, 0))

    def expand(table: Tensor) -> Tensor:
        slots = table.view(num_slots, num_codes, -1)
        first, second = slots[0 : 2 * num_pairs : 2], slots[1 : 2 * num_pairs : 2]
        pairs = (second.unsqueeze(2) + first.unsqueeze(1)).flatten(
            0, 2
        )  # row = code + num_codes * second code
        return torch.cat([pairs, slots[2 * num_pairs :].flatten(0, 1)])

    return torch.tensor(rows, dtype=torch.int32), expand


def pack_ranker(t: RankerTables) -> dict[str, Any]:
    """Tables as the kernels read them, tensors and numbers by name."""
    parts: list[Any] = [part for part in (t.networks, t.kernels) if part is not None]
    num_rows = t.num_slots * t.num_codes
    if not parts:
        raise InputError("path_score: expected networks or kernels for tables, got neither")
    for part in parts:
        if (
            part.table.ndim != 3
            or part.table.shape[0] != num_rows
            or part.offset.shape != part.table.shape[1:]
        ):
            raise InputError(
                f"path_score: expected shapes [{num_rows}, E, H] and [E, H] for table and offset, got "
                f"{list(part.table.shape)} and {list(part.offset.shape)}"
            )
    num_members = sum(part.table.shape[1] for part in parts)
    if t.weights.shape != (num_members,):
        raise InputError(
            f"path_score: expected shape [{num_members}] for weights, got {list(t.weights.shape)}"
        )
    shapes = [part.offset.shape for part in parts]
    table = _columns([part.table for part in parts], shapes)
    assert table is not None
    linear = None if t.linear is None else _pad_to(t.linear, _PANEL)
    rows, expand = lookups(
        t.num_slots, t.num_codes, table.shape[1] + (0 if linear is None else linear.shape[1])
    )
    table = expand(table)
    # Wider blocks mean fewer passes over the rows' indices; every member must then fill whole blocks.
    whole = (
        t.kernels is None and t.networks is not None and -(-t.networks.offset.shape[1] // _COLUMNS) % 2 == 0
    )
    block = 2 * _COLUMNS if whole else _COLUMNS
    fields: dict[str, Any] = {
        "num_slots": t.num_slots,
        "num_lookups": len(rows),
        "num_rows": len(table),
        "lookups": rows,
        "block": block,
        "table": table.view(len(table), -1, block).transpose(0, 1).contiguous(),
        "offset": _columns([part.offset for part in parts], shapes),
        "budget": _columns([part.budget for part in parts], shapes),
        "budget_square": _columns([getattr(part, "budget_square", None) for part in parts], shapes),
        "weights": t.weights.contiguous(),
    }
    if t.networks is not None:
        fields |= _pack_networks(t.networks)
    if t.kernels is not None:
        head = _pad_to(t.kernels.head, _COLUMNS).contiguous()
        fields |= {"num_kernels": head.shape[0], "kernel_width": head.shape[1], "kernel_head": head}
    if linear is not None and t.linear_offset is not None:
        fields |= {
            "linear": expand(linear).contiguous(),
            "linear_offset": _pad_to(t.linear_offset, _PANEL).contiguous(),
            "linear_budget": None
            if t.linear_budget is None
            else _pad_to(t.linear_budget, _PANEL).contiguous(),
        }
    if t.curve is not None:
        low, high = t.curve_range
        fields |= {
            "curve": t.curve.contiguous(),
            "curve_size": len(t.curve),
            "curve_low": float(low),
            "curve_per_unit": (len(t.curve) - 1) / (high - low),
        }
    return {key: value for key, value in fields.items() if value is not None}


def _pack_networks(networks: NetworkTables) -> dict[str, Any]:
    if len(networks.dense) > _MAX_DENSE:
        raise InputError(f"path_score: expected at most {_MAX_DENSE} dense layers, got {len(networks.dense)}")
    members, width = networks.offset.shape
    widths, fields = [width], {}
    for index, (weight, bias) in enumerate(networks.dense):
        if weight.shape[:2] != (members, widths[-1]) or bias.shape != (members, weight.shape[-1]):
            raise InputError(
                f"path_score: expected shapes [{members}, {widths[-1]}, H] and [{members}, H] for dense "
                f"layer {index}, got {list(weight.shape)} and {list(bias.shape)}"
            )
        panels = _pad_to(weight, _PANEL).view(members, widths[-1], -1, _PANEL)
        fields[f"dense_{index}"] = panels.transpose(1, 2).contiguous()  # [E, panels, H_in, 16]
        fields[f"bias_{index}"] = _pad_to(bias, _PANEL).contiguous()
        widths.append(weight.shape[-1])
    if networks.head.shape != (members, widths[-1]):
        raise InputError(
            f"path_score: expected shape [{members}, {widths[-1]}] for head, got {list(networks.head.shape)}"
        )
    head = _pad_to(networks.head, _PANEL).contiguous()
    return {**fields, "num_networks": members, "widths": tuple(widths), "head": head}


def path_score(
    ranker: PackedRanker,
    codes: np.ndarray | Tensor,
    z: Tensor | None = None,
    *,
    members: bool = False,
    trusted: bool = False,
) -> Any:
    """Score each path of a population.

    Args:
        ranker: The ranker.
        codes: [n, num_slots] uint8, any strides, each below `num_codes`.
        z: [n] float32, normalised budgets; None where the ranker has no such input.
        members: Whether to return every member's score as well.
        trusted: Skip the check of every code. A wrong code then reads other memory.

    Returns:
        [n] float32; with `members`, (scores, [M, n] float32).

    Raises:
        InputError: wrong shape, a code beyond the table, or z missing or of another length.
        TypeError: `codes` is not uint8, or z not float32.
    """
    tables = ranker.tables
    rows = as_codes(codes, tables.num_slots, "path_score")
    if tables.needs_budget:
        if z is None or z.shape != (len(rows),):
            got = None if z is None else list(z.shape)
            raise InputError(f"path_score: expected shape [{len(rows)}] for z, got {got}")
        if z.dtype != torch.float32:
            raise TypeError(f"path_score: expected float32 for z, got {z.dtype}")
        z = z.contiguous()
    else:
        z = None
    if not trusted and len(rows):
        high = int(largest_codes(rows)[1].max())
        if high >= tables.num_codes:
            raise InputError(f"path_score: expected codes below {tables.num_codes} for codes, got {high}")
    scores = torch.empty(len(rows), dtype=torch.float32)
    each = torch.empty(len(tables.weights), len(rows), dtype=torch.float32) if members else None
    _C.path_score(ranker.handle, rows, z, scores, each)
    return (scores, each) if members else scores

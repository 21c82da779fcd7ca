# SPDX-License-Identifier: Apache-2.0
"""Scores in 8-bit integers with a proven error bound, for sifting populations before they are scored exactly.

Call path: `Int8Ranker` quantises `RankerTables` once and proves `eps` -> `path_score_int8` -> _C;
`best_paths` sifts with it and returns exactly what float32 scores alone would.

The proof, for any path and any budget in `z_range`. Column k of the first layer counts steps t_k; each
look-up and the start are rounded once, the budget's part is off by at most 3, rounding to 8 bits adds 64
steps: e_k in total, and relu does not widen it. Weights are off by dW. Each unit of the second layer then
errs by sum_k dW_kj (h_k - m_k) + W_kj e_k, where m_k, half the largest activation, is a constant that the
bias absorbs. A relu passes between none and all of that on, so the score errs by at most
sum_k max(sum of positive, sum of negative head_j W_kj) e_k, and likewise for dW, |h_k - m_k| <= m_k + e_k.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pfnas_fast.errors import InputError
from pfnas_fast.ops._library import _C
from pfnas_fast.ops.path_cost import as_codes, largest_codes
from pfnas_fast.ops.path_score import PackedRanker, RankerTables, lookups, path_score

__all__ = ["Int8Ranker", "best_paths", "path_score_int8"]

_COLUMNS, _OUT_COLUMNS = 128, 64
# Largest and smallest sum of a column, rounding of 256 look-ups and of the budget left free below 2^15.
_TOP_STEP, _BOTTOM_STEP = 32600, 32600
_UNIT_ROUNDOFF = 2.0**-24


class Int8Ranker:
    """One network with one dense layer, quantised; `eps` bounds its distance from the float32 scores.

    Args:
        tables: One network with one dense layer; a linear part is kept in float32. No kernels, no curve.
        z_range: Normalised budgets for which the bound holds; not read where the budget is no input.

    Attributes:
        tables, z_range: As given.
        eps: No path scores further from its float32 score than this.

    Raises:
        InputError: another shape of ranker, weights that are not finite, or an empty z_range.

    Example:
        >>> import torch
        >>> from pfnas_fast.ops import Int8Ranker, NetworkTables, RankerTables, path_score_int8
        >>> dense = ((torch.randn(1, 8, 4), torch.zeros(1, 4)),)
        >>> net = NetworkTables(torch.randn(12, 1, 8), torch.zeros(1, 8), None, dense, torch.ones(1, 4))
        >>> ranker = Int8Ranker(RankerTables(4, 3, torch.ones(1), networks=net))
        >>> path_score_int8(ranker, torch.zeros(5, 4, dtype=torch.uint8)).shape
        torch.Size([5])
    """

    def __init__(self, tables: RankerTables, z_range: tuple[float, float] = (-4.0, 4.0)) -> None:
        net = tables.networks
        if net is None or net.offset.shape[0] != 1 or len(net.dense) != 1 or tables.kernels is not None:
            raise InputError(
                "Int8Ranker: expected one network with one dense layer for tables, got another ranker"
            )
        if tables.curve is not None:
            raise InputError("Int8Ranker: expected tables without a budget curve, got one")
        if not z_range[0] <= z_range[1]:
            raise InputError(f"Int8Ranker: expected low <= high for z_range, got {z_range}")
        self.tables, self.z_range = tables, (float(z_range[0]), float(z_range[1]))
        fields, self.eps = _quantise(tables, self.z_range)
        self._handle = _C.Int8Model(fields)

    def __reduce__(self) -> tuple[Any, ...]:
        return Int8Ranker, (self.tables, self.z_range)

    @property
    def handle(self) -> Any:
        """The compiled module's own object."""
        return self._handle


def _quantise(t: RankerTables, z_range: tuple[float, float]) -> tuple[dict[str, Any], float]:
    net = t.networks
    assert net is not None
    table = net.table[:, 0].double().numpy().reshape(t.num_slots, t.num_codes, -1)
    offset = net.offset[0].double().numpy()
    budget = np.zeros_like(offset) if net.budget is None else net.budget[0].double().numpy()
    weight, bias = net.dense[0][0][0].double().numpy(), net.dense[0][1][0].double().numpy()
    head = net.head[0].double().numpy() * float(t.weights[0])
    if not all(np.isfinite(part).all() for part in (table, offset, budget, weight, bias, head)):
        raise InputError("Int8Ranker: expected finite weights for tables, got some that are not")
    rows, expand = lookups(t.num_slots, t.num_codes, -(-len(offset) // _COLUMNS) * _COLUMNS // 2)

    # First layer: every slot's smallest entry moves into the start, so that partial sums only grow.
    smallest, largest = table.min(1), table.max(1)  # [slots, H]
    start = offset + smallest.sum(0)
    ends = np.stack([start + budget * z for z in z_range])
    top = np.maximum(ends.max(0) + (largest - smallest).sum(0), 0.0)  # largest activation
    step = np.maximum(np.maximum(top / _TOP_STEP, -ends.min(0) / _BOTTOM_STEP), 1e-30)
    middle_z, half_z = sum(z_range) / 2, max((z_range[1] - z_range[0]) / 2, 1e-30)
    lifted = torch.from_numpy((table - smallest[:, None]).reshape(-1, len(offset)))
    steps = np.rint(expand(lifted).numpy() / step)
    # Half a step for each look-up and for the start, 3 for the budget (its slope, itself, their product and
    # 2^15 for 2^15 - 1), 64 for the rounding to 8 bits.
    error = np.where(top > 0, (0.5 * (len(rows) + 1) + 3 + 64) * step, 0.0)

    # Second layer, in units of the 8-bit activations.
    scaled = weight * (128 * step)[:, None]
    scale = np.maximum(np.abs(scaled).max(0) / 127, 1e-30)
    rounded = np.rint(scaled / scale)
    off = rounded * scale / (128 * step)[:, None] - weight  # dW
    middle = top / 2
    new_bias = bias - off.T @ middle

    eps = (_one_sided(head * off) * (middle + error)).sum() + (_one_sided(head * weight) * error).sum()
    # Rounding of the float32 sums on both sides: at most one unit per operation of the largest terms.
    reach = np.abs(offset) + np.abs(table).max(1).sum(0) + np.abs(budget) * max(map(abs, z_range))
    terms = (np.abs(head) * (np.abs(bias) + np.abs(new_bias) + np.abs(weight).T @ reach)).sum()
    linear, linear_offset, linear_budget = _linear(t)
    if linear is not None:
        terms += float(linear.abs().view(t.num_slots, t.num_codes).max(1).values.sum()) + abs(linear_offset)
        terms += abs(linear_budget) * max(map(abs, z_range))
    eps += 4 * _UNIT_ROUNDOFF * (len(offset) + len(bias) + 2 * t.num_slots + 8) * terms

    width = -(-len(offset) // _COLUMNS) * _COLUMNS
    out_width = -(-len(bias) // _OUT_COLUMNS) * _OUT_COLUMNS
    weights = _padded(_padded(rounded, width, 0), out_width, 1).astype(np.int8)
    panels = weights.reshape(width // 4, 4, out_width // _OUT_COLUMNS, _OUT_COLUMNS)
    # A row may wrap around 2^16, as partial sums may: the whole sum fits, and integers add modulo 2^16.
    order = np.arange(width).reshape(-1, 4, 2, 8).transpose(0, 2, 1, 3).ravel()  # see int8_params.h
    blocks = _words(_padded(steps, width, 1)[:, order]).reshape(len(steps), -1, _COLUMNS)
    fields = {
        "num_slots": t.num_slots,
        "num_lookups": len(rows),
        "num_rows": len(steps),
        "lookups": rows,
        "width": width,
        "out_width": out_width,
        "table": torch.from_numpy(np.ascontiguousarray(blocks.transpose(1, 0, 2))),
        "start": torch.from_numpy(_words(_padded((start + budget * middle_z) / step, width, 0)[order])),
        "budget": torch.from_numpy(_words(_padded(budget * half_z / step, width, 0)[order])),
        "z_middle": middle_z,
        "z_scale": 32767 / half_z,
        "needs_budget": t.needs_budget,
        "weights": torch.from_numpy(np.ascontiguousarray(panels.transpose(2, 0, 3, 1))),
        "scale": _float(_padded(scale, out_width, 0)),
        "bias": _float(_padded(new_bias, out_width, 0)),
        "head": _float(_padded(head, out_width, 0)),
        "linear": None if linear is None else expand(linear.unsqueeze(1)).squeeze(1).contiguous(),
        "linear_offset": linear_offset,
        "linear_budget": linear_budget,
    }
    return fields, float(eps)


def _linear(t: RankerTables) -> tuple[Tensor | None, float, float]:
    """The linear part with its weight: (rows [num_rows] or None, offset, per unit of z)."""
    if t.linear is None or t.linear_offset is None:
        return None, 0.0, 0.0
    weight = float(t.weights[0])
    slope = 0.0 if t.linear_budget is None else weight * float(t.linear_budget[0])
    return weight * t.linear[:, 0], weight * float(t.linear_offset[0]), slope


def _one_sided(products: np.ndarray) -> np.ndarray:
    """Largest |sum over j of d_j products[k, j]| for any d in [0, 1]^J, per k."""
    return np.maximum(np.clip(products, 0, None).sum(1), np.clip(-products, 0, None).sum(1))


def _padded(array: np.ndarray, size: int, axis: int) -> np.ndarray:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size - array.shape[axis])
    return np.pad(array, widths)


def _words(array: np.ndarray) -> np.ndarray:
    """Rounded to whole numbers modulo 2^16, int16."""
    return np.rint(array).astype(np.int64).astype(np.int16)


def _float(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.float32))


def path_score_int8(
    ranker: Int8Ranker,
    codes: np.ndarray | Tensor,
    z: Tensor | None = None,
    *,
    trusted: bool = False,
    allow_vnni: bool = True,
) -> Tensor:
    """Score each path in 8-bit integers: within `ranker.eps` of `path_score`.

    Args:
        ranker: The quantised ranker.
        codes: [n, num_slots] uint8, any strides, each below `num_codes`.
        z: [n] float32, normalised budgets within `ranker.z_range`; None where they are no input.
        trusted: Skip the checks of codes and budgets. A wrong code then reads other memory.
        allow_vnni: Use AVX512-VNNI where the CPU has it; the scores are the same up to float32 rounding.

    Returns:
        [n] float32.

    Raises:
        InputError: wrong shape, a code beyond the table, or z missing, of another length or outside z_range.
        TypeError: `codes` is not uint8, or z not float32.
    """
    rows = as_codes(codes, ranker.tables.num_slots, "path_score_int8")
    if ranker.tables.needs_budget:
        if z is None or z.shape != (len(rows),):
            got = None if z is None else list(z.shape)
            raise InputError(f"path_score_int8: expected shape [{len(rows)}] for z, got {got}")
        if z.dtype != torch.float32:
            raise TypeError(f"path_score_int8: expected float32 for z, got {z.dtype}")
        z = z.contiguous()
    else:
        z = None
    if not trusted and len(rows):
        high = int(largest_codes(rows)[1].max())
        if high >= ranker.tables.num_codes:
            raise InputError(
                f"path_score_int8: expected codes below {ranker.tables.num_codes} for codes, got {high}"
            )
        low_z, high_z = ranker.z_range
        if z is not None and not bool(((z >= low_z) & (z <= high_z)).all()):
            raise InputError(f"path_score_int8: expected {low_z:g} to {high_z:g} for z, got values outside")
    scores = torch.empty(len(rows), dtype=torch.float32)
    _C.path_score_int8(ranker.handle, rows, z, scores, allow_vnni)
    return scores


def best_paths(
    exact: PackedRanker, sift: Int8Ranker, codes: np.ndarray | Tensor, z: Tensor | None, k: int
) -> tuple[Tensor, Tensor, int]:
    """The k best paths of a population by their float32 scores, most of which are never computed.

    Whatever 8-bit score the k-th best has, a path more than 2 eps below it cannot be among the best.

    Args:
        exact: The ranker.
        sift: The same tables, quantised.
        codes: [n, num_slots] uint8.
        z: [n] float32 or None.
        k: 1 <= k <= n.

    Returns:
        (indices int64 [k], best first, the first of equals first; float32 scores [k]; paths scored exactly).

    Raises:
        InputError: `sift` is of other tables, k out of range, or as `path_score_int8`.

    Example:
        >>> import torch
        >>> from pfnas_fast.ops import Int8Ranker, NetworkTables, PackedRanker, RankerTables, best_paths
        >>> dense = ((torch.randn(1, 8, 4), torch.zeros(1, 4)),)
        >>> net = NetworkTables(torch.randn(12, 1, 8), torch.zeros(1, 8), None, dense, torch.ones(1, 4))
        >>> tables = RankerTables(4, 3, torch.ones(1), networks=net)
        >>> codes = torch.randint(0, 3, (1000, 4), dtype=torch.uint8)
        >>> best_paths(PackedRanker(tables), Int8Ranker(tables), codes, None, 10)[0].shape
        torch.Size([10])
    """
    if sift.tables is not exact.tables:
        raise InputError("best_paths: expected the tables of exact for sift, got others")
    quick = path_score_int8(sift, codes, z)
    if not 1 <= k <= len(quick):
        raise InputError(f"best_paths: expected 1 to {len(quick)} for k, got {k}")
    limit = torch.topk(quick, k, sorted=False).values.min() - 2 * sift.eps
    chosen = torch.nonzero(quick >= limit).flatten()
    rows = as_codes(codes, exact.tables.num_slots, "best_paths")[chosen]
    scores = path_score(exact, rows, None if z is None else z[chosen], trusted=True)
    order = torch.sort(scores, descending=True, stable=True).indices[:k]
    return chosen[order], scores[order], len(chosen)

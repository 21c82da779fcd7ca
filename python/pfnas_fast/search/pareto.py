# SPDX-License-Identifier: Apache-2.0
"""Fronts of (MACs, AP): which points are on it, what area they cover, what MACs they save."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pfnas_fast.errors import InputError

__all__ = ["hypervolume", "macs_saved_at_equal_ap", "pareto_front"]


def _points(macs_m: Any, ap: Any, function: str) -> tuple[np.ndarray, np.ndarray]:
    macs, quality = np.asarray(macs_m, np.float64), np.asarray(ap, np.float64)
    if macs.ndim != 1 or macs.shape != quality.shape:
        raise InputError(
            f"{function}: expected two arrays of one length for macs_m and ap, "
            f"got shapes {list(macs.shape)} and {list(quality.shape)}"
        )
    if not (np.isfinite(macs).all() and np.isfinite(quality).all()) or (macs <= 0).any():
        raise InputError(f"{function}: expected finite ap and finite macs_m > 0, got other values")
    return macs, quality


def pareto_front(macs_m: Any, ap: Any) -> np.ndarray:
    """Indices of the points that no other point beats: fewer or as many MACs and higher or equal AP.

    Args:
        macs_m: [n], millions.
        ap: [n], larger is better.

    Returns:
        int64 [k], ascending in MACs and strictly in AP; of equal points the first.

    Raises:
        InputError: lengths differ, values not finite, or MACs <= 0.

    Example:
        >>> pareto_front([5.0, 8.0, 9.0], [0.2, 0.4, 0.3]).tolist()
        [0, 1]
    """
    macs, quality = _points(macs_m, ap, "pareto_front")
    order = np.lexsort((np.arange(len(macs)), -quality, macs))
    best = np.maximum.accumulate(quality[order])
    first = np.ones(len(order), bool)
    first[1:] = quality[order][1:] > best[:-1]
    return order[first]


def hypervolume(macs_m: Any, ap: Any, *, reference: tuple[float, float], log_macs: bool = True) -> float:
    """Area that a front dominates, up to a reference point.

    Args:
        macs_m: [n], millions.
        ap: [n].
        reference: (MACs in millions, AP): the worst corner. Points with more MACs or less AP than it add
            nothing.
        log_macs: Measure MACs in natural logs (a halving counts alike at every budget); False: in millions.

    Returns:
        The area, in AP * log MACs or AP * millions of MACs; 0 for an empty front.

    Raises:
        InputError: as `pareto_front`, or a reference that is not positive in MACs.

    Example:
        >>> hypervolume([1.0, 2.0], [0.1, 0.3], reference=(4.0, 0.0), log_macs=False)
        0.7
    """
    if not (np.isfinite(reference).all() and reference[0] > 0):
        raise InputError(f"hypervolume: expected finite (macs_m > 0, ap) for reference, got {reference}")
    macs, quality = _points(macs_m, ap, "hypervolume")
    inside = (macs < reference[0]) & (quality > reference[1])
    macs, quality = macs[inside], quality[inside]
    front = pareto_front(macs, quality)
    x = np.append(macs[front], reference[0])
    x = np.log(x) if log_macs else x
    return float((np.diff(x) * (quality[front] - reference[1])).sum())


def _cheapest(macs: np.ndarray, quality: np.ndarray, ap: float) -> float | None:
    """MACs at which a front reaches `ap`: log-linear between its points; None above its best AP."""
    front = pareto_front(macs, quality)
    x, y = np.log(macs[front]), quality[front]
    if len(x) == 0 or ap > y[-1]:
        return None
    return float(np.exp(np.interp(ap, y, x)))


def macs_saved_at_equal_ap(
    front_a: tuple[Any, Any], front_b: tuple[Any, Any], budgets_macs_m: Sequence[float]
) -> dict[float, float | None]:
    """How many MACs front A saves against front B, at the AP that B reaches with each budget.

    Args:
        front_a: (macs_m [n], ap [n]) of the front that is judged.
        front_b: The same of the baseline.
        budgets_macs_m: Budgets, millions.

    Returns:
        Per budget ``1 - MACs of A / budget of B`` at B's best AP within that budget (log-linear between A's
        points); negative where A needs more, None where B has no point within the budget or A never reaches
        its AP. A's cheapest point stands for every lower AP, so a saving there is a lower bound.

    Raises:
        InputError: as `pareto_front`.
    """
    macs_a, ap_a = _points(*front_a, "macs_saved_at_equal_ap")
    macs_b, ap_b = _points(*front_b, "macs_saved_at_equal_ap")
    saved: dict[float, float | None] = {}
    for budget in budgets_macs_m:
        within = macs_b <= budget
        saved[budget] = None
        if within.any():
            best = int(np.flatnonzero(within)[np.argmax(ap_b[within])])
            cheapest = _cheapest(macs_a, ap_a, float(ap_b[best]))
            if cheapest is not None:
                saved[budget] = 1.0 - cheapest / float(macs_b[best])
    return saved

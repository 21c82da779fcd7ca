# SPDX-License-Identifier: Apache-2.0
"""Checking labelled paths once, for every ranker: finite, consistent, distinct."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pfnas_fast.errors import InputError
from pfnas_fast.filter.encoding import GeneEncoding

__all__ = ["LabelledPaths", "collect_labels", "normal_scores", "standardise"]


@dataclass(frozen=True)
class LabelledPaths:
    """Distinct labelled paths.

    Attributes:
        codes: uint8 [n, num_slots].
        labels: float64 [n].
        log_macs: float64 [n], natural log of MACs in millions.
        label_sd: None, float64 [n] or [n, n].
    """

    codes: np.ndarray
    labels: np.ndarray
    log_macs: np.ndarray
    label_sd: np.ndarray | None


def _column(values: Any, name: str, length: int) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.shape != (length,):
        raise InputError(
            f"PathFilter.fit: expected shape [{length}] (one per path) for {name}, got {list(array.shape)}"
        )
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        raise InputError(
            f"PathFilter.fit: expected finite numbers for {name}, "
            f"got {array[bad[0]]} in row {bad[0]} ({len(bad)} such rows)"
        )
    return array


def _label_sd(label_sd: Any, length: int) -> np.ndarray | None:
    if label_sd is None:
        return None
    sd = np.asarray(label_sd, np.float64)
    if sd.shape not in ((), (length,), (length, length)) or not np.isfinite(sd).all() or (sd < 0).any():
        raise InputError(
            f"PathFilter.fit: expected finite values >= 0 of shape [], [{length}] or [{length}, {length}] "
            f"for label_sd, got shape {list(sd.shape)}"
        )
    return np.full(length, float(sd)) if sd.ndim == 0 else sd


def collect_labels(
    encoding: GeneEncoding, paths: Any, labels: Any, macs_m: Any, *, label_sd: Any = None
) -> LabelledPaths:
    """Check labelled paths and merge duplicates (same active genes): mean label, noise of that mean.

    Args:
        encoding: Of the space or table.
        paths: n paths in any form `encoding` takes.
        labels: [n].
        macs_m: [n], > 0.
        label_sd: None, a number, [n] or [n, n].

    Returns:
        The distinct paths, in order of first appearance.

    Raises:
        InputError: values that are not finite, lengths that differ, MACs <= 0, fewer than two distinct paths
            (a space with a single choice has no more), or labels that are all equal.
    """
    codes = encoding.codes(paths)
    values = _column(labels, "labels", len(codes))
    macs = _column(macs_m, "macs_m", len(codes))
    if (macs <= 0).any():
        raise InputError(f"PathFilter.fit: expected macs_m > 0, got {macs.min()}")
    noise = _label_sd(label_sd, len(codes))
    _, first, group = np.unique(codes, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    group = np.argsort(order)[group.reshape(-1)]  # groups numbered by first appearance
    rows = first[order]
    if len(rows) < 2:
        raise InputError(
            "PathFilter.fit: expected at least 2 distinct labelled paths for paths, "
            f"got {len(rows)} (of {len(codes)} rows)"
        )
    count = np.bincount(group)
    means = np.bincount(group, values) / count
    if noise is not None and len(rows) < len(codes):
        if noise.ndim == 1:
            noise = np.sqrt(np.bincount(group, noise**2)) / count
        else:
            noise = noise[np.ix_(rows, rows)]
    if np.ptp(means) == 0.0:
        raise InputError(
            f"PathFilter.fit: expected labels that differ, got {len(rows)} paths all labelled {means[0]:g}"
        )
    return LabelledPaths(codes[rows], means, np.log(macs[rows]), noise)


def standardise(values: np.ndarray) -> np.ndarray:
    """Mean 0, standard deviation 1 (zeros where all are equal)."""
    centred = values - values.mean()
    spread = centred.std()
    return centred / spread if spread > 0 else centred


def normal_scores(values: np.ndarray) -> np.ndarray:
    """Ranks as quantiles of the standard normal; ties share their mean rank."""
    from scipy.special import ndtri
    from scipy.stats import rankdata

    return ndtri((rankdata(values) - 0.5) / len(values))

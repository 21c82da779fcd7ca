# SPDX-License-Identifier: Apache-2.0
"""How well a score ranks: Kendall's tau over chosen pairs with bootstrap intervals, top-k recall, regret."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pfnas_fast.errors import InputError

__all__ = [
    "PairTau",
    "cost_bins",
    "label_reliability",
    "pair_tau",
    "regret",
    "tau_within_groups",
    "top_k_recall",
]


def cost_bins(macs_m: np.ndarray, num_bins: int, *, equal: str = "width") -> np.ndarray:
    """Number the budget bin of each path.

    Args:
        macs_m: [n], millions.
        num_bins: At least 1.
        equal: "width" = equal width in log MACs, "population" = equally many paths per bin.

    Returns:
        int64 [n] in 0..num_bins-1; some bins may be empty with "width".

    Raises:
        InputError: num_bins < 1 or another `equal`.
    """
    if num_bins < 1:
        raise InputError(f"cost_bins: expected num_bins >= 1, got {num_bins}")
    log_macs = np.log(np.asarray(macs_m, np.float64))
    if equal == "population":
        rank = np.empty(len(log_macs), np.int64)
        rank[np.argsort(log_macs, kind="stable")] = np.arange(len(log_macs))
        return rank * num_bins // max(len(log_macs), 1)
    if equal != "width":
        raise InputError(f"cost_bins: expected 'width' or 'population' for equal, got {equal!r}")
    if len(log_macs) == 0 or np.ptp(log_macs) == 0.0:
        return np.zeros(len(log_macs), np.int64)
    place = (log_macs - log_macs.min()) / np.ptp(log_macs)
    return np.minimum((place * num_bins).astype(np.int64), num_bins - 1)


@dataclass(frozen=True)
class PairTau:
    """Kendall's tau-b over a set of pairs, its bootstrap, and the same for a reference score.

    Attributes:
        tau: Of the score; None where no pair with distinct labels was left.
        low: 2.5 % bootstrap bound.
        high: 97.5 % bound.
        reference: Tau of the reference score (MACs).
        difference_low: 2.5 % bound of tau - reference, from the same resamples.
        difference_high: 97.5 % bound.
        num_pairs: Pairs with distinct labels.
    """

    tau: float | None
    low: float | None
    high: float | None
    reference: float | None
    difference_low: float | None
    difference_high: float | None
    num_pairs: int


def pair_tau(
    scores: np.ndarray,
    labels: np.ndarray,
    pairs: np.ndarray,
    *,
    reference: np.ndarray,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> PairTau:
    """Tau-b over the pairs that `pairs` selects, with intervals from resampling paths.

    Args:
        scores: [n].
        labels: [n].
        pairs: bool [n, n], symmetric; the diagonal is ignored.
        reference: [n], the score to compare with.
        num_bootstrap: Resamples.
        seed: Of the bootstrap.

    Returns:
        The taus; every field None where no pair is left.
    """
    pairs = pairs & ~np.eye(len(labels), dtype=bool)
    order_y = np.sign(labels[:, None] - labels[None, :]) * pairs
    rng = np.random.default_rng([seed, 0x7A])
    n = max(len(labels), 1)
    counts = rng.multinomial(n, np.full(n, 1.0 / n), size=num_bootstrap).astype(np.float64)
    weights = np.concatenate([np.ones((1, n)), counts]) if len(labels) else np.ones((1, 1))

    def total(matrix: np.ndarray) -> np.ndarray:
        return ((weights @ matrix) * weights).sum(1) if len(labels) else np.zeros(1)

    untied_y = total(np.abs(order_y))

    def tau(values: np.ndarray) -> np.ndarray:
        order = np.sign(values[:, None] - values[None, :]) * pairs
        with np.errstate(invalid="ignore", divide="ignore"):
            result = total(order * order_y) / np.sqrt(total(np.abs(order)) * untied_y)
        return np.where(untied_y > 0, np.nan_to_num(result), np.nan)

    own, other = tau(scores), tau(reference)
    num_pairs = int(np.abs(order_y).sum()) // 2
    if num_pairs == 0:
        return PairTau(None, None, None, None, None, None, 0)
    low, high = np.nanpercentile(own[1:], [2.5, 97.5])
    diff_low, diff_high = np.nanpercentile(own[1:] - other[1:], [2.5, 97.5])
    return PairTau(
        float(own[0]), float(low), float(high), float(other[0]), float(diff_low), float(diff_high), num_pairs
    )


def tau_within_groups(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> float:
    """Mean over groups of Kendall's tau-b; groups without distinct labels are left out (nan if all are)."""
    taus = []
    for group in np.unique(groups):
        rows = groups == group
        order = np.sign(np.subtract.outer(labels[rows], labels[rows]))
        guess = np.sign(np.subtract.outer(scores[rows], scores[rows]))
        untied = np.abs(order).sum()
        if untied > 0:
            taus.append(float((order * guess).sum() / max(np.sqrt(untied * np.abs(guess).sum()), 1.0)))
    return float(np.mean(taus)) if taus else float("nan")


def top_k_recall(
    scores: np.ndarray, labels: np.ndarray, groups: np.ndarray, *, fraction: float = 0.1
) -> float:
    """Mean over groups of the share of the truly best `fraction` found among as many best-scored paths."""
    recalls = []
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        k = max(1, round(fraction * len(rows)))
        best = rows[np.argsort(-labels[rows], kind="stable")[:k]]
        found = rows[np.argsort(-scores[rows], kind="stable")[:k]]
        recalls.append(len(np.intersect1d(best, found)) / k)
    return float(np.mean(recalls)) if recalls else float("nan")


def regret(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> float:
    """Mean over groups of (best label - label of the best-scored path), in the labels' unit."""
    losses = []
    for group in np.unique(groups):
        rows = groups == group
        losses.append(float(labels[rows].max() - labels[rows][np.argmax(scores[rows])]))
    return float(np.mean(losses)) if losses else float("nan")


def label_reliability(halves: np.ndarray, groups: np.ndarray | None = None) -> dict[str, float]:
    """Split-half reliability: do two halves of the label images agree about the paths?

    Args:
        halves: [n, 2], each path's label computed on either half of the images.
        groups: int [n], bins inside which the agreement is asked for; None = over all paths.

    Returns:
        ``correlation`` of the halves (pooled within groups), ``reliability`` of the full label
        (Spearman-Brown), ``noise_sd`` of the full label, ``label_sd`` within groups, ``signal_to_noise`` =
        label_sd / noise_sd.

    Raises:
        InputError: another shape, or values that are not finite.
    """
    values = np.asarray(halves, np.float64)
    if values.ndim != 2 or values.shape[1] != 2 or not np.isfinite(values).all():
        raise InputError(
            f"label_reliability: expected finite values of shape [n, 2] for halves, got {list(values.shape)}"
        )
    groups = np.zeros(len(values), np.int64) if groups is None else np.asarray(groups)
    centred = values.copy()
    for group in np.unique(groups):
        rows = groups == group
        centred[rows] -= centred[rows].mean(0)
    spread = np.sqrt((centred**2).sum(0))
    product = float(spread[0] * spread[1])
    correlation = float((centred[:, 0] * centred[:, 1]).sum()) / product if product > 0 else 0.0
    degrees = max(len(values) - len(np.unique(groups)), 1)
    noise = float(np.sqrt(((centred[:, 0] - centred[:, 1]) ** 2).sum() / degrees)) / 2.0
    label = float(np.sqrt((centred.mean(1) ** 2).sum() / degrees))
    return {
        "correlation": correlation,
        "reliability": 2.0 * correlation / (1.0 + correlation) if correlation > -1.0 else -1.0,
        "noise_sd": noise,
        "label_sd": label,
        "signal_to_noise": label / noise if noise > 0 else float("inf"),
    }

# SPDX-License-Identifier: Apache-2.0
"""The pairwise ranking loss: which of two paths is better, asked mostly of paths that cost about the same."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pfnas_fast.errors import InputError

__all__ = ["PairTargets", "pair_targets", "ranking_loss"]


@dataclass(frozen=True)
class PairTargets:
    """All pairs of the labelled paths.

    Attributes:
        probability: [n, n], target probability that the row's path is better than the column's.
        weight: [n, n], symmetric, zero on the diagonal, sums to 1.
    """

    probability: Tensor
    weight: Tensor


def pair_targets(
    labels: np.ndarray,
    log_macs: np.ndarray,
    *,
    bandwidth: float | None,
    label_sd: np.ndarray | float | None = None,
    softness: float = 0.0,
) -> PairTargets:
    """Weights and soft targets of every pair.

    Args:
        labels: float [n], larger is better.
        log_macs: float [n], natural log of MACs.
        bandwidth: h in the weight ``exp(-|difference of log MACs| / h)``; None weighs all pairs alike.
        label_sd: Standard deviation of the labels' noise: a number, one per path [n], or one per pair [n, n]
            (of the *difference*, as a paired bootstrap gives it). The target is then ``Phi(delta / sd of
            delta)``.
        softness: Without `label_sd`: sd of a difference as a fraction of the labels' sd. 0 = hard targets.

    Returns:
        The targets; ties get probability 1/2.

    Raises:
        InputError: `label_sd` has another shape, or is negative or not finite.

    Source:
        Pairwise logistic loss as in RankNet (Burges et al. 2005); soft targets for noisy labels:
        docs/path_filter.md.
    """
    delta = labels[:, None] - labels[None, :]
    if label_sd is None:
        pair_sd = np.full_like(delta, softness * float(labels.std()))
    else:
        sd = np.asarray(label_sd, np.float64)
        if sd.shape not in ((), labels.shape, delta.shape) or not np.isfinite(sd).all() or (sd < 0).any():
            raise InputError(
                f"PathFilter.fit: expected finite label_sd >= 0 of shape [], [{len(labels)}] or "
                f"[{len(labels)}, {len(labels)}], got shape {list(sd.shape)}"
            )
        if sd.shape != delta.shape:
            sd = np.broadcast_to(sd, labels.shape)
            sd = np.sqrt(sd[:, None] ** 2 + sd[None, :] ** 2)
        pair_sd = sd
    hard = torch.from_numpy(0.5 + 0.5 * np.sign(delta))
    soft = torch.special.ndtr(torch.from_numpy(delta / np.maximum(pair_sd, 1e-300)))
    probability = torch.where(torch.from_numpy(pair_sd > 0), soft, hard)
    weight = np.ones_like(delta)
    if bandwidth is not None:
        weight = np.exp(-np.abs(log_macs[:, None] - log_macs[None, :]) / bandwidth)
    np.fill_diagonal(weight, 0.0)
    weight /= max(weight.sum(), 1e-300)
    return PairTargets(probability.float(), torch.from_numpy(weight).float())


def ranking_loss(scores: Tensor, targets: PairTargets, pair_weight: Tensor | None = None) -> Tensor:
    """Weighted cross-entropy of ``sigmoid(s_i - s_j)`` against the pair targets.

    Args:
        scores: [E, n].
        targets: Of the same n paths.
        pair_weight: [E, n, n] instead of `targets.weight` (members that see different paths); sums to 1 per
            member.

    Returns:
        Scalar: the mean over pairs, summed over members (each member is fitted as if alone).
    """
    delta = scores.unsqueeze(2) - scores.unsqueeze(1)
    # Softplus form of the cross-entropy; by symmetry of the pairs its linear part is delta * probability.
    loss = F.softplus(delta) - delta * targets.probability
    return (loss * (targets.weight if pair_weight is None else pair_weight)).sum()

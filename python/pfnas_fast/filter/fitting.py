# SPDX-License-Identifier: Apache-2.0
"""Fitting the filter's two parts, networks and Gaussian processes, and how much each counts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pfnas_fast.filter.kernel import KernelModel, fit_kernel
from pfnas_fast.filter.labels import LabelledPaths, normal_scores, standardise
from pfnas_fast.filter.loss import PairTargets, pair_targets
from pfnas_fast.filter.network import RankerEnsemble
from pfnas_fast.filter.training import RankerConfig, train_ensemble

__all__ = ["FittedParts", "fit_parts"]

# The networks' share of the score. Its ends stay away from 0 and 1: with few labels, cross-validation
# cannot prove that one part is useless.
_SHARES = (0.2, 0.35, 0.5, 0.65)
_MIN_LABELS_FOR_CHOICE = 25
_NUM_FOLDS = 5
_MAX_KERNEL_PATHS = 640  # the process costs the cube of them
_JUDGE_BANDWIDTH = 0.1  # pairs within about 10 % in MACs decide


@dataclass(frozen=True)
class FittedParts:
    """The trained parts.

    Attributes:
        network: The ensemble, or None where its share is 0.
        kernels: Gaussian processes on the ranks and on the mean of ranks and labels; empty where the share is
            1.
        share: Of the networks in the score.
        bandwidth: The h that the networks were trained with.
    """

    network: RankerEnsemble | None
    kernels: tuple[KernelModel, ...]
    share: float
    bandwidth: float | None


def _folds(data: LabelledPaths, seed: int) -> np.ndarray:
    """Fold of each path, balanced over MACs."""
    n = len(data.labels)
    order = np.lexsort(
        (np.random.default_rng([seed, 0x68]).random(n), np.argsort(np.argsort(data.log_macs)) // 5)
    )
    fold = np.empty(n, np.int64)
    fold[order] = np.arange(n) % min(_NUM_FOLDS, n)
    return fold


def _path_noise(data: LabelledPaths, rows: np.ndarray) -> np.ndarray | None:
    """Variance of each label's noise, in units of the labels' variance."""
    if data.label_sd is None:
        return None
    sd = data.label_sd
    variance = sd**2 if sd.ndim == 1 else np.median(sd**2, axis=1) / 2.0
    return variance[rows] / data.labels.var()


def fit_kernels(
    data: LabelledPaths,
    features: np.ndarray,
    groups: np.ndarray,
    budget: np.ndarray,
    folds: np.ndarray,
    seed: int,
) -> tuple[tuple[KernelModel, ...], np.ndarray, np.ndarray]:
    """Fit a process on the labels' normal scores and one half way between those and the labels themselves.

    Ranks forget how far apart labels are, labels let outliers rule; neither is best on every table.

    Args:
        data: Labelled paths.
        features: float32 [n, F], centred.
        groups: int64 [F].
        budget: float64 [n].
        folds: int64 [n].
        seed: Chooses the subset where labels are many.

    Returns:
        (models, the rows they saw, their held-out predictions averaged, float64 [rows]).
    """
    rows = np.arange(len(data.labels))
    if len(rows) > _MAX_KERNEL_PATHS:
        rows = np.sort(np.random.default_rng([seed, 0x6B]).permutation(len(rows))[:_MAX_KERNEL_PATHS])
    ranks = normal_scores(data.labels[rows])
    models = tuple(
        fit_kernel(
            features[rows],
            groups,
            budget[rows],
            standardise(target),
            folds=folds[rows],
            noise=_path_noise(data, rows),
        )
        for target in (ranks, standardise(data.labels[rows]) + ranks)
    )
    held_out = np.mean([standardise(model.held_out.numpy()) for model in models], axis=0)
    return models, rows, held_out


def _held_out_networks(
    inputs: Tensor,
    labels: Tensor,
    data: LabelledPaths,
    bandwidth: float | None,
    config: RankerConfig,
    seed: int,
    folds: np.ndarray,
    film: bool,
) -> np.ndarray:
    """Each path's score by networks that did not see its fold: all folds trained at once, as members."""
    num_folds = int(folds.max()) + 1
    masks = torch.from_numpy(np.stack([folds != fold for fold in range(num_folds)])).float()
    targets = _targets(data, bandwidth, config)
    network = train_ensemble(
        inputs, labels, targets, config, num_members=num_folds, seed=seed, masks=masks, film=film
    )
    with torch.inference_mode():
        scores = network(inputs)
    scores = (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True).clamp_min(1e-6)
    return scores.numpy()[folds, np.arange(len(folds))]


def _targets(data: LabelledPaths, bandwidth: float | None, config: RankerConfig) -> PairTargets:
    return pair_targets(
        data.labels, data.log_macs, bandwidth=bandwidth, label_sd=data.label_sd, softness=config.softness
    )


def fit_parts(
    data: LabelledPaths,
    features: np.ndarray,
    groups: np.ndarray,
    budget: np.ndarray | None,
    *,
    config: RankerConfig,
    num_members: int,
    bandwidths: Sequence[float | None],
    share: float | None,
    seed: int,
    film: bool = False,
    start: RankerEnsemble | None = None,
) -> FittedParts:
    """Fit both parts; choose h and the networks' share by cross-validation on pairs of similar cost.

    Args:
        data: Labelled paths.
        features: float32 [n, F], centred.
        groups: int64 [F], which factor each feature belongs to.
        budget: float64 [n], normalised log MACs; None = not an input.
        config: Of the networks.
        num_members: Networks.
        bandwidths: Grid for h.
        share: The networks' share in [0, 1]; None = chosen.
        seed: Fixes everything.
        film: The budget modulates the networks.
        start: Networks to go on from, in a third of the steps; None starts afresh.

    Returns:
        The parts.
    """
    folds = _folds(data, seed)
    kernels: tuple[KernelModel, ...] = ()
    rows, held_out = np.arange(0), np.zeros(0)
    if share != 1.0:
        z = np.zeros(len(features)) if budget is None else budget
        kernels, rows, held_out = fit_kernels(data, features, groups, z, folds, seed)
    inputs = torch.from_numpy(features)
    if budget is not None:
        inputs = torch.cat([inputs, torch.from_numpy(budget).float().unsqueeze(1)], dim=1)
    inputs = inputs * config.input_scale
    labels = torch.from_numpy(standardise(data.labels)).float()
    bandwidth, chosen = bandwidths[0], 0.5 if share is None else share
    undecided = share is None or (len(bandwidths) > 1 and share > 0.0)
    if undecided and len(labels) >= _MIN_LABELS_FOR_CHOICE:
        judge = pair_targets(data.labels, data.log_macs, bandwidth=_JUDGE_BANDWIDTH)
        best = -np.inf
        for candidate in bandwidths:
            networks = _held_out_networks(inputs, labels, data, candidate, config, seed, folds, film)
            for weight in _SHARES if share is None else (share,):
                value = _agreement(networks, held_out, rows, weight, judge)
                if value > best + 1e-9:
                    best, bandwidth, chosen = value, candidate, weight
    network = None
    if chosen > 0.0:
        targets = _targets(data, bandwidth, config)
        if start is not None:
            start, config = copy.deepcopy(start), replace(config, num_steps=max(1, config.num_steps // 3))
        network = train_ensemble(
            inputs, labels, targets, config, num_members=num_members, seed=seed, network=start, film=film
        )
    return FittedParts(network, kernels, chosen, bandwidth)


def _agreement(
    networks: np.ndarray, kernels: np.ndarray, rows: np.ndarray, weight: float, judge: PairTargets
) -> float:
    """Weighted Kendall agreement of blended held-out scores, on the paths that both parts scored."""
    use = rows if len(kernels) else np.arange(len(networks))
    scores = weight * networks[use]
    if len(kernels):
        scores = scores + (1.0 - weight) * kernels
    order = np.sign(scores[:, None] - scores[None, :])
    probability = judge.probability.numpy()[np.ix_(use, use)]
    pair_weight = judge.weight.numpy()[np.ix_(use, use)]
    return float((order * np.sign(probability - 0.5) * pair_weight).sum() / pair_weight.sum())

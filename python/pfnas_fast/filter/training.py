# SPDX-License-Identifier: Apache-2.0
"""Fitting a stacked ensemble of rankers: AdamW, a cosine schedule, every member from its own start."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pfnas_fast.filter.loss import PairTargets, ranking_loss
from pfnas_fast.filter.network import RankerEnsemble

__all__ = ["RankerConfig", "train_ensemble"]

# Above this many labelled paths a step sees a random subset: the pairs grow with the square.
_MAX_PATHS_PER_STEP = 256


@dataclass(frozen=True)
class RankerConfig:
    """How one ensemble is built and trained.

    Attributes:
        hidden: Widths of the two hidden layers.
        num_steps: AdamW steps.
        learning_rate: Peak rate of the cosine schedule.
        weight_decay: Decoupled decay of the hidden layers; the skip gets `skip_decay`.
        skip_decay: Decoupled decay of the linear skip.
        dropout: Of the hidden layers.
        regression: Weight of the squared error to the standardised labels beside the ranking loss.
        bagging: Fraction of the labelled paths each member sees (1 = all).
        softness: Of the pair targets where the labels' noise is not given: sd of a difference as a fraction
            of the labels' sd.
        input_scale: Factor on all inputs: smaller = smoother.
    """

    hidden: tuple[int, int] = (64, 64)
    num_steps: int = 300
    learning_rate: float = 5e-3
    weight_decay: float = 1e-2
    skip_decay: float = 1e-2
    dropout: float = 0.3
    regression: float = 0.0
    bagging: float = 1.0
    softness: float = 0.3
    input_scale: float = 0.5


def _member_masks(num_members: int, n: int, fraction: float, generator: torch.Generator) -> Tensor | None:
    if fraction >= 1.0:
        return None
    keep = max(2, round(fraction * n))
    order = torch.rand(num_members, n, generator=generator).argsort(1)
    return torch.zeros(num_members, n).scatter_(1, order[:, :keep], 1.0)


def _loss(
    scores: Tensor, targets: PairTargets, labels: Tensor, mask: Tensor | None, regression: float
) -> Tensor:
    weight = None
    if mask is not None:
        weight = targets.weight * mask.unsqueeze(2) * mask.unsqueeze(1)
        weight = weight / weight.sum((1, 2), keepdim=True).clamp_min(1e-12)
    loss = ranking_loss(scores, targets, weight)
    if regression > 0.0:
        error = F.mse_loss(scores, labels.expand_as(scores), reduction="none")
        share = torch.ones_like(scores) if mask is None else mask
        loss = loss + regression * ((error * share).sum(1) / share.sum(1)).sum()
    return loss


def train_ensemble(
    features: Tensor,
    labels: Tensor,
    targets: PairTargets,
    config: RankerConfig,
    *,
    num_members: int,
    seed: int,
    masks: Tensor | None = None,
    network: RankerEnsemble | None = None,
    film: bool = False,
) -> RankerEnsemble:
    """Train all members at once.

    Args:
        features: float32 [n, F], normalised.
        labels: float32 [n], standardised.
        targets: Pairs of the n paths.
        config: Size and schedule.
        num_members: E.
        seed: Fixes initial weights, bags and subsets.
        masks: float32 [E, n], 1 where a member may see a path (cross-validation trains its folds as members).
        network: Warm start; None starts afresh.
        film: See `RankerEnsemble`; read where it starts afresh.

    Returns:
        The trained network, in eval mode.
    """
    generator = torch.Generator().manual_seed(seed)
    if network is None:
        network = RankerEnsemble(
            features.shape[1],
            hidden=config.hidden,
            num_members=num_members,
            generator=generator,
            dropout=config.dropout,
            film=film,
        )
    if masks is None:
        masks = _member_masks(num_members, len(features), config.bagging, generator)
    hidden = [p for name, p in network.named_parameters() if name != "skip"]
    optimizer = torch.optim.AdamW(
        [
            {"params": hidden, "weight_decay": config.weight_decay},
            {"params": [network.skip], "weight_decay": config.skip_decay},
        ],
        lr=config.learning_rate,
        foreach=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1.0 + math.cos(math.pi * step / config.num_steps))
    )
    network.train()
    for _ in range(config.num_steps):
        x, y, pairs, mask = features, labels, targets, masks
        if len(features) > _MAX_PATHS_PER_STEP:
            rows = torch.randperm(len(features), generator=generator)[:_MAX_PATHS_PER_STEP]
            weight = targets.weight[rows][:, rows]
            pairs = PairTargets(targets.probability[rows][:, rows], weight / weight.sum().clamp_min(1e-12))
            x, y, mask = features[rows], labels[rows], None if masks is None else masks[:, rows]
        optimizer.zero_grad(set_to_none=True)
        _loss(network(x), pairs, y, mask, config.regression).backward()
        optimizer.step()
        schedule.step()
    return network.eval()

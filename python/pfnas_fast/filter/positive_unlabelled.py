# SPDX-License-Identifier: Apache-2.0
"""A filter of weak paths after GreedyNASv2: learnt from a few known weak paths and many unlabelled ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pfnas_fast.errors import InputError
from pfnas_fast.filter.encoding import GeneEncoding
from pfnas_fast.filter.labels import collect_labels, standardise
from pfnas_fast.filter.network import RankerEnsemble
from pfnas_fast.filter.training import RankerConfig

__all__ = ["WeakPathFilter", "non_negative_risk"]

_CHUNK = 1 << 14


def non_negative_risk(positive: Tensor, unlabelled: Tensor, prior: float) -> Tensor:
    """Risk of a classifier that has seen positives and unlabelled examples, but no negatives.

    Args:
        positive: [E, p], logits of being positive, of examples that are.
        unlabelled: [E, u], logits of examples of which a share `prior` is positive.
        prior: Share of positives among the unlabelled, in (0, 1).

    Returns:
        Scalar, summed over members.

    Source:
        Kiryo et al., Positive-Unlabeled Learning with Non-Negative Risk Estimator (arXiv:1703.00593), eq. 6.

    Example:
        >>> import torch
        >>> round(float(non_negative_risk(torch.full((1, 2), 50.0), torch.full((1, 3), -50.0), 0.5)), 6)
        0.0
    """
    missed = prior * F.softplus(-positive).mean(1)
    false_alarms = F.softplus(unlabelled).mean(1) - prior * F.softplus(positive).mean(1)
    return (missed + false_alarms.clamp_min(0.0)).sum()


class WeakPathFilter:
    """Ranks paths by how little they look like the weak ones; `fit` and `score` as `PathFilter` has them.

    Labelled paths whose label lies in the lowest `weak_share` after its trend over log MACs is taken out are
    the positives, random paths of the space the unlabelled examples. Where labels are numbers, this throws
    away most of what they say: it is here to be compared with (docs/path_filter.md).

    Args:
        space: A `Space`; None with `num_choices`.
        num_choices: Choices per gene of a plain architecture table.
        cost: `CostModel` that gives the MACs where `score` gets none.
        weak_share: Share of weak paths, in labels and space.
        num_members: Networks.
        num_unlabelled: Random paths.
        config: Of the networks.

    Raises:
        InputError: weak_share outside (0, 1), num_members or num_unlabelled < 1, both or neither of space and
            num_choices.

    Source:
        GreedyNASv2 (arXiv:2111.12609), sec. 3.2.

    Example:
        >>> import numpy as np
        >>> paths = np.random.default_rng(0).integers(0, 3, (40, 4))
        >>> flt = WeakPathFilter(num_choices=[3] * 4, num_members=2)
        >>> flt.fit(paths, paths[:, 0], 1.0 + paths.sum(1)).score(paths, 1.0 + paths.sum(1)).shape
        (40,)
    """

    def __init__(
        self,
        space: Any = None,
        *,
        num_choices: Sequence[int] | None = None,
        cost: Any = None,
        weak_share: float = 0.5,
        num_members: int = 5,
        num_unlabelled: int = 512,
        config: RankerConfig | None = None,
    ) -> None:
        if not 0.0 < weak_share < 1.0:
            raise InputError(f"WeakPathFilter: expected 0 < weak_share < 1, got {weak_share}")
        if num_members < 1 or num_unlabelled < 1:
            raise InputError(
                "WeakPathFilter: expected num_members and num_unlabelled >= 1, got "
                f"{num_members} and {num_unlabelled}"
            )
        self.encoding = GeneEncoding.of(space, num_choices)
        self.space = space
        self.cost = cost
        self.weak_share = weak_share
        self.num_members = num_members
        self.num_unlabelled = num_unlabelled
        self.config = config or RankerConfig()
        self._network: RankerEnsemble | None = None
        self._norm = (0.0, 1.0)

    def clone(self) -> WeakPathFilter:
        """An unfitted copy."""
        return WeakPathFilter(
            self.space,
            num_choices=None if self.space is not None else self.encoding.slot_sizes,
            cost=self.cost,
            weak_share=self.weak_share,
            num_members=self.num_members,
            num_unlabelled=self.num_unlabelled,
            config=self.config,
        )

    def fit(
        self, paths: Any, labels: Any, macs_m: Any, *, label_sd: Any = None, seed: int = 0
    ) -> WeakPathFilter:
        """See `PathFilter.fit`; `label_sd` is checked and not used."""
        data = collect_labels(self.encoding, paths, labels, macs_m, label_sd=label_sd)
        features = self.encoding.features(data.codes)
        self._norm = float(data.log_macs.mean()), max(float(data.log_macs.std()), 1e-3)
        z = (data.log_macs - self._norm[0]) / self._norm[1]
        rest = standardise(data.labels)
        rest = rest - z * (z @ rest) / max(float(z @ z), 1e-12)
        weak = rest <= np.quantile(rest, self.weak_share)
        codes = self._random_codes(np.random.default_rng([seed, 0x9B]))
        # MACs are additive over genes in every space, so that a least-squares fit to the labelled paths knows
        # those of unlabelled ones where no cost model does.
        guess = self._macs_of(features, np.exp(data.log_macs), codes)
        unlabelled = self._inputs(codes, np.log(guess))
        positive = self._inputs(data.codes[weak], data.log_macs[weak])
        self._network = self._train(positive, unlabelled, seed)
        return self

    def _random_codes(self, rng: np.random.Generator) -> np.ndarray:
        if self.space is not None:
            from pfnas_fast.space import uniform_population

            return uniform_population(self.space, rng, self.num_unlabelled)
        sizes = np.asarray(self.encoding.slot_sizes)
        return (1 + rng.integers(0, sizes, (self.num_unlabelled, len(sizes)))).astype(np.uint8)

    def _macs_of(self, features: np.ndarray, macs_m: np.ndarray, codes: np.ndarray) -> np.ndarray:
        if self.cost is not None:
            return self.cost.macs_m(codes)
        design = np.column_stack([features, np.ones(len(features))]).astype(np.float64)
        weights = np.linalg.lstsq(design, macs_m, rcond=None)[0]
        guess = self.encoding.features(codes) @ weights[:-1] + weights[-1]
        return np.clip(guess, macs_m.min(), macs_m.max())

    def _inputs(self, codes: np.ndarray, log_macs: np.ndarray) -> Tensor:
        z = (log_macs - self._norm[0]) / self._norm[1]
        inputs = np.column_stack([self.encoding.features(codes), z]).astype(np.float32)
        return torch.from_numpy(inputs * np.float32(self.config.input_scale))

    def _train(self, positive: Tensor, unlabelled: Tensor, seed: int) -> RankerEnsemble:
        config = self.config
        network = RankerEnsemble(
            positive.shape[1],
            hidden=config.hidden,
            num_members=self.num_members,
            generator=torch.Generator().manual_seed(seed),
            dropout=config.dropout,
        )
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, foreach=True
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.num_steps)
        network.train()
        both = torch.cat([positive, unlabelled])
        for _ in range(config.num_steps):
            optimizer.zero_grad(set_to_none=True)
            logits = network(both)
            risk = non_negative_risk(
                logits[:, : len(positive)], logits[:, len(positive) :], prior=self.weak_share
            )
            risk.backward()
            optimizer.step()
            schedule.step()
        return network.eval()

    def score(self, paths: Any, macs_m: Any = None) -> np.ndarray:
        """Minus the mean logit of being weak, float32 [n]; arguments as `PathFilter.score`."""
        if self._network is None:
            raise InputError("WeakPathFilter.score: expected a fitted filter, got one before fit()")
        codes = self.encoding.codes(paths)
        if macs_m is None:
            if self.cost is None:
                raise InputError(
                    "WeakPathFilter.score: expected macs_m, or a filter built with cost=, got neither"
                )
            macs_m = self.cost.macs_m(codes)
        log_macs = np.log(np.asarray(macs_m, np.float64))
        scores = np.empty(len(codes), np.float32)
        with torch.inference_mode():
            for start in range(0, len(codes), _CHUNK):
                part = slice(start, start + _CHUNK)
                logits = self._network(self._inputs(codes[part], log_macs[part]))
                scores[part] = -logits.mean(0).numpy()
        return scores

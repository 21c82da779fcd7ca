# SPDX-License-Identifier: Apache-2.0
"""The path filter: ranks paths of similar cost, after DetOFA (arXiv:2303.13121); network and loss are ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pfnas_fast.errors import InputError
from pfnas_fast.filter.encoding import GeneEncoding
from pfnas_fast.filter.labels import LabelledPaths, collect_labels
from pfnas_fast.filter.loss import pair_targets
from pfnas_fast.filter.network import LookupScorer, RankerEnsemble
from pfnas_fast.filter.training import RankerConfig, train_ensemble

__all__ = ["PathFilter"]

_CHUNK = 1 << 14  # paths per scoring step: the first layer's output stays in the cache
_CONDITIONS = ("concat", "none")


class PathFilter:
    """Predicts which of the paths that meet a similar budget is better.

    ``f(path, budget)`` is an ensemble of small networks over the path's genes and its normalised log MACs,
    trained with a pairwise ranking loss whose pairs count ``exp(-|difference of log MACs| / h)``. Scores have
    no unit; only differences between paths of similar cost mean anything.

    Args:
        space: A `pfnas_fast.space.Space`; None with `num_choices`.
        num_choices: Choices per gene of a plain architecture table, instead of a space.
        cost: `CostModel` that gives a path's whole-detector MACs where `score` gets none.
        condition: "concat" = the budget is an input; "none" = genes only.
        num_members: Members of the ensemble.
        bandwidths: Grid for h; None in it = all pairs alike. More than one value: chosen by cross-validation.
        config: Size and schedule of the network; None = the default.

    Raises:
        InputError: both or neither of space and num_choices, or an unknown condition.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> paths = rng.integers(0, 3, (40, 4))
        >>> macs_m = 1.0 + paths.sum(1)
        >>> flt = PathFilter(num_choices=[3] * 4, num_members=2).fit(paths, paths @ [3.0, 1, 0, 0], macs_m)
        >>> flt.score(paths, macs_m).shape
        (40,)
    """

    def __init__(
        self,
        space: Any = None,
        *,
        num_choices: Sequence[int] | None = None,
        cost: Any = None,
        condition: str = "concat",
        num_members: int = 5,
        bandwidths: Sequence[float | None] = (None, 0.3),
        config: RankerConfig | None = None,
    ) -> None:
        if condition not in _CONDITIONS:
            raise InputError(f"PathFilter: expected one of {_CONDITIONS} for condition, got {condition!r}")
        if num_members < 1:
            raise InputError(f"PathFilter: expected num_members >= 1, got {num_members}")
        if not bandwidths or any(h is not None and not h > 0 for h in bandwidths):
            raise InputError(f"PathFilter: expected None or numbers > 0 for bandwidths, got {bandwidths}")
        self.encoding = GeneEncoding.of(space, num_choices)
        self.space = space
        self.cost = cost
        self.condition = condition
        self.num_members = num_members
        self.bandwidths = tuple(bandwidths)
        self.config = config or RankerConfig()
        self.bandwidth: float | None = None
        self._network: RankerEnsemble | None = None
        self._norm: dict[str, torch.Tensor] = {}
        self._scorer: LookupScorer | None = None

    def clone(self) -> PathFilter:
        """An unfitted filter of the same settings (cross-validation fits one per fold)."""
        return PathFilter(
            self.space,
            num_choices=None if self.space is not None else self.encoding.slot_sizes,
            cost=self.cost,
            condition=self.condition,
            num_members=self.num_members,
            bandwidths=self.bandwidths,
            config=self.config,
        )

    # ------------------------------------------------------------------ fitting

    def fit(
        self,
        paths: Any,
        labels: Any,
        macs_m: Any,
        *,
        label_sd: Any = None,
        seed: int = 0,
    ) -> PathFilter:
        """Learn the ranking from labelled paths.

        Args:
            paths: n paths: list of `Path`, uint8 population [n, num_slots], or integers [n, num_genes] (-1 =
                absent) where the filter was built from `num_choices`.
            labels: [n], larger is better (AP, accuracy, -loss); any unit.
            macs_m: [n], whole-detector MACs in millions.
            label_sd: Noise of the labels in their unit: a number, [n], or [n, n] for each difference.
            seed: Fixes the result bitwise.

        Returns:
            self.

        Raises:
            InputError: a label or cost that is not finite, lengths that differ, fewer than two distinct
                paths, or labels that are all equal. The same path given twice counts once, with the mean
                label.
        """
        data = collect_labels(self.encoding, paths, labels, macs_m, label_sd=label_sd)
        self._normalise(data)
        self.bandwidth = self._choose_bandwidth(data, seed)
        self._network = train_ensemble(
            *self._problem(data, self.bandwidth), self.config, num_members=self.num_members, seed=seed
        )
        self._fold(data)
        return self

    def _normalise(self, data: LabelledPaths) -> None:
        features = torch.from_numpy(self.encoding.features(data.codes))
        budget = torch.from_numpy(data.log_macs)
        self._norm = {
            "feature_mean": features.mean(0),
            "feature_scale": torch.ones(features.shape[1]),
            "budget_mean": budget.mean(),
            "budget_scale": budget.std(correction=0).clamp_min(1e-3),
        }

    def _inputs(self, codes: np.ndarray, log_macs: np.ndarray) -> torch.Tensor:
        norm = self._norm
        x = (torch.from_numpy(self.encoding.features(codes)) - norm["feature_mean"]) / norm["feature_scale"]
        if self.condition == "none":
            return x
        budget = (torch.from_numpy(log_macs) - norm["budget_mean"]) / norm["budget_scale"]
        return torch.cat([x, budget.float().unsqueeze(1)], dim=1)

    def _problem(self, data: LabelledPaths, bandwidth: float | None) -> tuple:
        labels = (data.labels - data.labels.mean()) / data.labels.std()
        targets = pair_targets(data.labels, data.log_macs, bandwidth=bandwidth, label_sd=data.label_sd)
        return self._inputs(data.codes, data.log_macs), torch.from_numpy(labels).float(), targets

    def _choose_bandwidth(self, data: LabelledPaths, seed: int) -> float | None:
        """The h whose held-out folds rank nearby pairs best; the first of the grid where labels are too few."""
        if len(self.bandwidths) == 1 or len(data.labels) < 24:
            return self.bandwidths[0]
        folds = np.random.default_rng([seed, 0x68]).permutation(len(data.labels)) % 3
        masks = torch.from_numpy(np.stack([folds != fold for fold in range(3)])).float()
        local = pair_targets(data.labels, data.log_macs, bandwidth=0.1, label_sd=data.label_sd)
        agreement = local.weight * (2.0 * local.probability - 1.0)
        best, chosen = -np.inf, self.bandwidths[0]
        for bandwidth in self.bandwidths:
            x, y, targets = self._problem(data, bandwidth)
            network = train_ensemble(x, y, targets, self.config, num_members=3, seed=seed, masks=masks)
            with torch.inference_mode():
                scores = network(x)
            order = torch.sign(scores.unsqueeze(2) - scores.unsqueeze(1))
            held_out = (1 - masks).unsqueeze(2) * (1 - masks).unsqueeze(1)
            value = float((order * agreement * held_out).sum())
            if value > best:
                best, chosen = value, bandwidth
        return chosen

    def _fold(self, data: LabelledPaths | None) -> None:
        """Put members on one scale (the labelled paths') and fold the first layer into lookup tables."""
        if self._network is None:
            raise RuntimeError("PathFilter: no network to fold")
        if data is not None:
            with torch.inference_mode():
                scores = self._network(self._inputs(data.codes, data.log_macs))
            self._norm["score_mean"] = scores.mean(1).clone()
            self._norm["score_scale"] = scores.std(1).clamp_min(1e-6).clone()
        norm = self._norm
        self._scorer = LookupScorer.fold(
            self._network,
            torch.from_numpy(self.encoding.design()),
            norm["feature_mean"],
            norm["feature_scale"],
            norm["score_mean"],
            norm["score_scale"],
            has_budget=self.condition != "none",
        )

    # ------------------------------------------------------------------ scoring

    def score(self, paths: Any, macs_m: Any = None) -> np.ndarray:
        """Score paths, millions of them in bounded memory.

        Args:
            paths: As in `fit`.
            macs_m: [n], millions of MACs; None: computed by `cost`. Not needed with condition "none".

        Returns:
            float32 [n]; larger is better among paths of similar MACs.

        Raises:
            InputError: not fitted, or `macs_m` missing while no `cost` was given, or of another length.
        """
        return self._score(paths, macs_m, spread=False)[0]

    def score_with_spread(self, paths: Any, macs_m: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """Like `score`, with the ensemble's disagreement.

        Returns:
            (score float32 [n], standard deviation over members float32 [n]; zeros for one member).
        """
        mean, spread = self._score(paths, macs_m, spread=True)
        return mean, spread

    def _score(self, paths: Any, macs_m: Any, *, spread: bool) -> tuple[np.ndarray, np.ndarray]:
        if self._scorer is None:
            raise InputError(
                "PathFilter.score: expected a fitted filter, got one before fit() or load_state_dict()"
            )
        codes = self.encoding.codes(paths)
        budget = self._budget(codes, macs_m)
        mean = np.empty(len(codes), np.float32)
        deviation = np.zeros(len(codes) if spread else 0, np.float32)
        rows = torch.from_numpy(np.ascontiguousarray(codes))
        for start in range(0, len(codes), _CHUNK):
            part = slice(start, start + _CHUNK)
            members = self._scorer.members(rows[part], None if budget is None else budget[part])
            mean[part] = members.mean(0).numpy()
            if spread and self.num_members > 1:
                deviation[part] = members.std(0).numpy()
        return mean, deviation

    def _budget(self, codes: np.ndarray, macs_m: Any) -> torch.Tensor | None:
        if self.condition == "none":
            return None
        if macs_m is None:
            if self.cost is None:
                raise InputError(
                    "PathFilter.score: expected macs_m, or a filter built with cost=, got neither"
                )
            macs_m = self.cost.macs_m(codes)
        macs = np.asarray(macs_m, np.float64)
        if macs.shape != (len(codes),):
            raise InputError(
                f"PathFilter.score: expected shape [{len(codes)}] for macs_m, got {list(macs.shape)}"
            )
        if not (macs > 0).all():
            raise InputError("PathFilter.score: expected macs_m > 0, got a value that is not")
        norm = self._norm
        budget = (torch.from_numpy(np.log(macs)) - norm["budget_mean"]) / norm["budget_scale"]
        return budget.float()

    # ------------------------------------------------------------------ saving

    def state_dict(self) -> dict[str, Any]:
        """Everything `load_state_dict` needs; only tensors, numbers, strings and lists (safe with weights_only)."""
        if self._network is None:
            raise InputError("PathFilter.state_dict: expected a fitted filter, got one before fit()")
        return {
            "slot_sizes": list(self.encoding.slot_sizes),
            "condition": self.condition,
            "num_members": self.num_members,
            "bandwidth": self.bandwidth,
            "config": {
                k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self.config).items()
            },
            "norm": dict(self._norm),
            "network": {k: v.detach().clone() for k, v in self._network.state_dict().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> PathFilter:
        """Restore a fitted filter into one built for the same space.

        Args:
            state: What `state_dict` returned.

        Returns:
            self.

        Raises:
            InputError: `state` is of another space or another condition.
        """
        if tuple(state["slot_sizes"]) != self.encoding.slot_sizes or state["condition"] != self.condition:
            raise InputError(
                f"PathFilter.load_state_dict: expected choices {list(self.encoding.slot_sizes)} and condition "
                f"{self.condition!r} for state, got {state['slot_sizes']} and {state['condition']!r}"
            )
        config = {k: tuple(v) if isinstance(v, list) else v for k, v in state["config"].items()}
        self.config = RankerConfig(**config)
        self.num_members = int(state["num_members"])
        self.bandwidth = state["bandwidth"]
        self._norm = {k: torch.as_tensor(v) for k, v in state["norm"].items()}
        self._network = RankerEnsemble(
            state["network"]["weight_1"].shape[1],
            hidden=self.config.hidden,
            num_members=self.num_members,
            generator=torch.Generator().manual_seed(0),
            dropout=self.config.dropout,
        ).eval()
        self._network.load_state_dict(state["network"])
        self._fold(None)
        return self

# SPDX-License-Identifier: Apache-2.0
"""The path filter: ranks paths of similar cost, after DetOFA (arXiv:2303.13121); the model is our choice."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pfnas_fast.errors import InputError
from pfnas_fast.filter.encoding import GeneEncoding
from pfnas_fast.filter.fitting import FittedParts, fit_parts
from pfnas_fast.filter.kernel import KernelModel, KernelScorer
from pfnas_fast.filter.labels import LabelledPaths, collect_labels
from pfnas_fast.filter.network import LookupScorer, RankerEnsemble
from pfnas_fast.filter.packing import PackedFilter, pack_filter
from pfnas_fast.filter.training import RankerConfig
from pfnas_fast.ops import BudgetRanker, CostTable, path_cost, path_score

__all__ = ["PathFilter"]

_CONDITIONS = ("concat", "film", "none")
_CHUNK = 1 << 18  # paths scored at once: what is computed on the way stays small


class PathFilter:
    """Predicts which of the paths that meet a similar budget is better.

    ``f(path, budget)`` blends two parts over the path's genes and its normalised log MACs: an ensemble of
    small networks trained with a pairwise ranking loss whose pairs count ``exp(-|difference of log MACs| /
    h)``, strong where genes act on each other and labels are many, and two Gaussian processes, strong where
    labels are few. The share of each is chosen by cross-validation. Scores have no unit; only differences
    between paths of similar cost mean anything.

    Args:
        space: A `pfnas_fast.space.Space`; None with `num_choices`.
        num_choices: Choices per gene of a plain architecture table, instead of a space.
        cost: `CostModel` that gives a path's whole-detector MACs where `score` gets none.
        condition: "concat" = the budget is an input; "film" = it scales and shifts the networks' first layer
            (for comparison: networks only, network_share=1, scored by torch and not by the compiled search);
            "none" = genes only.
        num_members: Members of the ensemble.
        bandwidths: Grid for h; None in it = all pairs alike. More than one value: chosen by cross-validation.
        network_share: Share of the networks in the score, 0..1; None = chosen by cross-validation.
        config: Size and schedule of the networks; None = the default.

    Attributes:
        parts: What `fit` found, `FittedParts`; None before.

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
        network_share: float | None = None,
        config: RankerConfig | None = None,
    ) -> None:
        if condition not in _CONDITIONS:
            raise InputError(f"PathFilter: expected one of {_CONDITIONS} for condition, got {condition!r}")
        if num_members < 1:
            raise InputError(f"PathFilter: expected num_members >= 1, got {num_members}")
        if not bandwidths or any(h is not None and not h > 0 for h in bandwidths):
            raise InputError(f"PathFilter: expected None or numbers > 0 for bandwidths, got {bandwidths}")
        if network_share is not None and not 0.0 <= network_share <= 1.0:
            raise InputError(f"PathFilter: expected None or 0..1 for network_share, got {network_share}")
        if condition == "film" and network_share != 1.0:
            raise InputError(
                f'PathFilter: expected network_share=1 for condition "film", got {network_share}: the '
                "processes have no such form"
            )
        self.encoding = GeneEncoding.of(space, num_choices)
        self.space = space
        self.cost = cost
        self.condition = condition
        self.num_members = num_members
        self.bandwidths = tuple(bandwidths)
        self.network_share = network_share
        self.config = config or RankerConfig()
        self.parts: FittedParts | None = None
        self._norm: dict[str, torch.Tensor] = {}
        self._packed: PackedFilter | None = None
        self._cost_table: CostTable | None = None

    def clone(self) -> PathFilter:
        """An unfitted filter of the same settings (cross-validation fits one per fold)."""
        return PathFilter(
            self.space,
            num_choices=None if self.space is not None else self.encoding.slot_sizes,
            cost=self.cost,
            condition=self.condition,
            num_members=self.num_members,
            bandwidths=self.bandwidths,
            network_share=self.network_share,
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
        warm_start: bool = False,
    ) -> PathFilter:
        """Learn the ranking from labelled paths.

        Args:
            paths: n paths: list of `Path`, uint8 population [n, num_slots], or integers [n, num_genes] (-1 =
                absent) where the filter was built from `num_choices`.
            labels: [n], larger is better (AP, accuracy, -loss); any unit.
            macs_m: [n], whole-detector MACs in millions.
            label_sd: Noise of the labels in their unit: a number, [n], or [n, n] for each difference.
            seed: Fixes the result bitwise.
            warm_start: Go on from the networks of the last `fit` in a third of the steps, for labels that
                moved a little (a refresh in mid-training); the processes are fitted anew, in no time. Without
                an earlier fit: as False.

        Returns:
            self.

        Raises:
            InputError: a label or cost that is not finite, lengths that differ, fewer than two distinct
                paths, or labels that are all equal. The same path given twice counts once, with the mean
                label.
        """
        data = collect_labels(self.encoding, paths, labels, macs_m, label_sd=label_sd)
        features = self.encoding.features(data.codes)
        start = self.parts.network if warm_start and self.parts is not None else None
        self._norm = {
            "feature_mean": torch.from_numpy(features.mean(0)),
            "budget_mean": torch.tensor(data.log_macs.mean()),
            "budget_scale": torch.tensor(max(data.log_macs.std(), 1e-3)),
        }
        self.parts = fit_parts(
            data,
            features - features.mean(0),
            self.encoding.feature_groups(),
            None if self.condition == "none" else self._normalised(data.log_macs).numpy(),
            config=self.config,
            num_members=self.num_members,
            bandwidths=self.bandwidths,
            share=self.network_share,
            seed=seed,
            film=self.condition == "film",
            start=start,
        )
        self._set_scales(data)
        self._fold()
        return self

    def _normalised(self, log_macs: np.ndarray) -> torch.Tensor:
        """Normalised budget, float64 [n]."""
        return (torch.from_numpy(log_macs) - self._norm["budget_mean"]) / self._norm["budget_scale"]

    def _set_scales(self, data: LabelledPaths) -> None:
        """Put every member on one scale: mean 0 and standard deviation 1 over the labelled paths."""
        if self.parts is None:
            raise RuntimeError("PathFilter: nothing fitted")
        members = len(self.parts.kernels) + (self.num_members if self.parts.network is not None else 0)
        self._norm["score_mean"], self._norm["score_scale"] = torch.zeros(members), torch.ones(members)
        self._fold()
        budget = None if self.condition == "none" else self._normalised(data.log_macs).float()
        scores = self._scores_and_members(data.codes, budget)[1]
        self._norm["score_mean"] = scores.mean(1).clone()
        self._norm["score_scale"] = scores.std(1).clamp_min(1e-6).clone()

    def _fold(self) -> None:
        """Fold first layers, covariances and normalisations into lookup tables."""
        if self.parts is None:
            raise RuntimeError("PathFilter: nothing to fold")
        norm, design = self._norm, self.encoding.design()
        if self.condition == "film":
            self._weights = torch.full((self.num_members,), 1.0 / self.num_members)
            return
        mean, scale = norm["score_mean"], norm["score_scale"]
        num_networks = len(mean) - len(self.parts.kernels)
        networks = None
        if self.parts.network is not None:
            networks = LookupScorer.fold(
                self.parts.network,
                torch.from_numpy(design),
                norm["feature_mean"],
                mean[:num_networks],
                scale[:num_networks],
                input_scale=self.config.input_scale,
                has_budget=self.condition != "none",
            )
        kernels = tuple(
            KernelScorer.fold(model, design, norm["feature_mean"], float(mean[index]), float(scale[index]))
            for index, model in enumerate(self.parts.kernels, start=num_networks)
        )
        share, num_kernels = self.parts.share, len(kernels)
        self._weights = torch.tensor(
            [share / max(num_networks, 1)] * num_networks
            + [(1.0 - share) / max(num_kernels, 1)] * num_kernels
        )
        self._packed = pack_filter(
            networks,
            kernels,
            self._weights,
            num_slots=self.encoding.num_slots,
            has_budget=self.condition != "none",
        )

    def _scores_and_members(
        self, codes: np.ndarray, z: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The score float32 [n], and every member's, float32 [members, n]."""
        if self.condition == "film" and z is not None:
            members = self._film_members(codes, z)
            return self._weights @ members, members
        if self._packed is None:
            raise RuntimeError("PathFilter: nothing folded")
        scores, members = path_score(self._packed.ranker, codes, z, members=True)
        if z is not None and self._packed.curves is not None:
            members = members + self._packed.member_curves(z)
        return scores, members

    @torch.inference_mode()
    def _film_members(self, codes: np.ndarray, z: torch.Tensor) -> torch.Tensor:
        """Every network's score, float32 [members, n]; the budget multiplies, so nothing can be folded."""
        if self.parts is None or self.parts.network is None:
            raise RuntimeError("PathFilter: nothing fitted")
        features = torch.from_numpy(self.encoding.features(codes)) - self._norm["feature_mean"]
        inputs = torch.cat([features, z.unsqueeze(1)], dim=1) * self.config.input_scale
        parts = [self.parts.network(part) for part in inputs.split(1 << 14)]
        mean, scale = self._norm["score_mean"], self._norm["score_scale"]
        return (torch.cat(parts, dim=1) - mean.unsqueeze(1)) / scale.unsqueeze(1)

    def budget_ranker(self) -> BudgetRanker:
        """The fitted filter as the compiled search takes it (`pfnas_fast.ops.SearchSpace`).

        Raises:
            InputError: not fitted, or condition "film", which the compiled search does not know.
        """
        if self.condition == "film":
            raise InputError('PathFilter.budget_ranker: expected condition "concat" or "none", got "film"')
        if self._packed is None:
            raise InputError("PathFilter.budget_ranker: expected a fitted filter, got one before fit()")
        mean, scale = float(self._norm["budget_mean"]), float(self._norm["budget_scale"])
        return BudgetRanker(self._packed.ranker, mean, scale)

    def normalised_inputs(self, paths: Any, macs_m: Any) -> tuple[np.ndarray, torch.Tensor]:
        """What the parts see of paths: codes uint8 [n, num_slots], budgets float64 [n] (zeros for "none")."""
        codes, z = self._inputs(paths, macs_m)
        return codes, torch.zeros(len(codes), dtype=torch.float64) if z is None else z.double()

    def feature_mean(self) -> torch.Tensor:
        """What was subtracted from the features, [F]."""
        return self._norm["feature_mean"]

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
        num_paths = len(paths) if hasattr(paths, "__len__") else 0
        if num_paths <= _CHUNK:
            return self._score_chunk(paths, macs_m)
        if macs_m is not None and np.shape(macs_m) != (num_paths,):
            raise InputError(
                f"PathFilter.score: expected shape [{num_paths}] for macs_m, got {list(np.shape(macs_m))}"
            )
        scores = np.empty(num_paths, np.float32)
        for start in range(0, num_paths, _CHUNK):
            part = slice(start, start + _CHUNK)
            scores[part] = self._score_chunk(paths[part], None if macs_m is None else macs_m[part])
        return scores

    def _score_chunk(self, paths: Any, macs_m: Any) -> np.ndarray:
        codes, z = self._inputs(paths, macs_m)
        if self.condition == "film":
            return self._scores_and_members(codes, z)[0].numpy()
        if self._packed is None:
            raise RuntimeError("PathFilter: fitted but not folded")
        return path_score(self._packed.ranker, codes, z, trusted=True).numpy()

    def score_with_spread(self, paths: Any, macs_m: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """Like `score`, with the ensemble's disagreement.

        Returns:
            (score float32 [n], standard deviation over members float32 [n]; zeros for one member).
        """
        codes, z = self._inputs(paths, macs_m)
        scores, members = self._scores_and_members(codes, z)
        return scores.numpy(), (self._weights @ (members - scores) ** 2).sqrt().numpy()

    def _inputs(self, paths: Any, macs_m: Any) -> tuple[np.ndarray, torch.Tensor | None]:
        """Checked codes [n, num_slots] and normalised budgets float32 [n]; None where they are no input."""
        if self.parts is None:
            raise InputError(
                "PathFilter.score: expected a fitted filter, got one before fit() or load_state_dict()"
            )
        codes = self.encoding.codes(paths)
        if self.condition == "none":
            return codes, None
        if macs_m is None:
            if self.cost is None:
                raise InputError(
                    "PathFilter.score: expected macs_m, or a filter built with cost=, got neither"
                )
            if self._cost_table is None:
                self._cost_table = CostTable(self.cost.macs_table, self.cost.macs_constant, 1e6)
            macs_m = path_cost(codes, self._cost_table).numpy()
        macs = np.asarray(macs_m, np.float64)
        if macs.shape != (len(codes),):
            raise InputError(
                f"PathFilter.score: expected shape [{len(codes)}] for macs_m, got {list(macs.shape)}"
            )
        if not (macs > 0).all():
            raise InputError("PathFilter.score: expected macs_m > 0, got a value that is not")
        return codes, self._normalised(np.log(macs)).float()

    # ------------------------------------------------------------------ saving

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs: only tensors, numbers, strings and lists (safe with weights_only)."""
        if self.parts is None:
            raise InputError("PathFilter.state_dict: expected a fitted filter, got one before fit()")
        network = self.parts.network
        config = dataclasses.asdict(self.config)
        return {
            "slot_sizes": list(self.encoding.slot_sizes),
            "condition": self.condition,
            "num_members": self.num_members,
            "bandwidth": self.parts.bandwidth,
            "share": self.parts.share,
            "config": {
                key: list(value) if isinstance(value, tuple) else value for key, value in config.items()
            },
            "norm": dict(self._norm),
            "network": None if network is None else {k: v.clone() for k, v in network.state_dict().items()},
            "kernels": [model.state() for model in self.parts.kernels],
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
                f"PathFilter.load_state_dict: expected choices {list(self.encoding.slot_sizes)}, condition "
                f"{self.condition!r} for state, got {state['slot_sizes']} and {state['condition']!r}"
            )
        config: dict[str, Any] = dict(state["config"])
        self.config = RankerConfig(**{**config, "hidden": tuple(config["hidden"])})
        self.num_members = int(state["num_members"])
        self._norm = {key: torch.as_tensor(value) for key, value in state["norm"].items()}
        network = None
        if state["network"] is not None:
            network = RankerEnsemble(
                state["network"]["weight_1"].shape[1],
                hidden=self.config.hidden,
                num_members=self.num_members,
                generator=torch.Generator().manual_seed(0),
                dropout=self.config.dropout,
                film=self.condition == "film",
            ).eval()
            network.load_state_dict(state["network"])
        kernels = tuple(KernelModel(**fields) for fields in state["kernels"])
        self.parts = FittedParts(network, kernels, float(state["share"]), state["bandwidth"])
        self._fold()
        return self

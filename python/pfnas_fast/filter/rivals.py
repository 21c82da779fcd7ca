# SPDX-License-Identifier: Apache-2.0
"""Classical regressors behind the filter's interface, all given log MACs: what the filter has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pfnas_fast.errors import InputError
from pfnas_fast.filter.encoding import GeneEncoding
from pfnas_fast.filter.labels import collect_labels

__all__ = ["RIVALS", "MacsOnly", "Rival"]

RIVALS = ("ridge", "forest", "boosted_trees")
_CHUNK = 1 << 17


def _regressor(name: str, seed: int) -> Any:
    from sklearn.ensemble import GradientBoostingRegressor, RandomForestRegressor
    from sklearn.linear_model import RidgeCV

    if name == "ridge":
        return RidgeCV(alphas=np.logspace(-3, 3, 25))
    if name == "forest":
        return RandomForestRegressor(n_estimators=300, max_features=0.5, random_state=seed)
    return GradientBoostingRegressor(
        n_estimators=400, max_depth=4, learning_rate=0.05, subsample=0.7, max_features=0.5, random_state=seed
    )


class Rival:
    """A regression on one-hot genes and log MACs, with `fit` and `score` as `PathFilter` has them.

    Args:
        name: "ridge", "forest" or "boosted_trees".
        space: A `Space`; None with `num_choices`.
        num_choices: Choices per gene of a plain architecture table.
        cost: `CostModel` that gives the MACs where `score` gets none.

    Raises:
        InputError: unknown name, or both or neither of space and num_choices.

    Example:
        >>> import numpy as np
        >>> paths = np.random.default_rng(0).integers(0, 3, (40, 4))
        >>> rival = Rival("ridge", num_choices=[3] * 4).fit(paths, paths[:, 0], 1.0 + paths.sum(1))
        >>> rival.score(paths, 1.0 + paths.sum(1)).shape
        (40,)
    """

    def __init__(
        self,
        name: str,
        space: Any = None,
        *,
        num_choices: Sequence[int] | None = None,
        cost: Any = None,
    ) -> None:
        if name not in RIVALS:
            raise InputError(f"Rival: expected one of {RIVALS} for name, got {name!r}")
        self.name = name
        self.encoding = GeneEncoding.of(space, num_choices)
        self.space = space
        self.cost = cost
        self._model: Any = None

    def clone(self) -> Rival:
        """An unfitted copy."""
        sizes = None if self.space is not None else self.encoding.slot_sizes
        return Rival(self.name, self.space, num_choices=sizes, cost=self.cost)

    def fit(self, paths: Any, labels: Any, macs_m: Any, *, label_sd: Any = None, seed: int = 0) -> Rival:
        """See `PathFilter.fit`; `label_sd` is checked and not used."""
        data = collect_labels(self.encoding, paths, labels, macs_m, label_sd=label_sd)
        target = (data.labels - data.labels.mean()) / data.labels.std()
        self._model = _regressor(self.name, seed).fit(self._inputs(data.codes, data.log_macs), target)
        return self

    def _inputs(self, codes: np.ndarray, log_macs: np.ndarray) -> np.ndarray:
        return np.concatenate([self.encoding.features(codes), log_macs[:, None]], axis=1, dtype=np.float32)

    def score(self, paths: Any, macs_m: Any = None) -> np.ndarray:
        """See `PathFilter.score`."""
        if self._model is None:
            raise InputError("Rival.score: expected a fitted model, got one before fit()")
        codes = self.encoding.codes(paths)
        if macs_m is None:
            if self.cost is None:
                raise InputError("Rival.score: expected macs_m, or a model built with cost=, got neither")
            macs_m = self.cost.macs_m(codes)
        log_macs = np.log(np.asarray(macs_m, np.float64))
        scores = np.empty(len(codes), np.float32)
        for start in range(0, len(codes), _CHUNK):
            part = slice(start, start + _CHUNK)
            scores[part] = self._model.predict(self._inputs(codes[part], log_macs[part]))
        return scores


class MacsOnly:
    """Ranks by MACs alone: the least any predictor has to beat."""

    def clone(self) -> MacsOnly:
        """Itself; there is nothing to fit."""
        return self

    def fit(self, paths: Any, labels: Any, macs_m: Any, *, label_sd: Any = None, seed: int = 0) -> MacsOnly:
        """Does nothing."""
        return self

    def score(self, paths: Any, macs_m: Any = None) -> np.ndarray:
        """Log MACs, float32 [n]."""
        return np.log(np.asarray(macs_m, np.float64)).astype(np.float32)

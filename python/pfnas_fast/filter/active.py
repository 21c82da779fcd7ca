# SPDX-License-Identifier: Apache-2.0
"""Active labelling: which paths of each budget bin to evaluate next."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pfnas_fast.errors import InputError
from pfnas_fast.filter.metrics import cost_bins
from pfnas_fast.filter.path_filter import PathFilter

__all__ = ["next_paths"]


def next_paths(
    flt: PathFilter,
    candidates: Any,
    macs_m: Any,
    *,
    num_paths: int,
    num_bins: int = 8,
    equal: str = "width",
    bins: np.ndarray | None = None,
) -> np.ndarray:
    """Choose the candidates about which the filter knows least, as many from every budget bin.

    Greedy: the path of largest posterior variance under the filter's first Gaussian process, which then
    counts as labelled; bins take turns. No label is needed for that, so a whole batch is chosen at once.

    Args:
        flt: Fitted filter with a Gaussian process (network_share below 1).
        candidates: n unlabelled paths, as `PathFilter.fit` takes them, e.g. 256 per bin from `ExactSampler`.
        macs_m: [n], millions.
        num_paths: How many to choose, 1 <= num_paths <= n.
        num_bins: Budget bins over the candidates.
        equal: As `cost_bins`: "width" or "population".
        bins: Budget bin of each candidate, int [n] in 0..num_bins-1, where it is known; then `equal` is not
            looked at.

    Returns:
        int64 [num_paths], distinct indices into `candidates`, in the order chosen. A bin that runs out of
        candidates is passed over.

    Raises:
        InputError: the filter is not fitted or has no process, or num_paths out of range.

    Source:
        Greedy maximisation of the information gained, Srinivas et al. (arXiv:0912.3995), sec. 2.2.

    Example:
        >>> import numpy as np
        >>> from pfnas_fast.filter import PathFilter
        >>> paths = np.random.default_rng(0).integers(0, 3, (90, 4))
        >>> macs_m = 1.0 + paths.sum(1)
        >>> flt = PathFilter(num_choices=[3] * 4, network_share=0.0)
        >>> flt = flt.fit(paths[:30], paths[:30, 0], macs_m[:30])
        >>> next_paths(flt, paths[30:], macs_m[30:], num_paths=8, num_bins=4).shape
        (8,)
    """
    if flt.parts is None or not flt.parts.kernels:
        raise InputError("next_paths: expected a fitted filter with a Gaussian process, got none")
    codes, z = flt.normalised_inputs(candidates, macs_m)
    if not 1 <= num_paths <= len(codes):
        raise InputError(f"next_paths: expected 1 to {len(codes)} for num_paths, got {num_paths}")
    if bins is None:
        bins = cost_bins(np.asarray(macs_m, np.float64), num_bins, equal=equal)
    elif np.shape(bins) != (len(codes),) or not ((bins >= 0) & (bins < num_bins)).all():
        raise InputError(f"next_paths: expected [{len(codes)}] numbers from 0 to {num_bins - 1} for bins")
    model = flt.parts.kernels[0]
    features = torch.from_numpy(flt.encoding.features(codes)).double() - flt.feature_mean()
    noise = model.noise()
    variance, shared = model.posterior(features, z)
    free = torch.ones(len(codes), dtype=torch.bool)
    chosen: list[int] = []
    turn = 0
    while len(chosen) < num_paths:
        mine = free & torch.from_numpy(bins == turn % num_bins)
        turn += 1
        if not mine.any():
            continue
        best = int(torch.where(mine, variance, -torch.inf).argmax())
        chosen.append(best)
        free[best] = False
        # Gaussian elimination by one more observation.
        row = model.covariance(features[best : best + 1], z[best : best + 1], features, z)[0]
        row = (row - shared[:, best] @ shared) / (variance[best].clamp_min(0.0) + noise).sqrt()
        shared = torch.cat([shared, row.unsqueeze(0)])
        variance = variance - row**2
    return np.array(chosen, np.int64)

# SPDX-License-Identifier: Apache-2.0
"""Draw paths of given costs, score them, keep the best, on a GPU in one pass; on the CPU through the engine.

Call path: `path_filter` -> per window, `SearchSpace.flood` on the CPU, or on a CUDA device `CudaPathFilter`,
which holds the tables there -> _C.path_filter_cuda -> one kernel -> the blocks' best are merged here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pfnas_fast.errors import InputError
from pfnas_fast.ops._library import _C
from pfnas_fast.ops.path_score import pack_ranker
from pfnas_fast.ops.path_search import BudgetRanker, Flood, SearchSpace

__all__ = ["CudaPathFilter", "path_filter"]

_BLOCK_PATHS = 256
_WANTED_BLOCKS = 1024  # several waves of a large GPU


def path_filter(
    search: SearchSpace,
    scorer: BudgetRanker,
    windows: Sequence[tuple[float, float]],
    n: int,
    *,
    seed: int,
    top_k: int,
    thresholds: Sequence[float] | None = None,
    device: str | torch.device = "cpu",
) -> list[Flood]:
    """Draw `n` paths in each window of costs, exactly; score them; keep each window's best distinct ones.

    Codes and costs of the draws are the same bits on every device; scores agree within rounding of float32.

    Args:
        search: The space, with walk tables (`SearchSpace.use_walks`).
        scorer: What is maximised.
        windows: (low, high), inclusive, in the cost's unit.
        n: Number of draws per window.
        seed: 0 .. 2^64 - 1. Window i draws with seed + i.
        top_k: Distinct paths wanted per window; on CUDA devices at most 32.
        thresholds: Per window, the lowest score that is kept; None: no limit.
        device: ``"cpu"`` or a CUDA device.

    Returns:
        One `Flood` per window.

    Raises:
        InputError: Numbers out of range, or a ranker or space too large for the CUDA kernel (a ValueError).
        NotImplementedError: Another kind of device, or a build without CUDA kernels.

    Source:
        Exact draws by dynamic programming: docs/path_filter.md. Random numbers: Salmon, Moraes, Dror, Shaw,
        Parallel random numbers: as easy as 1, 2, 3, SC 2011.

    Example:
        >>> import torch
        >>> from pfnas_fast.ops import BudgetRanker, NetworkTables, PackedRanker, RankerTables, SearchSpace
        >>> from pfnas_fast.ops import path_filter
        >>> from pfnas_fast.space import AdditiveCost, BudgetSampler, CostModel, load_space
        >>> model = CostModel(load_space("tiny"), num_classes=3)
        >>> search = SearchSpace(model.space, AdditiveCost.macs(model))
        >>> search.use_walks([BudgetSampler(model).walker(r) for r in model.space.resolutions])
        >>> slots, codes = model.space.num_slots, search.cost.table.shape[2]
        >>> rows = torch.randn(slots * codes, 1, 8)
        >>> net = NetworkTables(rows, torch.zeros(1, 8), None, (), torch.ones(1, 8))
        >>> ranker = PackedRanker(RankerTables(slots, codes, torch.ones(1), networks=net))
        >>> found = path_filter(search, BudgetRanker(ranker), [(11.0, 12.0)], 1000, seed=0, top_k=4)
        >>> len(found), found[0].codes.shape[0]
        (1, 4)
    """
    limits = [-float("inf")] * len(windows) if thresholds is None else list(thresholds)
    if len(limits) != len(windows):
        raise InputError(f"path_filter: expected {len(windows)} thresholds, got {len(limits)}")
    if n < 1 or top_k < 1:
        raise InputError(f"path_filter: expected n and top_k of at least 1, got {n} and {top_k}")
    device = torch.device(device)
    if device.type == "cpu":
        return [
            _flood(search, scorer, n, low, high, limit, seed + i, top_k)
            for i, ((low, high), limit) in enumerate(zip(windows, limits, strict=True))
        ]
    if device.type != "cuda" or not _C.cuda_built:
        built = "cpu or cuda" if _C.cuda_built else "cpu (this build has no CUDA kernels)"
        raise NotImplementedError(f"path_filter: expected {built} for device, got {device}")
    on_gpu = CudaPathFilter(search, scorer, device=device)
    return [
        on_gpu.run(n, low, high, seed=seed + i, top_k=top_k, threshold=limit)
        for i, ((low, high), limit) in enumerate(zip(windows, limits, strict=True))
    ]


def _flood(
    search: SearchSpace,
    scorer: BudgetRanker,
    n: int,
    low: float,
    high: float,
    threshold: float,
    seed: int,
    top_k: int,
) -> Flood:
    limits = None
    if threshold != -float("inf"):
        limits = (np.array([0.0, 1.0]), np.array([threshold, threshold]))
    return search.flood(scorer, n, low, high, seed=seed, top_k=top_k, thresholds=limits)


class CudaPathFilter:
    """The tables of a space and a ranker on a CUDA device.

    Args:
        search: The space, with walk tables.
        scorer: The ranker and the normalisation of its budget.
        device: Where the tables go.
        module: The compiled module; the tests pass their emulator.

    Raises:
        InputError: No walk tables, or a space or a ranker larger than the kernel takes.
    """

    def __init__(
        self, search: SearchSpace, scorer: BudgetRanker, *, device: torch.device, module: Any = _C
    ) -> None:
        self._module, self._device, self._search = module, device, search
        self._walks = search.walk_fields
        if not self._walks:
            raise InputError("path_filter: expected walk tables (SearchSpace.use_walks) for search, got none")
        if search.space.num_slots > module.path_filter_max_slots:
            most = module.path_filter_max_slots
            raise InputError(f"path_filter: expected at most {most} slots, got {search.space.num_slots}")
        ranker = pack_ranker(scorer.ranker.tables)
        widest = max(ranker.get("widths", (0,)))
        if widest > module.path_filter_max_hidden:
            most = module.path_filter_max_hidden
            raise InputError(f"path_filter: expected hidden layers of at most {most}, got {widest}")
        ranker["score_table"] = ranker.pop("table")
        joined = _joined(self._walks)
        if max(t.numel() for t in (ranker["score_table"], *joined.values())) >= 2**31:
            raise InputError("path_filter: expected tables of fewer than 2^31 numbers")
        fields = {**ranker, **search.fields, **joined}
        # One bit per block that begins a stage.
        fields["first_blocks"] = sum(1 << first for first in search.fields["stage_start"][:-1].tolist())
        self._fields = {name: self._there(value) for name, value in fields.items()}
        self._fields |= {"log_mean": scorer.log_mean, "log_scale": scorer.log_scale}

    def _there(self, value: Any) -> Any:
        return value.to(self._device).contiguous() if isinstance(value, Tensor) else value

    def run(
        self,
        n: int,
        low: float,
        high: float,
        *,
        seed: int,
        top_k: int,
        threshold: float = -float("inf"),
        everything: bool = False,
    ) -> Any:
        """Draw, score and select in one launch.

        Args:
            n: Number of draws.
            low: Lower end of the costs, in the cost's unit.
            high: Upper end, inclusive.
            seed: 0 .. 2^64 - 1.
            top_k: Distinct paths wanted.
            threshold: Lowest score that is kept.
            everything: Whether to return all codes and scores as well.

        Returns:
            A `Flood`; with `everything` also uint8 [n, num_slots] and float32 [n], NaN for paths not found.

        Raises:
            InputError: More paths wanted than a block keeps.
        """
        if not 1 <= top_k <= self._module.path_filter_max_best:
            most = self._module.path_filter_max_best
            raise InputError(f"path_filter: expected 1 to {most} for top_k, got {top_k}")
        per_block = -(-n // (_WANTED_BLOCKS * _BLOCK_PATHS)) * _BLOCK_PATHS
        blocks, slots = -(-n // per_block), self._search.space.num_slots
        possible = self._possible(low, high)
        outputs = {
            "codes": torch.zeros(blocks, top_k, slots, dtype=torch.uint8, device=self._device),
            "scores": torch.empty(blocks, top_k, dtype=torch.float32, device=self._device),
            "costs": torch.empty(blocks, top_k, dtype=torch.float64, device=self._device),
            "counts": torch.empty(blocks, 4, dtype=torch.int64, device=self._device),
        }
        if everything:
            outputs["all_codes"] = torch.empty(n, slots, dtype=torch.uint8, device=self._device)
            outputs["all_scores"] = torch.empty(n, dtype=torch.float32, device=self._device)
        self._module.path_filter_cuda(
            {
                **self._fields,
                **outputs,
                "num_possible": len(possible),
                "possible": self._there(torch.tensor(possible, dtype=torch.int64).view(-1, 4)),
                "low": float(low),
                "high": float(high),
                "seed": seed,
                "first_index": 0,
                "num_paths": n,
                "paths_per_block": per_block,
                "threshold": float(threshold),
                "top_k": top_k,
            }
        )
        host = {name: value.cpu().numpy() for name, value in outputs.items()}
        found = _merged(host, top_k, n)
        return (found, host["all_codes"], host["all_scores"]) if everything else found

    def _possible(self, low: float, high: float) -> list[tuple[int, int, int, int]]:
        """(resolution, first bucket, end, whether sums are taken from above), as the engine finds them."""
        found, unit = [], self._search.fields["unit"]
        for index, w in enumerate(self._walks):
            if high < w["low"] or low > w["high"]:
                continue
            size = w["num_buckets"]
            first = (low * unit - w["constant"] - w["residual_high"]) / w["step"]
            end = (high * unit - w["constant"] - w["residual_low"]) / w["step"]
            first = int(min(max(np.floor(first), 0), size))
            end = int(min(max(np.ceil(end) + 1, 0), size))
            if end <= first:
                continue
            up, down = w["cumulative"], w["cumulative_down"]
            upper = bool(up[first] > down[first])
            mass = down[first] - down[end] if upper else up[end] - up[first]
            if mass > 0:
                found.append((index, first, end, int(upper)))
        return found


def _joined(walks: list[dict[str, Any]]) -> dict[str, Tensor]:
    """All resolutions' tables one after the other, and where each begins."""
    rows, begins = [], [0, 0, 0]
    for w in walks:
        rows.append((w["num_buckets"], w["pad"], w["choice_length"], *begins))
        for i, name in enumerate(("cumulative", "after_choice", "after_stop")):
            begins[i] += w[name].numel()
    joined = {
        name: torch.cat([w[name].flatten() for w in walks])
        for name in ("cumulative", "cumulative_down", "after_choice", "after_stop")
    }
    stacked = {name: torch.stack([w[name] for w in walks]) for name in ("stop", "go_on")}
    steps = -torch.stack([w["buckets"][:, 1:] for w in walks]).to(torch.int32)  # of codes 1, 2, ..
    stacked["steps"] = torch.nn.functional.pad(steps, (0, -steps.shape[2] % 4))
    return {**joined, **stacked, "walks": torch.tensor(rows, dtype=torch.int64)}


def _merged(blocks: dict[str, np.ndarray], top_k: int, n: int) -> Flood:
    """The best distinct paths of all blocks: by score, then by codes, as within a block."""
    kept, walks, missing, accepted = (blocks["counts"][:, i] for i in range(4))
    rank = np.arange(blocks["scores"].shape[1])
    real = rank[None, :] < kept[:, None]  # [blocks, top_k]
    codes, scores, costs = (blocks[name][real] for name in ("codes", "scores", "costs"))
    order = np.lexsort((*codes.T[::-1], -scores.astype(np.float64)))
    codes, scores, costs = codes[order], scores[order], costs[order]
    fresh = np.ones(len(codes), dtype=bool)
    fresh[1:] = (codes[1:] != codes[:-1]).any(axis=1)
    chosen = np.flatnonzero(fresh)[:top_k]
    drawn = int(walks.sum())
    return Flood(
        codes[chosen],
        scores[chosen].astype(np.float64),
        costs[chosen],
        int(accepted.sum()),
        n,
        (n - int(missing.sum())) / drawn if drawn else 1.0,
    )

# SPDX-License-Identifier: Apache-2.0
"""What a run is going to do, from its settings alone; what is impossible is refused."""

from __future__ import annotations

import math

import torch

from pfnas_fast.data import Roles, load_classification, load_detection
from pfnas_fast.errors import InputError
from pfnas_fast.run.config import RunConfig
from pfnas_fast.run.job import stage_names, training_steps
from pfnas_fast.space import CostModel, load_space


def plan_text(config: RunConfig) -> str:
    """Describe stages, steps, memory and the range of MACs.

    Raises:
        InputError: a device, space, data folder, resolution or budget that cannot be.
    """
    check_device(config.device)
    space = load_space(config.space)
    # One class makes the cheapest head: a budget that is too small for it is too small for any data, which
    # need not be read.
    check_search_limits(config, CostModel(space, num_classes=1))
    roles = Roles(label=config.label_fraction, calib=config.calib_images)
    data = load_detection(config.data, roles=roles, seed=config.seed, fraction=config.train_fraction)
    if config.pretrain:
        load_classification(config.pretrain_data, seed=config.seed)
    num_classes = data.num_classes
    cost = CostModel(space, num_classes=num_classes)
    check_search_limits(config, cost)
    low, high = cost.range_m()
    saved_mb = float(cost.saved_bytes([space.max_path()])[0]) * config.batch_size / 1e6
    lines = [
        f"data {config.data} ({num_classes} classes), "
        f"space {space.name}: 10^{math.log10(space.num_paths):.1f} paths, "
        f"detectors of {low:.1f} to {high:.1f} M MACs at {', '.join(map(str, space.resolutions))} px",
        f"schedule {config.schedule}, sampler {config.sampler}, backend {config.backend}, seed {config.seed}",
        f"activations kept for backward by the largest path, {config.batch_size} images: {saved_mb:.0f} MB",
        "stages:",
    ]
    details = _stage_details(config, cost)
    lines += [f"  {name:<9} {details.get(name, '')}".rstrip() for name in stage_names(config)]
    return "\n".join(lines)


def check_device(device: str) -> None:
    """Refuse a device that this machine or this torch does not have.

    Raises:
        InputError: "cuda" where PyTorch sees no CUDA device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "config: expected a CUDA device that PyTorch sees for device, got 'cuda' and none "
            "(`pfnas checks` says more)"
        )


def check_search_limits(config: RunConfig, cost: CostModel, *, argument: str = "max_macs_m") -> None:
    """Refuse a search that no path of the space can satisfy.

    Args:
        config: `search_resolution` and `max_macs_m` are looked at.
        cost: Cost of detectors of the space.
        argument: What the user calls the budget.

    Raises:
        InputError: `search_resolution` is none of the space's, or `max_macs_m` lies outside the MACs of the
            space (at that resolution, where one is set); the text gives the range.
    """
    space, resolution, macs_m = cost.space, config.search_resolution, config.max_macs_m
    if resolution is not None and resolution not in space.resolutions:
        raise InputError(
            f"{space.name}: expected one of {', '.join(map(str, space.resolutions))} for search_resolution, "
            f"got {resolution!r}"
        )
    if macs_m is None:
        return
    if resolution is None:
        cost.check_budget_m(macs_m, argument=argument)
        return
    low, high = cost.range_m(resolution)
    if not low <= macs_m <= high:
        # Rounded inwards, so that the printed numbers are themselves accepted.
        raise InputError(
            f"{space.name}: expected {math.ceil(low * 100) / 100:.2f} to {math.floor(high * 100) / 100:.2f} "
            f"million MACs (search_resolution is {resolution}) for {argument}, got {macs_m:g}"
        )


def _stage_details(config: RunConfig, cost: CostModel) -> dict[str, str]:
    # Counted in sandwich steps; another schedule or sampler gets as many of its own as cost the same.
    counted = config.train_steps if config.uses_filter else config.train_steps + config.warmup_steps
    steps = training_steps(config, cost)["train"]
    about = "about " if config.uses_filter else ""
    later = max(2, config.labels_per_bin // 4)
    refresh = max(2, config.labels_per_bin // 2)
    extra = 0 if config.uses_filter else later + config.filter_refreshes * refresh
    chosen = ", half of them chosen by what the others leave unknown" if config.labelling == "active" else ""
    refreshed = ""
    if config.uses_filter and config.filter_refreshes:
        refreshed = f", the filter re-fitted {config.filter_refreshes} x with {refresh} paths per bin"
    return {
        "pretrain": f"{config.pretrain_steps} steps of {config.pretrain_batch_size} images "
        f"of {config.pretrain_data}",
        "warmup": f"{config.warmup_steps} sandwich steps of {config.batch_size} images",
        "label": f"{config.labels_per_bin + extra} paths in each of {config.num_bins} budget bins{chosen}",
        "prune": f"keep {100 * config.keep:.0f} % of the paths at every budget",
        "train": f"{about}{steps} {config.schedule} steps of {config.batch_size} images"
        + (f" (the compute of {counted} balanced sandwich steps)" if steps != counted or about else "")
        + refreshed,
        "search": f"{config.num_budgets} budgets, {config.candidates_per_budget} candidates each by real AP",
        "report": f"{config.random_paths} random paths at {config.report_budgets} budgets on test",
    }

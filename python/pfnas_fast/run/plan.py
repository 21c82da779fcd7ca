# SPDX-License-Identifier: Apache-2.0
"""What a run is going to do, from its settings alone; what is impossible is refused."""

from __future__ import annotations

import math

from pfnas_fast.data import load_detection
from pfnas_fast.filter.samplers import Balanced, Uniform
from pfnas_fast.run.config import RunConfig
from pfnas_fast.run.job import stage_names
from pfnas_fast.space import CostModel, load_space
from pfnas_fast.train.schedules import equal_compute_steps


def plan_text(config: RunConfig) -> str:
    """Describe stages, steps, memory and the range of MACs.

    Raises:
        InputError: a space, data folder or budget that cannot be.
    """
    space = load_space(config.space)
    if config.max_macs_m is not None:
        # One class makes the cheapest head: what is refused here is impossible for any data, which need not
        # be read.
        CostModel(space, num_classes=1).check_budget_m(config.max_macs_m, argument="max_macs_m")
    num_classes = load_detection(config.data, seed=config.seed).num_classes
    cost = CostModel(space, num_classes=num_classes)
    low, high = cost.range_m()
    if config.max_macs_m is not None:
        cost.check_budget_m(config.max_macs_m, argument="max_macs_m")
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


def _stage_details(config: RunConfig, cost: CostModel) -> dict[str, str]:
    steps = config.train_steps if config.uses_filter else config.train_steps + config.warmup_steps
    own = steps
    if config.schedule != "sandwich":
        balanced = Balanced(cost.space).bind(cost)
        sampler = Uniform(cost.space).bind(cost) if config.sampler == "uniform" else balanced
        own = equal_compute_steps(config.schedule, cost, sampler, balanced, steps)
    extra = 0 if config.uses_filter else max(1, config.labels_per_bin // 4)
    return {
        "pretrain": f"{config.pretrain_steps} steps of {config.pretrain_batch_size} images "
        f"of {config.pretrain_data}",
        "warmup": f"{config.warmup_steps} sandwich steps of {config.batch_size} images",
        "label": f"{config.labels_per_bin + extra} paths in each of {config.num_bins} budget bins",
        "prune": f"keep {100 * config.keep:.0f} % of the paths at every budget",
        "train": f"{own} {config.schedule} steps of {config.batch_size} images"
        + (f" (the compute of {steps} sandwich steps)" if own != steps else ""),
        "search": f"{config.num_budgets} budgets, {config.candidates_per_budget} candidates each by real AP",
        "report": f"{config.random_paths} random paths at {config.report_budgets} budgets on test",
    }

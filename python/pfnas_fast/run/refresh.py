# SPDX-License-Identifier: Apache-2.0
"""S3 to S5 once more in the middle of S6: fresh labels, the filter re-fitted, the space pruned anew.

Files of a refresh, `<name>` being "refresh", "refresh-2", ...: `<name>.csv` (labels),
`checkpoints/filter-<name>.pt`, `filter/<name>_thresholds.json`, and last `filter/<name>.json`, which says
that the rest is there and whether the filter is used. Where the filter of S4 was refused and training began
with balanced sampling, the first accepted filter of a refresh takes over (`switched` in its file).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from torch import nn

from pfnas_fast.detection import DetectionSupernet
from pfnas_fast.filter import BestUp, BudgetThresholds, Deferred, Filtered, PathFilter
from pfnas_fast.filter.metrics import tau_within_groups
from pfnas_fast.filter.report import filter_report
from pfnas_fast.run.labels import JoinedLabels, join_labels, label_drawn, measure_labels
from pfnas_fast.train import Labels, Refresh
from pfnas_fast.train.distributed import decide_together, rank_and_size
from pfnas_fast.train.labelling import read_labels

if TYPE_CHECKING:
    from pfnas_fast.filter import Sampler
    from pfnas_fast.run.job import Job

_LOGGED = ("name", "step", "filter_used", "switched", "reason", "drift")


def filtered_sampler(job: Job, flt: PathFilter) -> Filtered | BestUp:
    """The sampler that the run asked for, with a filter that is to be used."""
    config = job.config
    if config.sampler == "bestup":
        return BestUp(job.space, flt, num_candidates=max(2, round(1 / config.keep)))
    return Filtered(job.space, flt, keep=config.keep, epsilon=config.epsilon)


def refresh_of(job: Job, sampler: Sampler) -> Refresh | None:
    """What training with `sampler` is to do in its middle; None where nothing can be refreshed."""
    num_times = job.config.filter_refreshes
    if num_times == 0 or not isinstance(sampler, (Filtered, BestUp, Deferred)):
        return None

    def call(index: int, step: int, net: nn.Module | None) -> None:
        name = _name(index)
        if net is not None and rank_and_size()[0] == 0 and not job.run.has(f"filter/{name}.json"):
            assert isinstance(net, DetectionSupernet)
            _refit(job, name, step, net)
        decide_together(True)  # the other ranks wait for the files
        if job.run.read_json(f"filter/{name}.json")["filter_used"]:
            sampler.refresh(job.load_filter(f"filter-{name}"))

    return Refresh(num_times, call)


def read_refreshes(job: Job) -> list[dict[str, Any]]:
    """What the refreshes of this run say of themselves (`filter/<name>.json`), oldest first."""
    found = []
    for index in range(job.config.filter_refreshes):
        if not job.run.has(f"filter/{_name(index)}.json"):
            break
        found.append(job.run.read_json(f"filter/{_name(index)}.json"))
    return found


def filter_in_force(job: Job) -> tuple[PathFilter, str]:
    """The last accepted filter, or that of S4 where none was, and the file of its thresholds."""
    for entry in reversed(read_refreshes(job)):
        if entry["filter_used"]:
            return job.load_filter(f"filter-{entry['name']}"), _thresholds_file(entry["name"])
    return job.load_filter(), "filter/thresholds.json"


def filter_verdict(job: Job) -> tuple[bool, str]:
    """Whether training ended with a filter in use, and why; says so where only a refresh brought it."""
    report = job.run.read_json("filter/report.json")
    switch = next((entry for entry in read_refreshes(job) if entry.get("switched")), None)
    if switch is None:
        return report["filter_used"], report["reason"]
    return True, f"{report['reason']}; used from step {switch['step']} on: {switch['reason']}"


def pruned_space(job: Job) -> BudgetThresholds:
    """The pruned space that training ended with."""
    flt, file = filter_in_force(job)
    return BudgetThresholds.from_state_dict(job.run.read_json(file), flt, job.cost)


def refresh_labels(job: Job) -> dict[str, Labels]:
    """The labels of every refresh, by their stage."""
    return {
        entry["name"]: read_labels(job.run, entry["name"], job.space, macs_t=entry["macs_t"])
        for entry in read_refreshes(job)
    }


def _name(index: int) -> str:
    return "refresh" if index == 0 else f"refresh-{index + 1}"


def _thresholds_file(name: str) -> str:
    return f"filter/{name}_thresholds.json"


def _refit(job: Job, name: str, step: int, net: DetectionSupernet) -> None:
    """Label, re-fit from the filter in force, judge, and write everything down (rank 0)."""
    fresh = label_drawn(job, net, name, job.refresh_labels_per_bin)
    clock = time.perf_counter()
    joined = join_labels([measure_labels(job), *refresh_labels(job).values(), fresh])
    was_used, _ = filter_verdict(job)
    flt, _ = filter_in_force(job)
    tau_before = _tau(flt, fresh)
    flt.fit(
        joined.paths,
        joined.label,
        joined.macs_m,
        label_sd=joined.label_sd,
        seed=job.config.seed,
        warm_start=True,
    )
    report = _judge(job, flt, joined)
    used = bool(report["use_filter"] or job.config.force_filter)
    job.run.save(f"filter-{name}", flt.state_dict())
    drift = _drift(job, flt, name)
    stays = "the earlier filter stays" if was_used else "sampling stays balanced"
    entry = {
        "name": name,
        "step": step,
        "num_labels": len(fresh.paths),
        "label": fresh.label_name,
        "filter_used": used,
        "switched": used and not was_used,
        "reason": report["reason"] if used else f"{report['reason']}; {stays}",
        "tau_within_bins_before": tau_before,
        "tau_within_bins_macs_only": tau_within_groups(fresh.macs_m, fresh.label, fresh.bins),
        "drift": drift,
        "tau": report["tau"],
        "macs_t": fresh.macs_t,
        "seconds": round(time.perf_counter() - clock, 3),
    }
    job.run.log("refresh", **{key: entry[key] for key in _LOGGED})
    job.run.write_json(f"filter/{name}.json", entry)


def _judge(job: Job, flt: PathFilter, joined: JoinedLabels) -> dict[str, Any]:
    """The report of S4 on all labels so far: is the filter to be trusted?"""
    return filter_report(
        flt,
        joined.paths,
        joined.label,
        joined.macs_m,
        label_sd=joined.label_sd,
        num_bins=job.config.num_bins,
        seed=job.config.seed,
        curve_shares=(),
    )


def _drift(job: Job, flt: PathFilter, name: str) -> dict[str, float]:
    """How far the new filter is from `filter_in_force`; thresholds are written on the way."""
    trial = filtered_sampler(job, filter_in_force(job)[0]).bind(job.cost)
    drift = trial.refresh(flt)
    if isinstance(trial, Filtered):
        assert trial.thresholds is not None
        job.run.write_json(_thresholds_file(name), trial.thresholds.state_dict())
    return drift


def _tau(flt: PathFilter, labels: Labels) -> float:
    return tau_within_groups(flt.score(labels.paths, labels.macs_m), labels.label, labels.bins)

# SPDX-License-Identifier: Apache-2.0
"""S7, S8 and the report: search, export, and the only look at the test images."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from typing import Any

import numpy as np

from pfnas_fast.data import check_images, voc_ap50
from pfnas_fast.errors import InputError
from pfnas_fast.filter import PathFilter
from pfnas_fast.report.draw import draw_detections
from pfnas_fast.report.plots import plot_front
from pfnas_fast.run.finetune import finetune_front
from pfnas_fast.run.job import Job
from pfnas_fast.run.labels import ACTIVE_STAGE, join_labels, measure_drift, measure_label_sets, measure_labels
from pfnas_fast.run.refresh import filter_verdict, pruned_space, read_refreshes, refresh_labels
from pfnas_fast.search import EvolutionConfig, search
from pfnas_fast.space import BudgetSampler, CostModel, Path
from pfnas_fast.train import Labels, PathEvaluator, label_paths
from pfnas_fast.train.engine import stream_id

_RANDOM_WINDOW = (0.98, 1.02)  # random paths "of the same budget" have the searched path's MACs to 2 %


def search_budgets_m(
    cost: CostModel, *, num_budgets: int, max_macs_m: float | None = None, resolution: int | None = None
) -> list[float]:
    """Budgets evenly spaced in log MACs, from the cheapest path to the dearest (or `max_macs_m`)."""
    low, high = cost.range_m(resolution)
    if max_macs_m is not None:
        if not low <= max_macs_m:
            raise InputError(
                f"search: expected a budget from {low:.4g} to {high:.4g} M MACs for max_macs_m, "
                f"got {max_macs_m:g}"
            )
        high = min(high, max_macs_m)
    budgets = np.exp(np.linspace(np.log(low), np.log(high), num_budgets))
    return [low, *(float(value) for value in budgets[1:-1]), high] if num_budgets > 1 else [high]


def run_search(job: Job) -> None:
    """S7: candidates by predicted rank, the front by real AP on `select`; S8: export it."""
    config, run = job.config, job.run
    check_images(job.data.select)
    budgets = search_budgets_m(
        job.cost,
        num_budgets=config.num_budgets,
        max_macs_m=config.max_macs_m,
        resolution=config.search_resolution,
    )
    flt = search_filter(job)
    pruned = None
    if config.sampler == "path_filter" and filter_verdict(job)[0]:
        pruned = pruned_space(job)
    net = job.load_net("train")
    front = search(
        net,
        flt,
        budgets_macs_m=budgets,
        select=job.data.select,
        calib=job.data.calib,
        pruned=pruned,
        candidates_per_budget=config.candidates_per_budget,
        resolution=config.search_resolution,
        config=EvolutionConfig(iterations=config.search_iterations, num_flood=config.search_flood),
        run=run,
        progress=job.progress,
    )
    for member, name in zip(front, model_names([member.macs_m for member in front]), strict=True):
        with run.atomic(f"best/{name}") as temporary:
            member.export().save(temporary)
    run.write_json(
        "search.json", {"budgets_m": budgets, "candidates": front.num_candidates, "macs_t": front.macs_t}
    )
    run.write_json("pareto.json", [member.to_json() for member in front])


def search_filter(job: Job) -> PathFilter:
    """The predictor of the search: fitted to all labels, those made during and after a filtered training
    included.
    """
    sets = [measure_labels(job)]
    if job.config.uses_filter:
        sets += [*refresh_labels(job).values(), measure_drift(job)]
    joined = join_labels(sets)
    flt = PathFilter(
        job.space, cost=job.cost, condition=job.filter_condition, num_members=job.config.filter_members
    )
    return flt.fit(joined.paths, joined.label, joined.macs_m, label_sd=joined.label_sd, seed=job.config.seed)


def model_names(macs_m: Sequence[float]) -> list[str]:
    """File names of exported detectors: MACs with as many decimals (two at least) as keep them apart."""
    for decimals in range(2, 7):
        names = [f"{value:.{decimals}f}m.pt" for value in macs_m]
        if len(set(names)) == len(names):
            return names
    raise RuntimeError(f"model_names: members of a front with the same MACs: {macs_m}")


def run_report(job: Job) -> None:
    """Read `test` once: the front, random paths of the same budgets, correlations, compute, pictures."""
    run, config = job.run, job.config
    entries = run.read_json("pareto.json")
    check_images(job.data.test)
    net = job.load_net("train")
    front = [job.space.path_from_json(entry["path"]) for entry in entries]
    on_test = _measure(job, net, front, "front_test")
    names = model_names([entry["macs_m"] for entry in entries])
    report: dict[str, Any] = {
        "config": {
            "space": config.space,
            "schedule": config.schedule,
            "sampler": config.sampler,
            "seed": config.seed,
        },
        "images": {role: len(dataset) for role, dataset in job.data.roles().items()},
        "front": [
            {
                **entry,
                "model": f"best/{names[i]}",
                "ap_test": on_test.values["ap"][i],
                "ap50_test": on_test.values["ap50"][i],
            }
            for i, entry in enumerate(entries)
        ],
    }
    if job.data.kind == "voc":
        _add_voc(job, net, front, report["front"])
    random = _random_paths(job, front)
    on_random = _measure(job, net, [path for group in random.values() for path in group], "random_test")
    report["against_random"] = _against_random(front, on_test, random, on_random)
    report["spans"] = _spans(front, job.cost)
    report["macs_ap_correlation"] = _correlations(job)
    report["filter_used"], report["filter_reason"] = filter_verdict(job)
    report["filter_refreshes"] = read_refreshes(job)
    report["compute"] = compute_ledger(job)
    if config.finetune_steps:
        report["finetuned"] = finetune_front(job, net, front)
    with run.atomic("pareto.png") as temporary:
        plot_front(temporary, {run.folder.name: report})
    _draw(job, net, front)
    run.write_json("report.json", report)


def _measure(job: Job, net: Any, paths: list[Path], stage: str) -> Labels:
    return label_paths(
        net,
        job.data.test,
        paths=paths,
        num_bins=job.config.num_bins,
        calib=job.data.calib,
        run=job.run,
        stage=stage,
        progress=job.progress,
    )


def _random_paths(job: Job, front: list[Path]) -> dict[int, list[Path]]:
    """Random paths (gene measure) at the MACs of three or more members of the front: index in front -> paths.

    They are drawn at the resolutions that the search could use. A member that has its budget to itself (the
    cheapest path, say) has nothing to be compared with and is passed over.
    """
    wanted = max(3, job.config.report_budgets)
    sampler = BudgetSampler(job.cost)
    rng = np.random.default_rng([job.config.seed, stream_id("random_test")])
    groups: dict[int, list[Path]] = {}
    for index, path in enumerate(front):
        macs_m = job.cost.path_macs_m(path)
        low, high = macs_m * _RANDOM_WINDOW[0], macs_m * _RANDOM_WINDOW[1]
        feasible = sampler.feasible(low, high)
        if job.config.search_resolution is not None:
            feasible = [value for value in feasible if value == job.config.search_resolution]
        if not feasible:
            continue
        resolutions = rng.choice(feasible, job.config.random_paths)
        populations = [sampler.sample(rng, 1, low, high, int(resolution)) for resolution in resolutions]
        drawn = job.space.decode(np.concatenate(populations))
        if len(set(drawn)) > 1:
            groups[index] = drawn
    places = np.unique(np.round(np.linspace(0, len(groups) - 1, wanted + 2)[1:-1]).astype(int))
    if len(groups) <= wanted + 1:
        places = np.arange(len(groups))[-wanted:]
    indices = list(groups)
    return {indices[place]: groups[indices[place]] for place in places.tolist()}


def _against_random(
    front: list[Path], on_test: Labels, random: dict[int, list[Path]], on_random: Labels
) -> list[dict[str, Any]]:
    rows, start = [], 0
    for index, group in random.items():
        values = {name: on_random.values[name][start : start + len(group)] for name in ("ap", "ap50")}
        start += len(group)
        row: dict[str, Any] = {"macs_m": float(on_test.macs_m[index]), "num_random": len(group)}
        for name, found in values.items():
            searched = float(on_test.values[name][index])
            row[name] = {
                "searched": searched,
                "random_mean": float(found.mean()),
                "random_sd": float(found.std(ddof=1)) if len(found) > 1 else 0.0,
                "random_max": float(found.max()),
                "random_beaten": float((found < searched).mean()),
            }
        rows.append(row)
    return rows


def _spans(front: list[Path], cost: CostModel) -> dict[str, dict[str, float]]:
    """Span of the front in MACs, per resolution (a span over resolutions says nothing about the genes)."""
    spans = {}
    for resolution in sorted({path.resolution for path in front}):
        macs_m = [cost.path_macs_m(path) for path in front if path.resolution == resolution]
        spans[str(resolution)] = {
            "num": len(macs_m),
            "low_m": min(macs_m),
            "high_m": max(macs_m),
            "ratio": max(macs_m) / min(macs_m),
        }
    return spans


def _correlations(job: Job) -> dict[str, dict[str, float]]:
    """Pearson and Kendall correlation of log MACs with AP over every path measured, by set of images."""
    from scipy import stats

    result = {}
    refreshes = [entry["name"] for entry in read_refreshes(job)]
    names = ("labels", ACTIVE_STAGE, *refreshes, "relabels", "candidates", "front_test", "random_test")
    for name in names:
        rows = _read_measured(job, name)
        ap, macs_m = np.array([row["ap"] for row in rows]), np.array([row["macs_m"] for row in rows])
        if len(rows) < 3 or np.ptp(ap) == 0:
            continue
        pearson = float(np.corrcoef(np.log(macs_m), ap)[0, 1])
        kendall = float(np.asarray(stats.kendalltau(macs_m, ap))[0])
        result[name] = {"num": len(rows), "pearson": pearson, "kendall": kendall}
    return result


def _read_measured(job: Job, stage: str) -> list[dict[str, float]]:
    """MACs and AP of every path in `<stage>.csv`; none if there is no such file."""
    file = job.run.path(f"{stage}.csv")
    if not file.exists():
        return []
    rows = csv.DictReader(file.read_text().splitlines())
    return [{key: float(row[key]) for key in ("macs_m", "ap")} for row in rows]


def compute_ledger(job: Job) -> dict[str, dict[str, float]]:
    """What the run spent until its search ended: MACs executed (10^12) and seconds.

    Distillation, labelling and recalibration are included. Seconds of an attempt that was killed count as far
    as its last checkpoint or measured path.
    """
    ledger: dict[str, dict[str, float]] = {}
    for stage in ("pretrain", "warmup", "train"):
        if job.run.has_checkpoint(stage):
            state = job.run.load(stage)
            ledger[stage] = {"macs_t": float(state["macs_t"]), "seconds": float(state["seconds"])}
    measured: dict[str, dict[int, float]] = {}
    for line in job.run.read_log("measured"):
        measured.setdefault(line["stage"], {})[line["index"]] = line["seconds"]
    sets = {stage: labels.macs_t for stage, labels in measure_label_sets(job).items()}
    sets["candidates"] = job.run.read_json("search.json")["macs_t"]
    refreshes = read_refreshes(job)
    sets.update({entry["name"]: entry["macs_t"] for entry in refreshes})
    if job.config.uses_filter:
        sets["relabels"] = measure_drift(job).macs_t
    for stage, macs_t in sets.items():
        ledger[stage] = {"macs_t": macs_t, "seconds": sum(measured.get(stage, {}).values())}
    done = {line["stage"]: line["seconds"] for line in job.run.read_log("stage_done")}
    for stage in ("filter", "prune"):
        if stage in done:
            ledger[stage] = {"macs_t": 0.0, "seconds": done[stage]}
    for entry in refreshes:  # its labels are in; fitting and judging are not
        ledger[entry["name"]]["seconds"] += entry["seconds"]
    evolution = max(0.0, done.get("search", 0.0) - ledger["candidates"]["seconds"])
    ledger["search"] = {"macs_t": 0.0, "seconds": evolution}
    total = {key: sum(entry[key] for entry in ledger.values()) for key in ("macs_t", "seconds")}
    return {**ledger, "total": total}


def _add_voc(job: Job, net: Any, front: list[Path], rows: list[dict[str, Any]]) -> None:
    evaluator = PathEvaluator(net, job.data.test, calib=job.data.calib)
    for path, row in zip(front, rows, strict=True):
        detections, _ = evaluator.detect(path)
        for form in ("voc07", "voc12"):
            row[f"ap50_{form}_test"] = voc_ap50(job.data.test, detections, form=form)


def _draw(job: Job, net: Any, front: list[Path]) -> None:
    """Detections of a small, a middle and a large member of the front on a few test images."""
    subset = job.data.test.subset(range(min(6, len(job.data.test))))
    evaluator = PathEvaluator(net, subset, calib=job.data.calib)
    chosen = {"small": front[0], "middle": front[len(front) // 2], "large": front[-1]}
    for name, path in chosen.items():
        detections, _ = evaluator.detect(path)
        with job.run.atomic(f"detections/{name}.png") as temporary:
            draw_detections(temporary, subset, detections)

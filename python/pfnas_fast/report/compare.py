# SPDX-License-Identifier: Apache-2.0
"""Put finished runs side by side: fronts, hypervolume, MACs saved at equal AP, compute spent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from pfnas_fast.errors import InputError
from pfnas_fast.report.plots import plot_front
from pfnas_fast.run.folder import Run
from pfnas_fast.search import hypervolume, macs_saved_at_equal_ap
from pfnas_fast.space import CostModel, load_space


def compare_runs(folders: Sequence[str | FilePath], *, png: FilePath | None = None) -> dict[str, Any]:
    """Compare runs by what their fronts reach on the test images.

    Args:
        folders: Finished run folders of one data set and space; the first is the baseline.
        png: Where to draw the fronts.

    Returns:
        "reference": the hypervolume's worst corner [MACs in millions, AP] = the dearest path of the space and
            AP 0;
        "runs": per run its name, schedule, sampler, front, hypervolume (AP x natural log of MACs, on test),
            compute per stage, "training_macs_ratio" (MACs of warm-up and training over the baseline's; None
            where the baseline has none), random paths of the same budget;
        "macs_saved": per run but the first, per budget of the baseline's front, the share of MACs saved at
            the baseline's test AP (None where the run never reaches it).

    Raises:
        InputError: fewer than two runs, an unfinished one, or runs of different data, spaces or test images.
    """
    if len(folders) < 2:
        raise InputError(f"compare: expected at least two run folders, got {len(folders)}")
    runs = [Run.open(folder) for folder in folders]
    reports = {_name(run, runs): run.read_json("report.json") for run in runs}
    _check_comparable(runs)
    assert runs[0].config is not None
    num_classes = len(runs[0].read_json("splits.json")["class_names"])
    reference = (
        CostModel(load_space(runs[0].config.space), num_classes=num_classes).range_m()[1] * 1.001,
        0.0,
    )
    fronts = {name: _front(report) for name, report in reports.items()}
    baseline = next(iter(fronts))
    baseline_macs_t = _training_macs_t(reports[baseline])
    rows = []
    for name, report in reports.items():
        macs_t = _training_macs_t(report)
        rows.append(
            {
                "name": name,
                **report["config"],
                "front": [
                    {key: entry[key] for key in ("macs_m", "ap_test", "ap50_test")}
                    for entry in report["front"]
                ],
                "hypervolume": hypervolume(*fronts[name], reference=reference),
                "compute": report["compute"],
                "training_macs_ratio": macs_t / baseline_macs_t if baseline_macs_t > 0 else None,
                "against_random": report["against_random"],
            }
        )
    budgets = [float(value) for value in fronts[baseline][0]]
    saved = {
        name: [
            {"macs_m": budget, "saved": share}
            for budget, share in macs_saved_at_equal_ap(front, fronts[baseline], budgets).items()
        ]
        for name, front in fronts.items()
        if name != baseline
    }
    if png is not None:
        plot_front(png, reports)
    return {"reference": list(reference), "baseline": baseline, "runs": rows, "macs_saved": saved}


def _check_comparable(runs: Sequence[Run]) -> None:
    for run in runs[1:]:
        for key in ("data", "space"):
            first, other = getattr(runs[0].config, key), getattr(run.config, key)
            if first != other:
                raise InputError(
                    f"compare: expected runs of one {key}, got {first!r} in {runs[0].folder} "
                    f"and {other!r} in {run.folder}"
                )
        if run.read_json("splits.json")["test"] != runs[0].read_json("splits.json")["test"]:
            raise InputError(
                f"compare: expected runs with the same test images, got others in {run.folder} than in "
                f"{runs[0].folder}; roles depend on the seed where the data have no test split"
            )


def _training_macs_t(report: dict[str, Any]) -> float:
    """MACs of warm-up and training (10^12): what the schedules and samplers are given equal amounts of."""
    return sum(
        report["compute"][stage]["macs_t"] for stage in ("warmup", "train") if stage in report["compute"]
    )


def _front(report: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(MACs in millions, AP on test) of a run's front."""
    macs_m, ap = ([entry[key] for entry in report["front"]] for key in ("macs_m", "ap_test"))
    return np.array(macs_m), np.array(ap)


def _name(run: Run, runs: Sequence[Run]) -> str:
    names = [other.folder.name for other in runs]
    return run.folder.name if names.count(run.folder.name) == 1 else str(run.folder)

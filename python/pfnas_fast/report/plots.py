# SPDX-License-Identifier: Apache-2.0
"""Plots of fronts; no display is needed."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Any

from matplotlib.figure import Figure


def plot_front(file: FilePath, reports: dict[str, dict[str, Any]]) -> None:
    """Plot AP on test over MACs for one or more runs, random paths of the same budgets as bars (mean and SD).

    Args:
        file: PNG to write.
        reports: Name -> content of a run's `report.json`.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, (name, report) in enumerate(reports.items()):
        colour = f"C{index}"
        front = report["front"]
        macs_m = [entry["macs_m"] for entry in front]
        axes.plot(
            macs_m, [entry["ap_test"] for entry in front], "o-", color=colour, label=f"{name}: searched"
        )
        rows = report["against_random"]
        axes.errorbar(
            [row["macs_m"] for row in rows],
            [row["ap"]["random_mean"] for row in rows],
            [row["ap"]["random_sd"] for row in rows],
            fmt="x",
            color=colour,
            alpha=0.6,
            capsize=4,
            label=f"{name}: random paths, mean and SD",
        )
    axes.set_xscale("log")
    axes.set_xlabel("MACs of the whole detector (millions)")
    axes.set_ylabel("COCO AP on test")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=120)

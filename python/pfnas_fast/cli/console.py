# SPDX-License-Identifier: Apache-2.0
"""What the command line prints: progress with time left, and tables."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from pfnas_fast._system import SystemReport

console = Console()
_PLAIN_INTERVAL_SECONDS = 20.0


class StageProgress:
    """Progress of one stage after another: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self._bars: Progress | None = None
        self._tasks: dict[str, Any] = {}
        self._last_line: dict[str, float] = {}
        self._start: dict[str, tuple[float, int]] = {}

    def __enter__(self) -> StageProgress:
        if sys.stdout.isatty():
            self._bars = Progress(
                TextColumn("{task.description:<12}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[info]}"),
                console=console,
            )
            self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int, info: dict[str, float]) -> None:
        text = "  ".join(f"{key} {value:.3f}" for key, value in info.items())
        if self._bars is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(stage, total=total, info="")
            self._bars.update(self._tasks[stage], completed=done, info=text)
            return
        now = time.monotonic()
        start, first = self._start.setdefault(stage, (now, done))
        if done == total or now - self._last_line.get(stage, 0.0) >= _PLAIN_INTERVAL_SECONDS:
            self._last_line[stage] = now
            left = (now - start) / (done - first) * (total - done) if done > first else 0.0
            console.print(f"{stage:<12} {done}/{total}  {text}  {left:.0f} s left", highlight=False)


def print_system(report: SystemReport) -> None:
    """The table of `pfnas checks`, and one line for each thing to do."""
    table = Table(show_header=False)
    table.add_column("what", no_wrap=True)
    table.add_column("value", overflow="fold")
    for row in report.rows():
        table.add_row(*row)
    console.print(table, highlight=False)
    for text in report.advice:
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def print_report(report: dict[str, Any], folder: str) -> None:
    """The final table of a run."""
    table = Table(title="Searched detectors, cheapest first")
    for name in ("MACs (M)", "params (M)", "px", "AP select", "AP test", "AP50 test", "model"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for entry in report["front"]:
        table.add_row(
            f"{entry['macs_m']:.2f}",
            f"{entry['params_m']:.3f}",
            str(entry["path"]["r"]),
            f"{entry['ap']:.3f}",
            f"{entry['ap_test']:.3f}",
            f"{entry['ap50_test']:.3f}",
            entry["model"],
        )
    console.print(table)
    against = Table(title="On test: searched path against random paths of the same budget (AP)")
    for name in ("MACs (M)", "searched", "random mean", "random SD", "random best", "random beaten"):
        against.add_column(name, justify="right")
    for row in report["against_random"]:
        ap = row["ap"]
        against.add_row(
            f"{row['macs_m']:.2f}",
            f"{ap['searched']:.3f}",
            f"{ap['random_mean']:.3f}",
            f"{ap['random_sd']:.3f}",
            f"{ap['random_max']:.3f}",
            f"{100 * ap['random_beaten']:.0f} % of {row['num_random']}",
        )
    console.print(against)
    total = report["compute"]["total"]
    reason = report.get("filter_reason", "")  # runs of earlier versions have none
    for entry in report.get("filter_refreshes", []):
        console.print(
            f"Filter re-fitted at step {entry['step']} of training with {entry['num_labels']} fresh labels, "
            f"{'used' if entry['filter_used'] else 'not used'} ({entry['reason']}).",
            highlight=False,
        )
    console.print(
        f"Filter used: {'yes' if report['filter_used'] else 'no'}{f' ({reason})' if reason else ''}. "
        f"Compute: {total['macs_t']:.2f} T MACs, {total['seconds'] / 60:.1f} min. "
        f"Everything, models included, is in {folder} (report.json, pareto.png, detections/).",
        highlight=False,
    )


def print_comparison(comparison: dict[str, Any]) -> None:
    """The table of `pfnas compare`."""
    macs_m, ap = comparison["reference"]
    table = Table(title=f"Hypervolume on test (AP x ln MACs) against ({macs_m:.1f} M MACs, AP {ap:g})")
    for name in ("run", "schedule", "sampler", "hypervolume", "best AP", "training", "T MACs", "minutes"):
        table.add_column(name, justify="left" if name in ("run", "schedule", "sampler") else "right")
    for run in comparison["runs"]:
        total, ratio = run["compute"]["total"], run["training_macs_ratio"]
        table.add_row(
            run["name"],
            run["schedule"],
            run["sampler"],
            f"{run['hypervolume']:.4f}",
            f"{max(entry['ap_test'] for entry in run['front']):.3f}",
            "-" if ratio is None else f"{ratio:.2f} x",
            f"{total['macs_t']:.2f}",
            f"{total['seconds'] / 60:.1f}",
        )
    console.print(table)
    console.print(
        f"training: MACs of training the detection supernet, against {comparison['baseline']}; "
        "T MACs and minutes: everything, pre-training and labelling included.",
        highlight=False,
        markup=False,
    )
    for name, rows in comparison["macs_saved"].items():
        saved = Table(title=f"MACs that {name} saves at equal AP against {comparison['baseline']}")
        saved.add_column("budget (M)", justify="right")
        saved.add_column("saved", justify="right")
        for row in rows:
            share = row["saved"]
            saved.add_row(
                f"{row['macs_m']:.2f}", "AP not reached" if share is None else f"{100 * share:.0f} %"
            )
        console.print(saved)

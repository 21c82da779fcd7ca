# SPDX-License-Identifier: Apache-2.0
"""Ranking quality of the path filter on real architecture tables, beside classical regressors given log MACs.

``python benchmarks/filter_quality.py --json`` prints a JSON list of rows ``{name, model, tau_within,
tau_global, tau_local, regret, versus_best_low, ...}``. Protocol: 8 bins of equal population in MACs over the
whole table; labels drawn alike from every bin; 20 draws, the same for every model; judged on the rows never
seen in fitting. NAS-Bench-Macro has three training runs of every network: fitted on run 1, judged on the mean
of runs 2 and 3; with ``--labels mean`` fitted and judged on the mean of all three, where the labels' noise is
part of what is judged. A cell is ``table/labels``; other numbers of labels than the default's are possible.

- ``tau_within``: mean over bins of Kendall's tau-b; ``tau_global``: over all rows; ``tau_local``: over the
  pairs within 10 % in MACs.
- ``regret``: mean over bins of the best label less the label of the path scored best.
- ``regret_low``, ``regret_high``: its 95 % interval over draws.
- ``versus_best_low``: lower end of the paired 95 % interval (Student's t over draws) of tau_within less the
  best rival's; null for the rivals.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pfnas_fast.filter import PathFilter, RankerConfig, WeakPathFilter
from pfnas_fast.filter.metrics import cost_bins, regret, tau_within_groups
from pfnas_fast.filter.rivals import RIVALS, Rival

NUM_BINS = 8
TABLES = {"macro": "nas_bench_macro.csv.gz", "accel": "accel_nasbench.csv.gz"}
CELLS = ("macro/100", "macro/500", "accel/100", "accel/500")
LABELS = ("run1", "mean")
# Conditioning, loss and labels of the networks alone, then the parts of the whole.
NETWORKS: dict[str, Any] = {"network_share": 1.0}
ABLATION: dict[str, dict[str, Any]] = {
    "networks": NETWORKS,
    "networks, FiLM": {**NETWORKS, "condition": "film"},
    "networks, unconditioned": {**NETWORKS, "condition": "none"},
    "networks, all pairs alike": {**NETWORKS, "bandwidths": (None,)},
    "networks, pairs near in MACs": {**NETWORKS, "bandwidths": (0.3,)},
    "networks, pairs within 2 %": {**NETWORKS, "bandwidths": (0.02,)},
    "networks, pairs and regression": {**NETWORKS, "config": RankerConfig(regression=1.0)},
    "networks, hard targets": {**NETWORKS, "config": RankerConfig(softness=0.0)},
    "processes": {"network_share": 0.0},
    "processes, unconditioned": {"network_share": 0.0, "condition": "none"},
    "ours, unconditioned": {"condition": "none"},
}


@dataclass(frozen=True)
class Table:
    """One architecture table.

    Attributes:
        paths: int64 [n, genes], 0-based choices.
        num_choices: Per gene.
        labels: float64 [n], what models are fitted on.
        truth: float64 [n], what they are judged by.
        macs_m: float64 [n].
        bins: int64 [n].
    """

    paths: np.ndarray
    num_choices: list[int]
    labels: np.ndarray
    truth: np.ndarray
    macs_m: np.ndarray
    bins: np.ndarray


def load_table(folder: Path, name: str, *, labels_from: str = "run1") -> Table:
    """Read a table; rows with an empty cell among accuracy and MACs are left out.

    Args:
        folder: With the files of `TABLES`.
        name: "macro" or "accel".
        labels_from: Of macro: "run1" = labels from run 1, truth from runs 2 and 3; "mean" = both are the mean
            of the three runs. accel has one run, which is both.
    """
    with gzip.open(folder / TABLES[name], "rt", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    if name == "macro":
        raw = np.array([[int(choice) for choice in row["arch"]] for row in rows])
        runs = np.array([[float(row[f"acc_run{run}"]) for run in (1, 2, 3)] for row in rows])
        labels, truth = runs[:, 0], runs[:, 1:].mean(1)
        if labels_from == "mean":
            labels = truth = runs.mean(1)
        macs_m = np.array([float(row["flops"]) for row in rows]) / 1e6
    else:
        rows = [row for row in rows if row["top1"] and row["macs_m"]]
        genes = [column for column in rows[0] if column.startswith("block")]
        raw = np.array([[int(float(row[gene])) for gene in genes] for row in rows])
        labels = truth = np.array([float(row["top1"]) for row in rows])
        macs_m = np.array([float(row["macs_m"]) for row in rows])
    values = [np.unique(column) for column in raw.T]
    paths = np.stack([np.searchsorted(v, c) for v, c in zip(values, raw.T, strict=True)], axis=1)
    bins = cost_bins(macs_m, NUM_BINS, equal="population")
    return Table(paths, [len(v) for v in values], labels, truth, macs_m, bins)


def draw_rows(bins: np.ndarray, num_labels: int, draw: int) -> np.ndarray:
    """Rows to label: as many from every bin, the remainder spread at random."""
    rng = np.random.default_rng([draw, num_labels])
    per_bin = np.full(NUM_BINS, num_labels // NUM_BINS)
    per_bin[rng.permutation(NUM_BINS)[: num_labels - per_bin.sum()]] += 1
    return np.concatenate(
        [rng.choice(np.flatnonzero(bins == b), per_bin[b], replace=False) for b in range(NUM_BINS)]
    )


def tau_local(scores: np.ndarray, truth: np.ndarray, macs_m: np.ndarray) -> float:
    """Kendall's tau-b over the pairs within 10 % in MACs."""
    order = np.argsort(macs_m, kind="stable")
    scores, truth, log_macs = scores[order], truth[order], np.log(macs_m[order])
    agree, untied_scores, untied_truth = 0.0, 0.0, 0.0
    for offset in range(1, len(scores)):
        near = log_macs[offset:] - log_macs[:-offset] <= np.log(1.1)
        if not near.any():
            break
        guess = np.sign(scores[offset:] - scores[:-offset])[near]
        order_truth = np.sign(truth[offset:] - truth[:-offset])[near]
        agree += float(guess @ order_truth)
        untied_scores += float(np.abs(guess).sum())
        untied_truth += float(np.abs(order_truth).sum())
    return agree / max(np.sqrt(untied_scores * untied_truth), 1.0)


def measure(model: Any, table: Table, rows: np.ndarray, draw: int) -> dict[str, float]:
    """Fit on some rows, judge on the others."""
    start = time.perf_counter()
    model.fit(table.paths[rows], table.labels[rows], table.macs_m[rows], seed=draw)
    seconds = time.perf_counter() - start
    unseen = np.ones(len(table.labels), bool)
    unseen[rows] = False
    truth, macs_m, bins = table.truth[unseen], table.macs_m[unseen], table.bins[unseen]
    scores = model.score(table.paths[unseen], macs_m).astype(np.float64)
    return {
        "tau_within": tau_within_groups(scores, truth, bins),
        "tau_global": tau_within_groups(scores, truth, np.zeros_like(bins)),
        "tau_local": tau_local(scores, truth, macs_m),
        "regret": regret(scores, truth, bins),
        "fit_s": seconds,
    }


def models_for(table: Table, *, ablation: bool) -> dict[str, Callable[[], Any]]:
    """Name -> maker of an unfitted model."""
    makers: dict[str, Callable[[], Any]] = {"ours": lambda: PathFilter(num_choices=table.num_choices)}
    for name in RIVALS:
        makers[name] = lambda name=name: Rival(name, num_choices=table.num_choices)
    if ablation:
        for name, settings in ABLATION.items():
            makers[name] = lambda settings=settings: PathFilter(num_choices=table.num_choices, **settings)
        makers["weak paths (positive-unlabelled)"] = lambda: WeakPathFilter(num_choices=table.num_choices)
    return makers


def paired_interval(difference: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of paired differences (Student's t over draws)."""
    from scipy.stats import t

    n = len(difference)
    half = (
        float(t.ppf(0.975, max(n - 1, 1))) * float(difference.std(ddof=1)) / np.sqrt(n) if n > 1 else np.inf
    )
    return float(difference.mean()) - half, float(difference.mean()) + half


class Results:
    """Measurements by (cell, model, draw), kept in a file so that a long run can be made in pieces.

    Args:
        file: JSON lines; None = kept in memory only. Delete it when the models change.
        seconds: Stop measuring after this long.
    """

    def __init__(self, file: Path | None, seconds: float) -> None:
        self.file, self.end = file, time.perf_counter() + seconds
        self.rows: dict[tuple[str, str, int], dict[str, float]] = {}
        if file is not None and file.exists():
            for line in file.read_text().splitlines():
                entry = json.loads(line)
                self.rows[entry["cell"], entry["model"], entry["draw"]] = entry["values"]

    def get(self, cell: str, model: str, draw: int, make: Callable[[], dict[str, float]]) -> dict[str, float]:
        """A measurement, made if it is not there yet.

        Raises:
            TimeoutError: the time is over; what was measured so far is in the file.
        """
        key = cell, model, draw
        if key not in self.rows:
            if time.perf_counter() > self.end:
                raise TimeoutError(f"stopped at {cell}, draw {draw + 1}, {model}; run again to go on")
            self.rows[key] = make()
            if self.file is not None:
                entry = {"cell": cell, "model": model, "draw": draw, "values": self.rows[key]}
                with self.file.open("a") as stream:
                    stream.write(json.dumps(entry) + "\n")
        return self.rows[key]


def cell_name(text: str) -> str:
    """Checked ``table/labels``."""
    name, _, num_labels = text.partition("/")
    if name not in TABLES or not num_labels.isdigit() or int(num_labels) < NUM_BINS:
        raise argparse.ArgumentTypeError(
            f"expected {' or '.join(TABLES)}, a slash and {NUM_BINS} labels or more (macro/100), got {text!r}"
        )
    return text


def run_cell(
    folder: Path, cell: str, *, num_draws: int, ablation: bool, labels_from: str, kept: Results
) -> list[dict[str, Any]]:
    """All models on one cell; measurements from other labels than run 1's are kept as ``cell, mean``."""
    name, num_labels = cell.split("/")
    table = load_table(folder, name, labels_from=labels_from)
    if int(num_labels) >= len(table.labels):
        raise SystemExit(f"{cell}: expected fewer labels than the table's {len(table.labels)} rows")
    cell = cell if labels_from == "run1" else f"{cell}, {labels_from}"
    makers = models_for(table, ablation=ablation)
    results: dict[str, list[dict[str, float]]] = {model: [] for model in makers}
    for draw in range(num_draws):
        rows = draw_rows(table.bins, int(num_labels), draw)
        for model, make in makers.items():
            results[model].append(
                kept.get(
                    cell,
                    model,
                    draw,
                    lambda make=make, rows=rows, draw=draw: measure(make(), table, rows, draw),
                )
            )
        print(f"{cell}: draw {draw + 1} of {num_draws}", file=sys.stderr, flush=True)
    values = {
        m: {key: np.array([row[key] for row in rows]) for key in rows[0]} for m, rows in results.items()
    }
    best = max(RIVALS, key=lambda rival: values[rival]["tau_within"].mean())
    cells = []
    for model, columns in values.items():
        row: dict[str, Any] = {"name": cell, "model": model}
        row |= {key: round(float(column.mean()), 5) for key, column in columns.items()}
        row["versus_best_low"] = row["versus_best_high"] = row["regret_versus_best_low"] = None
        if model not in RIVALS:
            low, high = paired_interval(columns["tau_within"] - values[best]["tau_within"])
            row["versus_best_low"], row["versus_best_high"] = round(low, 5), round(high, 5)
            low, _ = paired_interval(columns["regret"] - values[best]["regret"])
            row["regret_versus_best_low"] = round(low, 5)
        low, high = paired_interval(columns["regret"])
        row["regret_low"], row["regret_high"] = round(low, 5), round(high, 5)
        row |= {"best_rival": best, "num_draws": num_draws}
        cells.append(row)
    return cells


def main() -> None:
    """Run the asked cells and print rows."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data" / "nas_tables"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", type=Path, default=default, help="folder with the two .csv.gz files")
    parser.add_argument("--cells", nargs="+", type=cell_name, metavar="TABLE/LABELS", default=CELLS)
    parser.add_argument(
        "--labels", choices=LABELS, default="run1", help="of macro: run 1, judged on the others, or the mean"
    )
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument(
        "--ablation", action="store_true", help="parts and conditioning of the filter as well"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--keep", type=Path, help="file of measurements: a run that was stopped goes on from it"
    )
    parser.add_argument("--seconds", type=float, default=np.inf, help="stop after this long; needs --keep")
    options = parser.parse_args()
    if not options.tables.is_dir():
        parser.error(f"no such folder: {options.tables}")
    rows, kept = [], Results(options.keep, options.seconds)
    try:
        for cell in options.cells:
            rows += run_cell(
                options.tables,
                cell,
                num_draws=options.draws,
                ablation=options.ablation,
                labels_from=options.labels,
                kept=kept,
            )
    except TimeoutError as stopped:
        sys.exit(str(stopped))
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    titles = f"{'within':>7} {'global':>7} {'local':>7} {'regret':>7} {'vs best rival':>18} {'fit s':>6}"
    print(f"{'cell':16} {'model':33} {titles}")
    for row in rows:
        interval = ""
        if row["versus_best_low"] is not None:
            interval = f"{row['versus_best_low']:+.4f} .. {row['versus_best_high']:+.4f}"
        numbers = " ".join(f"{row[key]:7.4f}" for key in ("tau_within", "tau_global", "tau_local", "regret"))
        print(f"{row['name']:16} {row['model']:33} {numbers} {interval:>18} {row['fit_s']:6.2f}")


if __name__ == "__main__":
    main()

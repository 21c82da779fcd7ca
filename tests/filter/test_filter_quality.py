# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the filter's quality: which labels of a table it fits on, and which it judges by."""

import argparse
import csv
import gzip
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def filter_quality() -> object:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import filter_quality
    finally:
        sys.path.remove(str(BENCHMARKS))
    return filter_quality


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table in the format of NAS-Bench-Macro: 4 layers of 3 choices, three noisy runs."""
    folder = tmp_path_factory.mktemp("tables")
    rng = np.random.default_rng(0)
    with gzip.open(folder / "nas_bench_macro.csv.gz", "wt", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["arch", "acc_run1", "acc_run2", "acc_run3", "flops"])
        for genes in itertools.product(range(3), repeat=4):
            runs = 80.0 + sum(genes) + rng.normal(0.0, 0.5, 3)
            writer.writerow(["".join(map(str, genes)), *runs, 1e6 * (1 + sum(genes)) + genes[0]])
    return folder


def test_labels_come_from_the_run_that_was_asked_for(filter_quality, tables: Path) -> None:
    with gzip.open(tables / "nas_bench_macro.csv.gz", "rt", encoding="utf-8") as stream:
        runs = np.array([[float(row[f"acc_run{i}"]) for i in (1, 2, 3)] for row in csv.DictReader(stream)])
    stated = filter_quality.load_table(tables, "macro")
    assert (stated.labels == runs[:, 0]).all()
    assert (stated.truth == (runs[:, 1] + runs[:, 2]) / 2).all()
    mean = filter_quality.load_table(tables, "macro", labels_from="mean")
    assert np.allclose(mean.labels, runs.sum(1) / 3, rtol=1e-12, atol=0)
    assert (mean.truth == mean.labels).all()
    assert (mean.paths == stated.paths).all()


def test_a_cell_names_a_table_and_enough_labels(filter_quality) -> None:
    assert filter_quality.cell_name("macro/1000") == "macro/1000"
    for text in ("macro", "macro/7", "macro/-9", "macro/all", "other/100", "macro/"):
        with pytest.raises(
            argparse.ArgumentTypeError, match=r"expected macro or accel, a slash and 8 labels"
        ):
            filter_quality.cell_name(text)


def test_both_protocols_run_and_are_kept_apart(
    filter_quality, tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filter_quality, "RIVALS", ("ridge",))
    monkeypatch.setattr(
        filter_quality,
        "PathFilter",
        lambda num_choices: filter_quality.Rival("ridge", num_choices=num_choices),
    )
    kept = filter_quality.Results(tmp_path / "kept.jsonl", np.inf)
    rows = {
        labels_from: filter_quality.run_cell(
            tables, "macro/24", num_draws=2, ablation=False, labels_from=labels_from, kept=kept
        )[0]
        for labels_from in filter_quality.LABELS
    }
    assert {row["name"] for row in rows.values()} == {"macro/24", "macro/24, mean"}
    # One run's noise is more than that of three.
    assert rows["mean"]["tau_within"] > rows["run1"]["tau_within"]
    assert len(kept.rows) == 2 * 2 * 2
    with pytest.raises(SystemExit, match="expected fewer labels than the table's 81 rows"):
        filter_quality.run_cell(
            tables, "macro/81", num_draws=1, ablation=False, labels_from="run1", kept=kept
        )

# SPDX-License-Identifier: Apache-2.0
"""Active labelling against random labelling on real architecture tables.

``python benchmarks/active_labelling.py`` starts from 40 labels (5 in each of 8 bins of equal population) and
adds 24 at a time, by `pfnas_fast.filter.next_paths` or at random, evenly over bins both ways. Printed: mean
tau within bins on the rows never labelled by either, and the 95 % interval of the paired difference over
draws. The filter is its Gaussian processes alone, which fit in a tenth of a second.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from filter_quality import NUM_BINS, Table, draw_rows, load_table, paired_interval

from pfnas_fast.filter import PathFilter, next_paths
from pfnas_fast.filter.metrics import tau_within_groups

START, STEP, NUM_STEPS, POOL_PER_BIN = 40, 24, 4, 128


def random_rows(table: Table, known: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
    """`count` rows not yet known, as many from every bin."""
    free = np.ones(len(table.labels), bool)
    free[known] = False
    return np.concatenate(
        [
            rng.choice(np.flatnonzero(free & (table.bins == b)), count // NUM_BINS, replace=False)
            for b in range(NUM_BINS)
        ]
    )


def fitted(table: Table, rows: np.ndarray, draw: int) -> PathFilter:
    """A filter of the labels so far."""
    flt = PathFilter(num_choices=table.num_choices, network_share=0.0)
    return flt.fit(table.paths[rows], table.labels[rows], table.macs_m[rows], seed=draw)


def labelled(table: Table, draw: int, *, active: bool) -> list[np.ndarray]:
    """Rows labelled after each step."""
    rng = np.random.default_rng([draw, 0xAC])
    rows = draw_rows(table.bins, START, draw)
    steps = [rows]
    for _ in range(NUM_STEPS):
        if active:
            pool = random_rows(table, rows, rng, POOL_PER_BIN * NUM_BINS)
            flt = fitted(table, rows, draw)
            chosen = pool[
                next_paths(
                    flt,
                    table.paths[pool],
                    table.macs_m[pool],
                    num_paths=STEP,
                    num_bins=NUM_BINS,
                    equal="population",
                )
            ]
        else:
            chosen = random_rows(table, rows, rng, STEP)
        rows = np.concatenate([rows, chosen])
        steps.append(rows)
    return steps


def run(table: Table, num_draws: int) -> dict[str, np.ndarray]:
    """Tau within bins, [draws, 1 + NUM_STEPS], of either way."""
    taus: dict[str, list[list[float]]] = {"active": [], "random": []}
    for draw in range(num_draws):
        ways = {name: labelled(table, draw, active=name == "active") for name in taus}
        unseen = np.ones(len(table.labels), bool)
        for steps in ways.values():
            unseen[steps[-1]] = False
        for name, steps in ways.items():
            taus[name].append([])
            for rows in steps:
                scores = fitted(table, rows, draw).score(table.paths[unseen], table.macs_m[unseen])
                taus[name][-1].append(
                    tau_within_groups(scores.astype(np.float64), table.truth[unseen], table.bins[unseen])
                )
    return {name: np.array(rows) for name, rows in taus.items()}


def main() -> None:
    """Print a table."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data" / "nas_tables"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", type=Path, default=default, help="folder with the two .csv.gz files")
    parser.add_argument("--draws", type=int, default=10)
    options = parser.parse_args()
    print(f"{'table':8} {'labels':>6} {'active':>7} {'random':>7}   difference, 95 %")
    for name in ("macro", "accel"):
        taus = run(load_table(options.tables, name), options.draws)
        for step in range(1 + NUM_STEPS):
            active, random = taus["active"][:, step], taus["random"][:, step]
            low, high = paired_interval(active - random)
            print(
                f"{name:8} {START + STEP * step:6d} {active.mean():7.4f} {random.mean():7.4f}"
                f"   {low:+.4f} .. {high:+.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()

#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""AP of a finished run's front with both backends and with the reference backend in float64.

    python benchmarks/backend_agreement.py runs/demo

Which backend is nearer to the truth, and does rounding move the metric? The largest and the smallest path
come first, then the members of the front; statistics are measured anew by each side.
"""

import argparse
import json
from pathlib import Path as FilePath

import torch

import pfnas_fast as pf
from pfnas_fast.run.job import open_job
from pfnas_fast.space import Path
from pfnas_fast.supernet import BNStatistics

__all__ = ["Float64Evaluator"]


class Float64Evaluator(pf.PathEvaluator):
    """As its base, for a net in float64."""

    def statistics(self, path: Path) -> BNStatistics:
        """Statistics of `path`, rounded to float32 once and then held in float64."""
        known = path in self._statistics
        measured = super().statistics(path)
        if not known:
            layers = {name: (mean.double(), var.double()) for name, (mean, var) in measured.layers.items()}
            self._statistics[path] = measured = BNStatistics(layers)
        return measured

    def _to_input(self, images: torch.Tensor) -> torch.Tensor:
        return super()._to_input(images).double()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="folder of a finished run")
    folder = FilePath(parser.parse_args().run)
    job = open_job(folder)
    weights = job.load_finished("train")["model"]

    def evaluator(backend: str, kind: type[pf.PathEvaluator], dtype: torch.dtype) -> pf.PathEvaluator:
        net = pf.DetectionSupernet(job.space, num_classes=job.data.num_classes, backend=backend)
        net.load_state_dict(weights)
        return kind(net.to(dtype).eval(), job.data.select, calib=job.data.calib)

    exact = evaluator("reference", Float64Evaluator, torch.float64)
    sides = {name: evaluator(name, pf.PathEvaluator, torch.float32) for name in ("fast", "reference")}
    front = json.loads((folder / "pareto.json").read_text())
    paths = [job.space.max_path(), job.space.min_path()]
    paths += [job.space.path_from_json(member["path"]) for member in front]
    worst = dict.fromkeys(sides, 0.0)
    print(f"{'MACs (M)':>9} {'float64':>9} " + " ".join(f"{name:>10}" for name in sides))
    for path in paths:
        truth = exact.metrics(path)["ap"]
        found = {name: side.metrics(path)["ap"] for name, side in sides.items()}
        worst = {name: max(worst[name], abs(ap - truth)) for name, ap in found.items()}
        line = " ".join(f"{ap:>10.6f}" for ap in found.values())
        print(f"{job.cost.path_macs_m(path):>9.2f} {truth:>9.6f} {line}", flush=True)
    print("largest difference from float64: " + ", ".join(f"{name} {d:.1e}" for name, d in worst.items()))


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Compares our kernels with a baseline in one process: ``python benchmarks/compare.py depthwise --json``.

Several suites may be named: ``python benchmarks/compare.py inference path_switch``.
``python benchmarks/compare.py all --device cuda --json`` runs the rows for a GPU (see suite_cuda.py).

Prints rows of {name, baseline, unit, ours, theirs, ratio_min, ratio_median}: `ours` and `theirs` are minima,
the ratios are theirs / ours of the minima and of the medians: above 1, ours is better. See README.md.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Iterator

from harness import Effort, Row, compare, prepare_process

SUITES = {
    "blocks": "suite_blocks",
    "cost": "suite_cost",
    "depthwise": "suite_depthwise",
    "evaluation": "suite_evaluation",
    "inference": "suite_inference",
    "memory": "suite_memory",
    "path_filter": "suite_path_filter",
    "path_switch": "suite_path_switch",
    "pointwise": "suite_pointwise",
    "recalibration": "suite_recalibration",
    "sampling": "suite_sampling",
    "search": "suite_search",
    "supernet_step": "suite_supernet_step",
    "train_step": "suite_train_step",
}


CUDA_SUITES = ("depthwise", "path_filter", "pointwise")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "suites", nargs="+", choices=[*sorted(SUITES), "all"], metavar="suite", help="%(choices)s"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of a table")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only rows whose name contains TEXT")
    parser.add_argument("--cpu", type=int, help="logical CPU to pin to (default: the last one)")
    parser.add_argument("--threads", type=int, default=1, help="threads of both sides (default: 1, pinned)")
    parser.add_argument(
        "--seconds", type=float, default=1.5, help="time spent on a row, at least (default: 1.5)"
    )
    parser.add_argument(
        "--blocks", type=int, default=5, help="blocks of 5 calls on a row, at least (default: 5)"
    )
    parser.add_argument("--isa", help="force an instruction-set tier of ours")
    return parser.parse_args()


def cpu_rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """Rows of the suites."""
    prepare_process(arguments.cpu, threads=arguments.threads)
    if arguments.isa:
        from pfnas_fast._system import force_cpu_isa

        force_cpu_isa(arguments.isa)
    effort = Effort(min_blocks=arguments.blocks, seconds=arguments.seconds)
    for name in sorted(SUITES) if "all" in arguments.suites else arguments.suites:
        suite = importlib.import_module(SUITES[name])  # imports torch, so only after prepare_process
        for row, build in suite.comparisons():
            if arguments.filter in row:
                built = build()
                yield built if isinstance(built, Row) else compare(built, effort)


def cuda_rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """Rows of the suites on the current CUDA device."""
    import torch
    from cuda_harness import EventTimer, compare_on_gpu
    from suite_cuda import Setting, comparisons

    device = torch.device("cuda", torch.cuda.current_device())
    timer, effort = EventTimer(device), Effort(min_blocks=arguments.blocks)
    for op, build in comparisons(Setting(device)):
        if op in arguments.suites or "all" in arguments.suites:
            comparison = build()
            if arguments.filter in comparison.name:
                yield from compare_on_gpu(comparison, timer, effort)


def why_not_on_gpu(suites: list[str]) -> str | None:
    """What keeps `suites` from running on a GPU here; None: nothing."""
    from cuda_harness import missing

    for suite in suites:
        if suite not in (*CUDA_SUITES, "all"):
            return f"{suite} has no rows for a GPU; those that have: {', '.join(CUDA_SUITES)}, all"
    return missing()


def main() -> int:
    arguments = parse_arguments()
    on_gpu = arguments.device == "cuda"
    if on_gpu and (reason := why_not_on_gpu(arguments.suites)) is not None:
        print(f"compare: --device cuda: {reason}", file=sys.stderr)
        return 2
    rows: list[Row] = []
    for row in cuda_rows(arguments) if on_gpu else cpu_rows(arguments):
        rows.append(row)
        if not arguments.json:
            print(
                f"{row.name:36} {row.ours:9.3f} {row.theirs:9.3f} {row.unit}   x{row.ratio_min:.2f} (min)"
                f"  x{row.ratio_median:.2f} (median)  vs {row.baseline}",
                flush=True,
            )
    if not rows:
        print(
            f"compare: no row of {', '.join(arguments.suites)} contains {arguments.filter!r}", file=sys.stderr
        )
        return 2
    if arguments.json:
        print(json.dumps([row.to_dict() for row in rows], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""Measuring one path as a run does: recalibration, forward pass, loss, selection and matching of boxes.

The embedded digits (100 images of the role `select`, 64 for recalibration), images decoded beforehand. With
``PFNAS_RUN=runs/demo`` the weights are those of a finished run on digits, else random ones.
"""

import os
from collections.abc import Callable, Iterator
from functools import partial

import torch
from harness import Comparison

import pfnas_fast as pf
from pfnas_fast.space import load_space

__all__ = ["comparisons"]


def evaluation(name: str, path_name: str) -> Comparison:
    """One row."""
    data, space = pf.load_detection("digits"), load_space("tiny")
    evaluators: list[pf.PathEvaluator] = []
    for backend in ("fast", "reference"):
        torch.manual_seed(0)
        net = pf.DetectionSupernet(space, num_classes=data.num_classes, backend=backend)
        folder = os.environ.get("PFNAS_RUN")
        if folder is not None:
            net.load_state_dict(torch.load(f"{folder}/checkpoints/train.pt", weights_only=True)["model"])
        evaluators.append(pf.PathEvaluator(net.eval(), data.select, calib=data.calib))
    path = {"max": space.max_path(), "min": space.min_path()}[path_name]

    def measure(evaluator: pf.PathEvaluator) -> dict[str, float]:
        evaluator._statistics.clear()
        detections, _ = evaluator.detect(path, with_loss=True)
        return evaluator.matches(detections).metrics()

    def check() -> None:
        ours, theirs = (measure(evaluator) for evaluator in evaluators)
        assert abs(ours["ap"] - theirs["ap"]) <= 1e-4, (ours["ap"], theirs["ap"])

    calls = [partial(measure, evaluator) for evaluator in evaluators]
    return Comparison(name, calls[0], calls[1], check, "reference")


def comparisons() -> Iterator[tuple[str, Callable[[], Comparison]]]:
    """Every row's name with the function that prepares it."""
    for path_name in ("max", "min"):
        name = f"evaluation/tiny/{path_name}"
        yield name, partial(evaluation, name, path_name)

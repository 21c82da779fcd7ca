# SPDX-License-Identifier: Apache-2.0
"""Optional short fine-tuning of chosen paths (part of S8), reported apart from the supernet's own numbers."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np

from pfnas_fast.detection import DetectionSupernet
from pfnas_fast.space import CostModel, Path, Space
from pfnas_fast.train import PathEvaluator, train

if TYPE_CHECKING:
    from pfnas_fast.run.job import Job

_RATE_FACTOR = 0.1


class FixedPath:
    """A sampler that knows one path."""

    def __init__(self, space: Space, path: Path) -> None:
        self.row = space.encode([path])

    def bind(self, cost: CostModel) -> FixedPath:
        del cost
        return self

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        del rng
        return np.repeat(self.row, n, axis=0)

    def population_for_step(self, seed: int, step: int, n: int) -> np.ndarray:
        del seed, step
        return np.repeat(self.row, n, axis=0)


def finetune_front(job: Job, net: DetectionSupernet, front: list[Path]) -> list[dict[str, Any]]:
    """Train each path of the front alone for `finetune_steps`, from the supernet's weights, and measure it on
    `test`.

    Returns:
        One row per path: path, MACs (millions), AP and AP50 on test.
    """
    rows = []
    for index, path in enumerate(front):
        tuned = copy.deepcopy(net)
        train(
            tuned,
            job.data.fit,
            sampler=FixedPath(job.space, path),
            schedule="single",
            steps=job.config.finetune_steps,
            batch_size=job.config.batch_size,
            optimizer=job.config.optimizer,
            learning_rate=_RATE_FACTOR * job.config.learning_rate,
            weight_decay=job.config.weight_decay,
            ema_decay=job.config.ema_decay,
            augmentation=job.augmentation(),
            checkpoint_every=job.config.checkpoint_every,
            run=job.run,
            stage=f"finetune-{index}",
            progress=job.progress,
        )
        evaluator = PathEvaluator(tuned, job.data.test, calib=job.data.calib)
        metrics = evaluator.metrics(path)
        with job.run.atomic(f"best/{job.cost.path_macs_m(path):.2f}m-finetuned.pt") as temporary:
            tuned.extract(path, evaluator.statistics(path), class_names=job.data.class_names).save(temporary)
        rows.append(
            {
                "path": path.to_json(),
                "macs_m": job.cost.path_macs_m(path),
                "ap_test": metrics["ap"],
                "ap50_test": metrics["ap50"],
            }
        )
    return rows

# SPDX-License-Identifier: Apache-2.0
"""Train a detection supernet (stages S2 and S6 of docs/method.md)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from pfnas_fast.data import Augmentation, Batch, DetectionDataset, normalize, resize_batch, train_batches
from pfnas_fast.detection import DetectionSupernet, assign_targets, detection_loss, distillation_loss
from pfnas_fast.errors import InputError
from pfnas_fast.filter.samplers import Balanced, Sampler
from pfnas_fast.run.folder import Run
from pfnas_fast.space import Path
from pfnas_fast.train.distributed import rank_and_size
from pfnas_fast.train.engine import Progress, Refresh, Teacher, TrainOptions, describe, fit


def train(
    net: DetectionSupernet,
    dataset: DetectionDataset,
    *,
    sampler: Sampler | None = None,
    schedule: str = "sandwich",
    steps: int,
    batch_size: int = 8,
    optimizer: str = "adamw",
    learning_rate: float = 1e-2,
    weight_decay: float = 0.02,
    distill_after: float = 0.2,
    distill_weight: float = 1.0,
    ema_decay: float = 0.995,
    augmentation: Augmentation | None = None,
    num_workers: int = 0,
    checkpoint_every: int = 100,
    run: Run | None = None,
    seed: int = 0,
    stage: str | None = None,
    progress: Progress | None = None,
    refresh: Refresh | None = None,
    steps_before: int = 0,
    steps_after: int = 0,
) -> dict[str, float]:
    """Train the shared weights of all paths, in place.

    Args:
        net: The supernet; afterwards it holds the moving average of its weights and is in eval mode.
        dataset: Images to fit.
        sampler: Where free paths come from; default: budget-balanced over the whole space.
        schedule: "sandwich", "progressive" or "single" (`pfnas_fast.train.schedules`).
        steps: Optimizer steps.
        batch_size: Images per step and process; every path of a step sees the same images.
        optimizer: "adamw" or "sgd" (Nesterov momentum 0.9).
        learning_rate: Peak of the cosine.
        weight_decay: Of convolution weights.
        distill_after: Fraction of the steps without distillation, of the whole training.
        distill_weight: Factor of the distillation loss; 0 switches it off, and no teacher runs.
        ema_decay: Decay per step of the weight average.
        augmentation: Default: `Augmentation()`.
        num_workers: Processes that prepare images; the result does not depend on it.
        checkpoint_every: Steps between checkpoints, where `run` is given.
        run: Folder for checkpoints and log; an interrupted call with the same arguments goes on where it
            stopped, and a finished one is loaded.
        seed: Start of all random streams, where no `run` gives one.
        stage: Name of the checkpoint and of the random streams. Default: "train"; with a `run`, later calls
            on the same `Run` object are "train-2", "train-3", ... in the order of the calls.
        progress: Called as `progress(stage, step, steps, {"loss": ...})` after each step.
        refresh: What to do in mid-training, to the sampler above all (`pfnas_fast.train.Refresh`).
        steps_before: Steps that an earlier call has made of the same training: this one goes on in the middle
            of the learning rate's curve. For schedules of one phase.
        steps_after: Steps that a later call will make of it: this one ends in the middle of the curve.

    Returns:
        `{"steps", "macs_t", "seconds"}`: steps made, MACs executed in 10^12 (forward + backward = 3 forward
        passes), time.

    Raises:
        InputError: an impossible setting, an unreadable image, classes that differ from the net's, a loss
            that is no longer finite, or a checkpoint of this stage that was made with other settings.

    Source:
        DetOFA, arXiv:2303.13121 (training concentrates on paths that a filter accepts); BigNAS,
        arXiv:2003.11142.

    Example:
        >>> import pfnas_fast as pf
        >>> data = pf.load_detection("digits")
        >>> net = pf.DetectionSupernet(pf.load_space("tiny"), num_classes=10, backend="reference")
        >>> result = pf.train(net, data.fit, steps=2, batch_size=2)
        >>> result["steps"]
        2
    """
    _check(net, dataset, steps, batch_size)
    for name, value in (("steps_before", steps_before), ("steps_after", steps_after)):
        if value < 0:
            raise InputError(f"train: expected at least 0 for {name}, got {value!r}")
    seed = run.seed if run is not None else seed
    if stage is None:
        stage = run.next_name("train") if run is not None else "train"
    sampler, augmentation = sampler or Balanced(net.space), augmentation or Augmentation()
    options = TrainOptions(
        schedule,
        steps,
        batch_size,
        optimizer,
        learning_rate,
        weight_decay,
        distill_after,
        distill_weight,
        ema_decay,
        checkpoint_every,
        seed,
        stage,
        describe(sampler),
        describe(augmentation),
        0 if refresh is None else refresh.num_times,
        steps_before,
        steps_after,
    )
    task = _DetectionTask(net, dataset, options, augmentation, num_workers)
    return fit(
        net,
        task,
        cost=net.cost,
        sampler=sampler.bind(net.cost),
        options=options,
        run=run,
        progress=progress,
        refresh=refresh,
    )


@dataclass
class _DetectionTask:
    net: DetectionSupernet
    dataset: DetectionDataset
    options: TrainOptions
    augmentation: Augmentation
    num_workers: int

    def batches(self, start_step: int, num_steps: int) -> Iterator[Batch]:
        rank, _ = rank_and_size()
        return train_batches(
            self.dataset,
            canvas=self.net.space.canvas(max(self.net.space.resolutions)),
            batch_size=self.options.batch_size,
            seed=self.options.stream_seed + 7919 * rank,
            start_step=start_step,
            num_steps=num_steps,
            augment=self.augmentation,
            num_workers=self.num_workers,
        )

    def backward(self, net: nn.Module, batch: Batch, paths: list[Path], teacher: Teacher) -> dict[str, float]:
        canvas = self.net.space.canvas(paths[0].resolution)
        device = next(net.parameters()).device
        small, targets = resize_batch(batch.images, batch.targets, canvas)
        images = normalize(small.to(device))  # [N, 3, H, W]
        assignment, lesson = None, None
        if teacher.kind == "frozen" and teacher.net is not None:
            lesson = _teach(teacher.net, images, self.net.space.max_path(paths[0].resolution))
        sums: dict[str, float] = {}
        for index, path in enumerate(paths):
            output = net(images, path)
            if assignment is None:
                assignment = assign_targets(output.grid, targets)
            losses = detection_loss(output, assignment)
            total = losses["total"]
            if lesson is not None:
                distilled = distillation_loss(output, lesson, assignment)["total"]
                losses["distill"] = distilled
                total = total + teacher.weight * distilled
            (total / len(paths)).backward()
            if index == 0 and teacher.kind == "largest":
                lesson = output.detach()
            for key, value in losses.items():
                sums[key] = sums.get(key, 0.0) + float(value.detach())
        return {key: value / len(paths) for key, value in sums.items()}


@torch.no_grad()
def _teach(net: nn.Module, images: torch.Tensor, path: Path):
    """The frozen teacher runs on the statistics of this batch, as its students do."""
    net.train()
    return net(images, path)


def _check(net: DetectionSupernet, dataset: DetectionDataset, steps: int, batch_size: int) -> None:
    if steps < 1:
        raise InputError(f"train: expected at least 1 for steps, got {steps!r}")
    if batch_size < 2:
        raise InputError(
            f"train: expected at least 2 for batch_size (BatchNorm needs a batch), got {batch_size!r}"
        )
    if len(dataset) == 0:
        raise InputError("train: expected at least one image in dataset, got 0")
    if len(dataset.class_names) != net.num_classes:
        raise InputError(
            f"train: expected {net.num_classes} classes (the net's) in dataset, "
            f"got {len(dataset.class_names)}"
        )

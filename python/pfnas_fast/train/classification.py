# SPDX-License-Identifier: Apache-2.0
"""Pre-train the backbone supernet on classification (stage S0 of docs/method.md)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from pfnas_fast.data import (
    ClassificationAugmentation,
    ClassificationData,
    ClassificationDataset,
    EvalImages,
    classification_batches,
    normalize,
)
from pfnas_fast.data.images import resize
from pfnas_fast.errors import InputError
from pfnas_fast.filter.samplers import Uniform
from pfnas_fast.run.folder import Run
from pfnas_fast.space import CostModel, Path
from pfnas_fast.supernet import ClassificationSupernet, recalibrate, use_statistics
from pfnas_fast.train.distributed import rank_and_size
from pfnas_fast.train.engine import Progress, Teacher, TrainOptions, describe, fit
from pfnas_fast.train.evaluate import model_input

_LABEL_SMOOTHING = 0.1
_EVAL_BATCH = 64


def pretrain(
    net: ClassificationSupernet,
    data: ClassificationData,
    *,
    steps: int,
    schedule: str = "sandwich",
    batch_size: int = 64,
    optimizer: str = "sgd",
    learning_rate: float = 0.1,
    weight_decay: float = 3e-5,
    ema_decay: float = 0.995,
    hflip: bool = True,
    checkpoint_every: int = 100,
    run: Run | None = None,
    seed: int = 0,
    stage: str = "pretrain",
    progress: Progress | None = None,
) -> dict[str, float]:
    """Train a classification supernet in place.

    Paths are drawn uniformly over genes; the largest teaches the others softly.

    Args:
        net: Its space must be a classification space (`Space.for_classification`).
        data: Labelled images.
        steps: Optimizer steps.
        schedule: "sandwich", "progressive" or "single".
        batch_size: Images per step and process.
        optimizer, learning_rate, weight_decay, ema_decay, checkpoint_every, run, seed, stage, progress: As
            for `train`.
        hflip: Whether a mirrored image keeps its class.

    Returns:
        `{"steps", "macs_t", "seconds"}` as `train`.

    Raises:
        InputError: classes that differ from the net's, an impossible setting, or a loss that is no longer
            finite.

    Source:
        DetOFA, arXiv:2303.13121: a supernet for detection starts from one trained on classification.

    Example:
        >>> import pfnas_fast as pf
        >>> data = pf.load_classification("digits")
        >>> space = pf.load_space("tiny").for_classification()
        >>> net = pf.ClassificationSupernet(space, num_classes=10, backend="reference")
        >>> pf.pretrain(net, data, steps=2, batch_size=4)["steps"]
        2
    """
    if len(data.class_names) != net.num_classes:
        raise InputError(
            f"pretrain: expected {net.num_classes} classes (the net's) in data, got {len(data.class_names)}"
        )
    seed = run.seed if run is not None else seed
    sampler, augmentation = Uniform(net.space), ClassificationAugmentation(flip=0.5 if hflip else 0.0)
    options = TrainOptions(
        schedule,
        steps,
        batch_size,
        optimizer,
        learning_rate,
        weight_decay,
        0.2,
        1.0,
        ema_decay,
        checkpoint_every,
        seed,
        stage,
        describe(sampler),
        describe(augmentation),
    )
    cost = CostModel(net.space, num_classes=net.num_classes, task="classification")
    task = _ClassificationTask(net, data.train, options, augmentation)
    return fit(
        net,
        task,
        cost=cost,
        sampler=sampler.bind(cost),
        options=options,
        run=run,
        progress=progress,
    )


@torch.no_grad()
def classification_accuracy(
    net: ClassificationSupernet, data: ClassificationData, path: Path, *, num_calib: int = 256
) -> float:
    """Top-1 accuracy of one path on the validation images, BN recalibrated on training images first."""
    canvas = net.space.canvas(path.resolution)
    calib = data.train.subset(range(min(num_calib, len(data.train))))
    batches = EvalImages(calib, canvas, fit="crop").batches(_EVAL_BATCH)
    statistics = recalibrate(net, path, (model_input(net, batch) for batch in batches))
    labels = torch.as_tensor(data.val.labels)
    predicted = []
    with use_statistics(net, statistics):
        for batch in EvalImages(data.val, canvas, fit="crop").batches(_EVAL_BATCH):
            predicted.append(net(model_input(net, batch), path).argmax(1).cpu())
    return float((torch.cat(predicted) == labels).float().mean())


@dataclass
class _ClassificationTask:
    net: ClassificationSupernet
    dataset: ClassificationDataset
    options: TrainOptions
    augmentation: ClassificationAugmentation

    def batches(self, start_step: int, num_steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        rank, _ = rank_and_size()
        return classification_batches(
            self.dataset,
            canvas=self.net.space.canvas(max(self.net.space.resolutions)),
            batch_size=self.options.batch_size,
            seed=self.options.stream_seed + 7919 * rank,
            start_step=start_step,
            num_steps=num_steps,
            augment=self.augmentation,
        )

    def backward(
        self, net: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], paths: list[Path], teacher: Teacher
    ) -> dict[str, float]:
        device = next(net.parameters()).device
        canvas = self.net.space.canvas(paths[0].resolution)
        images = normalize(resize(batch[0], canvas).to(device))  # [N, 3, H, W]
        labels = batch[1].to(device)  # [N]
        lesson = None
        if teacher.kind == "frozen" and teacher.net is not None:
            with torch.no_grad():
                teacher.net.train()
                lesson = teacher.net(images, self.net.space.max_path(paths[0].resolution)).softmax(1)
        sums = {"total": 0.0, "distill": 0.0}
        for index, path in enumerate(paths):
            logits = net(images, path)
            hard = F.cross_entropy(logits, labels, label_smoothing=_LABEL_SMOOTHING)
            total = hard
            if lesson is not None:
                soft = F.cross_entropy(logits, lesson)
                total = hard + teacher.weight * soft
                sums["distill"] += float(soft.detach()) / len(paths)
            (total / len(paths)).backward()
            if index == 0 and teacher.kind == "largest":
                lesson = logits.detach().softmax(1)
            sums["total"] += float(hard.detach()) / len(paths)
        return sums

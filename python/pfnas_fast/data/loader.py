# SPDX-License-Identifier: Apache-2.0
"""Training batches as a function of (seed, step): resuming at any step gives the batches an uninterrupted run
would see.

Position p of step s takes element s * batch_size + p of an endless sequence of seeded permutations
("epochs"), and its augmentation draws from a generator of (seed, s, p) alone. Worker processes therefore
change nothing but the speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pfnas_fast.data.augment import (
    Augmentation,
    ClassificationAugmentation,
    augment_classification,
    augment_detection,
)
from pfnas_fast.data.datasets import Batch, ClassificationDataset, DetectionDataset, Target
from pfnas_fast.data.images import shrink_to
from pfnas_fast.errors import InputError

CACHE_BYTES = 2 << 30
_STREAM_ORDER, _STREAM_AUGMENT = 21, 22
T = TypeVar("T")


def train_batches(
    dataset: DetectionDataset,
    *,
    canvas: tuple[int, int],
    batch_size: int,
    seed: int,
    num_steps: int,
    start_step: int = 0,
    augment: Augmentation | None = None,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """Yield the training batches of steps start_step .. start_step + num_steps - 1.

    Args:
        dataset: Images with boxes, at least one.
        canvas: (height, width) px of the batches.
        batch_size: Images a batch.
        seed: Fixes order and augmentation.
        num_steps: How many batches to yield.
        start_step: First step, counted from 0.
        augment: Strengths; None for the defaults.
        num_workers: Worker processes; 0 prepares batches in this one. The batches are the same.

    Yields:
        Batches; boxes in px of the canvas. Decoded images are kept in memory, shrunk to what the augmentation
        can show, as long as they fit into 2 GiB.

    Raises:
        InputError: an empty dataset, a bad size, an unreadable image.

    Example:
        >>> from pfnas_fast.data import load_detection
        >>> data = load_detection("digits")
        >>> batch = next(train_batches(data.fit, canvas=(96, 128), batch_size=2, seed=0, num_steps=1))
        >>> batch.images.shape
        torch.Size([2, 3, 96, 128])
    """
    strengths = augment or Augmentation()
    zoom = max(1.0, strengths.scale[1])
    cache = PixelCache(dataset, canvas, zoom)

    def make(index: int, rng: np.random.Generator) -> tuple[Tensor, Target]:
        image = cache.get(index)
        target = _scaled_target(dataset, index, image)
        return augment_detection(image, target, canvas, strengths, rng, mirror=dataset.mirror)

    steps = _Steps(make, len(dataset), batch_size, seed, _collate_detection)
    return _run(steps, dataset, cache, start_step, num_steps, num_workers, "train_batches")


def classification_batches(
    dataset: ClassificationDataset,
    *,
    canvas: tuple[int, int],
    batch_size: int,
    seed: int,
    num_steps: int,
    start_step: int = 0,
    augment: ClassificationAugmentation | None = None,
    num_workers: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield classification batches: images uint8 [N, 3, H, W] and labels int64 [N]; arguments as in
    `train_batches`.

    Raises:
        InputError: an empty dataset, a bad size, an unreadable image.
    """
    strengths = augment or ClassificationAugmentation()
    zoom = (1 / strengths.area[0]) ** 0.5
    cache = PixelCache(dataset, canvas, zoom)

    def make(index: int, rng: np.random.Generator) -> tuple[Tensor, int]:
        image = augment_classification(cache.get(index), canvas, strengths, rng, mirror=dataset.mirror)
        return image, int(dataset.labels[index])

    steps = _Steps(make, len(dataset), batch_size, seed, _collate_classification)
    return _run(steps, dataset, cache, start_step, num_steps, num_workers, "classification_batches")


class PixelCache:
    """Decoded images, at most `zoom` times what fits the canvas, kept while they take at most `max_bytes`."""

    def __init__(
        self,
        dataset: DetectionDataset | ClassificationDataset,
        canvas: tuple[int, int],
        zoom: float,
        max_bytes: int = CACHE_BYTES,
    ) -> None:
        self.dataset, self.canvas, self.zoom, self.room = dataset, canvas, zoom, max_bytes
        self.images: dict[int, Tensor] = {}

    def get(self, index: int) -> Tensor:
        """Pixels of image `index`, uint8 [3, h, w]."""
        image = self.images.get(index)
        if image is None:
            image = shrink_to(self.dataset.read(index), self.canvas, self.zoom)
            if image.numel() <= self.room:
                self.images[index] = image
                self.room -= image.numel()
        return image

    def fill(self) -> None:
        """Read images until all are kept or the room is used up."""
        for index in range(len(self.dataset)):
            if self.room <= 0:
                break
            self.get(index)


class _Steps(Dataset, Generic[T]):
    """Step number -> batch; a torch Dataset so that a DataLoader can hand steps to worker processes."""

    def __init__(
        self,
        make: Callable[[int, np.random.Generator], tuple],
        size: int,
        batch_size: int,
        seed: int,
        collate: Callable[[list[tuple]], T],
    ) -> None:
        self.make, self.size, self.batch_size, self.seed, self.collate = make, size, batch_size, seed, collate
        self._epoch: tuple[int, np.ndarray] = (-1, np.zeros(0, dtype=np.int64))

    def indices(self, step: int) -> list[int]:
        """The images of a step, in order."""
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [self._element(position) for position in positions]

    def _element(self, position: int) -> int:
        epoch, place = divmod(position, self.size)
        if self._epoch[0] != epoch:
            order = np.random.default_rng([self.seed, _STREAM_ORDER, epoch]).permutation(self.size)
            self._epoch = (epoch, order)
        return int(self._epoch[1][place])

    def __getitem__(self, step: int) -> T:
        made = []
        for position, index in enumerate(self.indices(step)):
            rng = np.random.default_rng([self.seed, _STREAM_AUGMENT, step, position])
            made.append(self.make(index, rng))
        return self.collate(made)


def _run(
    steps: _Steps[T],
    dataset: DetectionDataset | ClassificationDataset,
    cache: PixelCache,
    start_step: int,
    num_steps: int,
    num_workers: int,
    caller: str,
) -> Iterator[T]:
    if len(dataset) == 0:
        raise InputError(f"{caller}: expected at least one image for dataset {dataset.name!r}, got none")
    for name, value, low in (
        ("batch_size", steps.batch_size, 1),
        ("start_step", start_step, 0),
        ("num_steps", num_steps, 0),
        ("num_workers", num_workers, 0),
    ):
        if value < low:
            raise InputError(f"{caller}: expected a whole number >= {low} for {name}, got {value}")
    order = range(start_step, start_step + num_steps)
    if num_workers == 0:
        return (steps[step] for step in order)
    return _run_workers(steps, dataset, cache, order, num_workers)


def _run_workers(
    steps: _Steps[T],
    dataset: DetectionDataset | ClassificationDataset,
    cache: PixelCache,
    order: range,
    num_workers: int,
) -> Iterator[T]:
    cache.fill()  # before the fork: workers share these pages
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=order,
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(0),  # keeps the loader off the global generator
        multiprocessing_context="fork",
    )
    for step, batch in zip(order, loader, strict=True):
        for index in steps.indices(step):
            dataset.log_read(index)
        yield batch


def _scaled_target(dataset: DetectionDataset, index: int, image: Tensor) -> Target:
    record = dataset.records[index]
    target = dataset.target(index)
    if (record.height, record.width) == tuple(image.shape[1:]):
        return target
    scale = torch.tensor([image.shape[2] / record.width, image.shape[1] / record.height] * 2)
    return Target(target.boxes * scale, target.labels, target.ignore_boxes * scale)


def _collate_detection(made: list[tuple]) -> Batch:
    return Batch(torch.stack([image for image, _ in made]), [target for _, target in made])


def _collate_classification(made: list[tuple]) -> tuple[Tensor, Tensor]:
    return torch.stack([image for image, _ in made]), torch.tensor([label for _, label in made])

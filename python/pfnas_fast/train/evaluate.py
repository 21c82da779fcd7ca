# SPDX-License-Identifier: Apache-2.0
"""Evaluate paths of a supernet: recalibrate, detect, measure."""

from __future__ import annotations

import torch

from pfnas_fast.data import DetectionDataset, EvalImages, Evaluator, Matches, Target, normalize
from pfnas_fast.detection import (
    Assignment,
    Detection,
    DetectionSupernet,
    DetectorOutput,
    assign_targets,
    detection_loss,
    postprocess,
)
from pfnas_fast.errors import InputError
from pfnas_fast.space import Path
from pfnas_fast.supernet import BNStatistics, ClassificationSupernet, recalibrate, use_statistics


class PathEvaluator:
    """Measures paths on one set of images, for one version of the weights: make a new one after training.

    Images are decoded once per resolution. BatchNorm statistics are measured once per path and never left in
    the net.

    Args:
        net: The supernet; its weights must not change while this object is in use.
        dataset: Images to evaluate on.
        calib: Training images that BatchNorm is recalibrated on; default: those that came with `dataset`.
        batch_size: Images per forward pass.

    Raises:
        InputError: no calibration images, or classes that differ from the net's.

    Example:
        >>> import pfnas_fast as pf
        >>> data = pf.load_detection("digits")
        >>> net = pf.DetectionSupernet(pf.load_space("tiny"), num_classes=10, backend="reference")
        >>> images, calib = data.select.subset(range(4)), data.calib.subset(range(8))
        >>> evaluator = pf.PathEvaluator(net, images, calib=calib)
        >>> 0 <= evaluator.metrics(net.space.min_path())["ap50"] <= 1
        True
    """

    def __init__(
        self,
        net: DetectionSupernet,
        dataset: DetectionDataset,
        *,
        calib: DetectionDataset | None = None,
        batch_size: int = 32,
    ) -> None:
        calib = calib if calib is not None else dataset.calib
        if calib is None:
            raise InputError("PathEvaluator: expected calibration images for calib, got None")
        if len(dataset.class_names) != net.num_classes:
            raise InputError(
                f"PathEvaluator: expected {net.num_classes} classes (the net's) in dataset, "
                f"got {len(dataset.class_names)}"
            )
        if batch_size < 2 or batch_size % 2:
            raise InputError(
                f"PathEvaluator: expected an even number >= 2 for batch_size, got {batch_size!r}"
            )
        self.net, self.dataset, self.calib, self.batch_size = net, dataset, calib, batch_size
        self._judge = Evaluator(dataset)
        self.macs_t = 0.0
        self._images: dict[tuple[str, int], EvalImages] = {}
        self._statistics: dict[Path, BNStatistics] = {}
        self._assignments: dict[tuple[tuple[int, int], int], Assignment] = {}

    def statistics(self, path: Path) -> BNStatistics:
        """BatchNorm statistics of `path`, pooled over the calibration images (float32 [C] each)."""
        if path not in self._statistics:
            images = self._cached("calib", self.calib, path.resolution)
            batches = (self._to_input(batch) for batch in images.batches(self.batch_size))
            self._statistics[path] = recalibrate(self.net, path, batches)
            self.macs_t += self.net.cost.path_macs_m(path) * len(self.calib) / 1e6
        return self._statistics[path]

    @torch.no_grad()
    def detect(self, path: Path, *, with_loss: bool = False) -> tuple[list[Detection], tuple[float, float]]:
        """Run `path` over the images.

        Returns:
            One `Detection` per image, boxes in px of the original image; and the mean detection loss of the
            images at even and at odd places (NaN unless `with_loss`).
        """
        images = self._cached("eval", self.dataset, path.resolution)
        detections: list[Detection] = []
        losses: tuple[list[float], list[float]] = ([], [])
        with use_statistics(self.net, self.statistics(path)):
            for batch in images.batches(self.batch_size):
                output = self.net(self._to_input(batch), path)
                start = len(detections)
                found = postprocess(output)
                detections += [
                    Detection(images.to_original(start + i, item.boxes), item.scores, item.labels)
                    for i, item in enumerate(found)
                ]
                if with_loss:
                    self._add_losses(output, start, images, losses)
        self.macs_t += self.net.cost.path_macs_m(path) * len(self.dataset) / 1e6
        return detections, (_mean(losses[0]), _mean(losses[1]))

    def metrics(self, path: Path) -> dict[str, float]:
        """The 12 COCO numbers of `path` (`pfnas_fast.data.evaluate`)."""
        return self.matches(self.detect(path)[0]).metrics()

    def matches(self, detections: list[Detection]) -> Matches:
        """Match the detections of all images with the ground truth.

        Numbers for any subset of the images follow from it.
        """
        return self._judge.match(detections)

    def _add_losses(
        self, output: DetectorOutput, start: int, images: EvalImages, losses: tuple[list[float], list[float]]
    ) -> None:
        for parity, values in enumerate(losses):
            # Batches have an even size, so places in the batch have the parity of the image.
            rows = slice(parity, None, 2)
            part = DetectorOutput(
                output.logits[rows], output.ltrb[rows], output.centerness[rows], output.grid
            )
            if len(part.logits):
                values.append(
                    float(detection_loss(part, self._assignment(part, start + parity, images))["total"])
                )

    def _assignment(self, part: DetectorOutput, first: int, images: EvalImages) -> Assignment:
        """The targets of every second image from `first` on, laid out; kept where the images are."""
        key = (images.canvas, first)
        found = self._assignments.get(key)
        if found is None:
            targets = [self._target(first + 2 * i, images) for i in range(len(part.logits))]
            found = assign_targets(part.grid, targets)
            if images.is_cached:
                self._assignments[key] = found
        return found

    def _cached(self, role: str, dataset: DetectionDataset, resolution: int) -> EvalImages:
        key = (role, resolution)
        if key not in self._images:
            self._images[key] = EvalImages(dataset, self.net.space.canvas(resolution))
        return self._images[key]

    def _to_input(self, images: torch.Tensor) -> torch.Tensor:
        return model_input(self.net, images)

    def _target(self, index: int, images: EvalImages) -> Target:
        target, scale = self.dataset.target(index), images.scales[index]
        return Target(target.boxes * scale, target.labels, target.ignore_boxes * scale)


def model_input(net: DetectionSupernet | ClassificationSupernet, images: torch.Tensor) -> torch.Tensor:
    """uint8 images [N, 3, H, W] as `net` wants them in evaluation: on its device, in its fastest layout."""
    device = next(net.parameters()).device
    is_compiled = device.type == "cpu" and net.backbone.backend == "fast"
    layout = torch.contiguous_format if is_compiled else torch.channels_last
    return normalize(images.to(device), memory_format=layout)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")

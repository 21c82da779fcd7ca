# SPDX-License-Identifier: Apache-2.0
"""One detector of a space as a plain module: what a search hands to its user."""

import pathlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pfnas_fast.data.images import letterbox, normalize
from pfnas_fast.detection.checkpoint import read_tensors, write_tensors
from pfnas_fast.detection.neck_head import Head, Neck, run_prepared_detector
from pfnas_fast.detection.output import Detection, DetectorOutput
from pfnas_fast.detection.postprocess import postprocess
from pfnas_fast.errors import InputError
from pfnas_fast.space import Path, Space
from pfnas_fast.supernet import BNStatistics, PlainBackbone
from pfnas_fast.supernet.packing import Packer, pack_detector
from pfnas_fast.supernet.prepared import PreparableMixin, PreparedSubnet

_FORMAT = "pfnas_fast.Detector/1"


class Detector(PreparableMixin[DetectorOutput]):
    """The detector of one path; ordinary torch layers only, batch normalisation set.

    `DetectionSupernet.extract` makes one with weights; the constructor makes an untrained one. To fine-tune
    it, call `train()` and feed `detection_loss` with `dense(images)`.

    Args:
        space: The search space.
        path: A path of it.
        num_classes: Number of classes.
        class_names: One name per class; default "0", "1", ...

    Attributes:
        canvas: (height, width) in px that images are scaled to.

    Raises:
        InputError: the path is not in the space, or the number of names differs from the number of classes.
    """

    def __init__(
        self, space: Space, path: Path, *, num_classes: int, class_names: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        names = tuple(map(str, range(num_classes) if class_names is None else class_names))
        if len(names) != num_classes:
            raise InputError(f"Detector: expected {num_classes} names for class_names, got {len(names)}")
        self.space = space
        self.path = space.path_from_json(path.to_json())
        self.num_classes = num_classes
        self.class_names = names
        self.canvas = space.canvas(path.resolution)
        head = space.head
        self.backbone = PlainBackbone(space, self.path)
        self.neck = Neck(space.tap_channels, head.channels, plain=True)
        self.head = Head(
            head.channels, head.num_convs, num_classes=num_classes, strides=space.tap_strides, plain=True
        )

    def dense(self, images: Tensor) -> DetectorOutput:
        """Raw predictions at every location for normalised canvases [N, 3, H, W], float32."""
        return self.head(self.neck(self.backbone(images)), (images.shape[2], images.shape[3]))

    def forward(self, images: Tensor) -> list[Detection]:
        """Detect objects.

        Args:
            images: Normalised canvases, [N, 3, H, W], float32.

        Returns:
            N detections, boxes in canvas px; `postprocess` with its defaults.
        """
        return postprocess(self.dense(images))

    @torch.no_grad()
    def predict(
        self,
        image: Tensor,
        *,
        score_threshold: float = 0.05,
        iou_threshold: float = 0.6,
        max_detections: int = 100,
    ) -> Detection:
        """Detect objects in one image as it comes from a decoder; scales and normalises it.

        On the CPU in float32, the compiled subnet (`prepare`) does it; the first call packs the weights. It
        does not see writes to them through ``.data`` or numpy: call `drop_prepared` after such.

        Args:
            image: RGB, [3, H, W], uint8, any size.
            score_threshold: See `postprocess`, as for the next two.
            iou_threshold: Overlap in IoU above which the weaker box of a class is dropped.
            max_detections: Most boxes returned.

        Returns:
            The detections, boxes in px of `image` and clipped to it, on the detector's device.

        Raises:
            TypeError: not a uint8 tensor.
            InputError: not of shape [3, H, W], or the detector is in training mode.

        Example:
            >>> from pfnas_fast.space import load_space
            >>> space = load_space("tiny")
            >>> detector = Detector(space, space.min_path(), num_classes=3).eval()
            >>> image = torch.zeros(3, 480, 640, dtype=torch.uint8)
            >>> len(detector.predict(image, score_threshold=0.9))  # an untrained net is sure of nothing
            0
        """
        if not isinstance(image, Tensor) or image.dtype != torch.uint8:
            kind = image.dtype if isinstance(image, Tensor) else type(image).__name__
            raise TypeError(f"predict: expected a uint8 tensor for image, got {kind}")
        if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise InputError(f"predict: expected the shape [3, H, W] for image, got {list(image.shape)}")
        if self.training:
            raise InputError(
                "predict: expected a detector in eval mode, got one in training mode (call eval() first)"
            )
        canvas, scale = letterbox(image, self.canvas)
        device = next(self.parameters()).device
        layout = torch.contiguous_format if device.type == "cpu" else torch.channels_last
        batch = normalize(canvas[None].to(device), memory_format=layout)
        output = self._run_prepared(batch, self.path)
        (found,) = postprocess(
            self.dense(batch) if output is None else output,
            score_threshold=score_threshold,
            iou_threshold=iou_threshold,
            max_detections=max_detections,
        )
        return found.to_original(scale, (image.shape[1], image.shape[2]))

    def prepare(
        self, path: Path | None = None, statistics: BNStatistics | None = None
    ) -> PreparedSubnet[DetectorOutput]:
        """As `PreparableMixin.prepare`; the path is this detector's own.

        Example:
            >>> from pfnas_fast.space import load_space
            >>> space = load_space("tiny")
            >>> detector = Detector(space, space.min_path(), num_classes=3).eval()
            >>> detector.prepare()(torch.zeros(1, 3, 96, 128)).logits.shape
            torch.Size([1, 252, 3])
        """
        return super().prepare(self.path if path is None else path, statistics)

    def _pack(self) -> tuple[Packer, dict[str, Any]]:
        return pack_detector(self)

    def _finish_prepared(self, images: Tensor, compiled: Any) -> DetectorOutput:
        return run_prepared_detector(self.head, images, compiled)

    def save(self, file: str | pathlib.Path) -> None:
        """Write everything that `load` needs: space, path, classes and weights; atomic, tensors on the CPU.

        Args:
            file: Where to; missing folders are made.
        """
        content = {
            "format": _FORMAT,
            "space": self.space.to_dict(),
            "path": self.path.to_json(),
            "class_names": list(self.class_names),
            "state_dict": {name: tensor.cpu() for name, tensor in self.state_dict().items()},
        }
        write_tensors(file, content)

    @classmethod
    def load(cls, file: str | pathlib.Path) -> "Detector":
        """Read what `save` wrote, without running any code that the file might contain.

        Args:
            file: The file.

        Returns:
            The detector, in eval mode, on the CPU.

        Raises:
            InputError: there is no such file, it is damaged, or it is no detector.
        """
        content = read_tensors("Detector.load", file)
        if content.get("format") != _FORMAT:
            raise InputError(
                f"Detector.load: expected a file written by Detector.save, got {str(file)!r} "
                f"with the format {content.get('format')!r}"
            )
        space = Space.from_dict(content["space"])
        names = content["class_names"]
        detector = cls(
            space, space.path_from_json(content["path"]), num_classes=len(names), class_names=names
        )
        detector.load_state_dict(content["state_dict"])
        return detector.eval()


class DenseScores(nn.Module):
    """A detector as tensors in, tensors out, for torch.export and ONNX: no thresholds, no NMS.

    Args:
        detector: The detector, in eval mode.
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised canvases [N, 3, H, W] -> scores [N, L, K] in [0, 1] and boxes [N, L, 4], xyxy px."""
        output = self.detector.dense(images)
        scores = (output.logits.sigmoid() * output.centerness.sigmoid()[..., None]).sqrt()
        return scores, output.boxes

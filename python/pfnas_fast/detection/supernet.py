# SPDX-License-Identifier: Apache-2.0
"""All detectors of a space in one set of weights."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pfnas_fast.detection.checkpoint import read_tensors
from pfnas_fast.detection.detector import Detector
from pfnas_fast.detection.neck_head import Head, Neck, run_prepared_detector
from pfnas_fast.detection.output import DetectorOutput
from pfnas_fast.errors import InputError
from pfnas_fast.space import CostModel, Path, Space
from pfnas_fast.supernet import (
    ActiveSubnetMixin,
    Backbone,
    BNStatistics,
    ClassificationSupernet,
    copy_active_weights,
)
from pfnas_fast.supernet.packing import Packer, pack_detector
from pfnas_fast.supernet.prepared import PreparableMixin


class DetectionSupernet(PreparableMixin[DetectorOutput], ActiveSubnetMixin):
    """An elastic backbone with a static neck and head.

    Args:
        space: The search space.
        num_classes: Number of classes, >= 1.
        backend: ``"reference"`` (pure PyTorch) or ``"fast"`` (the ops of this package). In eval mode and
            without gradients, ``"fast"`` runs whole paths as compiled subnets (`prepare`), in float32 on the
            CPU; nets and images of other types go through the layers, which name what they do not support.
            What is compiled does not see writes through ``.data`` or numpy: call `drop_prepared` after such.

    Attributes:
        cost: MACs, parameters and saved bytes of whole detectors of this space and number of classes.

    Raises:
        InputError: unknown backend or no class.

    Source:
        DetOFA, arXiv:2303.13121 (a detection supernet from a classification one); head and neck are our
        choice.

    Example:
        >>> from pfnas_fast.space import load_space
        >>> net = DetectionSupernet(load_space("tiny"), num_classes=3)
        >>> path = net.set_active_subnet(ks=3, e=2, d=1, resolution=128)
        >>> net(torch.rand(2, 3, 96, 128)).logits.shape
        torch.Size([2, 252, 3])
    """

    def __init__(self, space: Space, *, num_classes: int, backend: str = "reference") -> None:
        if num_classes < 1:
            raise InputError(
                f"DetectionSupernet: expected at least 1 class for num_classes, got {num_classes}"
            )
        super().__init__(space)
        self.num_classes = num_classes
        self.cost = CostModel(space, num_classes=num_classes)
        self.backbone = Backbone(space, backend=backend)
        self.neck = Neck(space.tap_channels, space.head.channels)
        self.head = Head(
            space.head.channels,
            space.head.num_convs,
            num_classes=num_classes,
            strides=space.tap_strides,
            backend=backend,
        )

    def forward(self, images: Tensor, path: Path | None = None) -> DetectorOutput:
        """Predict at every location.

        Args:
            images: Normalised canvases, [N, 3, H, W], float32. Any size runs; costs and training assume
                `space.canvas(path.resolution)`.
            path: The path to run; None runs `active_path`.

        Returns:
            Raw predictions; `postprocess` turns them into detections.
        """
        path = self.active_path if path is None else path
        output = self._run_prepared(images, path) if self.backbone.backend == "fast" else None
        if output is not None:
            return output
        return self.head(self.neck(self.backbone(images, path)), (images.shape[2], images.shape[3]))

    def _pack(self) -> tuple[Packer, dict[str, Any]]:
        return pack_detector(self)

    def _finish_prepared(self, images: Tensor, compiled: Any) -> DetectorOutput:
        return run_prepared_detector(self.head, images, compiled)

    def load_backbone(self, source: str | pathlib.Path | Mapping[str, Any] | ClassificationSupernet) -> None:
        """Take over the backbone's weights from a pre-trained classification supernet.

        Args:
            source: The supernet, its state dict, the state dict of a `Backbone`, or a file with one of these
                (alone, or under the key ``"model"`` of a training checkpoint). For a checkpoint of
                Once-for-All use `load_ofa_weights`.

        Raises:
            InputError: the file is absent or unreadable, or its weights do not fit this space; neck, head and
                backbone are unchanged then.
        """
        if isinstance(source, ClassificationSupernet):
            self._load_backbone_state(source.backbone.state_dict(), "the given net")
        elif isinstance(source, Mapping):
            self._load_backbone_state(source, "the given state dict")
        else:
            self._load_backbone_state(read_tensors("load_backbone", source), repr(str(source)))

    def _load_backbone_state(self, state: Mapping[str, Any], origin: str) -> None:
        for key in ("model", "state_dict"):
            if isinstance(state.get(key), Mapping):
                state = state[key]
        prefix = "backbone."
        if any(name.startswith(prefix) for name in state):
            state = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
        own = self.backbone.state_dict()
        wrong = sorted(own.keys() ^ state.keys())
        wrong += sorted(name for name in own.keys() & state.keys() if own[name].shape != state[name].shape)
        if wrong:
            raise InputError(
                f"load_backbone: expected weights of a backbone of space {self.space.name!r} for source, "
                f"got {origin} which differs in {len(wrong)} entries, the first being {wrong[0]!r}"
            )
        self.backbone.load_state_dict(dict(state))

    @torch.no_grad()
    def extract(
        self, path: Path, statistics: BNStatistics | None, *, class_names: Sequence[str] | None = None
    ) -> Detector:
        """Cut one path out as a detector of its own.

        Args:
            path: A path of the space.
            statistics: BN statistics of this path, from `recalibrate(self, path, ...)`. None takes the shared
                running buffers, which mix all paths: of use only after `set_running_statistics`.
            class_names: One name per class; default "0", "1", ...

        Returns:
            A plain module in eval mode, on this net's device, that shares no memory with it and predicts the
            same.

        Raises:
            InputError: the path is not in the space, the statistics belong to another path, or the number of
                names differs from the number of classes.
        """
        detector = Detector(self.space, path, num_classes=self.num_classes, class_names=class_names)
        copy_active_weights(self, detector, statistics)
        return detector.to(next(self.parameters()).device).eval()

    def get_active_subnet(
        self, preserve_weight: bool = True, statistics: BNStatistics | None = None
    ) -> Detector:
        """The active path as a plain module of its own, in this net's mode.

        Args:
            preserve_weight: Copy the weights; otherwise the detector is freshly initialised.
            statistics: See `extract`.

        Returns:
            The detector.
        """
        if preserve_weight:
            return self.extract(self.active_path, statistics).train(self.training)
        fresh = Detector(self.space, self.active_path, num_classes=self.num_classes)
        return fresh.to(next(self.parameters()).device).train(self.training)

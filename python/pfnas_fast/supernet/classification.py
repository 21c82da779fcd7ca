# SPDX-License-Identifier: Apache-2.0
"""The classification supernet: an elastic backbone with OFA-MobileNetV3's tail."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pfnas_fast.errors import InputError
from pfnas_fast.space import Path, Space, TailSpec
from pfnas_fast.supernet.active import ActiveSubnetMixin
from pfnas_fast.supernet.backbone import Backbone, ConvBN
from pfnas_fast.supernet.extraction import ClassificationSubnet, copy_active_weights
from pfnas_fast.supernet.layers import pixel_mean
from pfnas_fast.supernet.packing import Packer, pack_classifier
from pfnas_fast.supernet.prepared import PreparableMixin
from pfnas_fast.supernet.recalibration import BNStatistics


class ClassificationTail(nn.Module):
    """1x1 - BN - h-swish - global pool - 1x1 (no BN, no bias) - h-swish - dropout - linear; static.

    Args:
        in_channels: Channels of the last stage.
        tail: Widths and dropout.
        num_classes: Outputs of the linear layer.
    """

    def __init__(self, in_channels: int, tail: TailSpec, num_classes: int) -> None:
        super().__init__()
        self.feature = ConvBN(in_channels, tail.feature_channels, activation="hswish")
        self.hidden = nn.Linear(tail.feature_channels, tail.hidden_channels, bias=False)
        nn.init.normal_(self.hidden.weight, std=(2.0 / tail.hidden_channels) ** 0.5)
        self.dropout = nn.Dropout(tail.dropout)
        self.classifier = nn.Linear(tail.hidden_channels, num_classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> logits [N, num_classes]."""
        pooled = pixel_mean(self.feature(x))
        return self.classifier(self.dropout(F.hardswish(self.hidden(pooled))))


class ClassificationSupernet(PreparableMixin[Tensor], ActiveSubnetMixin):
    """All classifiers of a space in one set of weights.

    Args:
        space: The search space; its square form (`Space.for_classification`) is used.
        num_classes: Number of classes, >= 1.
        backend: ``"reference"`` (pure PyTorch) or ``"fast"``, as for `DetectionSupernet`: in eval mode and
            without gradients, whole paths run as compiled subnets (`prepare`), in float32 on the CPU; nets
            and images of other types go through the layers, which name what they do not support.
            What is compiled does not see writes through ``.data`` or numpy: call `drop_prepared` after such.

    Raises:
        InputError: unknown backend or no class.

    Example:
        >>> import torch
        >>> from pfnas_fast.space import load_space
        >>> net = ClassificationSupernet(load_space("tiny"), num_classes=10)
        >>> path = net.set_active_subnet(ks=3, e=2, d=1)
        >>> net(torch.rand(2, 3, 96, 96)).shape
        torch.Size([2, 10])
    """

    def __init__(self, space: Space, *, num_classes: int, backend: str = "reference") -> None:
        if num_classes < 1:
            raise InputError(
                f"ClassificationSupernet: expected at least 1 class for num_classes, got {num_classes}"
            )
        super().__init__(space.for_classification())
        self.num_classes = num_classes
        self.backbone = Backbone(self.space, backend=backend)
        self.tail = ClassificationTail(self.space.stages[-1].out_channels, self.space.tail, num_classes)

    def forward(self, x: Tensor, path: Path | None = None) -> Tensor:
        """Classify images.

        Args:
            x: Normalised images, [N, 3, H, W], float32.
            path: The path to run; None runs `active_path`.

        Returns:
            Logits, [N, num_classes].
        """
        path = self.active_path if path is None else path
        logits = self._run_prepared(x, path) if self.backbone.backend == "fast" else None
        if logits is not None:
            return logits
        return self.tail(self.backbone(x, path, taps=False))

    def _pack(self) -> tuple[Packer, dict[str, Any]]:
        return pack_classifier(self)

    def _finish_prepared(self, images: Tensor, compiled: Any) -> Tensor:
        logits = images.new_empty(images.shape[0], self.num_classes)
        compiled.run(images, logits)
        return logits

    @torch.no_grad()
    def get_active_subnet(
        self, preserve_weight: bool = True, statistics: BNStatistics | None = None
    ) -> ClassificationSubnet:
        """The active path as a plain module of its own.

        Args:
            preserve_weight: Copy the weights; otherwise the subnet is freshly initialised.
            statistics: Of the active path, from `recalibrate(self, path, ...)`; None takes the running
                buffers.

        Returns:
            A subnet in this net's mode, on its device, that shares no memory with it and computes the same
            output.

        Example:
            >>> from pfnas_fast.space import load_space
            >>> from pfnas_fast.supernet import recalibrate
            >>> net = ClassificationSupernet(load_space("tiny"), num_classes=10)
            >>> path = net.set_active_subnet(ks=3, e=2, d=1)
            >>> statistics = recalibrate(net, path, [torch.rand(4, 3, 96, 96)])
            >>> net.get_active_subnet(statistics=statistics).eval()(torch.rand(1, 3, 96, 96)).shape
            torch.Size([1, 10])
        """
        subnet = ClassificationSubnet(self.space, self.active_path, num_classes=self.num_classes)
        if preserve_weight:
            copy_active_weights(self, subnet, statistics)
        return subnet.to(next(self.parameters()).device).train(self.training)

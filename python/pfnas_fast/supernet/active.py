# SPDX-License-Identifier: Apache-2.0
"""The active path of a supernet, under the names that users of Once-for-All type."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from pfnas_fast.space import Path, Space, uniform_population
from pfnas_fast.supernet.backbone import Backbone
from pfnas_fast.supernet.sorting import reorganize_middle_weights


class ActiveSubnetMixin(nn.Module):
    """Base of a supernet whose forward takes a path or runs the active one, which starts as the largest.

    The active path is plain state of the object: it is not part of the state dict. A subclass calls
    `__init__` with its space and owns a `backbone`.

    Args:
        space: The search space.
    """

    backbone: Backbone

    def __init__(self, space: Space) -> None:
        super().__init__()
        self.space = space
        self._active_path = space.max_path()

    @property
    def active_path(self) -> Path:
        """The path that forward runs when none is given; assigning validates it against the space.

        Raises:
            InputError: on assignment, if the path is not in the space.
        """
        return self._active_path

    @active_path.setter
    def active_path(self, path: Path) -> None:
        self._active_path = self.space.path(
            ks=path.kernel_sizes, e=path.expand_ratios, d=path.depths, resolution=path.resolution
        )

    def set_active_subnet(
        self,
        ks: int | Sequence[int] | None = None,
        e: int | Sequence[int] | None = None,
        d: int | Sequence[int] | None = None,
        resolution: int | None = None,
    ) -> Path:
        """Choose the active path.

        Args:
            ks: Kernel size of every block, or one per block of the space. None keeps the active path's;
                blocks that it skips take their largest. The same holds for the other arguments.
            e: Expand ratio of every block, or one per block.
            d: Depth of every stage, or one per stage.
            resolution: Longest side of the input, px.

        Returns:
            The new active path.

        Raises:
            InputError: a list has the wrong length or a value is not among the choices.

        Example:
            >>> from pfnas_fast.space import load_space
            >>> from pfnas_fast.supernet import ClassificationSupernet
            >>> net = ClassificationSupernet(load_space("tiny"), num_classes=10)
            >>> net.set_active_subnet(ks=3, e=2, d=[1, 2, 3, 3]).depths
            (1, 2, 3, 3)
        """
        active, blocks = self._active_path, self.space.blocks
        if ks is None:
            ks = [k or block.kernel_sizes[-1] for k, block in zip(active.kernel_sizes, blocks, strict=True)]
        if e is None:
            e = [r or block.expand_ratios[-1] for r, block in zip(active.expand_ratios, blocks, strict=True)]
        self._active_path = self.space.path(
            ks=ks,
            e=e,
            d=active.depths if d is None else d,
            resolution=active.resolution if resolution is None else resolution,
        )
        return self._active_path

    def set_max_net(self) -> Path:
        """Make the largest path, at the largest resolution, the active one and return it."""
        self._active_path = self.space.max_path()
        return self._active_path

    def sample_active_subnet(self, rng: np.random.Generator | None = None) -> Path:
        """Draw the active path as Once-for-All does: depths, active genes and resolution uniformly.

        Args:
            rng: Source of randomness. None seeds one from torch's default generator, so `torch.manual_seed`
                governs.

        Returns:
            The new active path. (Once-for-All returns a dict; ``path.to_json()`` is one.)
        """
        if rng is None:
            rng = np.random.default_rng(int(torch.randint(2**63 - 1, ())))
        (self._active_path,) = self.space.decode(uniform_population(self.space, rng, 1))
        return self._active_path

    def re_organize_middle_weights(self, expand_ratio_stage: int = 0) -> None:
        """Sort the middle channels of every block by importance; see `reorganize_middle_weights`."""
        reorganize_middle_weights(self.backbone, expand_ratio_stage=expand_ratio_stage)

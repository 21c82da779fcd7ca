# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the data tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from data_helpers import coco_json, write_split


@pytest.fixture
def coco_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes a COCO folder: `coco_folder(train=10, val=4, test=4)` images per split."""

    def make(**sizes: int) -> Path:
        for n, (split, size) in enumerate(sizes.items()):
            write_split(tmp_path, split, coco_json(size, first_id=1 + 1000 * n))
        return tmp_path

    return make

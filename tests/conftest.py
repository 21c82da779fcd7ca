# SPDX-License-Identifier: Apache-2.0
"""Fixtures for the whole suite."""

from pathlib import Path

import pytest
from toy import write_toy_classification, write_toy_detection


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real images and tables that stands beside a checkout; tests that need it are skipped
    without it."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the sample data at {folder}, which is absent")
    return folder


@pytest.fixture(scope="session")
def toy_detection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COCO folder of coloured rectangles: 20 train, 6 val, 6 test images, two classes."""
    return write_toy_detection(tmp_path_factory.mktemp("toy") / "detection")


@pytest.fixture(scope="session")
def toy_classification(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder of plain colours, two classes."""
    return write_toy_classification(tmp_path_factory.mktemp("toy") / "classification")

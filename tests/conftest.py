# SPDX-License-Identifier: Apache-2.0
"""Fixtures for the whole suite."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real images and tables that stands beside a checkout; tests that need it are skipped without it."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the sample data at {folder}, which is absent")
    return folder

# SPDX-License-Identifier: Apache-2.0
"""The examples in the docstrings run."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name", ["active", "backbone", "classification", "extraction", "layers", "ofa", "recalibration"]
)
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"pfnas_fast.supernet.{name}"))
    assert result.attempted > 0
    assert result.failed == 0

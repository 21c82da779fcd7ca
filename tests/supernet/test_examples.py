# SPDX-License-Identifier: Apache-2.0
"""The examples in the docstrings of the whole package run."""

import doctest
import importlib
from pathlib import Path

import pytest

import pfnas_fast

ROOT = Path(pfnas_fast.__file__).parent


def _modules_with_examples() -> list[str]:
    """Found in the sources, so that collecting the tests imports none of them."""
    found = []
    for file in sorted(ROOT.rglob("*.py")):
        if ">>>" in file.read_text():
            name = ".".join(file.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
            found.append(name)
    return found


@pytest.mark.parametrize("name", _modules_with_examples())
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0

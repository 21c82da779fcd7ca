# SPDX-License-Identifier: Apache-2.0
"""The examples in the docstrings run."""

import ast
import doctest
import importlib
from pathlib import Path

import pytest

import pfnas_fast

ROOT = Path(pfnas_fast.__file__).parent


def _modules_with_examples() -> list[str]:
    """Found in the sources, so that no module is imported while tests are collected."""
    names = []
    for file in sorted(ROOT.rglob("*.py")):
        if ">>>" in file.read_text():
            names.append(".".join(file.relative_to(ROOT.parent).with_suffix("").parts))
    return names


@pytest.mark.parametrize("name", _modules_with_examples())
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


def test_public_names_have_examples() -> None:
    without = [name for name in pfnas_fast.__all__ if ">>>" not in (getattr(pfnas_fast, name).__doc__ or "")]
    assert without == []


def test_first_lines_of_docstrings_are_sentences() -> None:
    """A docstring's first paragraph is one line."""
    wrapped = []
    for file in sorted((ROOT / "train").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                lines = (ast.get_docstring(node) or "").splitlines()
                if len(lines) > 1 and lines[1].strip():
                    wrapped.append(f"{file.name}: {lines[0]}")
    assert wrapped == []

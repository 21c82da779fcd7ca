# SPDX-License-Identifier: Apache-2.0
"""Reading and writing files of tensors: atomic, and never executing what a file contains."""

import os
import pathlib
import pickle
import tempfile
import zipfile
from collections.abc import Mapping
from typing import Any

import torch

from pfnas_fast.errors import InputError


def write_tensors(file: str | pathlib.Path, content: Mapping[str, Any]) -> None:
    """Write `content` so that `file` is either complete or as it was before.

    Args:
        file: Where to; missing folders are made.
        content: Tensors, numbers, strings, lists and dicts of these.
    """
    target = pathlib.Path(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        torch.save(dict(content), name)
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise


def read_tensors(function: str, file: str | pathlib.Path) -> dict[str, Any]:
    """Read a file of tensors on the CPU with ``weights_only=True``.

    Args:
        function: Name that an error message starts with.
        file: The file.

    Returns:
        Its dictionary.

    Raises:
        InputError: there is no such file, it is damaged, or it holds anything but plain data.
    """
    path = pathlib.Path(file)
    if not path.is_file():
        raise InputError(f"{function}: expected an existing file, got {str(path)!r}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        RuntimeError,
        EOFError,
        KeyError,
        ValueError,
    ) as error:
        raise InputError(
            f"{function}: expected a file of tensors that loads with weights_only=True, got {str(path)!r}"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{function}: expected a dictionary in {str(path)!r}, got {type(content).__name__}")
    return content

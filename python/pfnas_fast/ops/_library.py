# SPDX-License-Identifier: Apache-2.0
"""The torch library that every op of this package is registered in, and the compiled module behind it."""

import torch  # first: the compiled module then finds torch's OpenMP runtime already loaded

try:
    from pfnas_fast import _C
except ImportError as error:
    raise ImportError(
        "pfnas_fast: the compiled module pfnas_fast._C cannot be loaded; reinstall with 'pip install .',"
        f" or build it in place as docs/add_an_op.md says ({error})"
    ) from error

__all__ = ["LIBRARY", "_C"]

LIBRARY = torch.library.Library("pfnas_fast", "DEF")

# SPDX-License-Identifier: Apache-2.0
"""The command `pfnas`."""

from __future__ import annotations

import sys

from pfnas_fast.cli.app import app
from pfnas_fast.errors import InputError


def main() -> None:
    """Run the command line; a user's mistake is one clear line and exit code 2."""
    try:
        app()
    except InputError as error:
        text = " ".join(str(error).split())
        print(f"pfnas: {text}", file=sys.stderr)
        raise SystemExit(2) from None

# SPDX-License-Identifier: Apache-2.0
"""A run: its settings, its folder, its stages."""

from pfnas_fast.run.config import RunConfig, load_config, make_config
from pfnas_fast.run.folder import Run

__all__ = ["Run", "RunConfig", "load_config", "make_config"]

# SPDX-License-Identifier: Apache-2.0
"""Search spaces as data, their paths, and what the paths cost."""

from pfnas_fast.space.additive import AdditiveCost
from pfnas_fast.space.budget import BudgetSampler
from pfnas_fast.space.costs import CostModel
from pfnas_fast.space.description import load_space, preset_names
from pfnas_fast.space.path import Path
from pfnas_fast.space.population import uniform_population
from pfnas_fast.space.space import Space
from pfnas_fast.space.specs import (
    BlockSpec,
    HeadSpec,
    StageSpec,
    StaticBlockSpec,
    TailSpec,
    make_divisible,
    se_channels,
)

__all__ = [
    "AdditiveCost",
    "BlockSpec",
    "BudgetSampler",
    "CostModel",
    "HeadSpec",
    "Path",
    "Space",
    "StageSpec",
    "StaticBlockSpec",
    "TailSpec",
    "load_space",
    "make_divisible",
    "preset_names",
    "se_channels",
    "uniform_population",
]

# SPDX-License-Identifier: Apache-2.0
"""The path filter, its thresholds, and the samplers that use it."""

from pfnas_fast.filter.active import next_paths
from pfnas_fast.filter.exact import ExactSampler
from pfnas_fast.filter.path_filter import PathFilter
from pfnas_fast.filter.positive_unlabelled import WeakPathFilter
from pfnas_fast.filter.samplers import Balanced, BestUp, Deferred, Filtered, RandomPrune, Sampler, Uniform
from pfnas_fast.filter.thresholds import BudgetThresholds
from pfnas_fast.filter.training import RankerConfig

__all__ = [
    "Balanced",
    "BestUp",
    "BudgetThresholds",
    "Deferred",
    "ExactSampler",
    "Filtered",
    "PathFilter",
    "RandomPrune",
    "RankerConfig",
    "Sampler",
    "Uniform",
    "WeakPathFilter",
    "next_paths",
]

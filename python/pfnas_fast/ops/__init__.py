# SPDX-License-Identifier: Apache-2.0
"""Compiled ops, registered as ``torch.ops.pfnas_fast.*``, and their pure-PyTorch twins in `reference`."""

from pfnas_fast.ops import reference
from pfnas_fast.ops._memory import pooled_bytes, release_memory
from pfnas_fast.ops.batch_norm_act import batch_norm_act
from pfnas_fast.ops.dynamic_depthwise_conv import dynamic_depthwise_conv
from pfnas_fast.ops.dynamic_pointwise_conv import (
    dynamic_pointwise_conv,
    dynamic_pointwise_conv_moments,
    pack_pointwise_weight,
)
from pfnas_fast.ops.path_cost import CostTable, path_cost
from pfnas_fast.ops.path_filter import path_filter
from pfnas_fast.ops.path_score import KernelTables, NetworkTables, PackedRanker, RankerTables, path_score
from pfnas_fast.ops.path_score_int8 import Int8Ranker, best_paths, path_score_int8
from pfnas_fast.ops.path_search import BudgetRanker, Flood, SearchSpace
from pfnas_fast.ops.train_mbconv import train_mbconv

__all__ = [
    "BudgetRanker",
    "CostTable",
    "Flood",
    "Int8Ranker",
    "KernelTables",
    "NetworkTables",
    "PackedRanker",
    "RankerTables",
    "SearchSpace",
    "batch_norm_act",
    "best_paths",
    "dynamic_depthwise_conv",
    "dynamic_pointwise_conv",
    "dynamic_pointwise_conv_moments",
    "pack_pointwise_weight",
    "path_cost",
    "path_filter",
    "path_score",
    "path_score_int8",
    "pooled_bytes",
    "reference",
    "release_memory",
    "train_mbconv",
]

# SPDX-License-Identifier: Apache-2.0
"""The supernet: dynamic layers, elastic backbone, classifier, recalibration, extraction of subnets."""

from pfnas_fast.supernet.active import ActiveSubnetMixin
from pfnas_fast.supernet.backbone import Backbone, ConvBN
from pfnas_fast.supernet.classification import ClassificationSupernet
from pfnas_fast.supernet.extraction import ClassificationSubnet, PlainBackbone, copy_active_weights
from pfnas_fast.supernet.fused import set_training_plan
from pfnas_fast.supernet.layers import (
    DynamicBatchNorm2d,
    DynamicDepthwiseConv2d,
    DynamicMBConv,
    DynamicPointwiseConv2d,
    DynamicSE,
)
from pfnas_fast.supernet.ofa import load_ofa_weights
from pfnas_fast.supernet.prepared import PreparedSubnet
from pfnas_fast.supernet.recalibration import (
    BNStatistics,
    recalibrate,
    recalibrate_paths,
    set_running_statistics,
    use_statistics,
    write_running_statistics,
)
from pfnas_fast.supernet.sorting import reorganize_middle_weights

__all__ = [
    "ActiveSubnetMixin",
    "BNStatistics",
    "Backbone",
    "ClassificationSubnet",
    "ClassificationSupernet",
    "ConvBN",
    "DynamicBatchNorm2d",
    "DynamicDepthwiseConv2d",
    "DynamicMBConv",
    "DynamicPointwiseConv2d",
    "DynamicSE",
    "PlainBackbone",
    "PreparedSubnet",
    "copy_active_weights",
    "load_ofa_weights",
    "recalibrate",
    "recalibrate_paths",
    "reorganize_middle_weights",
    "set_running_statistics",
    "set_training_plan",
    "use_statistics",
    "write_running_statistics",
]

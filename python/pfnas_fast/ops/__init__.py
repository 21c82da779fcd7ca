# SPDX-License-Identifier: Apache-2.0
"""Compiled ops, registered as ``torch.ops.pfnas_fast.*``, and their pure-PyTorch twins in `reference`."""

from pfnas_fast.ops import reference
from pfnas_fast.ops.dynamic_depthwise_conv import dynamic_depthwise_conv
from pfnas_fast.ops.dynamic_pointwise_conv import dynamic_pointwise_conv, pack_pointwise_weight

__all__ = ["dynamic_depthwise_conv", "dynamic_pointwise_conv", "pack_pointwise_weight", "reference"]

# SPDX-License-Identifier: Apache-2.0
"""Puts emulated CUDA kernels behind the registered ops, for CPU tensors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pfnas_fast.ops.dynamic_depthwise_conv import cuda_implementations as depthwise
from pfnas_fast.ops.dynamic_pointwise_conv import cuda_implementations as pointwise

IMPLEMENTATIONS: tuple[Callable[[Any], dict[str, Callable[..., Any]]], ...] = (depthwise, pointwise)


ORDERS = ("forward", "reverse", "random")  # of blocks and threads
SEEDS = (1, 2)  # of the random order, and of the inputs


@contextmanager
def emulated_ops(module: Any) -> Iterator[None]:
    """Within it, every op that has a CUDA implementation runs it on CPU tensors, over `module`."""
    with torch.library._scoped_library("pfnas_fast", "IMPL") as library:
        for implementations in IMPLEMENTATIONS:
            for name, implementation in implementations(module).items():
                library.impl(name, implementation, "CPU", allow_override=True)
        yield

# SPDX-License-Identifier: Apache-2.0
"""Bytes that autograd keeps between forward and backward of the OFA-MobileNetV3 w1.0 backbone.

N = 16 at 160 px, counted by `saved_tensors_hooks`: every storage once, parameters and buffers not. memory/max
is plan "memory" on the largest path; memory/max/speed the default plan. Nothing is timed.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from harness import Row
from suite_train_step import BATCH, SIZE_PX, paths
from torch import Tensor, nn
from training_nets import assert_same, channels_last, make_pair

from pfnas_fast.space import Path, load_space
from pfnas_fast.supernet import Backbone, set_training_plan

__all__ = ["comparisons"]


def saved_bytes(net: nn.Module, images: Tensor, path: Path) -> tuple[int, list[Tensor]]:
    """Bytes kept by one forward pass, and its features."""
    own = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = net(images, path)
    return sum(sizes.values()), features


def memory(name: str, plan: str) -> Row:
    space = load_space("ofa_mbv3_w1.0")
    fast, reference = make_pair(lambda backend: Backbone(space, backend=backend))
    set_training_plan(fast, plan)
    images, path = channels_last(BATCH, 3, SIZE_PX, SIZE_PX), paths(space)[name.split("/")[1]]
    ours, our_features = saved_bytes(fast, images, path)
    theirs, their_features = saved_bytes(reference, images, path)
    assert_same(our_features, their_features)
    ratio = round(theirs / ours, 3)
    return Row(name, "reference", "bytes", ours, theirs, ratio, ratio)


def comparisons() -> Iterator[tuple[str, Callable[[], Row]]]:
    """Every row's name with the function that measures it."""
    for name in ("max", "mid", "min"):
        yield f"memory/{name}", partial(memory, f"memory/{name}", "memory")
    yield "memory/max/speed", partial(memory, "memory/max/speed", "speed")

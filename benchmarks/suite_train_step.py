# SPDX-License-Identifier: Apache-2.0
"""Forward and backward of one path of the OFA-MobileNetV3 w1.0 backbone, N = 16 at 160 px.

Both sides run the same path of a sliced supernet and compute the gradients of all parameters on it; neither
the optimiser nor the loss is inside (fixed gradients of the three tapped features). threads/...: ours with
one thread against ours with `--threads` threads; only listed with more than one.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from harness import Comparison, on_one_thread
from torch import Tensor, nn
from training_nets import assert_same, channels_last, gradients, make_pair

from pfnas_fast.space import Path, Space, load_space
from pfnas_fast.supernet import Backbone, set_training_plan

__all__ = ["comparisons", "paths"]

BATCH, SIZE_PX = 16, 160


def paths(space: Space) -> dict[str, Path]:
    """The largest path, one of middle size (k 5, e 4, d 3), the smallest."""
    return {"max": space.max_path(), "mid": space.path(ks=5, e=4, d=3), "min": space.min_path()}


def step(net: nn.Module, images: Tensor, path: Path, grads: list[Tensor]) -> list[Tensor]:
    """One forward and backward pass with fresh gradients."""
    for parameter in net.parameters():
        parameter.grad = None
    features = net(images, path)
    torch.autograd.backward(features, grads)
    return features


def train_step(name: str, *, plan: str = "speed") -> Comparison:
    space = load_space("ofa_mbv3_w1.0")
    fast, reference = make_pair(lambda backend: Backbone(space, backend=backend))
    set_training_plan(fast, plan)
    images, path = channels_last(BATCH, 3, SIZE_PX, SIZE_PX), paths(space)[name]
    shapes = zip(space.tap_channels, space.tap_strides, strict=True)
    grads = [channels_last(BATCH, c, SIZE_PX // s, SIZE_PX // s, seed=s) for c, s in shapes]
    ours = partial(step, fast, images, path, grads)
    theirs = partial(step, reference, images, path, grads)

    def check() -> None:
        assert_same(ours(), theirs())
        assert_same(gradients(fast), gradients(reference))

    title = f"train_step/{name}" + ("" if plan == "speed" else f"/plan-{plan}")
    return Comparison(title, ours, theirs, check, baseline="reference")


def threads() -> Comparison:
    both = train_step("max")
    return Comparison(
        "threads/train_step/max", both.ours, on_one_thread(both.ours), both.check, baseline="1thread"
    )


def comparisons() -> Iterator[tuple[str, Callable[[], Comparison]]]:
    """Every row's name with the function that prepares it."""
    for name in ("max", "mid", "min"):
        yield f"train_step/{name}", partial(train_step, name)
    yield "train_step/max/plan-memory", partial(train_step, "max", plan="memory")
    if torch.get_num_threads() > 1:
        yield "threads/train_step/max", threads

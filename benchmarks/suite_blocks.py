# SPDX-License-Identifier: Apache-2.0
"""Forward and backward of one inverted residual block in training mode, N = 32, all gradients."""

from collections.abc import Callable, Iterator
from functools import partial

from harness import Comparison
from torch import Tensor, nn
from training_nets import assert_same, channels_last, gradients, make_pair

from pfnas_fast.space import BlockSpec
from pfnas_fast.supernet.layers import DynamicMBConv

__all__ = ["comparisons"]

BATCH = 32
# (height = width, channels in and out, expand ratio, squeeze-and-excitation, activation)
SHAPES = {
    "56x56x24-96": (56, 24, 4, False, "relu"),
    "28x28x40-160": (28, 40, 4, False, "hswish"),
    "14x14x112-672-se": (14, 112, 6, True, "hswish"),
    "7x7x160-960-se": (7, 160, 6, True, "hswish"),
}


def step(net: nn.Module, x: Tensor, grad: Tensor, kernel_size: int, expand_ratio: int) -> Tensor:
    """One forward and backward pass with fresh gradients."""
    x.grad = None
    for parameter in net.parameters():
        parameter.grad = None
    y = net(x, kernel_size, expand_ratio)
    y.backward(grad)
    return y


def block_train(name: str, kernel_size: int) -> Comparison:
    size, channels, ratio, se, activation = SHAPES[name]
    spec = BlockSpec(
        index=0,
        stage=0,
        position=0,
        in_channels=channels,
        out_channels=channels,
        stride=1,
        activation=activation,
        se=se,
        kernel_sizes=(3, 5, 7),
        expand_ratios=(ratio,),
    )
    fast, reference = make_pair(lambda backend: DynamicMBConv(spec, backend=backend))
    our_x = channels_last(BATCH, channels, size, size).requires_grad_()
    their_x = our_x.detach().clone().requires_grad_()
    grad = channels_last(BATCH, channels, size, size, seed=1)
    ours = partial(step, fast, our_x, grad, kernel_size, ratio)
    theirs = partial(step, reference, their_x, grad, kernel_size, ratio)

    def check() -> None:
        assert_same([ours()], [theirs()])
        assert our_x.grad is not None
        assert their_x.grad is not None
        assert_same([our_x.grad, *gradients(fast)], [their_x.grad, *gradients(reference)])

    return Comparison(f"block_train/{name}/k{kernel_size}", ours, theirs, check, baseline="reference")


def comparisons() -> Iterator[tuple[str, Callable[[], Comparison]]]:
    """Every row's name with the function that prepares it."""
    for name in SHAPES:
        for kernel_size in (7, 5, 3):
            yield f"block_train/{name}/k{kernel_size}", partial(block_train, name, kernel_size)

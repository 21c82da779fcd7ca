# SPDX-License-Identifier: Apache-2.0
"""Depthwise convolution against torch's own grouped convolution, both in channels_last, N = 32.

weight_grad: the gradient of the filter alone (x frozen). Ours: the registered backward op on a bank of the
    active size. Theirs: aten::convolution_backward with only the weight wanted.
op: forward and backward through autograd. Ours: from the 7x7 bank, so the derivation of the filter and the
    gradients of bank and matrices are inside. Theirs: F.conv2d with groups = C on a ready filter of the
    active size, so nothing of that is inside. This leans towards torch.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from harness import Comparison
from torch import Tensor

from pfnas_fast.ops import dynamic_depthwise_conv, reference

__all__ = ["comparisons"]

BATCH = 32


class Shape(NamedTuple):
    """Input map: height = width = `size`."""

    size: int
    channels: int
    stride: int = 1

    @property
    def name(self) -> str:
        return f"{self.size}x{self.size}x{self.channels}" + ("/s2" if self.stride == 2 else "")


SHAPES = [
    # 224-px nets
    Shape(56, 96),
    Shape(28, 160),
    Shape(14, 672),
    Shape(7, 960),
    # 160-px nets, one per stage; 72 is the narrowest second block
    Shape(40, 72),
    Shape(40, 144),
    Shape(20, 240),
    Shape(10, 480),
    Shape(10, 672),
    Shape(5, 960),
    # first blocks of their stages, 160 px
    Shape(80, 96, 2),
    Shape(40, 144, 2),
    Shape(20, 240, 2),
    Shape(10, 672, 2),
]


class Inputs:
    """Tensors of one shape and kernel size; the same numbers for both sides."""

    def __init__(self, shape: Shape, kernel_size: int) -> None:
        g = torch.Generator().manual_seed(0)
        c, size = shape.channels, shape.size
        self.kernel_size, self.stride, self.channels = kernel_size, shape.stride, c
        x = torch.randn(BATCH, c, size, size, generator=g)  # [N, C, H, W]
        self.x = x.contiguous(memory_format=torch.channels_last)
        self.bank = torch.randn(c, 1, 7, 7, generator=g)
        self.matrix_5 = torch.eye(25) + 0.01 * torch.randn(25, 25, generator=g)
        self.matrix_3 = torch.eye(9) + 0.01 * torch.randn(9, 9, generator=g)
        derived = reference.derive_filter(self.bank, self.matrix_5, self.matrix_3, kernel_size)
        self.filter = derived.detach().contiguous()  # [C, 1, k, k]
        y = self.conv2d(self.x, self.filter)
        self.grad_y = torch.randn(y.shape, generator=g).contiguous(memory_format=torch.channels_last)

    def conv2d(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, stride=self.stride, padding=self.kernel_size // 2, groups=self.channels)


def _assert_same(ours: Tensor | None, theirs: Tensor | None) -> None:
    assert ours is not None
    assert theirs is not None
    assert float((ours - theirs).abs().max()) <= 1e-4 * float(theirs.abs().max()), "the two sides differ"


def weight_grad(shape: Shape, kernel_size: int) -> Comparison:
    """The filter's gradient alone."""
    i = Inputs(shape, kernel_size)
    half = kernel_size // 2

    def ours() -> Tensor:
        return torch.ops.pfnas_fast.dynamic_depthwise_conv_backward(
            i.grad_y, i.x, i.filter, None, None, kernel_size, i.stride, False, True
        )[1]

    def theirs() -> Tensor:
        return torch.ops.aten.convolution_backward(
            i.grad_y,
            i.x,
            i.filter,
            None,
            [i.stride] * 2,
            [half] * 2,
            [1, 1],
            False,
            [0, 0],
            i.channels,
            [False, True, False],
        )[1]

    return Comparison(
        f"weight_grad/k{kernel_size}/{shape.name}", ours, theirs, lambda: _assert_same(ours(), theirs())
    )


def whole_op(shape: Shape, kernel_size: int) -> Comparison:
    """Forward and backward, all gradients."""
    i = Inputs(shape, kernel_size)
    our_x, bank, matrix_5, matrix_3 = (
        t.clone().requires_grad_() for t in (i.x, i.bank, i.matrix_5, i.matrix_3)
    )
    their_x, weight = (t.clone().requires_grad_() for t in (i.x, i.filter))

    def ours() -> Tensor:
        for leaf in (our_x, bank, matrix_5, matrix_3):
            leaf.grad = None
        y = dynamic_depthwise_conv(our_x, bank, matrix_5, matrix_3, kernel_size=kernel_size, stride=i.stride)
        y.backward(i.grad_y)
        return y

    def theirs() -> Tensor:
        their_x.grad = weight.grad = None
        y = i.conv2d(their_x, weight)
        y.backward(i.grad_y)
        return y

    def check() -> None:
        _assert_same(ours().detach(), theirs().detach())
        _assert_same(our_x.grad, their_x.grad)
        if kernel_size == 7:
            _assert_same(bank.grad, weight.grad)

    return Comparison(f"op/k{kernel_size}/{shape.name}", ours, theirs, check)


def comparisons() -> Iterator[tuple[str, Callable[[], Comparison]]]:
    """Every row's name with the function that prepares it."""
    for kind, build in (("weight_grad", weight_grad), ("op", whole_op)):
        for kernel_size in (7, 5, 3):
            for shape in SHAPES:
                yield f"{kind}/k{kernel_size}/{shape.name}", partial(build, shape, kernel_size)

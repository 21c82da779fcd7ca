# SPDX-License-Identifier: Apache-2.0
"""Calls of train_mbconv that its tests share."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """Sizes of one call."""

    n: int
    ci: int
    ce: int
    co: int
    h: int
    w: int
    kernel_size: int = 3
    stride: int = 1
    max_kernel: int = 7
    activations: tuple[str | None, ...] = ("relu", "relu", None)
    se: int = 0
    spare: int = 0  # rows and columns of the weights beyond those in use
    expand: bool = True
    depth_norm: bool = True

    @property
    def residual(self) -> bool:
        return self.stride == 1 and self.ci == self.co

    @property
    def name(self) -> str:
        acts = "".join("0" if a is None else a[0] for a in self.activations)
        flags = f"{'' if self.expand else '-noexpand'}{'' if self.depth_norm else '-nonorm'}"
        return (
            f"{self.n}x{self.h}x{self.w}-{self.ci}-{self.ce}-{self.co}-k{self.kernel_size}of{self.max_kernel}"
            f"s{self.stride}{acts}se{self.se}+{self.spare}{flags}"
        )


HSWISH = ("hswish", "hswish", None)
CASES = [
    Case(2, 8, 24, 8, 9, 7, kernel_size=5, spare=8),
    Case(3, 24, 72, 40, 10, 10, kernel_size=7, stride=2, activations=HSWISH),
    Case(5, 40, 120, 40, 5, 5, kernel_size=3, se=32, spare=16),
    Case(2, 16, 40, 24, 13, 11, kernel_size=5, stride=2, se=16, activations=HSWISH, max_kernel=5),
    Case(9, 8, 16, 8, 7, 7, kernel_size=7, activations=HSWISH, se=8),
    Case(2, 3, 5, 7, 2, 2, kernel_size=3),  # channels that fill no vector, one pixel per corner
    Case(2, 17, 49, 18, 4, 3, kernel_size=5, se=9, spare=1),
    Case(1, 8, 16, 8, 1, 9, kernel_size=3, max_kernel=3),  # flat
    Case(1, 16, 33, 16, 40, 41, kernel_size=7),  # more pixels than a tile and a slab
    Case(2, 112, 336, 112, 6, 6, kernel_size=5, se=88, activations=HSWISH),  # small tiles
    Case(2, 16, 16, 16, 9, 8, expand=False, activations=(None, "relu", None), max_kernel=3),
    Case(2, 24, 24, 16, 6, 5, expand=False, depth_norm=False, activations=(None, None, "hswish")),
]


class Arguments:
    """Leaves of one call."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)

        def rand(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=g) * scale).requires_grad_()

        def norm(channels: int) -> tuple[Tensor, Tensor]:
            return (rand(channels, scale=0.3).detach() + 1).requires_grad_(), rand(channels, scale=0.3)

        ci, ce, co, r, s = case.ci, case.ce, case.co, case.se, case.spare
        k = case.max_kernel
        self.case = case
        x = rand(case.n, ci, case.h, case.w).detach()
        self.x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        self.expand = rand(ce + s, ci + s, 1, 1, scale=ci**-0.5) if case.expand else None
        self.bank = rand(ce + s, 1, k, k, scale=1 / k)
        self.matrices = tuple(
            (torch.eye(m) + torch.randn(m, m, generator=g) / m).requires_grad_() for m in (25, 9)
        )
        self.project = rand(co + s, ce + s, 1, 1, scale=ce**-0.5)
        self.norms = [
            norm(ce + s) if case.expand else None,
            norm(ce + s) if case.depth_norm else None,
            norm(co + s),
        ]
        self.excitation = None
        if r:
            self.excitation = (
                rand(r + s, ce + s, scale=2 * ce**-0.5),
                rand(r + s, scale=0.5),
                rand(ce + s, r + s, scale=2 * r**-0.5),
                rand(ce + s),
            )

    def leaves(self) -> dict[str, Tensor]:
        leaves = {"x": self.x, "bank": self.bank, "project": self.project}
        if self.expand is not None:
            leaves["expand"] = self.expand
        leaves |= dict(zip(("matrix_5", "matrix_3"), self.matrices, strict=True))
        for stage, norm in enumerate(self.norms):
            if norm is not None:
                leaves |= {f"gamma_{stage}": norm[0], f"beta_{stage}": norm[1]}
        if self.excitation is not None:
            leaves |= dict(zip(("w1", "b1", "w2", "b2"), self.excitation, strict=True))
        return leaves

    def double(self) -> "Arguments":
        other = Arguments(self.case)
        mine = self.leaves()
        for name, leaf in other.leaves().items():
            leaf.data = mine[name].detach().double()
        return other

    def run(self, op: Any, **options: Any) -> tuple[Tensor, Tensor]:
        c = self.case
        return op(
            *(self.x, self.expand, self.bank, self.matrices, self.project, self.norms, self.excitation),
            mid_channels=c.ce,
            out_channels=c.co,
            se_channels=c.se,
            kernel_size=c.kernel_size,
            stride=c.stride,
            residual=c.residual,
            activations=c.activations,
            **options,
        )

    def gradients(self, op: Any, **options: Any) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
        y, moments = self.run(op, **options)
        g = torch.Generator().manual_seed(7)
        y.backward(torch.randn(y.shape, generator=g).to(y.dtype))
        return y.detach(), moments, {name: leaf.grad for name, leaf in self.leaves().items()}

# SPDX-License-Identifier: Apache-2.0
"""Absolute times of dynamic_depthwise_conv, one thread; compare.py gives the ratios to torch.

Run: ``pytest benchmarks/bench_dynamic_depthwise_conv.py --benchmark-enable``.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from suite_depthwise import SHAPES, Inputs, Shape

from pfnas_fast.ops import dynamic_depthwise_conv


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kernel_size", [3, 5, 7])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name.replace("/", "-"))
def test_forward(benchmark: BenchmarkFixture, shape: Shape, kernel_size: int) -> None:
    i = Inputs(shape, kernel_size)
    arguments = (i.x, i.bank, i.matrix_5, i.matrix_3)
    benchmark(lambda: dynamic_depthwise_conv(*arguments, kernel_size=kernel_size, stride=i.stride))


@pytest.mark.parametrize("kernel_size", [3, 5, 7])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name.replace("/", "-"))
def test_forward_and_backward(benchmark: BenchmarkFixture, shape: Shape, kernel_size: int) -> None:
    i = Inputs(shape, kernel_size)
    leaves = [t.clone().requires_grad_() for t in (i.x, i.bank, i.matrix_5, i.matrix_3)]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        y = dynamic_depthwise_conv(*leaves, kernel_size=kernel_size, stride=i.stride)
        y.backward(i.grad_y)

    benchmark(step)

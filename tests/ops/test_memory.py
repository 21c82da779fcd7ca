# SPDX-License-Identifier: Apache-2.0
"""The pool behind large outputs: reused, bounded, released on request, safe between threads."""

import resource
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pfnas_fast import _C
from pfnas_fast.ops import dynamic_depthwise_conv, pooled_bytes, release_memory
from pfnas_fast.ops._memory import empty, empty_channels_last

LIKE = torch.empty(0)
SHAPE = (2, 32, 128, 128)  # 4 MiB
NUM_BYTES = 4 << 20


@pytest.fixture(autouse=True)
def clean_pool() -> Iterator[None]:
    release_memory()
    assert pooled_bytes() == (0, 0), "another test left a tensor alive"
    yield
    release_memory()


def test_a_pooled_tensor_looks_like_any_other() -> None:
    ours, theirs = empty_channels_last(LIKE, SHAPE), torch.empty(SHAPE, memory_format=torch.channels_last)
    assert ours.shape == theirs.shape
    assert ours.stride() == theirs.stride()
    assert ours.dtype == torch.float32
    assert ours.data_ptr() % (2 << 20) == 0
    assert torch.equal(ours.fill_(2.0).clone(), torch.full(SHAPE, 2.0))


@pytest.mark.parametrize("shape", [(1, 1, 800, 800), (800, 800, 1, 1), (1, 800, 1, 800)])
def test_sizes_of_one_are_channels_last_too(shape: tuple[int, int, int, int]) -> None:
    ours = empty_channels_last(LIKE, shape)
    assert pooled_bytes()[0] > 0
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_a_contiguous_tensor() -> None:
    ours = empty(LIKE, (3, 70_000, 16))
    assert pooled_bytes()[0] > 0
    assert ours.shape == (3, 70_000, 16)
    assert ours.is_contiguous()


def test_memory_comes_back() -> None:
    first = empty_channels_last(LIKE, SHAPE)
    address = first.data_ptr()
    assert pooled_bytes() == (NUM_BYTES, 0)
    view = first[:1]
    del first
    assert pooled_bytes() == (NUM_BYTES, 0), "a view keeps the memory"
    del view
    assert pooled_bytes() == (0, NUM_BYTES)
    smaller = empty_channels_last(LIKE, (2, 30, 128, 128))
    assert smaller.data_ptr() == address
    assert empty_channels_last(LIKE, SHAPE).data_ptr() != address


def test_a_block_much_larger_than_needed_is_not_given_away() -> None:
    del_me = empty_channels_last(LIKE, (4, 32, 128, 128))
    del del_me
    assert pooled_bytes() == (0, 2 * NUM_BYTES)
    tensor = empty_channels_last(LIKE, SHAPE)
    assert pooled_bytes()[0] == NUM_BYTES == tensor.nbytes


def test_kept_memory_is_bounded_by_what_was_alive_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    largest = 0
    for _ in range(200):
        rows = int(torch.randint(64, 512, (), generator=generator))
        alive = [empty_channels_last(LIKE, (1, 96, rows, 128)) for _ in range(2)]
        largest = max(largest, sum(tensor.nbytes for tensor in alive))
        del alive
        # Blocks up to 5/4 of their tensors, and waiting ones beside them.
        assert sum(pooled_bytes()) <= 1.25 * 1.25 * largest


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_released_memory_leaves_the_process() -> None:
    sizes = [(1, 48, 256, 256 + 8 * i) for i in range(16)]  # 12 MiB each: below glibc's largest threshold
    tensors = [empty_channels_last(LIKE, size).fill_(1.0) for size in sizes]
    full, held = _resident_bytes(), sum(tensor.nbytes for tensor in tensors)
    tensors.clear()
    assert _resident_bytes() > full - held // 4, "the pool keeps blocks"
    release_memory()
    assert _resident_bytes() < full - held * 3 // 4


def test_release_frees_scratch_too() -> None:
    dynamic_depthwise_conv(torch.randn(1, 64, 64, 64), torch.randn(64, 1, 7, 7), kernel_size=7)
    held = _C.scratch_bytes()
    release_memory()
    assert _C.scratch_bytes() < held  # other threads keep theirs until they next run a kernel


def test_release_frees_all_scratch_of_one_thread() -> None:
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from pfnas_fast.ops import dynamic_depthwise_conv, release_memory\n"
        "from pfnas_fast.ops._library import _C\n"
        "dynamic_depthwise_conv(torch.randn(1, 64, 64, 64), torch.randn(64, 1, 7, 7), kernel_size=7)\n"
        "assert _C.scratch_bytes() > 0\n"
        "release_memory()\n"
        "assert _C.scratch_bytes() == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_small_tensors_are_left_to_torch() -> None:
    small = empty_channels_last(LIKE, (1, 8, 16, 16))
    assert pooled_bytes() == (0, 0)
    assert small.is_contiguous(memory_format=torch.channels_last)


def test_deterministic_mode_fills_it() -> None:
    empty_channels_last(LIKE, SHAPE).fill_(1.0)
    torch.use_deterministic_algorithms(True)
    try:
        assert bool(empty_channels_last(LIKE, SHAPE).isnan().all())
    finally:
        torch.use_deterministic_algorithms(False)


def test_threads_never_share_a_block() -> None:
    def work(value: int) -> bool:
        for _ in range(50):
            tensor = empty_channels_last(LIKE, SHAPE).fill_(float(value))
            if not bool((tensor == float(value)).all()):
                return False
        return True

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(4)))


def _gradients(x: Tensor, bank: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, bank = x.clone().requires_grad_(), bank.clone().requires_grad_()
    y = dynamic_depthwise_conv(x, bank, kernel_size=7)
    y.square().sum().backward()
    assert x.grad is not None
    assert bank.grad is not None
    return y.detach(), x.grad, bank.grad


def test_outputs_do_not_depend_on_what_the_memory_held(tier: str) -> None:
    x = torch.randn(2, 40, 100, 100).contiguous(memory_format=torch.channels_last)
    bank = torch.randn(40, 1, 7, 7)
    expected = [t.clone() for t in _gradients(x, bank)]
    assert pooled_bytes()[1] > 0
    _C.poison_tensor_pool()
    for got, want in zip(_gradients(x, bank), expected, strict=True):
        assert torch.equal(got, want)

# SPDX-License-Identifier: Apache-2.0
"""The PTX that nvcc makes of the kernels, run on the emulator: the same bits as their source.

Tier 1 translates some kernels for sm_80; ``pytest -m tier2`` all of them, for sm_80 and sm_90.
"""

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from emulated_ops import emulated_ops
from emulator_build import CSRC, PLAIN, build_module, load_module
from test_depthwise import CALLS, Call, inputs, run

DEPTHWISE = CSRC / "kernels" / "dynamic_depthwise_conv" / "dynamic_depthwise_conv_cuda.cu"
TIER_1 = r"fold_splits|(derive_filter|filter_backward|matrix_backward)I|bfloat16Li5E|IfLi7E"


@pytest.fixture(scope="module")
def translated(emulator: str, nvcc: str) -> Callable[[int, str], ModuleType]:
    """Builds a module whose depthwise kernels come from PTX of one architecture."""
    from cuda_compiler import translated_object

    def build(architecture: int, pattern: str) -> ModuleType:
        ptx = translated_object(DEPTHWISE, architecture, pattern)
        part = "_part" if pattern else ""  # both builds may live in one process
        return load_module(build_module(PLAIN, extra_objects=[ptx], name=f"_sm{architecture}{part}"))

    return build


def assert_same_bits(source: ModuleType, compiled: ModuleType, call: Call) -> None:
    """fma and add are all the arithmetic there is, so nothing may differ."""
    tensors = inputs(call, seed=5)
    with emulated_ops(source):
        expected = run(tensors, call)
    with emulated_ops(compiled):
        actual = run(tensors, call)
    for name, a, b in zip(expected._fields, actual, expected, strict=True):
        assert torch.equal(a, b), f"{name} of {call}"


def tier_1_calls() -> Iterator[Call]:
    for call in CALLS:
        if call.kernel_size == 5:
            yield call._replace(dtype=torch.bfloat16)
        if call.kernel_size == 7:
            yield call


def test_same_bits_as_the_source(plain: ModuleType, translated: Callable[[int, str], ModuleType]) -> None:
    module = translated(80, TIER_1)
    for call in tier_1_calls():
        assert_same_bits(plain, module, call)
    ran = module.translated_kernels()
    assert any("convolveI13__nv_bfloat16Li5ELi1E" in name for name in ran)
    assert any("filter_gradientIfLi7ELi2E" in name for name in ran)
    counts = module.instruction_counts()
    assert counts["fma.rn.f32"] > counts["ld.shared.v2.f32"] * 4  # taps are reused over the strip


def test_a_pair_leaves_in_one_store(translated: Callable[[int, str], ModuleType]) -> None:
    """The compiler had split two bfloat16 into two stores. The taps are float32."""
    module = translated(80, TIER_1)
    call = Call(1, 24, 9, 11, 5, 1, dtype=torch.bfloat16)
    x, *filters, _ = inputs(call)
    module.instruction_counts()  # empties the counters
    with emulated_ops(module):
        torch.ops.pfnas_fast.dynamic_depthwise_conv(x, *filters, call.kernel_size, call.stride)
    counts = module.instruction_counts()
    assert counts.get("st.global.u16", 0) == 0
    assert counts["st.global.u32"] == x.numel() // 2


@pytest.mark.tier2
@pytest.mark.parametrize("architecture", [80, 90])
def test_same_bits_everywhere(
    architecture: int, plain: ModuleType, translated: Callable[[int, str], ModuleType]
) -> None:
    module = translated(architecture, "")
    for order in ("forward", "reverse", "random"):
        module.set_order(order, 7)
        for call in CALLS:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                assert_same_bits(plain, module, call._replace(dtype=dtype))

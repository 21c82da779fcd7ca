# SPDX-License-Identifier: Apache-2.0
"""What ptxas says of every kernel: no spills, registers, shared memory, blocks per multiprocessor, sizes.

Tier 1 looks at sm_75, sm_80 and sm_90; ``pytest -m tier2`` at all seven architectures.
"""

import re
from collections.abc import Callable

import pytest
from emulator_build import KERNELS
from occupancy import blocks_per_multiprocessor

THREADS = 256
MAX_ENTRY_POINTS = 120
MAX_BYTES = 25 << 20  # of all cubins of one architecture
# Registers and shared bytes at most, by kernel; the rest is small.
PINNED = {
    r"convolveI.*Li3ELi1E": (104, 5760),
    r"convolveI.*Li3ELi2E": (128, 5760),
    r"convolveI.*Li5ELi.E": (128, 16000),
    r"convolveI.*Li7ELi.E": (128, 31360),
    r"convolve_transposedI.*Li3E": (80, 5760),
    r"convolve_transposedI.*Li5E": (128, 16000),
    r"convolve_transposedI.*Li7E": (128, 31360),
    r"filter_gradientI.*Li3ELi.E": (128, 6144),
    r"filter_gradientI.*Li5ELi.E": (128, 10240),
    r"filter_gradientI.*Li7ELi.E": (128, 14336),
    r"pointwise_simtI": (128, 26624),
    r"pointwise_tensor_coreI": (128, 28672),
    r"panel_gradient_simtI": (96, 10240),
    r"panel_gradient_tensor_coreI": (120, 20480),
    r"fold_panelsI": (64, 1024),
    r"fold_moments": (64, 3072),
    r"filter_pathsILi(16|32)E": (120, 45568),
    r"derive_filterI": (64, 1088),
    r"filter_backwardI": (64, 3456),
    r"matrix_backwardI": (64, 0),
    r"fold_splits": (64, 1024),
}

# Fewer than two blocks are right here: 45 KB of codes and hidden layers in an sm_75's 64 KB; eight warps
# still take turns, and a smaller tile would read the weights more often.
ONE_BLOCK = (("filter_paths", 75),)


# Pairs of channels that a thread has under way at once: the columns it asks for before it needs the first of
# them, and those it has just written. Bytes that a block copies while it computes on others.
PAIRS_PER_THREAD: dict[str, Callable[..., int]] = {
    r"convolveI.*Li(\d)ELi(\d)E": lambda k, s: s * 3 + k + 4,
    r"convolve_transposedI.*Li(\d)E": lambda k: (3 + k // 2) // 2 + k // 2 // 2 + 1 + 8,
    r"filter_gradientI.*Li(\d)ELi(\d)E": lambda k, s: s * 7 + k + 8,  # of x and of grad_y
}
BYTES_PER_BLOCK = {
    r"pointwise_tensor_coreI": (128 + 96) * 32 * 2,
    r"panel_gradient_tensor_coreI": (64 + 96) * 32 * 2,
}
MIN_IN_FLIGHT = 18_000  # bytes per multiprocessor: an H100's 3.35 TB/s x 700 ns / 132


def bytes_in_flight(name: str, blocks: int) -> int | None:
    """Per multiprocessor; None where operands come from caches, are few, or are float32 in tiles."""
    pair = 8 if re.search(r"\d(convolve|convolve_transposed|filter_gradient)If", name) else 4
    for pattern, pairs in PAIRS_PER_THREAD.items():
        if match := re.search(rf"\d{pattern}", name):
            return blocks * THREADS * pair * pairs(*map(int, match.groups()))
    for pattern, size in BYTES_PER_BLOCK.items():
        if re.search(rf"\d{pattern}", name):
            return blocks * size
    return None


def limits_of(name: str) -> tuple[int, int]:
    found = [limits for pattern, limits in PINNED.items() if re.search(rf"\d{pattern}", name)]
    assert len(found) == 1, f"{name}: add its limits to PINNED"
    return found[0]


def check(architecture: int) -> None:
    from cuda_compiler import compiled, resources

    entry_points = size = streaming = 0
    for source in KERNELS:
        kernels = resources(source, architecture)
        size += compiled(source, architecture).stat().st_size
        assert kernels, source
        entry_points += len(kernels)
        for name, used in kernels.items():
            registers, shared_bytes = limits_of(name)
            assert used.spill_bytes == 0, (name, used)
            assert used.stack_bytes == 0, f"{name}: an array is indexed at run time, so in local memory"
            assert used.registers <= registers, (name, used)
            assert used.shared_bytes <= shared_bytes, (name, used)
            blocks = blocks_per_multiprocessor(
                architecture, threads=THREADS, registers=used.registers, shared_bytes=used.shared_bytes
            )
            few = any(re.search(kernel, name) and architecture == old for kernel, old in ONE_BLOCK)
            assert blocks >= (1 if few else 2), (name, used, blocks)
            if architecture >= 80 and (under_way := bytes_in_flight(name, blocks)) is not None:
                assert under_way >= MIN_IN_FLIGHT, (name, under_way)
                streaming += 1
    assert entry_points <= MAX_ENTRY_POINTS
    assert architecture < 80 or streaming == 51  # all convolutions and tensor-core kernels
    assert size <= MAX_BYTES


@pytest.mark.parametrize("architecture", [75, 80, 90])
def test_resources(architecture: int, nvcc: str) -> None:
    check(architecture)


@pytest.mark.tier2
@pytest.mark.parametrize("architecture", [86, 89, 100, 120])
def test_resources_of_the_other_architectures(architecture: int, nvcc: str) -> None:
    check(architecture)


@pytest.mark.parametrize("architecture", [80, pytest.param(90, marks=pytest.mark.tier2)])
def test_machine_code_uses_tensor_cores(architecture: int, nvcc: str) -> None:
    """HMMA in what ptxas made of the tensor-core kernels, no such thing and no local memory in the others."""
    from cuda_compiler import disassemble, disassembler_path

    if disassembler_path() is None:
        pytest.skip("needs cuobjdump and nvdisasm: triton's, or PyPI's nvidia-cuda-cuobjdump and -nvdisasm")
    for source in KERNELS:
        for name, opcodes in disassemble(source, architecture).items():
            assert ("HMMA" in opcodes) == ("tensor_core" in name), name
            assert not opcodes & {"LDL", "STL"}, f"{name} spills"
            assert ("LDGSTS" in opcodes) == ("tensor_core" in name), name


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared_bytes", "blocks"),
    [
        (90, 256, 141, 8320, 1),  # what cuda_occupancy.h of CUDA 13.0 says
        (90, 256, 128, 8320, 2),
        (75, 256, 32, 2220, 4),
        (86, 256, 32, 2220, 6),
        (80, 256, 32, 2220, 8),
    ],
)
def test_occupancy_rule(
    architecture: int, threads: int, registers: int, shared_bytes: int, blocks: int
) -> None:
    found = blocks_per_multiprocessor(
        architecture, threads=threads, registers=registers, shared_bytes=shared_bytes
    )
    assert found == blocks

# SPDX-License-Identifier: Apache-2.0
"""How many blocks of a kernel run side by side on one multiprocessor (CUDA C++ Programming Guide, compute
capabilities): the rule behind cudaOccupancyMaxActiveBlocksPerMultiprocessor, without a device."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one architecture.

    Attributes:
        max_threads: Resident threads.
        max_blocks: Resident blocks.
        shared_bytes: Shared memory for all blocks.
        reserved_bytes: Shared memory that the system takes per block.
    """

    max_threads: int
    max_blocks: int
    shared_bytes: int
    reserved_bytes: int = 1024


KIB = 1024
MULTIPROCESSORS = {
    75: Multiprocessor(1024, 16, 64 * KIB, reserved_bytes=0),
    80: Multiprocessor(2048, 32, 164 * KIB),
    86: Multiprocessor(1536, 16, 100 * KIB),
    89: Multiprocessor(1536, 24, 100 * KIB),
    90: Multiprocessor(2048, 32, 228 * KIB),
    100: Multiprocessor(2048, 32, 228 * KIB),
    120: Multiprocessor(1536, 24, 100 * KIB),
}
_REGISTERS, _WARP, _REGISTER_UNIT = 65536, 32, 256


def blocks_per_multiprocessor(architecture: int, *, threads: int, registers: int, shared_bytes: int) -> int:
    """Resident blocks.

    Args:
        architecture: 75 to 120.
        threads: Of a block.
        registers: Of a thread.
        shared_bytes: Of a block.
    """
    limits = MULTIPROCESSORS[architecture]
    warps = -(-threads // _WARP)
    per_warp = -(-registers * _WARP // _REGISTER_UNIT) * _REGISTER_UNIT
    by_registers = _REGISTERS // per_warp // 4 * 4 // warps  # four schedulers hold equal numbers of warps
    by_threads = limits.max_threads // (warps * _WARP)
    shared = shared_bytes + limits.reserved_bytes
    by_shared = limits.shared_bytes // shared if shared else limits.max_blocks
    return min(limits.max_blocks, by_registers, by_threads, by_shared)

// SPDX-License-Identifier: Apache-2.0
// Memory of large tensors. A block that comes from the system costs a page fault per page, and the zeros that
// the kernel of the system writes into it: as much as the arithmetic of a depthwise convolution. Blocks are
// therefore kept when their tensor dies, and given to the next that fits.
#pragma once

#include <cstddef>

namespace pfnas {

struct PoolBlock {
  void* data;
  std::size_t num_bytes;  // at least what was asked for
};

struct PoolUse {
  std::size_t in_use_bytes;   // behind living tensors
  std::size_t waiting_bytes;  // kept for the next
};

// A block with a 2 MiB boundary at its start, backed by huge pages where the system has them. The content is
// whatever the last user left. Any thread may take and give back. Throws std::bad_alloc.
PoolBlock take_from_pool(std::size_t num_bytes);
void give_back_to_pool(const PoolBlock& block);

// A block serves tensors down to 4/5 of its size. All blocks together never exceed 5/4 of the blocks that
// were in use at once since the last release; those that wait never exceed a quarter of the machine's memory.
PoolUse pool_use();

// Gives every waiting block back to the system.
void release_pool();

// For tests: fills every waiting block with NaN, so that a read of an unwritten output shows.
void poison_pool();

}  // namespace pfnas

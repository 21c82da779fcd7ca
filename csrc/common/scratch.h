// SPDX-License-Identifier: Apache-2.0
// Reused working memory. Kernels never allocate per call: a fresh block costs a page fault per 4 KB.
#pragma once

#include <cstddef>

namespace pfnas {

enum class Scratch {
  kThread = 0,  // a worker's own tile buffers
  kCall = 1,    // arrays that a whole call, or a worker's part of it, shares
  kResult = 2   // what such parts leave for the rest of the call
};

// A 64-byte aligned buffer of at least `count` floats, owned by the calling thread and kept until it ends.
// The content is whatever the last user left. One buffer per purpose: asking again for the same purpose
// reuses it, and may move it; asking for another purpose does not.
float* thread_scratch(Scratch purpose, std::size_t count);

// Bytes that all threads hold.
std::size_t scratch_bytes();

// Frees the buffers of the calling thread now, and each buffer of every other thread when it next asks for
// that one: a kernel that runs there keeps what it uses. Must not run while a kernel of the calling thread
// does.
void release_scratch();

// Asks for huge pages where the system offers them: without, large arrays cost a page fault and an address
// translation per 4 KB. Contents stay.
void advise_huge_pages(void* data, std::size_t num_bytes);

// For tests: fill every buffer of the calling thread with NaN, so that a read of stale memory shows.
void poison_thread_scratch();

}  // namespace pfnas

// SPDX-License-Identifier: Apache-2.0
#include "common/scratch.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pfnas {
namespace {

constexpr std::size_t kAlignment = 64;
constexpr std::size_t kHugePage = std::size_t{2} << 20;

std::atomic<std::size_t> total_bytes{0};
std::atomic<unsigned> num_releases{0};

struct Buffer {
  float* data = nullptr;
  std::size_t count = 0;
  unsigned seen_releases = 0;

  ~Buffer() { release(); }
  void release() {
    std::free(data);
    total_bytes.fetch_sub(count * sizeof(float), std::memory_order_relaxed);
    data = nullptr;
    count = 0;
  }
  // Memory of another thread cannot be freed from there: each buffer is freed when it is next asked for.
  void obey_release() {
    const unsigned asked = num_releases.load(std::memory_order_relaxed);
    if (asked != seen_releases) release();
    seen_releases = asked;
  }
  float* reserve(std::size_t wanted) {
    if (wanted > count) {
      release();
      const std::size_t alignment = wanted * sizeof(float) < kHugePage ? kAlignment : kHugePage;
      const std::size_t bytes = (wanted * sizeof(float) + alignment - 1) / alignment * alignment;
      data = static_cast<float*>(std::aligned_alloc(alignment, bytes));
      if (data == nullptr) throw std::bad_alloc();
      if (alignment == kHugePage) advise_huge_pages(data, bytes);
      count = bytes / sizeof(float);
      total_bytes.fetch_add(bytes, std::memory_order_relaxed);
    }
    return data;
  }
};

struct ThreadBuffers {
  Buffer by_purpose[3];
};

thread_local ThreadBuffers buffers;

}  // namespace

float* thread_scratch(Scratch purpose, std::size_t count) {
  Buffer& buffer = buffers.by_purpose[static_cast<int>(purpose)];
  buffer.obey_release();
  return buffer.reserve(count);
}

std::size_t scratch_bytes() { return total_bytes.load(std::memory_order_relaxed); }

void release_scratch() {
  num_releases.fetch_add(1, std::memory_order_relaxed);
  for (Buffer& buffer : buffers.by_purpose) buffer.obey_release();
}

void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] std::size_t num_bytes) {
#if defined(__linux__)
  const auto begin = (reinterpret_cast<std::uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const auto end = (reinterpret_cast<std::uintptr_t>(data) + num_bytes) / kHugePage * kHugePage;
  // A refusal costs speed only.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

void poison_thread_scratch() {
  for (Buffer& buffer : buffers.by_purpose) {
    for (std::size_t i = 0; i < buffer.count; ++i) buffer.data[i] = std::numeric_limits<float>::quiet_NaN();
  }
}

}  // namespace pfnas

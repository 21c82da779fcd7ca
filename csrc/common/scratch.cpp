// SPDX-License-Identifier: Apache-2.0
#include "common/scratch.h"

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

struct Buffer {
  float* data = nullptr;
  std::size_t count = 0;

  ~Buffer() { std::free(data); }
  float* reserve(std::size_t wanted) {
    if (wanted > count) {
      std::free(data);
      count = 0;
      const std::size_t alignment = wanted * sizeof(float) < kHugePage ? kAlignment : kHugePage;
      const std::size_t bytes = (wanted * sizeof(float) + alignment - 1) / alignment * alignment;
      data = static_cast<float*>(std::aligned_alloc(alignment, bytes));
      if (data == nullptr) throw std::bad_alloc();
      if (alignment == kHugePage) advise_huge_pages(data, bytes);
      count = bytes / sizeof(float);
    }
    return data;
  }
};

thread_local Buffer buffers[2];

}  // namespace

float* thread_scratch(Scratch purpose, std::size_t count) {
  return buffers[static_cast<int>(purpose)].reserve(count);
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
  for (Buffer& buffer : buffers) {
    for (std::size_t i = 0; i < buffer.count; ++i) buffer.data[i] = std::numeric_limits<float>::quiet_NaN();
  }
}

}  // namespace pfnas

// SPDX-License-Identifier: Apache-2.0
#include "common/scratch.h"

#include <cstdlib>
#include <limits>
#include <new>

namespace pfnas {
namespace {

constexpr std::size_t kAlignment = 64;

struct Buffer {
  float* data = nullptr;
  std::size_t count = 0;

  ~Buffer() { std::free(data); }
  float* reserve(std::size_t wanted) {
    if (wanted > count) {
      std::free(data);
      count = 0;
      const std::size_t bytes = (wanted * sizeof(float) + kAlignment - 1) / kAlignment * kAlignment;
      data = static_cast<float*>(std::aligned_alloc(kAlignment, bytes));
      if (data == nullptr) throw std::bad_alloc();
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

void poison_thread_scratch() {
  for (Buffer& buffer : buffers) {
    for (std::size_t i = 0; i < buffer.count; ++i) buffer.data[i] = std::numeric_limits<float>::quiet_NaN();
  }
}

}  // namespace pfnas

// SPDX-License-Identifier: Apache-2.0
// A tensor as the kernels' callers see it: a borrowed pointer with sizes. Valid only while the Python object
// lives.
#pragma once

#include <cstdint>

#include "common/dlpack.h"

namespace pfnas {

constexpr int kMaxDims = 4;

struct TensorView {
  void* data = nullptr;
  dlpack::Device device{dlpack::kCpu, 0};
  dlpack::DataType dtype{dlpack::kFloat, 32, 1};
  int ndim = 0;
  std::int64_t shape[kMaxDims] = {};
  std::int64_t strides[kMaxDims] = {};  // in elements

  bool is_float32() const { return dtype.code == dlpack::kFloat && dtype.bits == 32 && dtype.lanes == 1; }
  bool is_cpu() const { return device.type == dlpack::kCpu; }
  std::int64_t numel() const {
    std::int64_t count = 1;
    for (int d = 0; d < ndim; ++d) count *= shape[d];
    return count;
  }

  // Strides of size-1 dimensions are arbitrary, and an empty tensor has no elements to misplace.
  bool has_order(const int* slow_to_fast) const {
    if (numel() == 0) return true;
    std::int64_t expected = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      const int d = slow_to_fast[i];
      if (shape[d] != 1 && strides[d] != expected) return false;
      expected *= shape[d];
    }
    return true;
  }
  bool is_contiguous() const {
    constexpr int order[kMaxDims] = {0, 1, 2, 3};
    return has_order(order);
  }
  bool is_channels_last() const {  // [N, C, H, W] stored as N, H, W, C
    constexpr int order[kMaxDims] = {0, 2, 3, 1};
    return ndim == 4 && has_order(order);
  }
};

}  // namespace pfnas

// SPDX-License-Identifier: Apache-2.0
// What happens to the sums of a 1x1 convolution while they are in registers.
#pragma once

#include "common/activation.h"
#include "common/panels.h"
#include "common/simd.h"

namespace pfnas::PFNAS_TIER {

// scale and shift of one vector of channels; a null pointer means 1 or 0.
struct AffineVec {
  Vec scale, shift;
  int lanes;
};

static PFNAS_INLINE Vec load_some(const float* p, int lanes) {
  return lanes == kLanes ? load(p) : load_lanes(p, lanes);
}

static PFNAS_INLINE AffineVec load_affine(const float* scale, const float* shift, std::int64_t first,
                                          std::int64_t num_channels) {
  const int lanes =
      static_cast<int>(max_of<std::int64_t>(0, min_of<std::int64_t>(kLanes, num_channels - first)));
  return {scale == nullptr ? broadcast(1.0f) : load_some(scale + first, lanes),
          shift == nullptr ? Vec{} : load_some(shift + first, lanes), lanes};
}

// y = act((partial + sum) * scale + shift + residual), written as rows of pixels. Pointers are at the panel's
// first channel; `num_channels` of the panel exist.
template <Activation kActivation>
struct OutputSink {
  const float* partial;  // what earlier inputs summed to, or null
  std::int64_t partial_stride;
  const float* scale;
  const float* shift;
  const float* residual;  // or null
  std::int64_t residual_stride;
  const std::int32_t* residual_rows;  // which row of `residual` a row takes, or null: its own
  float* y;
  std::int64_t y_stride;
  std::int64_t num_channels;  // of this panel
  static constexpr bool kAccumulates = false;

  using Column = AffineVec;
  PFNAS_INLINE Vec start(std::int64_t row, int vec) const {
    return partial == nullptr ? Vec{} : load(partial + row * partial_stride + vec * kLanes);
  }
  PFNAS_INLINE Column column(int vec) const { return load_affine(scale, shift, vec * kLanes, num_channels); }
  struct Row {
    float* y;
    const float* residual;
  };
  PFNAS_INLINE Row row(std::int64_t row) const {
    const std::int64_t from = residual_rows == nullptr ? row : residual_rows[row];
    return {y + row * y_stride, residual == nullptr ? nullptr : residual + from * residual_stride};
  }
  PFNAS_INLINE void finish(const Row& row, int vec, const Column& column, Vec sum) const {
    Vec value = sum * column.scale + column.shift;
    if (residual != nullptr) value += load_some(row.residual + vec * kLanes, column.lanes);
    value = activate<kActivation>(value);
    float* out = row.y + vec * kLanes;
    if (column.lanes == kLanes) {
      store(out, value);
    } else {
      store_lanes(out, value, column.lanes);
    }
  }
};

}  // namespace pfnas::PFNAS_TIER

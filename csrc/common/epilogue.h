// SPDX-License-Identifier: Apache-2.0
// What happens to the sums of a 1x1 convolution: y = act(sum * scale + shift + residual).
#pragma once

#include "common/activation.h"
#include "common/panels.h"
#include "common/simd.h"

namespace pfnas::PFNAS_TIER {

// The sink of pointwise_panel that writes channels_last rows. `vec` counts vectors of `kLanes` channels from
// the start of the panel; pointers are at the panel's first channel. num_channels: of this panel, 1 to 48.
template <Activation kActivation>
struct AffineSink {
  const float* scale;     // [num_channels] or null: 1
  const float* shift;     // [num_channels] or null: 0
  const float* residual;  // row m at residual + m * residual_stride, or null
  float* y;               // row m at y + m * y_stride
  std::int64_t residual_stride;
  std::int64_t y_stride;
  int num_channels;

  struct Column {
    Vec scale, shift;
    int lanes;
  };

  PFNAS_INLINE Vec start(std::int64_t, int) const { return Vec{}; }
  PFNAS_INLINE Column column(int vec) const {
    const int lanes = min_of(kLanes, num_channels - vec * kLanes);
    return {scale == nullptr ? broadcast(1.0f) : load_some(scale + vec * kLanes, lanes),
            shift == nullptr ? Vec{} : load_some(shift + vec * kLanes, lanes), lanes};
  }
  PFNAS_INLINE void finish(std::int64_t row, int vec, const Column& column, Vec sum) const {
    Vec value = sum * column.scale + column.shift;
    if (residual != nullptr) {
      value += load_some(residual + row * residual_stride + vec * kLanes, column.lanes);
    }
    value = activate<kActivation>(value);
    float* out = y + row * y_stride + vec * kLanes;
    if (column.lanes == kLanes) {
      store(out, value);
    } else {
      store_lanes(out, value, column.lanes);
    }
  }

 private:
  static PFNAS_INLINE Vec load_some(const float* p, int lanes) {
    return lanes == kLanes ? load(p) : load_lanes(p, lanes);
  }
};

}  // namespace pfnas::PFNAS_TIER

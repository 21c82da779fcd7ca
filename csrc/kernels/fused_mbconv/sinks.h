// SPDX-License-Identifier: Apache-2.0
// Where the sums of the two 1x1 convolutions of a block go (see common/pointwise_tile.h for what a sink is).
#pragma once

#include "common/epilogue.h"

namespace pfnas::PFNAS_TIER {

// Expanded pixels into planes: pixel m of vector v at planes + v * plane_stride + offsets[m].
template <Activation kActivation>
struct PlaneSink {
  const float* scale;
  const float* shift;
  std::int64_t num_channels;  // of this panel
  float* planes;
  std::int64_t plane_stride;
  const std::int32_t* offsets;

  using Column = AffineVec;
  PFNAS_INLINE Vec start(std::int64_t, int) const { return Vec{}; }
  PFNAS_INLINE Column column(int vec) const { return load_affine(scale, shift, vec * kLanes, num_channels); }
  PFNAS_INLINE void finish(std::int64_t row, int vec, const Column& column, Vec sum) const {
    store(planes + vec * plane_stride + offsets[row],
          activate<kActivation>(sum * column.scale + column.shift));
  }
};

// Partial sums over some of the inputs, kept for the next call: [pixels][stride].
struct PartialSink {
  float* sums;
  std::int64_t stride;
  bool is_first;

  struct Column {};
  PFNAS_INLINE Vec start(std::int64_t row, int vec) const {
    return is_first ? Vec{} : load(sums + row * stride + vec * kLanes);
  }
  PFNAS_INLINE Column column(int) const { return {}; }
  PFNAS_INLINE void finish(std::int64_t row, int vec, const Column&, Vec sum) const {
    store(sums + row * stride + vec * kLanes, sum);
  }
};

}  // namespace pfnas::PFNAS_TIER

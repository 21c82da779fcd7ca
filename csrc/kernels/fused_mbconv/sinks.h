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
  static constexpr bool kAccumulates = false;

  using Column = AffineVec;
  PFNAS_INLINE Vec start(std::int64_t, int) const { return Vec{}; }
  using Row = float*;
  PFNAS_INLINE Column column(int vec) const { return load_affine(scale, shift, vec * kLanes, num_channels); }
  PFNAS_INLINE Row row(std::int64_t row) const { return planes + offsets[row]; }
  PFNAS_INLINE void finish(Row to, int vec, const Column& column, Vec sum) const {
    store(to + vec * plane_stride, activate<kActivation>(sum * column.scale + column.shift));
  }
};

// Partial sums over some of the inputs, kept for the next call: [pixels][stride].
struct PartialSink {
  float* sums;
  std::int64_t stride;
  bool is_first;
  static constexpr bool kAccumulates = false;

  struct Column {};
  PFNAS_INLINE Vec start(std::int64_t row, int vec) const {
    return is_first ? Vec{} : load(sums + row * stride + vec * kLanes);
  }
  using Row = float*;
  PFNAS_INLINE Column column(int) const { return {}; }
  PFNAS_INLINE Row row(std::int64_t row) const { return sums + row * stride; }
  PFNAS_INLINE void finish(Row to, int vec, const Column&, Vec sum) const { store(to + vec * kLanes, sum); }
};

}  // namespace pfnas::PFNAS_TIER

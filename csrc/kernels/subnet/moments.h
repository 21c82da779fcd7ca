// SPDX-License-Identifier: Apache-2.0
// Mean and variance per channel: summed in float32 over up to 256 pixels around the first of them, so that a
// large mean does not eat the variance, and joined in float64 beyond, in an order that the shape alone
// decides.
#pragma once

#include "common/pointwise_tile.h"
#include "common/simd.h"

namespace pfnas::PFNAS_TIER {

constexpr std::int64_t kPixelsPerSum = 256;

// Moments of one work item: mean and sum of squared deviations of `channels` channels.
struct ItemMoments {
  double* mean;
  double* deviation;

  // Adds `more` values to the `count` that there are; channel by channel.
  PFNAS_INLINE void join(std::int64_t c, std::int64_t count, double other_mean, double other_deviation,
                         std::int64_t more) const {
    if (count == 0) {
      mean[c] = other_mean;
      deviation[c] = other_deviation;
      return;
    }
    const double share = static_cast<double>(more) / static_cast<double>(count + more);
    const double delta = other_mean - mean[c];
    mean[c] += delta * share;
    deviation[c] += other_deviation + delta * delta * static_cast<double>(count) * share;
  }

  // Sums of up to one panel of channels from `first`, taken around `pivot`.
  void join_sums(std::int64_t first, std::int64_t num_channels, std::int64_t count, const float* pivot,
                 const float* sums, const float* squares, std::int64_t more) const {
    const double inverse = 1.0 / static_cast<double>(more);
    for (std::int64_t c = 0; c < num_channels; ++c) {
      const double sum = sums[c];
      join(first + c, count, pivot[c] + sum * inverse, squares[c] - sum * sum * inverse, more);
    }
  }
};

// All items of a layer.
struct MomentTable {
  double* data;  // [items][2][channels]
  std::int64_t channels;

  ItemMoments item(std::int64_t i) const {
    double* row = data + i * 2 * channels;
    return {row, row + channels};
  }
};

// Adds pixels [num_pixels][stride], channels [first, first + num_vecs * lanes) of them, to moments of `count`
// pixels. `data` is at channel `first`.
static inline void add_pixels(const ItemMoments& moments, std::int64_t first, std::int64_t num_channels,
                              std::int64_t count, const float* data, std::int64_t stride,
                              std::int64_t num_pixels) {
  for (std::int64_t begin = 0; begin < num_pixels; begin += kPixelsPerSum) {
    const std::int64_t n = min_of(kPixelsPerSum, num_pixels - begin);
    for (std::int64_t c = 0; c < num_channels; c += kLanes) {
      const float* in = data + begin * stride + c;
      const Vec pivot = load(in);
      Vec sum[2] = {}, square[2] = {};
      std::int64_t m = 0;
      for (; m + 2 <= n; m += 2, in += 2 * stride) {
        PFNAS_UNROLL for (int u = 0; u < 2; ++u) {
          const Vec value = load(in + u * stride) - pivot;
          sum[u] += value;
          square[u] += value * value;
        }
      }
      if (m < n) {
        const Vec value = load(in) - pivot;
        sum[0] += value;
        square[0] += value * value;
      }
      float pivots[kLanes], sums[kLanes], squares[kLanes];
      store(pivots, pivot);
      store(sums, sum[0] + sum[1]);
      store(squares, square[0] + square[1]);
      moments.join_sums(first + c, min_of<std::int64_t>(kLanes, num_channels - c), count, pivots, sums,
                        squares, n);
    }
    count += n;
  }
}

// Sink of a 1x1 convolution (common/pointwise_tile.h) that keeps the sums of one panel only.
struct MomentSink {
  const float* pivot;  // [48]
  float* sums;         // [48]
  float* squares;      // [48]
  static constexpr bool kAccumulates = true;

  struct Column {
    Vec pivot, sum, square;
  };
  struct Row {};
  PFNAS_INLINE Vec start(std::int64_t, int) const { return Vec{}; }
  PFNAS_INLINE Column column(int vec) const {
    return {load(pivot + vec * kLanes), load(sums + vec * kLanes), load(squares + vec * kLanes)};
  }
  PFNAS_INLINE Row row(std::int64_t) const { return {}; }
  PFNAS_INLINE void finish(const Row&, int, Column& column, Vec sum) const {
    const Vec value = sum - column.pivot;
    column.sum += value;
    column.square += value * value;
  }
  PFNAS_INLINE void close(int vec, const Column& column) const {
    store(sums + vec * kLanes, column.sum);
    store(squares + vec * kLanes, column.square);
  }
};

// Sink that keeps one pixel.
struct PivotSink {
  float* pivot;  // [48]
  static constexpr bool kAccumulates = false;

  struct Column {};
  struct Row {};
  PFNAS_INLINE Vec start(std::int64_t, int) const { return Vec{}; }
  PFNAS_INLINE Column column(int) const { return {}; }
  PFNAS_INLINE Row row(std::int64_t) const { return {}; }
  PFNAS_INLINE void finish(const Row&, int vec, const Column&, Vec sum) const {
    store(pivot + vec * kLanes, sum);
  }
};

}  // namespace pfnas::PFNAS_TIER

// SPDX-License-Identifier: Apache-2.0
// Depthwise convolution of one vector of channels, from a plane in cache to rows of pixels, with folded batch
// normalisation, activation and the sums for pooling.
//
// A plane is [rows][columns][lanes]. Rows may form a ring: row y of the image is row y % num_rows. Rows
// outside the image are skipped, not padded. Columns outside it are zeros in memory, or, where one tile
// covers the whole row (maps of 5, 7, 10 columns), left out at compile time: of 35 products of a 7-tap row
// over 5 columns, 12 would be with zeros.
#pragma once

#include "common/activation.h"
#include "common/simd.h"

namespace pfnas::PFNAS_TIER {

constexpr int kFilterBlock = 16;  // channels per block of the filter, in every tier

struct DepthwiseJob {
  const float* plane;       // of the first image; column 0 is the first one in memory
  std::int64_t num_rows;    // of the plane
  std::int64_t row_stride;  // in floats, as all strides
  std::int64_t height;      // of the image
  const float* filter;      // [K * K] taps, kFilterBlock floats apart
  Vec scale, shift;
  Activation activation;
  float* out;  // column 0 of row y_begin
  std::int64_t out_row_stride;
  std::int64_t out_col_stride;
  std::int64_t out_width;
  std::int64_t y_begin, y_end;  // rows of the output
  float* pool;                  // [lanes], the outputs are added to it; or null
};

template <Activation kActivation, int kWidth>
static PFNAS_INLINE void finish_depthwise_tile(const DepthwiseJob& job, Vec (&sums)[kWidth], float* out,
                                               int columns) {
  PFNAS_UNROLL for (int c = 0; c < kWidth; ++c) {
    sums[c] = activate<kActivation>(sums[c] * job.scale + job.shift);
  }
  if (columns >= kWidth) {
    PFNAS_UNROLL for (int c = 0; c < kWidth; ++c) store(out + c * job.out_col_stride, sums[c]);
  } else {
    PFNAS_UNROLL for (int c = 0; c < kWidth; ++c) {
      if (c < columns) store(out + c * job.out_col_stride, sums[c]);
    }
  }
  if (job.pool == nullptr) return;
  Vec total{};
  PFNAS_UNROLL for (int c = 0; c < kWidth; ++c) {
    if (c < columns) total += sums[c];
  }
  store(job.pool, load(job.pool) + total);
}

// One tap row: every loaded column feeds up to K sums. kWhole: the row has kWidth * S columns and nothing
// else.
template <int K, int S, int kWidth, bool kWhole>
static PFNAS_INLINE void depthwise_tap_row(const float* in, const float* filter, Vec (&sums)[kWidth]) {
  constexpr int kPad = kWhole ? K / 2 : 0;
  constexpr int kColumns = kWhole ? kWidth * S : (kWidth - 1) * S + K;
  Vec taps[K];
  PFNAS_UNROLL for (int s = 0; s < K; ++s) taps[s] = load(filter + s * kFilterBlock);
  PFNAS_UNROLL for (int x = 0; x < kColumns; ++x) {
    const Vec value = load_once(in + x * kLanes);
    PFNAS_UNROLL for (int s = 0; s < K; ++s) {
      const int shifted = x + kPad - s;
      if (shifted >= 0 && shifted % S == 0 && shifted / S < kWidth) sums[shifted / S] += value * taps[s];
    }
  }
}

template <int K, int S, int kWidth, bool kWhole>
void depthwise_rows(const DepthwiseJob& job) {
  constexpr int P = K / 2;
  for (std::int64_t y = job.y_begin; y < job.y_end; ++y) {
    const std::int64_t top = y * S - P;
    const int first = static_cast<int>(max_of<std::int64_t>(0, -top));
    const int end = static_cast<int>(min_of<std::int64_t>(K, job.height - top));
    const float* rows[K];
    std::int64_t ring = (top + first) % job.num_rows;
    for (int r = first; r < end; ++r) {
      rows[r] = job.plane + ring * job.row_stride;
      if (++ring == job.num_rows) ring = 0;
    }
    float* out = job.out + (y - job.y_begin) * job.out_row_stride;
    for (std::int64_t i = 0; i < job.out_width; i += kWidth) {
      Vec sums[kWidth] = {};
      for (int r = first; r < end; ++r) {
        const float* in = rows[r] + i * S * kLanes;
        __asm__("" : "+r"(in));  // else GCC keeps the address of each column in a register of its own
        depthwise_tap_row<K, S, kWidth, kWhole>(in, job.filter + r * K * kFilterBlock, sums);
      }
      const int columns = static_cast<int>(min_of<std::int64_t>(kWidth, job.out_width - i));
      dispatch_activation(job.activation, [&](auto tag) {
        finish_depthwise_tile<decltype(tag)::value>(job, sums, out + i * job.out_col_stride, columns);
      });
    }
  }
}

// What runs a shape: the function, its tile, and whether planes need zero columns.
struct DepthwiseKernel {
  void (*run)(const DepthwiseJob&) = nullptr;
  int width = 0;
  bool whole_rows = false;
};

template <int K, int S, int kWidth>
static void offer_depthwise(std::int64_t width, std::int64_t out_width, DepthwiseKernel& best) {
  // Registers, and columns that PFNAS_UNROLL takes apart.
  if constexpr (kWidth + K + 1 <= kNumRegisters && (kWidth - 1) * S + K <= 32) {
    if (best.whole_rows) return;
    if (width == kWidth * S && out_width == kWidth) {
      best = {depthwise_rows<K, S, kWidth, true>, kWidth, true};
      return;
    }
    // Columns computed, plus what starting a tile costs.
    const auto cost = [&](int tile) { return static_cast<double>(ceil_div(out_width, tile)) * (tile + 1.5); };
    if (best.run == nullptr || cost(kWidth) <= cost(best.width)) {
      best = {depthwise_rows<K, S, kWidth, false>, kWidth, false};
    }
  }
}

template <int K, int S>
static DepthwiseKernel select_depthwise(std::int64_t width, std::int64_t out_width) {
  DepthwiseKernel best;
  offer_depthwise<K, S, 4>(width, out_width, best);
  offer_depthwise<K, S, 5>(width, out_width, best);
  offer_depthwise<K, S, 6>(width, out_width, best);
  offer_depthwise<K, S, 7>(width, out_width, best);
  offer_depthwise<K, S, 8>(width, out_width, best);
  offer_depthwise<K, S, 10>(width, out_width, best);
  offer_depthwise<K, S, 14>(width, out_width, best);
  offer_depthwise<K, S, 20>(width, out_width, best);
  return best;
}

static inline DepthwiseKernel select_depthwise(int kernel_size, int stride, std::int64_t width,
                                               std::int64_t out_width) {
  switch (kernel_size * 10 + stride) {
    case 31:
      return select_depthwise<3, 1>(width, out_width);
    case 32:
      return select_depthwise<3, 2>(width, out_width);
    case 51:
      return select_depthwise<5, 1>(width, out_width);
    case 52:
      return select_depthwise<5, 2>(width, out_width);
    case 71:
      return select_depthwise<7, 1>(width, out_width);
    default:
      return select_depthwise<7, 2>(width, out_width);
  }
}

}  // namespace pfnas::PFNAS_TIER

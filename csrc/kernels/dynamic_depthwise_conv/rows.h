// SPDX-License-Identifier: Apache-2.0
// Which register tiles a shape runs, and how large the planes are that they read.
#pragma once

#include "common/check.h"
#include "common/simd.h"
#include "kernels/dynamic_depthwise_conv/filter.h"
#include "kernels/dynamic_depthwise_conv/params.h"
#include "kernels/dynamic_depthwise_conv/planes.h"
#include "kernels/dynamic_depthwise_conv/tiles.h"

namespace pfnas::PFNAS_TIER {

// The functions a shape runs, with the widths of their tiles.
struct RowKernels {
  void (*forward)(const ConvJob&) = nullptr;
  void (*grad_input)(const ConvJob&) = nullptr;
  void (*grad_filter)(const GradFilterJob&) = nullptr;
  int forward_width = 0;
  int grad_input_width = 0;
  int grad_filter_width = 0;
};

// Columns computed when `width` is covered by tiles of `tile`, plus what starting a tile costs (K loads of
// the taps).
static inline double cover_cost(std::int64_t width, int tile) {
  return static_cast<double>(ceil_div(width, tile)) * (tile + 1.0);
}

template <int K, int S, int kWidth>
static inline void offer_width(std::int64_t width, std::int64_t out_width, RowKernels& best) {
  if constexpr (kWidth + K + 1 <= kNumRegisters) {
    if (best.forward == nullptr ||
        cover_cost(out_width, kWidth) < cover_cost(out_width, best.forward_width)) {
      best.forward = forward_rows<K, S, kWidth>;
      best.forward_width = kWidth;
    }
    if constexpr (kWidth % S == 0) {
      if (best.grad_input == nullptr ||
          cover_cost(width, kWidth) < cover_cost(width, best.grad_input_width)) {
        best.grad_input = grad_input_rows<K, S, kWidth>;
        best.grad_input_width = kWidth;
      }
    }
  }
  if constexpr (kWidth + K * grad_filter_num_rows(K) + 1 <= kNumRegisters) {
    if (best.grad_filter == nullptr ||
        cover_cost(out_width, kWidth) < cover_cost(out_width, best.grad_filter_width)) {
      best.grad_filter = grad_filter_rows<K, S, kWidth>;
      best.grad_filter_width = kWidth;
    }
  }
}

// Widths that tile the maps of 160- and 224-px nets (5, 10, 20, 40, 80 and 7, 14, 28, 56) with little waste.
template <int K, int S>
static inline RowKernels select_rows(const DynamicDepthwiseConvParams& p) {
  RowKernels best;
  offer_width<K, S, 4>(p.width, p.out_width, best);
  offer_width<K, S, 5>(p.width, p.out_width, best);
  offer_width<K, S, 6>(p.width, p.out_width, best);
  offer_width<K, S, 7>(p.width, p.out_width, best);
  offer_width<K, S, 8>(p.width, p.out_width, best);
  offer_width<K, S, 10>(p.width, p.out_width, best);
  offer_width<K, S, 14>(p.width, p.out_width, best);
  return best;
}

static inline RowKernels select_rows(const DynamicDepthwiseConvParams& p) {
  switch (p.kernel_size * 10 + p.stride) {
    case 31:
      return select_rows<3, 1>(p);
    case 32:
      return select_rows<3, 2>(p);
    case 51:
      return select_rows<5, 1>(p);
    case 52:
      return select_rows<5, 2>(p);
    case 71:
      return select_rows<7, 1>(p);
    case 72:
      return select_rows<7, 2>(p);
    default:
      PFNAS_CHECK(false);
  }
  return {};
}

static inline double conv_flops(const DynamicDepthwiseConvParams& p) {
  return 2.0 * static_cast<double>(p.batch * p.channels * p.out_height * p.out_width) * p.kernel_size *
         p.kernel_size;
}

static inline int valid_channels(const DynamicDepthwiseConvParams& p, std::int64_t block) {
  return static_cast<int>(min_of<std::int64_t>(kBlock, p.channels - block * kBlock));
}

static inline Image x_image(const DynamicDepthwiseConvParams& p, const float* data) {
  return {data, p.height, p.width, p.channels};
}
static inline Image y_image(const DynamicDepthwiseConvParams& p, const float* data) {
  return {data, p.out_height, p.out_width, p.channels};
}

static inline std::int64_t round_up(std::int64_t value, std::int64_t step) {
  return ceil_div(value, step) * step;
}

// Pitches: the columns that the tiles read, which may reach beyond the image where a tile does.
static inline Planes input_planes(const DynamicDepthwiseConvParams& p, const RowKernels& rows) {
  const std::int64_t tiled =
      max_of(round_up(p.out_width, rows.forward_width), round_up(p.out_width, rows.grad_filter_width));
  Planes x;
  x.pad = p.kernel_size / 2;
  x.width = p.width;
  x.height = p.height;
  x.pitch = max_of(x.pad + x.width, (tiled - 1) * p.stride + p.kernel_size);
  return x;
}

static inline Planes grad_planes(const DynamicDepthwiseConvParams& p, const RowKernels& rows) {
  const std::int64_t half = p.kernel_size / 2;
  const std::int64_t last_read = (round_up(p.width, rows.grad_input_width) - 1 + half) / p.stride;
  Planes g;
  g.pad = half;
  g.width = p.out_width;
  g.height = p.out_height;
  g.pitch = half + max_of(round_up(p.out_width, rows.grad_filter_width), last_read + 1);
  return g;
}

// Rows of x that rows [begin, end) of y read.
static inline std::int64_t first_input_row(const DynamicDepthwiseConvParams& p, std::int64_t begin) {
  return max_of<std::int64_t>(0, begin * p.stride - p.kernel_size / 2);
}
static inline std::int64_t end_input_row(const DynamicDepthwiseConvParams& p, std::int64_t end) {
  return min_of<std::int64_t>(p.height, (end - 1) * p.stride - p.kernel_size / 2 + p.kernel_size);
}

}  // namespace pfnas::PFNAS_TIER

// SPDX-License-Identifier: Apache-2.0
// Tiles that read channels_last memory as it is, without packing it first: for small filters the copy costs
// as much as the arithmetic. They need whole vectors of channels and a width that tiles divide. Columns and
// rows outside the image are read from a vector of zeros.
#pragma once

#include "common/simd.h"
#include "kernels/dynamic_depthwise_conv/filter.h"
#include "kernels/dynamic_depthwise_conv/params.h"
#include "kernels/dynamic_depthwise_conv/planes.h"
#include "kernels/dynamic_depthwise_conv/tiles.h"

namespace pfnas::PFNAS_TIER {

alignas(64) static constexpr float kZeros[kLanes] = {};

// One vector of channels of an activation, [images][height][width][col_stride].
struct MapView {
  const float* data;
  std::int64_t height;
  std::int64_t width;
  std::int64_t col_stride;  // = C

  std::int64_t row_stride() const { return width * col_stride; }
  const float* row(std::int64_t image, std::int64_t y) const {
    return data + (image * height + y) * row_stride();
  }
};

// Rows of one image; all the channels of a tile before the next tile, so that memory is read in order.
struct DirectConvJob {
  MapView in;            // forward: x; gradient to the input: grad_y
  const float* filters;  // [num_blocks][K * K taps][kBlock]
  float* out;            // [images][out_height][out_width][col_stride]
  std::int64_t out_height;
  std::int64_t out_width;
  std::int64_t num_channels;  // a multiple of kLanes
  bool streams;               // the output goes past the caches
  bool fetches;               // what the next row reads
};

// `kCount` columns from `first` on of one row of the map, with what leads to the same column one row further.
template <int kCount>
struct OuterColumns {
  const float* at[kCount + 1];
  std::int64_t step[kCount + 1];
  bool exists[kCount + 1];

  PFNAS_INLINE OuterColumns(const MapView& map, const float* row, std::int64_t first, std::int64_t row_step) {
    PFNAS_UNROLL for (int i = 0; i < kCount; ++i) {
      const bool inside = first + i >= 0 && first + i < map.width;
      at[i] = inside ? row + (first + i) * map.col_stride : kZeros;
      step[i] = inside ? row_step : 0;
      exists[i] = inside;
    }
  }
  PFNAS_INLINE OuterColumns channel(std::int64_t c) const {
    OuterColumns moved = *this;
    PFNAS_UNROLL for (int i = 0; i < kCount; ++i) moved.at[i] += exists[i] ? c : 0;
    return moved;
  }
  PFNAS_INLINE void advance() { PFNAS_UNROLL for (int i = 0; i < kCount; ++i) at[i] += step[i]; }
};

// Fetches the lines of kCols columns of kRows rows into L2.
template <int kRows, int kCols>
static PFNAS_INLINE void fetch_columns(const float* at, std::int64_t row_stride, std::int64_t col_stride) {
  PFNAS_UNROLL for (int a = 0; a < kRows; ++a, at += row_stride) {
    const float* line = at;
    PFNAS_UNROLL for (int i = 0; i < kCols; ++i, line += col_stride) __builtin_prefetch(line, 0, 2);
  }
}

// Columns that a tile reads: kLeft and kRight of them may lie outside the image. Column q times tap s goes to
// output `target(q, s)`, if that is one of the tile's.
template <int K, int S, int kWidth>
struct ForwardColumns {
  static constexpr int kLeft = K / 2, kBody = (kWidth - 1) * S + 1, kRight = K / 2;
  static constexpr int target(int q, int s) {
    return q >= s && (q - s) % S == 0 && (q - s) / S < kWidth ? (q - s) / S : -1;
  }
};
template <int K, int S, int kWidth>
struct GradInputColumns {
  static constexpr int kLeft = K / 2 / S, kBody = kWidth / S, kRight = (kWidth - 1 + K / 2) / S - kBody + 1;
  static constexpr int target(int q, int s) {
    const int p = S * (q - kLeft) + s - K / 2;
    return p >= 0 && p < kWidth ? p : -1;
  }
};

// `ahead`: column `col` of the first of kAhead rows that the next row of the output reads besides; null:
// none.
template <class Columns, int K, int kWidth, int kAhead>
static PFNAS_INLINE void direct_tile(const DirectConvJob& job, const float* row, std::int64_t col,
                                     std::int64_t row_step, std::int64_t w_begin, std::int64_t w_step,
                                     int num_rows, const float* ahead, float* out) {
  constexpr int kBodyEnd = Columns::kLeft + Columns::kBody;
  const OuterColumns<Columns::kLeft> all_left(job.in, row, col - Columns::kLeft, row_step);
  const OuterColumns<Columns::kRight> all_right(job.in, row, col + Columns::kBody, row_step);
  const std::int64_t out_row_stride = job.out_width * job.in.col_stride;
  for (std::int64_t c = 0; c < job.num_channels; c += kLanes, out += kLanes) {
    OuterColumns<Columns::kLeft> left = all_left.channel(c);
    OuterColumns<Columns::kRight> right = all_right.channel(c);
    const float* body = row + col * job.in.col_stride + c;
    const float* w = job.filters + c / kBlock * K * K * kBlock + c % kBlock + w_begin;
    if (ahead != nullptr) {
      fetch_columns<kAhead, Columns::kBody + 1>(ahead + c, job.in.row_stride(), job.in.col_stride);
    }
    if (!job.streams) fetch_columns<1, kWidth>(out + out_row_stride, 0, job.in.col_stride);
    Vec sums[kWidth] = {};
    for (int r = 0; r < num_rows; ++r, body += row_step, w += w_step) {
      Vec taps[K];
      PFNAS_UNROLL for (int s = 0; s < K; ++s) taps[s] = load(w + s * kBlock);
      const float* x = body;
      PFNAS_UNROLL for (int q = 0; q < kBodyEnd + Columns::kRight; ++q) {
        PFNAS_KEEP_ORDER;
        Vec value;
        if (q < Columns::kLeft) {
          value = load(left.at[q]);
        } else if (q >= kBodyEnd) {
          value = load(right.at[q - kBodyEnd]);
        } else {
          value = load(x);
          x += job.in.col_stride;
        }
        PFNAS_UNROLL for (int s = 0; s < K; ++s) {
          const int p = Columns::target(q, s);
          if (p >= 0) sums[p] += value * taps[s];
        }
      }
      left.advance();
      right.advance();
    }
    if (kCanStream && job.streams) {
      PFNAS_UNROLL for (int i = 0; i < kWidth; ++i) stream(out + i * job.in.col_stride, sums[i]);
    } else {
      PFNAS_UNROLL for (int i = 0; i < kWidth; ++i) store(out + i * job.in.col_stride, sums[i]);
    }
  }
}

template <int K, int S, int kWidth>
void direct_forward_row(const DirectConvJob& job, std::int64_t image, std::int64_t y) {
  using Columns = ForwardColumns<K, S, kWidth>;
  const std::int64_t top = y * S - K / 2;
  const auto r_begin = max_of<std::int64_t>(0, -top), r_end = min_of<std::int64_t>(K, job.in.height - top);
  const float* row = job.in.row(image, top + r_begin);
  float* out = job.out + (image * job.out_height + y) * job.out_width * job.in.col_stride;
  for (std::int64_t i = 0; i < job.out_width; i += kWidth) {
    const float* ahead = job.fetches ? job.in.row(image, top + K) + i * S * job.in.col_stride : nullptr;
    direct_tile<Columns, K, kWidth, S>(job, row, i * S, job.in.row_stride(), r_begin * K * kBlock, K * kBlock,
                                       static_cast<int>(r_end - r_begin), ahead, out + i * job.in.col_stride);
  }
}

template <int K, int S, int kWidth>
void direct_grad_input_row(const DirectConvJob& job, std::int64_t image, std::int64_t y) {
  using Columns = GradInputColumns<K, S, kWidth>;
  // Row y gets row (y + P - r) / S of grad_y through filter row r.
  constexpr int P = K / 2;
  const std::int64_t below = max_of<std::int64_t>(0, y + P - S * (job.in.height - 1));
  const std::int64_t r_begin = below + (y + P - below) % S, r_end = min_of<std::int64_t>(K, y + P + 1);
  const int num_rows = r_end > r_begin ? static_cast<int>((r_end - r_begin + S - 1) / S) : 0;
  const float* row = job.in.row(image, (y + P - r_begin) / S);
  float* out = job.out + (image * job.out_height + y) * job.out_width * job.in.col_stride;
  for (std::int64_t i = 0; i < job.out_width; i += kWidth) {
    const float* ahead =
        job.fetches && y % S == 0 ? job.in.row(image, (y + P) / S + 1) + i / S * job.in.col_stride : nullptr;
    direct_tile<Columns, K, kWidth, 1>(job, row, i / S, -job.in.row_stride(), r_begin * K * kBlock,
                                       S * K * kBlock, num_rows, ahead, out + i * job.in.col_stride);
  }
}

struct DirectGradFilterJob {
  MapView x;
  MapView grad_y;
  float* grads;               // [num_blocks][K * K taps][kBlock]; added to
  std::int64_t num_channels;  // a multiple of kLanes
  bool fetches;               // what the next row reads
};

template <int K, int S, int kWidth>
static PFNAS_INLINE void direct_grad_filter_tile(const DirectGradFilterJob& job, std::int64_t image,
                                                 std::int64_t y, std::int64_t col) {
  constexpr int P = K / 2, kBodyEnd = P + (kWidth - 1) * S + 1;
  const float* all_g = job.grad_y.row(image, y) + col * job.grad_y.col_stride;
  for (std::int64_t c = 0; c < job.num_channels; c += kLanes) {
    float* sums_at = job.grads + c / kBlock * K * K * kBlock + c % kBlock;
    const float* g = all_g + c;
    const float* ahead = job.x.row(image, y * S - P + K) + col * S * job.x.col_stride + c;
    if (job.fetches) {
      fetch_columns<S, S * kWidth>(ahead, job.x.row_stride(), job.x.col_stride);
      fetch_columns<1, kWidth>(g + 2 * job.grad_y.row_stride(), 0, job.grad_y.col_stride);
    }
    Vec grads[kWidth];
    PFNAS_UNROLL for (int j = 0; j < kWidth; ++j, g += job.grad_y.col_stride) grads[j] = load(g);
    for (int r = 0; r < K; ++r) {
      const std::int64_t in_row = y * S - P + r;
      if (in_row < 0 || in_row >= job.x.height) continue;
      Vec sums[K];
      PFNAS_UNROLL for (int s = 0; s < K; ++s) sums[s] = load(sums_at + (r * K + s) * kBlock);
      const float* row = job.x.row(image, in_row) + c;
      const float* x = row + (col * S - P) * job.x.col_stride;
      PFNAS_UNROLL for (int q = 0; q < kBodyEnd + P; ++q, x += job.x.col_stride) {
        PFNAS_KEEP_ORDER;
        const float* at = x;
        if (q < P) at = col * S - P + q < 0 ? kZeros : x;
        if (q >= kBodyEnd) at = col * S - P + q >= job.x.width ? kZeros : x;
        const Vec value = load(at);
        PFNAS_UNROLL for (int s = 0; s < K; ++s) {
          const int j = ForwardColumns<K, S, kWidth>::target(q, s);
          if (j >= 0) sums[s] += value * grads[j];
        }
      }
      PFNAS_UNROLL for (int s = 0; s < K; ++s) store(sums_at + (r * K + s) * kBlock, sums[s]);
    }
  }
}

template <int K, int S, int kWidth>
void direct_grad_filter_row(const DirectGradFilterJob& job, std::int64_t image, std::int64_t y) {
  for (std::int64_t i = 0; i < job.grad_y.width; i += kWidth) {
    direct_grad_filter_tile<K, S, kWidth>(job, image, y, i);
  }
}

// The functions a shape runs without packing; null: it is packed.
struct DirectKernels {
  void (*forward)(const DirectConvJob&, std::int64_t image, std::int64_t y) = nullptr;
  void (*grad_input)(const DirectConvJob&, std::int64_t image, std::int64_t y) = nullptr;
  void (*grad_filter)(const DirectGradFilterJob&, std::int64_t image, std::int64_t y) = nullptr;
  int forward_width = 0;
  int grad_input_width = 0;
  int grad_filter_width = 0;
};

// Later offers are wider, and better: they load each tap and each outer column for more outputs.
template <int K, int S, int kWidth>
static inline void offer_direct(const DynamicDepthwiseConvParams& p, DirectKernels& best) {
  if constexpr (kWidth + K + 1 <= kNumRegisters) {
    if (p.out_width % kWidth == 0) {
      best.forward = direct_forward_row<K, S, kWidth>;
      best.forward_width = kWidth;
    }
    if constexpr (kWidth % S == 0) {
      if (p.width % kWidth == 0) {
        best.grad_input = direct_grad_input_row<K, S, kWidth>;
        best.grad_input_width = kWidth;
      }
    }
  }
  if constexpr (kWidth + K * K + 1 <= kNumRegisters) {
    if (p.out_width % kWidth == 0) {
      best.grad_filter = direct_grad_filter_row<K, S, kWidth>;
      best.grad_filter_width = kWidth;
    }
  }
}

template <int K, int S>
static inline DirectKernels select_direct_kernels(const DynamicDepthwiseConvParams& p) {
  DirectKernels best;
  offer_direct<K, S, 4>(p, best);
  offer_direct<K, S, 5>(p, best);
  offer_direct<K, S, 6>(p, best);
  offer_direct<K, S, 7>(p, best);
  offer_direct<K, S, 8>(p, best);
  offer_direct<K, S, 10>(p, best);
  offer_direct<K, S, 14>(p, best);
  return best;
}

static inline DirectKernels select_direct_kernels(const DynamicDepthwiseConvParams& p) {
  if (p.kernel_size != 3 || p.channels % kLanes != 0) return {};
  return p.stride == 1 ? select_direct_kernels<3, 1>(p) : select_direct_kernels<3, 2>(p);
}

}  // namespace pfnas::PFNAS_TIER

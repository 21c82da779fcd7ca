// SPDX-License-Identifier: Apache-2.0
// Register tiles. Each works on one vector of channels of planes packed as [rows][columns][lanes] with zero
// columns on both sides, keeps its sums in registers, and feeds every loaded vector to up to K multiply-adds.
// Rows outside the image are skipped rather than padded: on a 5x5 map with K = 7 that saves a third of the
// work.
#pragma once

#include "common/simd.h"
#include "kernels/dynamic_depthwise_conv/filter.h"

namespace pfnas::PFNAS_TIER {

// One vector of channels of a packed slab: a few images, or a band of rows of one. Column 0 of the image is
// column P.
struct PlaneView {
  const float* data;          // column 0 of the plane, row `first_row` of the first image
  std::int64_t row_stride;    // in floats
  std::int64_t image_stride;  // in floats
  std::int64_t first_row;
  std::int64_t height;  // of the image: rows 0 .. height - 1 exist

  const float* row(std::int64_t image, std::int64_t y) const {
    return data + image * image_stride + (y - first_row) * row_stride;
  }
};

// Memory that the next step will touch, fetched into L2 while this one computes: reading it in one burst
// while packing would leave the memory idle during the arithmetic. `base` is null where there is nothing to
// fetch.
struct Ahead {
  const float* base =
      nullptr;  // channels_last, column 0 of what the next step holds instead of row 0 of this one
  std::int64_t col_stride = 0;  // in floats; one cache line per column
  std::int64_t row_stride = 0;
  std::int64_t image_stride = 0;
  std::int64_t last_row = 0;  // rows beyond it are not fetched

  template <int kCount>
  PFNAS_INLINE void fetch(std::int64_t image, std::int64_t row, std::int64_t col) const {
    if (base == nullptr || row > last_row) return;
    const float* line = base + image * image_stride + row * row_stride + col * col_stride;
    PFNAS_UNROLL for (int i = 0; i < kCount; ++i) __builtin_prefetch(line + i * col_stride, 0, 2);
  }
};

struct ConvJob {
  PlaneView in;         // forward: x; gradient to the input: grad_y
  const float* filter;  // [K * K taps], kBlock floats apart
  float* out;           // column 0 of row 0 of the first image of the output, at this vector's first channel
  std::int64_t out_image_stride;  // in floats
  std::int64_t out_row_stride;
  std::int64_t out_col_stride;  // = C
  std::int64_t out_width;
  std::int64_t num_images;
  std::int64_t y_begin, y_end;  // rows of the output
  int lanes;                    // channels of the vector that exist
  bool streams;                 // the output goes past the caches
  Ahead ahead_in, ahead_out;    // forward: x and y; gradient to the input: grad_y and grad_x
  Ahead ahead_x;                // gradient to the input only
};

template <int kWidth>
static PFNAS_INLINE void store_tile(const Vec (&sums)[kWidth], const ConvJob& job, float* out,
                                    std::int64_t num_cols) {
  if (kCanStream && job.streams && num_cols == kWidth) {
    PFNAS_UNROLL for (int i = 0; i < kWidth; ++i) stream(out + i * job.out_col_stride, sums[i]);
    return;
  }
  if (num_cols == kWidth && job.lanes == kLanes) {
    PFNAS_UNROLL for (int i = 0; i < kWidth; ++i) store(out + i * job.out_col_stride, sums[i]);
    return;
  }
  // The ragged right edge, or fewer channels than lanes: through memory, to keep the sums in registers above.
  float spill[kWidth * kLanes];
  PFNAS_UNROLL for (int i = 0; i < kWidth; ++i) store(spill + i * kLanes, sums[i]);
  for (std::int64_t i = 0; i < num_cols; ++i) {
    store_lanes(out + i * job.out_col_stride, load(spill + i * kLanes), job.lanes);
  }
}

// out[i] = sum over rows r and s of x[S i + s] w[r][s]
template <int K, int S, int kWidth>
static PFNAS_INLINE void forward_tile(const ConvJob& job, const float* x, const float* w, int num_rows,
                                      float* out, std::int64_t num_cols) {
  Vec sums[kWidth] = {};
  for (int r = 0; r < num_rows; ++r, x += job.in.row_stride, w += K * kBlock) {
    Vec taps[K];
    PFNAS_UNROLL for (int s = 0; s < K; ++s) taps[s] = load(w + s * kBlock);
    PFNAS_UNROLL for (int q = 0; q < (kWidth - 1) * S + K; ++q) {
      PFNAS_KEEP_ORDER;
      const Vec value = load(x + q * kLanes);
      PFNAS_UNROLL for (int s = 0; s < K; ++s) {
        const int i = q - s;
        if (i >= 0 && i % S == 0 && i / S < kWidth) sums[i / S] += value * taps[s];
      }
    }
  }
  store_tile<kWidth>(sums, job, out, num_cols);
}

template <int K, int S, int kWidth>
PFNAS_INLINE void forward_row(const ConvJob& job, std::int64_t image, std::int64_t y) {
  constexpr int P = K / 2;
  const std::int64_t top = y * S - P;
  const int r_begin = static_cast<int>(max_of<std::int64_t>(0, -top));
  const int r_end = static_cast<int>(min_of<std::int64_t>(K, job.in.height - top));
  const float* x = job.in.row(image, top + r_begin);
  const float* w = job.filter + r_begin * K * kBlock;
  float* out = job.out + image * job.out_image_stride + y * job.out_row_stride;
  for (std::int64_t i = 0; i < job.out_width; i += kWidth) {
    PFNAS_UNROLL for (int a = 0; a < S; ++a) job.ahead_in.fetch<S * kWidth>(image, y * S + a, i * S);
    job.ahead_out.fetch<kWidth>(image, y, i);
    forward_tile<K, S, kWidth>(job, x + i * S * kLanes, w, r_end - r_begin, out + i * job.out_col_stride,
                               min_of<std::int64_t>(kWidth, job.out_width - i));
  }
}

template <int K, int S, int kWidth>
void forward_rows(const ConvJob& job) {
  for (std::int64_t image = 0; image < job.num_images; ++image) {
    for (std::int64_t y = job.y_begin; y < job.y_end; ++y) forward_row<K, S, kWidth>(job, image, y);
  }
}

// out[p] = sum over rows and over s with (p + P - s) % S = 0 of g[(p + P - s) / S] w[r][s]; kWidth % S = 0.
template <int K, int S, int kWidth>
static PFNAS_INLINE void grad_input_tile(const ConvJob& job, const float* g, const float* w, int num_rows,
                                         float* out, std::int64_t num_cols) {
  constexpr int P = K / 2;
  constexpr int q_first = -(P / S);
  constexpr int q_last = (kWidth - 1 + P) / S;
  Vec sums[kWidth] = {};
  for (int r = 0; r < num_rows; ++r, g -= job.in.row_stride, w += S * K * kBlock) {
    Vec taps[K];
    PFNAS_UNROLL for (int s = 0; s < K; ++s) taps[s] = load(w + s * kBlock);
    PFNAS_UNROLL for (int q = q_first; q <= q_last; ++q) {
      PFNAS_KEEP_ORDER;
      const Vec value = load(g + q * kLanes);
      PFNAS_UNROLL for (int s = 0; s < K; ++s) {
        const int p = S * q + s - P;
        if (p >= 0 && p < kWidth) sums[p] += value * taps[s];
      }
    }
  }
  store_tile<kWidth>(sums, job, out, num_cols);
}

template <int K, int S, int kWidth>
PFNAS_INLINE void grad_input_row(const ConvJob& job, std::int64_t image, std::int64_t y) {
  constexpr int P = K / 2;
  // Row y gets row (y + P - r) / S of grad_y through filter row r.
  const std::int64_t below = max_of<std::int64_t>(0, y + P - S * (job.in.height - 1));
  const std::int64_t r_begin = below + (y + P - below) % S;
  const std::int64_t r_end = min_of<std::int64_t>(K, y + P + 1);
  const int num_rows = r_end > r_begin ? static_cast<int>((r_end - r_begin + S - 1) / S) : 0;
  const float* g = job.in.row(image, (y + P - r_begin) / S) + P * kLanes;
  const float* w = job.filter + r_begin * K * kBlock;
  float* out = job.out + image * job.out_image_stride + y * job.out_row_stride;
  for (std::int64_t i = 0; i < job.out_width; i += kWidth) {
    if (y % S == 0) job.ahead_in.fetch<kWidth / S>(image, y / S, i / S);
    job.ahead_x.fetch<kWidth>(image, y, i);
    job.ahead_out.fetch<kWidth>(image, y, i);
    grad_input_tile<K, S, kWidth>(job, g + i / S * kLanes, w, num_rows, out + i * job.out_col_stride,
                                  min_of<std::int64_t>(kWidth, job.out_width - i));
  }
}

template <int K, int S, int kWidth>
void grad_input_rows(const ConvJob& job) {
  for (std::int64_t image = 0; image < job.num_images; ++image) {
    for (std::int64_t y = job.y_begin; y < job.y_end; ++y) grad_input_row<K, S, kWidth>(job, image, y);
  }
}

struct GradFilterJob {
  PlaneView x;
  PlaneView grad_y;       // its columns beyond the image are zero
  const float* zero_row;  // stands in for rows of x outside the image
  float* grad;            // [K * K taps], kBlock floats apart; added to
  std::int64_t out_width;
  std::int64_t image_begin, image_end;  // of the slab
  std::int64_t y_begin, y_end;          // rows of grad_y
  Ahead ahead_x, ahead_grad_y;
};

// Filter rows whose sums fit the register file together, so that enough independent sums hide the latency of
// an FMA.
constexpr int grad_filter_num_rows(int k) {
  return k == 3 ? 3 : kNumRegisters >= 32 ? (k == 5 ? 3 : 2) : (k == 5 ? 2 : 1);
}

template <int K, int S, int kWidth, int kRows>
static PFNAS_INLINE void grad_filter_tile(const float* const (&x)[kRows], const float* g,
                                          Vec (&sums)[kRows][K]) {
  Vec grads[kWidth];
  PFNAS_UNROLL for (int j = 0; j < kWidth; ++j) grads[j] = load(g + j * kLanes);
  PFNAS_UNROLL for (int a = 0; a < kRows; ++a) {
    PFNAS_UNROLL for (int q = 0; q < (kWidth - 1) * S + K; ++q) {
      PFNAS_KEEP_ORDER;
      const Vec value = load(x[a] + q * kLanes);
      PFNAS_UNROLL for (int s = 0; s < K; ++s) {
        const int j = q - s;
        if (j >= 0 && j % S == 0 && j / S < kWidth) sums[a][s] += value * grads[j / S];
      }
    }
  }
}

// Pass number kPass of the K / kRows passes fetches its share of the columns that tile i of the next step
// will pack.
template <int K, int S, int kWidth>
static PFNAS_INLINE void fetch_share(const GradFilterJob& job, std::int64_t image, std::int64_t y,
                                     std::int64_t i, int pass) {
  constexpr int kPasses = (K + grad_filter_num_rows(K) - 1) / grad_filter_num_rows(K);
  constexpr int kShare = (kWidth + kPasses - 1) / kPasses;
  const std::int64_t col = i + pass * kShare;
  if (pass * kShare >= kWidth) return;
  job.ahead_grad_y.fetch<kShare>(image, y, col);
  PFNAS_UNROLL for (int a = 0; a < S; ++a) job.ahead_x.fetch<S * kShare>(image, y * S + a, col * S);
}

// kRows filter rows at once: their sums stay in registers over all the rows and images of the job.
template <int K, int S, int kWidth, int kRows>
static PFNAS_INLINE void grad_filter_taps(const GradFilterJob& job, int r) {
  constexpr int P = K / 2;
  Vec sums[kRows][K];
  PFNAS_UNROLL for (int a = 0; a < kRows; ++a) {
    PFNAS_UNROLL for (int s = 0; s < K; ++s) sums[a][s] = load(job.grad + ((r + a) * K + s) * kBlock);
  }
  // Rows of grad_y that meet the image through at least one of the filter rows r .. r + kRows - 1.
  const std::int64_t begin = max_of<std::int64_t>(job.y_begin, (P - (r + kRows - 1) + S - 1) / S);
  const std::int64_t end = min_of<std::int64_t>(job.y_end, (job.x.height - 1 + P - r) / S + 1);
  for (std::int64_t image = job.image_begin; image < job.image_end; ++image) {
    for (std::int64_t y = begin; y < end; ++y) {
      const float* x[kRows];
      PFNAS_UNROLL for (int a = 0; a < kRows; ++a) {
        const std::int64_t row = y * S - P + r + a;
        x[a] = row >= 0 && row < job.x.height ? job.x.row(image, row) : job.zero_row;
      }
      const float* g = job.grad_y.row(image, y) + P * kLanes;
      for (std::int64_t i = 0; i < job.out_width; i += kWidth, g += kWidth * kLanes) {
        fetch_share<K, S, kWidth>(job, image, y, i, r / grad_filter_num_rows(K));
        grad_filter_tile<K, S, kWidth, kRows>(x, g, sums);
        PFNAS_UNROLL for (int a = 0; a < kRows; ++a) x[a] += kWidth * S * kLanes;
      }
    }
  }
  PFNAS_UNROLL for (int a = 0; a < kRows; ++a) {
    PFNAS_UNROLL for (int s = 0; s < K; ++s) store(job.grad + ((r + a) * K + s) * kBlock, sums[a][s]);
  }
}

template <int K, int S, int kWidth>
void grad_filter_rows(const GradFilterJob& job) {
  constexpr int kRows = grad_filter_num_rows(K);
  int r = 0;
  for (; r + kRows <= K; r += kRows) grad_filter_taps<K, S, kWidth, kRows>(job, r);
  if constexpr (K % kRows != 0) grad_filter_taps<K, S, kWidth, K % kRows>(job, r);
}

}  // namespace pfnas::PFNAS_TIER

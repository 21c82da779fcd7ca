// SPDX-License-Identifier: Apache-2.0
// Gradient of a depthwise convolution to its filter, without atomics. A thread owns two channels and one
// filter row r: kernel_size sums in registers. The output rows of all images are dealt to blocks, and within
// a block to groups; groups are added in shared memory, blocks by a second kernel, always in the same order.
#pragma once

#include "cuda/storage.h"
#include "kernels/dynamic_depthwise_conv/cuda_convolve.cuh"
#include "kernels/dynamic_depthwise_conv/cuda_plan.h"

namespace pfnas::cuda {

struct FilterGradientParams {
  const void* x;       // [N, height, width, C]
  const void* grad_y;  // [N, out_height, out_width, C]
  float* partial;      // [splits, k^2, row]
  std::int64_t batch;
  std::int64_t channels;
  int row;
  int height, width;
  int out_height, out_width;
  FilterPlan plan;
};

// Adds one output row: grad_y of that row times the row of x that filter row r sees.
template <class T, int kK, int kS>
PFNAS_DEVICE void add_filter_row(const FilterGradientParams& p, const T* x, const T* grad_y, int in_row,
                                 int out_row, PairAccess access, float2 (&sums)[kK]) {
  constexpr int kColumns = kS * (kFilterStrip - 1) + kK;
  for (int first = 0; first < p.out_width; first += kFilterStrip) {
    Pair<T> columns[kColumns], gradients[kFilterStrip];
    load_columns(x, p.channels, in_row, p.height, first * kS - kK / 2, p.width, access, columns);
    load_columns(grad_y, p.channels, out_row, p.out_height, first, p.out_width, access, gradients);
    float2 seen[kColumns];  // the compiler would convert a column for each of its taps
    PFNAS_UNROLL_LOOP
    for (int i = 0; i < kColumns; ++i) seen[i] = to_float2(columns[i]);
    PFNAS_UNROLL_LOOP
    for (int i = 0; i < kFilterStrip; ++i) {
      const float2 gradient = to_float2(gradients[i]);
      PFNAS_UNROLL_LOOP
      for (int s = 0; s < kK; ++s) sums[s] = multiply_add(seen[kS * i + s], gradient, sums[s]);
    }
  }
}

template <class T, int kK, int kS>
__global__ void __launch_bounds__(kThreads, 2) filter_gradient(FilterGradientParams p) {
  PFNAS_SHARED(float2, group_sums, [kThreads * kK]);  // [kK taps of a row][thread]
  const int thread = static_cast<int>(threadIdx.x);
  const int pair = thread % p.plan.pairs;
  const int r = thread / p.plan.pairs % kK;
  const int group = thread / (p.plan.pairs * kK);
  const std::int64_t first_pair = static_cast<std::int64_t>(blockIdx.y) * p.plan.pairs;
  const std::int64_t channel = 2 * (first_pair + pair);

  float2 sums[kK] = {};
  if (channel < p.channels) {
    const PairAccess access{p.channels % 2 == 0, channel + 1 < p.channels};
    const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * p.plan.rows_per_split;
    const std::int64_t all_rows = p.batch * p.out_height;
    const std::int64_t end =
        begin + p.plan.rows_per_split < all_rows ? begin + p.plan.rows_per_split : all_rows;
    for (std::int64_t item = begin + group; item < end; item += p.plan.groups) {
      const std::int64_t image = item / p.out_height;
      const int out_row = static_cast<int>(item - image * p.out_height);
      const int in_row = out_row * kS + r - kK / 2;
      if (in_row < 0 || in_row >= p.height) continue;
      const T* x = static_cast<const T*>(p.x) + image * p.height * p.width * p.channels + channel;
      const T* grad_y =
          static_cast<const T*>(p.grad_y) + image * p.out_height * p.out_width * p.channels + channel;
      add_filter_row<T, kK, kS>(p, x, grad_y, in_row, out_row, access, sums);
    }
  }
  const int threads = static_cast<int>(blockDim.x);
  PFNAS_UNROLL_LOOP
  for (int s = 0; s < kK; ++s) store_vector(&group_sums[s * threads + thread], sums[s]);
  __syncthreads();
  const int row_items = kK * p.plan.pairs;  // of one s and one group: [r][pairs]
  float* partial = p.partial + static_cast<std::int64_t>(blockIdx.x) * kK * kK * p.row;
  for (int i = thread; i < kK * row_items; i += threads) {
    const int s = i / row_items, item = i - s * row_items;
    const int tap = item / p.plan.pairs * kK + s;
    const std::int64_t target = 2 * (first_pair + item % p.plan.pairs);
    if (target >= p.row) continue;
    const float2* source = &group_sums[s * threads + item];
    float2 sum = load_vector<float2>(source);
    for (int g = 1; g < p.plan.groups; ++g) sum = add(sum, load_vector<float2>(source + g * row_items));
    store_vector(partial + static_cast<std::int64_t>(tap) * p.row + target, sum);
  }
}

struct FoldParams {
  const float* partial;  // [splits, count]
  float* sum;            // [count]
  std::int64_t count;
  int splits;
};

constexpr int kFoldColumns = 32, kFoldRows = 8;

// sum[i] = partial[0][i] + partial[1][i] + ..: kFoldRows threads take every kFoldRows-th split, then fold.
__global__ void __launch_bounds__(kFoldColumns* kFoldRows) fold_splits(FoldParams p) {
  PFNAS_SHARED(float, row_sums, [kFoldRows][kFoldColumns]);
  const int column = static_cast<int>(threadIdx.x) % kFoldColumns;
  const int row = static_cast<int>(threadIdx.x) / kFoldColumns;
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kFoldColumns + column;
  float sum = 0.0f;
  if (i < p.count) {
    for (int split = row; split < p.splits; split += kFoldRows) sum += p.partial[split * p.count + i];
  }
  row_sums[row][column] = sum;
  __syncthreads();
  if (row != 0 || i >= p.count) return;
  for (int other = 1; other < kFoldRows; ++other) sum += row_sums[other][column];
  p.sum[i] = sum;
}

}  // namespace pfnas::cuda

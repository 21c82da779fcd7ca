// SPDX-License-Identifier: Apache-2.0
// Gradient of a 1x1 convolution to its panels, x^T grad_y, without atomics. A block computes 64 inputs x 96
// outputs over its share of the pixels; a second kernel folds the shares in order.
#pragma once

#include "kernels/dynamic_pointwise_conv/cuda_simt.cuh"
#include "kernels/dynamic_pointwise_conv/cuda_tensor_core.cuh"

namespace pfnas::cuda {

struct PanelGradientParams {
  const void* x;       // [pixels, I]
  const void* grad_y;  // [pixels, O]
  float* partial;      // [splits, ceil(O / 48), I, 48]
  std::int64_t num_pixels;
  std::int64_t in_channels;
  std::int64_t out_channels;
  PanelGradientPlan plan;
  bool vector_x, vector_grad_y;  // rows start at the boundary of the kernel's vector loads
};

struct PanelTile {
  std::int64_t first_input, first_output;
  std::int64_t first_pixel, end_pixel;
  float* partial;  // of this split
};

// Blocks of one split are neighbours: its rows are then read from memory once.
PFNAS_DEVICE PanelTile locate_panel_tile(const PanelGradientParams& p) {
  const std::int64_t tiles = p.plan.input_tiles * p.plan.output_tiles;
  const std::int64_t split = blockIdx.x / tiles, tile = blockIdx.x - split * tiles;
  const std::int64_t input = tile / p.plan.output_tiles, output = tile - input * p.plan.output_tiles;
  const std::int64_t begin = split * p.plan.pixels_per_split, end = begin + p.plan.pixels_per_split;
  return {input * kTileInputs, output * kTileOutputs, begin, end < p.num_pixels ? end : p.num_pixels,
          p.partial + split * p.plan.floats};
}

// Two neighbouring outputs of one input; in the last panel, columns beyond O are sums of zeros.
PFNAS_DEVICE void store_panel_sums(const PanelGradientParams& p, const PanelTile& at, int input, int output,
                                   float2 sums) {
  const std::int64_t row = at.first_input + input, column = at.first_output + output;
  const std::int64_t panel = column / kPanelWidth;
  if (row >= p.in_channels || panel * kPanelWidth >= p.out_channels) return;
  store_vector(at.partial + (panel * p.in_channels + row) * kPanelWidth + column % kPanelWidth, sums);
}

// Rows of pixels, [kSimtInputs][kColumns] from channel `first` on.
template <class T, int kColumns>
PFNAS_DEVICE void fill_rows(const void* rows, std::int64_t channels, std::int64_t first, const PanelTile& at,
                            std::int64_t pixel0, bool vector, float (&tile)[kSimtInputs][kColumns]) {
  constexpr int kQuads = kColumns / kQuad;
  for (int i = static_cast<int>(threadIdx.x); i < kSimtInputs * kQuads; i += kPointwiseThreads) {
    const int row = i / kQuads, column = i % kQuads * kQuad;
    const std::int64_t pixel = pixel0 + row, channel = first + column;
    const std::int64_t count = pixel < at.end_pixel ? channels - channel : 0;
    const T* source = static_cast<const T*>(rows) + pixel * channels + channel;
    store_vector(&tile[row][column], load_quad(source, vector && count > 0, count));
  }
}

template <class T>
__global__ void __launch_bounds__(kPointwiseThreads, 2) panel_gradient_simt(PanelGradientParams p) {
  PFNAS_SHARED_ALIGNED(16, float, x, [kSimtInputs][kTileInputs]);
  PFNAS_SHARED_ALIGNED(16, float, gradients, [kSimtInputs][kTileOutputs]);
  constexpr int kPairs = kOutputsPerThread / 2;
  const PanelTile at = locate_panel_tile(p);
  const int output = 2 * (static_cast<int>(threadIdx.x) % kOutputThreads);
  const int input = kQuad * (static_cast<int>(threadIdx.x) / kOutputThreads);
  float2 sums[kQuad][kPairs] = {};
  for (std::int64_t pixel = at.first_pixel; pixel < at.end_pixel; pixel += kSimtInputs) {
    fill_rows<T>(p.x, p.in_channels, at.first_input, at, pixel, p.vector_x, x);
    fill_rows<T>(p.grad_y, p.out_channels, at.first_output, at, pixel, p.vector_grad_y, gradients);
    __syncthreads();
    PFNAS_UNROLL_LOOP
    for (int k = 0; k < kSimtInputs; ++k) {
      const auto values = load_vector<Quad<float>>(&x[k][input]);
      PFNAS_UNROLL_LOOP
      for (int j = 0; j < kPairs; ++j) {
        const auto gradient = load_vector<float2>(&gradients[k][output + j * kTileOutputs / kPairs]);
        PFNAS_UNROLL_LOOP
        for (int i = 0; i < kQuad; ++i) {
          sums[i][j] = multiply_add(make_float2(values.values[i], values.values[i]), gradient, sums[i][j]);
        }
      }
    }
    __syncthreads();
  }
  PFNAS_UNROLL_LOOP
  for (int i = 0; i < kQuad; ++i) {
    PFNAS_UNROLL_LOOP
    for (int j = 0; j < kPairs; ++j) {
      store_panel_sums(p, at, input + i, output + j * kTileOutputs / kPairs, sums[i][j]);
    }
  }
}

constexpr int kStagePixels = 32;

template <class T>
struct PanelStage {
  T x[kStagePixels][kTileInputs];
  T gradients[kStagePixels][kTileOutputs];
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

// Rows of 8 chunks all begin in the same bank; turned by the row, eight of them differ.
PFNAS_DEVICE int turned_input(int row, int column) { return column ^ (row % 8 * kChunk); }

template <class T>
PFNAS_DEVICE void start_rows(const PanelGradientParams& p, const PanelTile& at, std::int64_t pixel0,
                             PanelStage<T>& stage) {
  constexpr int kInputChunks = kTileInputs / kChunk, kOutputChunks = kTileOutputs / kChunk;
  const T *x = static_cast<const T*>(p.x), *grad_y = static_cast<const T*>(p.grad_y);
  for (int i = static_cast<int>(threadIdx.x); i < kStagePixels * kInputChunks; i += kPointwiseThreads) {
    const int row = i / kInputChunks, column = i % kInputChunks * kChunk;
    const std::int64_t pixel = pixel0 + row, channel = at.first_input + column;
    const std::int64_t left = pixel < at.end_pixel ? p.in_channels - channel : 0;
    start_chunk(&stage.x[row][turned_input(row, column)], x + pixel * p.in_channels + channel, x, left,
                p.vector_x);
  }
  for (int i = static_cast<int>(threadIdx.x); i < kStagePixels * kOutputChunks; i += kPointwiseThreads) {
    const int row = i / kOutputChunks, column = i % kOutputChunks * kChunk;
    const std::int64_t pixel = pixel0 + row, channel = at.first_output + column;
    const std::int64_t left = pixel < at.end_pixel ? p.out_channels - channel : 0;
    start_chunk(&stage.gradients[row][turned_column(row, column)], grad_y + pixel * p.out_channels + channel,
                grad_y, left, p.vector_grad_y);
  }
}

// The warp's 16 inputs x 48 outputs += x^T grad_y; both operands lie with pixels as rows.
template <class T>
PFNAS_DEVICE void multiply_rows(const PanelStage<T>& stage, int first_input, int first_output, int lane,
                                float (&sums)[kOutputBlocks][4]) {
  const int matrix = lane / 8, row = lane % 8;
  PFNAS_UNROLL_LOOP
  for (int k = 0; k < kStagePixels; k += 16) {
    std::uint32_t a[4];
    const int a_row = k + matrix / 2 * 8 + row, b_row = k + matrix % 2 * 8 + row;
    load_matrix_transposed(a, &stage.x[a_row][turned_input(a_row, first_input + matrix % 2 * 8)]);
    PFNAS_UNROLL_LOOP
    for (int j = 0; j < kOutputBlocks; j += 2) {
      std::uint32_t b[4];
      const int output = first_output + j * 8 + matrix / 2 * 8;
      load_matrix_transposed(b, &stage.gradients[b_row][turned_column(b_row, output)]);
      const std::uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
      multiply_tile<T>(sums[j], a, left);
      multiply_tile<T>(sums[j + 1], a, right);
    }
  }
}

#endif

template <class T>
__global__ void __launch_bounds__(kPointwiseThreads, 2) panel_gradient_tensor_core(PanelGradientParams p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  __trap();  // select_dynamic_pointwise_conv_kernel never chooses it here
#else
  PFNAS_SHARED_ALIGNED(16, PanelStage<T>, stages, [2]);
  const PanelTile at = locate_panel_tile(p);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int first_input = warp % 4 * 16, first_output = warp / 4 * kWarpOutputs;
  float sums[kOutputBlocks][4] = {};
  start_rows(p, at, at.first_pixel, stages[0]);
  commit_copies();
  int current = 0;
  for (std::int64_t pixel = at.first_pixel; pixel < at.end_pixel; pixel += kStagePixels, current ^= 1) {
    if (pixel + kStagePixels < at.end_pixel) start_rows(p, at, pixel + kStagePixels, stages[current ^ 1]);
    commit_copies();  // an empty group keeps the count
    wait_copies<1>();
    __syncthreads();
    multiply_rows(stages[current], first_input, first_output, lane, sums);
    __syncthreads();
  }
  PFNAS_UNROLL_LOOP
  for (int j = 0; j < kOutputBlocks; ++j) {
    const int input = first_input + lane / 4, output = first_output + j * 8 + lane % 4 * 2;
    store_panel_sums(p, at, input, output, make_float2(sums[j][0], sums[j][1]));
    store_panel_sums(p, at, input + 8, output, make_float2(sums[j][2], sums[j][3]));
  }
#endif
}

struct FoldPanelsParams {
  const float* partial;  // [splits, panels, I, 48]
  void* grad_panels;     // [panels, I_max, 48]
  std::int64_t count;    // panels * I * 48
  std::int64_t splits;
  std::int64_t in_channels, max_in_channels;
};

constexpr int kPanelColumns = 32, kPanelRows = 8;

// The sum of all splits: kPanelRows threads take every kPanelRows-th split, then fold.
template <class T>
__global__ void __launch_bounds__(kPanelColumns* kPanelRows) fold_panels(FoldPanelsParams p) {
  PFNAS_SHARED(float, row_sums, [kPanelRows][kPanelColumns]);
  const int column = static_cast<int>(threadIdx.x) % kPanelColumns;
  const int row = static_cast<int>(threadIdx.x) / kPanelColumns;
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kPanelColumns + column;
  float sum = 0.0f;
  if (i < p.count) {
    for (std::int64_t split = row; split < p.splits; split += kPanelRows) {
      sum += p.partial[split * p.count + i];
    }
  }
  row_sums[row][column] = sum;
  __syncthreads();
  if (row != 0 || i >= p.count) return;
  for (int other = 1; other < kPanelRows; ++other) sum += row_sums[other][column];
  const std::int64_t panel_size = p.in_channels * kPanelWidth, panel = i / panel_size;
  const std::int64_t skipped = panel * (p.max_in_channels - p.in_channels) * kPanelWidth;
  static_cast<T*>(p.grad_panels)[i + skipped] = from_float<T>(sum);
}

}  // namespace pfnas::cuda

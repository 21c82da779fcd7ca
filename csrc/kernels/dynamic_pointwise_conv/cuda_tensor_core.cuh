// SPDX-License-Identifier: Apache-2.0
// 1x1 convolution and its gradient to the input on tensor cores, for 16-bit storage from sm_80 on. A block
// computes 128 pixels x 96 outputs with eight warps of 32 x 48; cp.async fills one pair of tiles while
// mma.sync works on the other.
#pragma once

#include "cuda/async_copy.h"
#include "cuda/tensor_core.h"
#include "kernels/dynamic_pointwise_conv/cuda_moments.cuh"
#include "kernels/dynamic_pointwise_conv/cuda_tile.cuh"

namespace pfnas::cuda {

constexpr int kStageInputs = 32;  // inputs per stage
constexpr int kChunk = 8;         // 16-bit numbers per 16-byte copy
constexpr int kWarpPixels = 32, kWarpOutputs = 48;
constexpr int kPixelWarps = kTilePixels / kWarpPixels;                            // 4
constexpr int kPixelBlocks = kWarpPixels / 16, kOutputBlocks = kWarpOutputs / 8;  // mma tiles of a warp

// The weights lie as the panels hold them, and are transposed on the way into registers where that is needed.
template <class T, bool kTransposed>
struct StageTiles {
  T pixels[kTilePixels][kStageInputs];
  T weights[kTransposed ? kTileOutputs : kStageInputs][kTransposed ? kStageInputs : kTileOutputs];
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

// Where a chunk of a row lies. Rows are 4 or 12 chunks of 16 bytes and all banks hold 8, so in plain order
// eight rows of one column, what an ldmatrix reads, would share two bank groups; turned by the row, they
// differ, and so do eight neighbouring chunks, what a quarter warp's cp.async writes.
PFNAS_DEVICE int turned_column(int row, int column) { return column ^ (row / 2 % 4 * kChunk); }

// Starts copying a chunk of a row: `left` elements exist from `source` on, the others become zero. `base` is
// any address that may be named where nothing is read.
template <class T>
PFNAS_DEVICE void start_chunk(T* target, const T* source, const T* base, std::int64_t left, bool vector) {
  const int valid = left >= kChunk ? kChunk : left > 0 ? static_cast<int>(left) : 0;
  if (vector) {
    copy_async_16(target, valid > 0 ? source : base, valid * static_cast<int>(sizeof(T)));
  } else {
    for (int e = 0; e < kChunk; ++e) target[e] = e < valid ? source[e] : from_float<T>(0.0f);
  }
}

template <class T, bool kTransposed>
PFNAS_DEVICE void start_pixels(const PointwiseTileParams& p, const TilePosition& at, std::int64_t k0,
                               StageTiles<T, kTransposed>& stage) {
  const auto& op = p.op;
  constexpr int kChunks = kStageInputs / kChunk;
  const T* x = static_cast<const T*>(op.x);
  for (int i = static_cast<int>(threadIdx.x); i < kTilePixels * kChunks; i += kPointwiseThreads) {
    const int row = i / kChunks, column = i % kChunks * kChunk;
    const std::int64_t pixel = at.first_pixel + row, k = k0 + column;
    const std::int64_t left = pixel < op.num_pixels ? op.in_channels - k : 0;
    start_chunk(&stage.pixels[row][turned_column(row, column)], x + pixel * op.in_channels + k, x, left,
                p.vector_rows);
  }
}

template <class T, bool kTransposed>
PFNAS_DEVICE void start_weights(const PointwiseTileParams& p, const TilePosition& at, std::int64_t k0,
                                StageTiles<T, kTransposed>& stage) {
  constexpr int kRows = kTransposed ? kTileOutputs : kStageInputs;
  constexpr int kChunks = (kTransposed ? kStageInputs : kTileOutputs) / kChunk;
  const T* panels = static_cast<const T*>(p.op.panels);
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kChunks; i += kPointwiseThreads) {
    const int row = i / kChunks, column = i % kChunks * kChunk;
    const std::int64_t k = k0 + (kTransposed ? column : row);
    const std::int64_t output = at.first_output + (kTransposed ? row : column);
    const bool inside = k < p.op.in_channels && output < p.op.out_channels;
    const T* source = kTransposed ? weight_at<T>(p.op, output, k) : weight_at<T>(p.op, k, output);
    // Of a forward row, the panel holds more outputs than are wanted; they are computed and dropped.
    const std::int64_t left = !inside ? 0 : kTransposed ? p.op.in_channels - k : kChunk;
    start_chunk(&stage.weights[row][turned_column(row, column)], source, panels, left, true);
  }
}

// b[0], b[1]: a tile of 16 inputs x 8 outputs; b[2], b[3]: the next eight outputs.
template <class T, bool kTransposed>
PFNAS_DEVICE void load_weights(const StageTiles<T, kTransposed>& stage, int k, int output, int lane,
                               std::uint32_t (&b)[4]) {
  const int matrix = lane / 8, row = lane % 8;
  if (kTransposed) {
    const int r = output + matrix / 2 * 8 + row;
    load_matrix(b, &stage.weights[r][turned_column(r, k + matrix % 2 * 8)]);
  } else {
    const int r = k + matrix % 2 * 8 + row;
    load_matrix_transposed(b, &stage.weights[r][turned_column(r, output + matrix / 2 * 8)]);
  }
}

using WarpSums = float[kPixelBlocks][kOutputBlocks][4];

// The warp's 32 x 48 sums += its rows of pixels x its columns of weights.
template <class T, bool kTransposed>
PFNAS_DEVICE void multiply_stage(const StageTiles<T, kTransposed>& stage, int first_pixel, int first_output,
                                 int lane, WarpSums& sums) {
  const int matrix = lane / 8, row = lane % 8;  // of the four 8 x 8 matrices that one ldmatrix loads
  PFNAS_UNROLL_LOOP
  for (int k = 0; k < kStageInputs; k += 16) {
    std::uint32_t a[kPixelBlocks][4];
    PFNAS_UNROLL_LOOP
    for (int i = 0; i < kPixelBlocks; ++i) {
      const int pixel = first_pixel + i * 16 + matrix % 2 * 8 + row;
      load_matrix(a[i], &stage.pixels[pixel][turned_column(pixel, k + matrix / 2 * 8)]);
    }
    PFNAS_UNROLL_LOOP
    for (int j = 0; j < kOutputBlocks; j += 2) {
      std::uint32_t b[4];
      load_weights(stage, k, first_output + j * 8, lane, b);
      const std::uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
      PFNAS_UNROLL_LOOP
      for (int i = 0; i < kPixelBlocks; ++i) {
        multiply_tile<T>(sums[i][j], a[i], left);
        multiply_tile<T>(sums[i][j + 1], a[i], right);
      }
    }
  }
}

// Lane l of an mma tile holds two neighbouring columns of rows l / 4 and l / 4 + 8.
PFNAS_DEVICE void stage_sums(const WarpSums& sums, int first_row, int first_output, int lane,
                             StagingTile& staging) {
  PFNAS_UNROLL_LOOP
  for (int i = 0; i < kPixelBlocks; ++i) {
    PFNAS_UNROLL_LOOP
    for (int j = 0; j < kOutputBlocks; ++j) {
      const int row = first_row + i * 16 + lane / 4, column = first_output + j * 8 + lane % 4 * 2;
      store_vector(&staging[row][column], make_float2(sums[i][j][0], sums[i][j][1]));
      store_vector(&staging[row + 8][column], make_float2(sums[i][j][2], sums[i][j][3]));
    }
  }
}

#endif

template <class T, bool kTransposed>
__global__ void __launch_bounds__(kPointwiseThreads, 2) pointwise_tensor_core(PointwiseTileParams p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  __trap();  // select_dynamic_pointwise_conv_kernel never chooses it here
#else
  using Stage = StageTiles<T, kTransposed>;
  PFNAS_SHARED_ALIGNED(16, char, memory, [2 * sizeof(Stage)]);  // first the stages, then the way to y
  static_assert(sizeof(StagingTile) <= 2 * sizeof(Stage));
  Stage* const stages = reinterpret_cast<Stage*>(memory);
  auto& staging = *reinterpret_cast<StagingTile*>(memory);
  const TilePosition at = locate_tile(p);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int first_pixel = warp % kPixelWarps * kWarpPixels, first_output = warp / kPixelWarps * kWarpOutputs;
  WarpSums sums = {};
  start_pixels(p, at, 0, stages[0]);
  start_weights(p, at, 0, stages[0]);
  commit_copies();
  int current = 0;
  for (std::int64_t k0 = 0; k0 < p.op.in_channels; k0 += kStageInputs, current ^= 1) {
    if (k0 + kStageInputs < p.op.in_channels) {
      start_pixels(p, at, k0 + kStageInputs, stages[current ^ 1]);
      start_weights(p, at, k0 + kStageInputs, stages[current ^ 1]);
    }
    commit_copies();  // an empty group keeps the count
    wait_copies<1>();
    __syncthreads();
    multiply_stage(stages[current], first_pixel, first_output, lane, sums);
    __syncthreads();
  }
  Moments moments = {};
  for (int pass = 0; pass < kPasses; ++pass) {
    if (first_pixel / kPassPixels == pass) {
      stage_sums(sums, first_pixel % kPassPixels, first_output, lane, staging);
    }
    __syncthreads();
    finish_pass<T>(p, at, pass, staging);
    __syncthreads();
    if (!kTransposed && p.partial_moments != nullptr) {
      add_moments(p, at, pass, staging, moments);
      __syncthreads();
    }
  }
  if (!kTransposed && p.partial_moments != nullptr) store_moments(p, at, staging, moments);
#endif
}

}  // namespace pfnas::cuda

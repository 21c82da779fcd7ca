// SPDX-License-Identifier: Apache-2.0
// 1x1 convolution and its gradient to the input on the ordinary arithmetic units: float32 anywhere, 16-bit
// storage before sm_80. A block computes 128 pixels x 96 outputs, a thread 8 x 6 of them; both operands pass
// through shared memory in steps of 16 inputs.
#pragma once

#include "kernels/dynamic_pointwise_conv/cuda_moments.cuh"
#include "kernels/dynamic_pointwise_conv/cuda_tile.cuh"

namespace pfnas::cuda {

constexpr int kSimtInputs = 16;  // per step
constexpr int kPixelPitch = kTilePixels + kQuad;
constexpr int kPixelsPerThread = 8, kOutputsPerThread = 6;
constexpr int kOutputThreads = kTileOutputs / kOutputsPerThread;  // 16

struct SimtTiles {
  float inputs[kSimtInputs][kPixelPitch];  // x, transposed
  float weights[kSimtInputs][kTileOutputs];
};

template <class T>
PFNAS_DEVICE void fill_pixels(const PointwiseTileParams& p, const TilePosition& at, std::int64_t k0,
                              SimtTiles& tiles) {
  const auto& op = p.op;
  for (int i = static_cast<int>(threadIdx.x); i < kTilePixels * kSimtInputs / kQuad; i += kPointwiseThreads) {
    const int row = i % kTilePixels, quad = i / kTilePixels;
    const std::int64_t pixel = at.first_pixel + row, k = k0 + quad * kQuad;
    const std::int64_t count = pixel < op.num_pixels ? op.in_channels - k : 0;
    const T* source = static_cast<const T*>(op.x) + pixel * op.in_channels + k;
    const Quad<float> x = load_quad(source, p.vector_rows && count > 0, count);
    PFNAS_UNROLL_LOOP
    for (int e = 0; e < kQuad; ++e) tiles.inputs[quad * kQuad + e][row] = x.values[e];
  }
}

template <class T>
PFNAS_DEVICE void fill_weights(const PointwiseTileParams& p, const TilePosition& at, std::int64_t k0,
                               SimtTiles& tiles) {
  for (int i = static_cast<int>(threadIdx.x); i < kSimtInputs * kTileOutputs; i += kPointwiseThreads) {
    const int k = i / kTileOutputs, column = i % kTileOutputs;
    const std::int64_t output = at.first_output + column;
    const bool inside = k0 + k < p.op.in_channels && output < p.op.out_channels;
    tiles.weights[k][column] = inside ? to_float(*weight_at<T>(p.op, k0 + k, output)) : 0.0f;
  }
}

// For the gradient to the input: rows of a panel become columns.
template <class T>
PFNAS_DEVICE void fill_transposed_weights(const PointwiseTileParams& p, const TilePosition& at,
                                          std::int64_t k0, SimtTiles& tiles) {
  constexpr int kItems = kTileOutputs * kSimtInputs / kQuad;
  for (int i = static_cast<int>(threadIdx.x); i < kItems; i += kPointwiseThreads) {
    const int column = i % kTileOutputs, quad = i / kTileOutputs;
    const std::int64_t output = at.first_output + column, k = k0 + quad * kQuad;
    const std::int64_t count = output < p.op.out_channels ? p.op.in_channels - k : 0;
    const T* source = weight_at<T>(p.op, count > 0 ? output : 0, count > 0 ? k : 0);
    const Quad<float> weights = load_quad(source, count >= kQuad, count);
    PFNAS_UNROLL_LOOP
    for (int e = 0; e < kQuad; ++e) tiles.weights[quad * kQuad + e][column] = weights.values[e];
  }
}

using SimtSums = float2[kPixelsPerThread][kOutputsPerThread / 2];

// `pixel` and `output`: first ones of the thread; it has four pixels in each half and two outputs in each
// third of the tile.
PFNAS_DEVICE void multiply_tiles(const SimtTiles& tiles, int pixel, int output, SimtSums& sums) {
  constexpr int kPairs = kOutputsPerThread / 2;
  PFNAS_UNROLL_LOOP
  for (int k = 0; k < kSimtInputs; ++k) {
    Quad<float> x[kPasses];
    float2 w[kPairs];
    PFNAS_UNROLL_LOOP
    for (int h = 0; h < kPasses; ++h) {
      x[h] = load_vector<Quad<float>>(&tiles.inputs[k][pixel + h * kPassPixels]);
    }
    PFNAS_UNROLL_LOOP
    for (int j = 0; j < kPairs; ++j) {
      w[j] = load_vector<float2>(&tiles.weights[k][output + j * kTileOutputs / kPairs]);
    }
    PFNAS_UNROLL_LOOP
    for (int i = 0; i < kPixelsPerThread; ++i) {
      const float value = x[i / kQuad].values[i % kQuad];
      PFNAS_UNROLL_LOOP
      for (int j = 0; j < kPairs; ++j) sums[i][j] = multiply_add(make_float2(value, value), w[j], sums[i][j]);
    }
  }
}

template <class T, bool kTransposed>
__global__ void __launch_bounds__(kPointwiseThreads, 2) pointwise_simt(PointwiseTileParams p) {
  PFNAS_SHARED_ALIGNED(16, char, memory, [sizeof(StagingTile)]);  // first the tiles, then the way to y
  static_assert(sizeof(SimtTiles) <= sizeof(StagingTile));
  auto& tiles = *reinterpret_cast<SimtTiles*>(memory);
  auto& staging = *reinterpret_cast<StagingTile*>(memory);
  const TilePosition at = locate_tile(p);
  const int output = 2 * (static_cast<int>(threadIdx.x) % kOutputThreads);
  const int pixel = kQuad * (static_cast<int>(threadIdx.x) / kOutputThreads);
  SimtSums sums = {};
  for (std::int64_t k0 = 0; k0 < p.op.in_channels; k0 += kSimtInputs) {
    fill_pixels<T>(p, at, k0, tiles);
    if (kTransposed) {
      fill_transposed_weights<T>(p, at, k0, tiles);
    } else {
      fill_weights<T>(p, at, k0, tiles);
    }
    __syncthreads();
    multiply_tiles(tiles, pixel, output, sums);
    __syncthreads();
  }
  constexpr int kPairs = kOutputsPerThread / 2;
  Moments moments = {};
  PFNAS_UNROLL_LOOP
  for (int pass = 0; pass < kPasses; ++pass) {
    PFNAS_UNROLL_LOOP
    for (int i = 0; i < kQuad; ++i) {
      PFNAS_UNROLL_LOOP
      for (int j = 0; j < kPairs; ++j) {
        store_vector(&staging[pixel + i][output + j * kTileOutputs / kPairs], sums[pass * kQuad + i][j]);
      }
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
}

}  // namespace pfnas::cuda

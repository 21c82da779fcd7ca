// SPDX-License-Identifier: Apache-2.0
// What the CUDA kernels of dynamic_pointwise_conv share: the tile of a block, and the way from its sums to y.
// Sums go through shared memory, 64 pixels at a time: however a kernel holds them, rows of y are then written
// (and the residual read) in whole sectors by one rolled loop.
#pragma once

#include "cuda/storage.h"
#include "kernels/dynamic_pointwise_conv/cuda_plan.h"

namespace pfnas::cuda {

// y = act(x W + ..), or the gradient to x, which is the same product with the panels transposed: then x is
// grad_y, y is grad_x, and in_channels counts outputs.
struct PointwiseTileParams {
  DynamicPointwiseConvParams op;
  float* partial_moments;  // [tiles of pixels, 2, O] or null
  int output_tiles;     // blocks that share a tile of pixels; neighbours, so that x is read from memory once
  bool vector_rows;     // rows of x start at the boundary of the kernel's vector loads
  bool vector_outputs;  // rows of y, residual, scale and shift allow accesses of four elements
};

struct TilePosition {
  std::int64_t first_pixel;
  std::int64_t first_output;
};

PFNAS_DEVICE TilePosition locate_tile(const PointwiseTileParams& p) {
  const std::int64_t block = blockIdx.x;
  const std::int64_t pixels = block / p.output_tiles;
  return {pixels * kTilePixels, (block - pixels * p.output_tiles) * kTileOutputs};
}

// Where a panel holds the weight of one input and one output.
template <class T>
PFNAS_DEVICE const T* weight_at(const DynamicPointwiseConvParams& op, std::int64_t input,
                                std::int64_t output) {
  const std::int64_t panel = output / kPanelWidth;
  return static_cast<const T*>(op.panels) + (panel * op.max_in_channels + input) * kPanelWidth +
         (output - panel * kPanelWidth);
}

constexpr int kQuad = 4;  // elements per access

template <class T>
struct alignas(kQuad * sizeof(T)) Quad {
  T values[kQuad];
};

// `count` elements as floats, the others zero. `vector`: all four exist and are aligned.
template <class T>
PFNAS_DEVICE Quad<float> load_quad(const T* source, bool vector, std::int64_t count) {
  Quad<float> quad = {};
  if (vector) {
    const auto stored = load_vector<Quad<T>>(source);
    PFNAS_UNROLL_LOOP
    for (int e = 0; e < kQuad; ++e) quad.values[e] = to_float(stored.values[e]);
  } else {
    PFNAS_UNROLL_LOOP
    for (int e = 0; e < kQuad; ++e) {
      if (e < count) quad.values[e] = to_float(source[e]);
    }
  }
  return quad;
}

// Returns what was stored, rounded to its type.
template <class T>
PFNAS_DEVICE Quad<float> store_quad(T* target, const Quad<float>& quad, bool vector, std::int64_t count) {
  Quad<T> stored;
  Quad<float> rounded;
  PFNAS_UNROLL_LOOP
  for (int e = 0; e < kQuad; ++e) {
    stored.values[e] = from_float<T>(quad.values[e]);
    rounded.values[e] = to_float(stored.values[e]);
  }
  if (vector) {
    store_vector(target, stored);
  } else {
    PFNAS_UNROLL_LOOP
    for (int e = 0; e < kQuad; ++e) {
      if (e < count) target[e] = stored.values[e];
    }
  }
  return rounded;
}

PFNAS_DEVICE float activate(float value, Activation activation) {
  if (activation == Activation::kRelu) return value < 0.0f ? 0.0f : value;  // NaN stays
  if (activation == Activation::kHswish) {
    return value * (fminf(fmaxf(value + 3.0f, 0.0f), 6.0f) * (1.0f / 6.0f));
  }
  return value;
}

// y = act(sum * scale + shift + residual) for four neighbouring outputs of one pixel.
template <class T>
PFNAS_DEVICE Quad<float> finish_quad(const PointwiseTileParams& p, std::int64_t pixel, std::int64_t output,
                                     Quad<float> sums) {
  const auto& op = p.op;
  const std::int64_t count = op.out_channels - output;
  const std::int64_t at = pixel * op.out_channels + output;
  Quad<float> scale{{1.0f, 1.0f, 1.0f, 1.0f}}, shift = {}, residual = {};
  if (op.scale != nullptr) scale = load_quad(op.scale + output, p.vector_outputs, count);
  if (op.shift != nullptr) shift = load_quad(op.shift + output, p.vector_outputs, count);
  if (op.residual != nullptr) {
    residual = load_quad(static_cast<const T*>(op.residual) + at, p.vector_outputs, count);
  }
  PFNAS_UNROLL_LOOP
  for (int e = 0; e < kQuad; ++e) {
    const float value = fmaf(sums.values[e], scale.values[e], shift.values[e]) + residual.values[e];
    sums.values[e] = activate(value, op.activation);
  }
  return store_quad(static_cast<T*>(op.y) + at, sums, p.vector_outputs, count);
}

constexpr int kPassPixels = 64;
constexpr int kPasses = kTilePixels / kPassPixels;
constexpr int kStagingRow = kTileOutputs + 8;  // four rows of eight floats, what half a warp writes, then lie
                                               // in different banks
using StagingTile = float[kPassPixels][kStagingRow];

template <class T>
PFNAS_DEVICE void finish_pass(const PointwiseTileParams& p, const TilePosition& at, int pass,
                              StagingTile& staging) {
  constexpr int kQuads = kTileOutputs / kQuad;
  for (int i = static_cast<int>(threadIdx.x); i < kPassPixels * kQuads; i += kPointwiseThreads) {
    const int row = i / kQuads, column = i % kQuads * kQuad;
    const std::int64_t pixel = at.first_pixel + pass * kPassPixels + row;
    const std::int64_t output = at.first_output + column;
    if (pixel >= p.op.num_pixels || output >= p.op.out_channels) continue;
    const auto sums = load_vector<Quad<float>>(&staging[row][column]);
    const Quad<float> stored = finish_quad<T>(p, pixel, output, sums);
    if (p.partial_moments != nullptr) store_vector(&staging[row][column], stored);
  }
}

}  // namespace pfnas::cuda

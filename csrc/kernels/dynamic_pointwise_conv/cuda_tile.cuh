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

template <Activation kActivation>
PFNAS_DEVICE float activate(float value) {
  if constexpr (kActivation == Activation::kRelu) return value < 0.0f ? 0.0f : value;  // NaN stays
  if constexpr (kActivation == Activation::kHswish) {
    return value * (fminf(fmaxf(value + 3.0f, 0.0f), 6.0f) * (1.0f / 6.0f));
  }
  return value;
}

template <Activation kActivation>
PFNAS_DEVICE void activate(Quad<float>& quad) {
  PFNAS_UNROLL_LOOP
  for (int e = 0; e < kQuad; ++e) quad.values[e] = activate<kActivation>(quad.values[e]);
}

// Four neighbouring outputs: what is the same for all pixels.
struct QuadAffine {
  Quad<float> scale{{1.0f, 1.0f, 1.0f, 1.0f}}, shift{};
  std::int64_t count;  // outputs from the first of the four on
};

PFNAS_DEVICE QuadAffine load_affine(const PointwiseTileParams& p, std::int64_t output) {
  QuadAffine affine;
  affine.count = p.op.out_channels - output;
  if (p.op.scale != nullptr) affine.scale = load_quad(p.op.scale + output, p.vector_outputs, affine.count);
  if (p.op.shift != nullptr) affine.shift = load_quad(p.op.shift + output, p.vector_outputs, affine.count);
  return affine;
}

// y = act(sum * scale + shift + residual) for four neighbouring outputs of one pixel, which begin at `at`.
template <class T>
PFNAS_DEVICE Quad<float> finish_quad(const PointwiseTileParams& p, const QuadAffine& affine, std::int64_t at,
                                     Quad<float> sums) {
  const auto& op = p.op;
  Quad<float> residual = {};
  if (op.residual != nullptr) {
    residual = load_quad(static_cast<const T*>(op.residual) + at, p.vector_outputs, affine.count);
  }
  PFNAS_UNROLL_LOOP
  for (int e = 0; e < kQuad; ++e) {
    sums.values[e] =
        fmaf(sums.values[e], affine.scale.values[e], affine.shift.values[e]) + residual.values[e];
  }
  if (op.activation == Activation::kRelu) activate<Activation::kRelu>(sums);
  if (op.activation == Activation::kHswish) activate<Activation::kHswish>(sums);
  return store_quad(static_cast<T*>(op.y) + at, sums, p.vector_outputs, affine.count);
}

constexpr int kPassPixels = 64;
constexpr int kPasses = kTilePixels / kPassPixels;
constexpr int kStagingRow = kTileOutputs + 8;  // four rows of eight floats, what half a warp writes, then lie
                                               // in different banks
using StagingTile = float[kPassPixels][kStagingRow];

// A thread keeps to four outputs and walks down the pixels, so that what belongs to outputs stays in
// registers; 16 of the 256 threads have none.
template <class T>
PFNAS_DEVICE void finish_pass(const PointwiseTileParams& p, const TilePosition& at, int pass,
                              StagingTile& staging) {
  constexpr int kQuads = kTileOutputs / kQuad, kRows = kPointwiseThreads / kQuads;
  const int first = static_cast<int>(threadIdx.x) / kQuads;
  const int column = static_cast<int>(threadIdx.x) % kQuads * kQuad;
  const std::int64_t output = at.first_output + column;
  if (first >= kRows || output >= p.op.out_channels) return;
  const QuadAffine affine = load_affine(p, output);
  const std::int64_t first_pixel = at.first_pixel + pass * kPassPixels;
  const std::int64_t left = p.op.num_pixels - first_pixel;
  const int end = left < kPassPixels ? static_cast<int>(left) : kPassPixels;
  std::int64_t target = (first_pixel + first) * p.op.out_channels + output;
  PFNAS_ROLLED_LOOP
  for (int row = first; row < end; row += kRows) {
    const auto sums = load_vector<Quad<float>>(&staging[row][column]);
    const Quad<float> stored = finish_quad<T>(p, affine, target, sums);
    if (p.partial_moments != nullptr) store_vector(&staging[row][column], stored);
    target += kRows * p.op.out_channels;
  }
}

}  // namespace pfnas::cuda

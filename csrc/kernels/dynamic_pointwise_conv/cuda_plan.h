// SPDX-License-Identifier: Apache-2.0
// How the CUDA kernels of dynamic_pointwise_conv cut their work: by the shape alone, so results are the same
// bits on every GPU of one kind of arithmetic. Plain C++.
#pragma once

#include <cstdint>

#include "common/panels.h"
#include "kernels/dynamic_pointwise_conv/cuda_params.h"

namespace pfnas::cuda {

constexpr int kPointwiseThreads = 256;
constexpr int kTilePixels = 128;
constexpr int kTilePanels = 2;
constexpr int kTileOutputs = kTilePanels * kPanelWidth;  // 96
constexpr int kTileInputs = 64;                          // of the panels' gradient: 64 inputs x 96 outputs

// The panels' gradient is a sum over all pixels: they are dealt to `splits` blocks, whose sums a second
// kernel folds in order.
struct PanelGradientPlan {
  std::int64_t input_tiles = 0;
  std::int64_t output_tiles = 0;
  std::int64_t splits = 0;
  std::int64_t pixels_per_split = 0;
  std::int64_t floats = 0;  // of one split: [ceil(O / 48), I, 48]
};

inline PanelGradientPlan plan_panel_gradient(std::int64_t num_pixels, std::int64_t in_channels,
                                             std::int64_t out_channels) {
  constexpr std::int64_t kWantedBlocks = 512;  // about two waves of a large GPU
  constexpr std::int64_t kMinPixels = 512;     // a split writes 4 bytes per weight: it must read far more
  constexpr std::int64_t kStep = 32;           // pixels that a kernel takes at a time
  PanelGradientPlan plan;
  plan.input_tiles = divide_up(in_channels, kTileInputs);
  plan.output_tiles = divide_up(out_channels, kTileOutputs);
  const std::int64_t wanted = divide_up(kWantedBlocks, plan.input_tiles * plan.output_tiles);
  std::int64_t pixels = divide_up(divide_up(num_pixels, wanted), kStep) * kStep;
  if (pixels < kMinPixels) pixels = kMinPixels;
  plan.pixels_per_split = pixels;
  plan.splits = divide_up(num_pixels, pixels);
  plan.floats = panels_size(out_channels, in_channels);
  return plan;
}

}  // namespace pfnas::cuda

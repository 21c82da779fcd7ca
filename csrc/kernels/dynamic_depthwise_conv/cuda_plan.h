// SPDX-License-Identifier: Apache-2.0
// How the CUDA kernels of dynamic_depthwise_conv cut their work. A cut depends on the shape alone, never on
// the device, so results are the same bits on every GPU. Plain C++: tests call it too.
#pragma once

#include <cstdint>

#include "kernels/dynamic_depthwise_conv/cuda_params.h"

namespace pfnas::cuda {

constexpr int kStrip = 4;        // output columns per thread
constexpr int kThreads = 256;    // per block, at most
constexpr int kMaxPairs = 64;    // channel pairs per block of the convolutions
constexpr int kFilterStrip = 8;  // columns per step of the filter gradient
constexpr int kMaxFilterPairs = 32;
constexpr int kTargetBlocks = 512;  // about two waves of a large GPU

// The cut of a convolution: a block has `pairs` channel pairs of `strips` strips; a strip is kStrip columns
// of a band of `band_rows` rows, which a thread walks down.
struct ConvolvePlan {
  int pairs = 0;
  int strips = 0;
  int chunks = 0;  // of channel pairs: grid.y
  int strips_per_row = 0;
  int bands = 0;
  int band_rows = 0;
  std::int64_t num_strips = 0;                                           // over images, bands and columns
  std::int64_t blocks() const { return divide_up(num_strips, strips); }  // grid.x
};

// `height` and `width` are those of what is written. `step` divides a band (2 for the transposed
// convolution).
inline ConvolvePlan plan_convolve(std::int64_t batch, std::int64_t channels, std::int64_t height,
                                  std::int64_t width, int step) {
  ConvolvePlan plan;
  const std::int64_t pairs = divide_up(channels, 2);
  constexpr int kPairsPerSector = 8;  // 16-bit storage: chunks start at whole 32-byte sectors
  const std::int64_t chunks = divide_up(pairs, kMaxPairs);
  plan.pairs = static_cast<int>(
      chunks == 1 ? pairs : divide_up(divide_up(pairs, chunks), kPairsPerSector) * kPairsPerSector);
  plan.chunks = static_cast<int>(divide_up(pairs, plan.pairs));
  plan.strips = kThreads / plan.pairs;
  plan.strips_per_row = static_cast<int>(divide_up(width, kStrip));
  // A band re-reads kernel_size - stride rows above it, so bands are as tall as filling the GPU allows.
  const std::int64_t blocks_per_band = divide_up(batch * plan.strips_per_row, plan.strips) * plan.chunks;
  const std::int64_t wanted = divide_up(kTargetBlocks, blocks_per_band);
  constexpr std::int64_t kMinBandRows = 8;
  std::int64_t rows = divide_up(height, wanted);
  if (rows < kMinBandRows) rows = kMinBandRows < height ? kMinBandRows : height;
  plan.band_rows = static_cast<int>(divide_up(rows, step) * step);
  plan.bands = static_cast<int>(divide_up(height, plan.band_rows));
  plan.num_strips = batch * plan.bands * plan.strips_per_row;
  return plan;
}

// The cut of the filter gradient: a block has `pairs` channel pairs x kernel_size filter rows x `groups`; the
// output rows of all images are dealt to `splits` blocks, whose sums a second kernel folds in order.
struct FilterPlan {
  int pairs = 0;
  int groups = 0;
  int chunks = 0;  // grid.y
  int splits = 0;  // grid.x
  std::int64_t rows_per_split = 0;
  int threads(int kernel_size) const { return pairs * kernel_size * groups; }
};

inline FilterPlan plan_filter_gradient(const DynamicDepthwiseConvParams& p) {
  FilterPlan plan;
  const std::int64_t pairs = divide_up(p.channels, 2);
  double best = 0;
  for (std::int64_t chunks = divide_up(pairs, kMaxFilterPairs); chunks <= divide_up(pairs, 8); ++chunks) {
    std::int64_t per_chunk = divide_up(pairs, chunks);
    if (chunks > 1) per_chunk = divide_up(per_chunk, 8) * 8;
    const std::int64_t groups = kThreads / (per_chunk * p.kernel_size);
    const std::int64_t used_chunks = divide_up(pairs, per_chunk);
    const double busy =
        static_cast<double>(pairs * p.kernel_size * groups) / static_cast<double>(used_chunks * kThreads);
    if (busy <= best * 1.02) continue;  // fewer chunks unless it pays
    best = busy;
    plan.pairs = static_cast<int>(per_chunk);
    plan.groups = static_cast<int>(groups);
    plan.chunks = static_cast<int>(used_chunks);
  }
  const std::int64_t rows = p.batch * p.out_height;
  const std::int64_t wanted = divide_up(kTargetBlocks, plan.chunks);
  const std::int64_t min_rows = 4 * plan.groups;
  plan.rows_per_split = divide_up(rows, wanted);
  if (plan.rows_per_split < min_rows) plan.rows_per_split = min_rows;
  plan.splits = static_cast<int>(divide_up(rows, plan.rows_per_split));
  return plan;
}

// Where things lie in the workspace, in floats. Rows of channels are padded to whole pairs.
struct WorkspacePlan {
  std::int64_t row = 0;         // floats of one row of channels
  std::int64_t taps = 0;        // [k^2, row]
  std::int64_t partial = 0;     // [splits, k^2, row]
  std::int64_t grad_taps = 0;   // [k^2, row]
  std::int64_t derivation = 0;  // [kDerivationRows, row]
  std::int64_t total = 0;
};

// Rows that the gradients of the matrices are made of: inputs of M5 and M3, then gradients of their outputs.
constexpr int kInput5Row = 0, kInput3Row = 25, kGrad5Row = 34, kGrad3Row = 59, kDerivationRows = 68;

inline WorkspacePlan plan_workspace(const DynamicDepthwiseConvParams& p, bool backward) {
  WorkspacePlan plan;
  plan.row = divide_up(p.channels, 2) * 2;
  const std::int64_t filter = plan.row * p.kernel_size * p.kernel_size;
  plan.total = plan.partial = filter;
  if (!backward) return plan;
  const std::int64_t splits = p.batch == 0 ? 0 : plan_filter_gradient(p).splits;
  plan.grad_taps = plan.partial + splits * filter;
  plan.derivation = plan.grad_taps + filter;
  plan.total = plan.derivation + kDerivationRows * plan.row;
  return plan;
}

}  // namespace pfnas::cuda

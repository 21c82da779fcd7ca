// SPDX-License-Identifier: Apache-2.0
// Mean and variance of every output channel of y as stored, without atomics and without the cancellation of
// E[y^2] - E[y]^2: centred sums per tile, merged pairwise (Chan, Golub, LeVeque: Updating formulae and a
// pairwise algorithm for computing sample variances, 1979) in an order that the shape alone sets.
#pragma once

#include "kernels/dynamic_pointwise_conv/cuda_tile.cuh"

namespace pfnas::cuda {

struct Moments {
  float count, mean, squares;  // squares: sum of (y - mean)^2
};

PFNAS_DEVICE Moments merge(const Moments& a, const Moments& b) {
  if (b.count == 0.0f) return a;
  if (a.count == 0.0f) return b;
  const float count = a.count + b.count;
  const float share = b.count / count, difference = b.mean - a.mean;
  const float between = difference * difference * a.count;
  return {count, fmaf(difference, share, a.mean), fmaf(between, share, a.squares + b.squares)};
}

constexpr int kGroupRows = kPassPixels / 2;  // two groups of threads share a pass

// Pixels of a pass that a group of threads sees.
PFNAS_DEVICE int rows_in_group(std::int64_t num_pixels, const TilePosition& at, int pass, int group) {
  const std::int64_t left = num_pixels - at.first_pixel - pass * kPassPixels - group * kGroupRows;
  return left <= 0 ? 0 : left < kGroupRows ? static_cast<int>(left) : kGroupRows;
}

// Adds a pass to what this thread holds: of one column, every other group of rows.
PFNAS_DEVICE void add_moments(const PointwiseTileParams& p, const TilePosition& at, int pass,
                              const StagingTile& staging, Moments& moments) {
  const int thread = static_cast<int>(threadIdx.x);
  const int column = thread % kTileOutputs, group = thread / kTileOutputs;
  if (group >= 2) return;
  const int rows = rows_in_group(p.op.num_pixels, at, pass, group);
  if (rows == 0) return;
  const float* first = &staging[group * kGroupRows][column];
  float sum = 0.0f, squares = 0.0f;
  for (int row = 0; row < rows; ++row) sum += first[row * kStagingRow];
  const float mean = sum / static_cast<float>(rows);
  for (int row = 0; row < rows; ++row) {
    const float difference = first[row * kStagingRow] - mean;
    squares = fmaf(difference, difference, squares);
  }
  moments = merge(moments, {static_cast<float>(rows), mean, squares});
}

// Leaves the tile's moments in partial_moments. Every thread calls it.
PFNAS_DEVICE void store_moments(const PointwiseTileParams& p, const TilePosition& at, StagingTile& staging,
                                const Moments& moments) {
  const int thread = static_cast<int>(threadIdx.x);
  const int column = thread % kTileOutputs, group = thread / kTileOutputs;
  if (group == 1) {
    staging[0][column] = moments.count;
    staging[1][column] = moments.mean;
    staging[2][column] = moments.squares;
  }
  __syncthreads();
  const std::int64_t output = at.first_output + column;
  if (group != 0 || output >= p.op.out_channels) return;
  const Moments tile = merge(moments, {staging[0][column], staging[1][column], staging[2][column]});
  float* target = p.partial_moments + at.first_pixel / kTilePixels * 2 * p.op.out_channels + output;
  target[0] = tile.mean;
  target[p.op.out_channels] = tile.squares;
}

struct FoldMomentsParams {
  const float* partial;  // [tiles, 2, O]
  float* mean;           // [O]
  float* variance;       // [O]
  std::int64_t num_pixels;
  std::int64_t out_channels;
};

constexpr int kMomentColumns = 32, kMomentRows = 8;

__global__ void __launch_bounds__(kMomentColumns* kMomentRows) fold_moments(FoldMomentsParams p) {
  PFNAS_SHARED(Moments, shared_moments, [kMomentRows][kMomentColumns]);
  const int column = static_cast<int>(threadIdx.x) % kMomentColumns;
  const int row = static_cast<int>(threadIdx.x) / kMomentColumns;
  const std::int64_t output = static_cast<std::int64_t>(blockIdx.x) * kMomentColumns + column;
  const std::int64_t tiles = (p.num_pixels + kTilePixels - 1) / kTilePixels;
  Moments moments = {};
  if (output < p.out_channels) {
    for (std::int64_t tile = row; tile < tiles; tile += kMomentRows) {
      const std::int64_t left = p.num_pixels - tile * kTilePixels;
      const float* source = p.partial + tile * 2 * p.out_channels + output;
      const float count = static_cast<float>(left < kTilePixels ? left : kTilePixels);
      moments = merge(moments, {count, source[0], source[p.out_channels]});
    }
  }
  shared_moments[row][column] = moments;
  __syncthreads();
  if (row != 0 || output >= p.out_channels) return;
  for (int other = 1; other < kMomentRows; ++other) moments = merge(moments, shared_moments[other][column]);
  p.mean[output] = moments.mean;
  p.variance[output] = moments.squares / static_cast<float>(p.num_pixels);
}

}  // namespace pfnas::cuda

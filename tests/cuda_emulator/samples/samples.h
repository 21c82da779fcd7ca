// SPDX-License-Identifier: Apache-2.0
// Small kernels that exist to hold planted bugs: the harness must catch every one of them.
#pragma once

#include <cstdint>

namespace samples {

enum class Bug : int {
  kNone = 0,
  kNoBarrierBeforeOverwrite = 1,  // tile_multiply: the tile is refilled while others still read it
  kBankConflict = 2,              // tile_multiply: a column walk without padding
  kSharedOutOfBounds = 3,         // block_sum: the sums of the warps one place too far
  kNoBarrierBetweenWarps = 4,     // block_sum: read before the other warps have written
  kPartialShuffle = 5,            // block_sum: half a warp skips a full-mask shuffle
  kPlainAddAcrossBlocks = 6,      // block_sum: += on global memory by several blocks
  kOneGroupTooFew = 7,            // staged_scale: uses a tile whose copy may still be under way
  kGlobalOffByOne = 8,            // staged_scale: stores one element further
  kMisalignedVector = 9,          // staged_scale: a 16-byte load from a 4-byte boundary
  kUninitialisedShared = 10,      // block_sum: adds an element nobody wrote
};

struct MultiplyParams {
  const float* a;  // [n, n], n a multiple of 32
  const float* b;  // [n, n]
  float* c;        // [n, n]
  int n;
  Bug bug;
};
void tile_multiply(const MultiplyParams& params);

struct SumParams {
  const float* x;  // [count]
  float* partial;  // [blocks]
  float* total;    // [1], written by the planted bug only
  int count;
  int blocks;
  Bug bug;
};
void block_sum(const SumParams& params);

struct ScaleParams {
  const float* x;  // [count], count a multiple of 256
  float* y;        // [count]: 2 x
  int count;
  Bug bug;
};
void staged_scale(const ScaleParams& params);

}  // namespace samples

// SPDX-License-Identifier: Apache-2.0
// The contract between the binding and the CUDA kernel of path_filter: draw paths of a window of costs as
// path_search does, score them by a ranker as path_score does, keep each block's best. All pointers are the
// device's.
#pragma once

#include <cstdint>

#include "cuda/runtime.h"
#include "kernels/path_score/params.h"

namespace pfnas::cuda {

constexpr int kFilterThreads = 256;  // paths that a block draws at a time
constexpr int kHiddenFloats = 6400;  // two layers of a tile: 32 paths of 128 and 64 columns, or 16 of any
constexpr int kRegisterCodes = 12;   // of a block, at most, for its sums to be kept in registers
constexpr int kFilterSlots = 32;     // of a path, at most
constexpr int kFilterHidden = 192;   // columns of a network's layers, at most
constexpr int kFilterBest = 32;      // paths kept per block, at most
constexpr int kWalkFields = 6;
constexpr int kPossibleFields = 4;
constexpr int kCountFields = 4;

struct PathFilterParams {
  // The space and its cost, see path_search/params.h
  int num_slots = 0;
  int num_codes = 0;
  std::uint32_t first_blocks = 0;            // bit b: block b begins a stage
  const std::int32_t* slot_sizes = nullptr;  // [num_slots]
  const double* table = nullptr;             // [resolutions][num_slots - 1][num_codes]
  const double* constant = nullptr;          // [resolutions]
  double unit = 1;

  // Walk tables of all resolutions, one after the other
  const std::int64_t* walks = nullptr;  // [resolutions][6]: buckets, padding and length of a row of choices,
                                        // begins of its cumulative, after_choice and after_stop
  const double* cumulative = nullptr;
  const double* cumulative_down = nullptr;
  const double* after_choice = nullptr;
  const double* after_stop = nullptr;
  int step_row = 0;                     // num_codes - 1, rounded up to 4
  const std::int32_t* steps = nullptr;  // [resolutions][num_slots - 1][step_row]: what codes 1, 2, .. add to
                                        // the buckets left, 0 at most
  const double* stop = nullptr;         // [resolutions][num_slots - 1]
  const double* go_on = nullptr;        // [resolutions][num_slots - 1]

  // The window: resolutions that may have a path in it, and their buckets
  int num_possible = 0;
  const std::int64_t* possible =
      nullptr;               // [num_possible][4]: resolution, first bucket, end, sums from above
  double low = 0, high = 0;  // reported unit

  // Path i is a function of (seed, first_index + i) and the window
  std::uint64_t seed = 0;
  std::uint64_t first_index = 0;
  std::int64_t num_paths = 0;
  std::int64_t paths_per_block = 0;

  PathScoreModel model;
  int even_pitch = 0, odd_pitch = 0;   // floats from path to path of the hidden layers 0, 2 and 1, 3
  double log_mean = 0, log_scale = 1;  // z = (log cost - mean) / scale
  float threshold = 0;                 // lowest score accepted
  int top_k = 0;

  std::uint8_t* codes = nullptr;      // [blocks][top_k][num_slots], distinct within a block, best first
  float* scores = nullptr;            // [blocks][top_k]
  double* costs = nullptr;            // [blocks][top_k]
  std::int64_t* counts = nullptr;     // [blocks][4]: kept, walks made, paths not found, accepted
  std::uint8_t* all_codes = nullptr;  // [num_paths][num_slots] or null
  float* all_scores = nullptr;        // [num_paths] or null; NaN where no path was found
};

void path_filter(const PathFilterParams& params, Stream stream);

}  // namespace pfnas::cuda

// SPDX-License-Identifier: Apache-2.0
// The kernel of path_filter: a block draws 256 paths at a time, scores them kPaths at a time, and keeps the
// best distinct ones that reach the threshold. Nothing per path leaves the block.
#pragma once

#include "kernels/path_filter/cuda_draw.cuh"
#include "kernels/path_filter/cuda_params.h"
#include "kernels/path_filter/cuda_score.cuh"

namespace pfnas::cuda {

constexpr int kCodePitch = kFilterSlots + 4;  // nine words: one slot of 32 paths lies in different banks

// The best distinct paths so far, best first; of equal scores the smaller codes come first, so that the
// result depends on the set of paths and not on their order. NaN never enters.
struct BestPaths {
  int count;
  float scores[kFilterBest];
  double costs[kFilterBest];
  std::uint8_t codes[kFilterBest][kFilterSlots];
};

PFNAS_DEVICE int compare_codes(const std::uint8_t* a, const std::uint8_t* b, int num_slots) {
  PFNAS_ROLLED_LOOP
  for (int slot = 0; slot < num_slots; ++slot) {
    if (a[slot] != b[slot]) return a[slot] < b[slot] ? -1 : 1;
  }
  return 0;
}

// By one thread: few paths get this far once a block has seen some.
PFNAS_DEVICE void keep_path(BestPaths& best, int top_k, int num_slots, const std::uint8_t* codes, float score,
                            double cost) {
  int place = 0;
  while (place < best.count && best.scores[place] > score) ++place;
  while (place < best.count && best.scores[place] == score) {
    const int order = compare_codes(codes, best.codes[place], num_slots);
    if (order == 0) return;
    if (order < 0) break;
    ++place;
  }
  if (place >= top_k) return;
  if (best.count < top_k) ++best.count;
  PFNAS_ROLLED_LOOP
  for (int i = best.count - 1; i > place; --i) {
    best.scores[i] = best.scores[i - 1];
    best.costs[i] = best.costs[i - 1];
    PFNAS_ROLLED_LOOP
    for (int slot = 0; slot < num_slots; ++slot) best.codes[i][slot] = best.codes[i - 1][slot];
  }
  best.scores[place] = score;
  best.costs[place] = cost;
  PFNAS_ROLLED_LOOP
  for (int slot = 0; slot < num_slots; ++slot) best.codes[place][slot] = codes[slot];
}

enum Counter { kWalks, kMissing, kAccepted, kNumCounters };

template <int kPaths>
__global__ void __launch_bounds__(kFilterThreads, 2) filter_paths(PathFilterParams p) {
  PFNAS_SHARED(std::uint8_t, codes, [kFilterThreads][kCodePitch]);
  PFNAS_SHARED(double, costs, [kFilterThreads]);
  PFNAS_SHARED(ScoreTile<kPaths>, tile, [1]);
  PFNAS_SHARED(float, z, [kFilterThreads]);
  PFNAS_SHARED(float, scores, [kFilterThreads]);
  PFNAS_SHARED(BestPaths, best, [1]);
  PFNAS_SHARED(unsigned, counters, [kNumCounters]);
  PFNAS_SHARED(unsigned, candidates, [kFilterThreads / 32]);
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * p.paths_per_block;
  const std::int64_t end = begin + p.paths_per_block < p.num_paths ? begin + p.paths_per_block : p.num_paths;
  if (thread == 0) best[0].count = 0;
  if (thread < kNumCounters) counters[thread] = 0;
  __syncthreads();
  for (std::int64_t first = begin; first < end; first += kFilterThreads) {
    const bool real = first + thread < end;
    Drawn drawn{__longlong_as_double(0x7ff8000000000000ll), 0};
    if (real) {
      drawn = draw_path(p, first + thread, codes[thread]);
    } else {
      PFNAS_ROLLED_LOOP
      for (int slot = 0; slot < p.num_slots; ++slot) codes[thread][slot] = 0;
    }
    const bool found = drawn.cost == drawn.cost;
    costs[thread] = drawn.cost;
    z[thread] = normalised_budget(p, drawn.cost);
    scores[thread] = first_score(p.model, z[thread]);
    if (drawn.walks > 0) atomicAdd(&counters[kWalks], drawn.walks);
    if (real && !found) atomicAdd(&counters[kMissing], 1u);
    __syncthreads();
    PFNAS_ROLLED_LOOP
    for (int tile_first = 0; tile_first < kFilterThreads; tile_first += kPaths) {
      if (first + tile_first >= end) break;
      score_tile(p, tile_first, codes, z, scores, tile[0]);
    }
    __syncthreads();
    const bool accepted = found && scores[thread] >= p.threshold;
    if (accepted) atomicAdd(&counters[kAccepted], 1u);
    const bool full = best[0].count == p.top_k;
    const bool candidate =
        accepted && p.top_k > 0 && (!full || scores[thread] >= best[0].scores[p.top_k - 1]);
    const unsigned votes = __ballot_sync(0xffffffffu, candidate ? 1 : 0);
    if (thread % 32 == 0) candidates[thread / 32] = votes;
    if (real && p.all_scores != nullptr) {
      p.all_scores[first + thread] = found ? scores[thread] : __uint_as_float(0x7fc00000u);
    }
    if (real && p.all_codes != nullptr) {
      std::uint8_t* target = p.all_codes + (first + thread) * p.num_slots;
      PFNAS_ROLLED_LOOP
      for (int slot = 0; slot < p.num_slots; ++slot) target[slot] = codes[thread][slot];
    }
    __syncthreads();
    if (thread == 0) {
      PFNAS_ROLLED_LOOP
      for (int path = 0; path < kFilterThreads; ++path) {
        if ((candidates[path / 32] >> path % 32 & 1u) == 0) continue;
        keep_path(best[0], p.top_k, p.num_slots, codes[path], scores[path], costs[path]);
      }
    }
    __syncthreads();
  }
  const std::int64_t block = blockIdx.x;
  for (int i = thread; i < best[0].count * p.num_slots; i += kFilterThreads) {
    const int rank = i / p.num_slots, slot = i - rank * p.num_slots;
    p.codes[(block * p.top_k + rank) * p.num_slots + slot] = best[0].codes[rank][slot];
  }
  if (thread < best[0].count) {
    p.scores[block * p.top_k + thread] = best[0].scores[thread];
    p.costs[block * p.top_k + thread] = best[0].costs[thread];
  }
  if (thread == 0) {
    std::int64_t* counts = p.counts + block * kCountFields;
    counts[0] = best[0].count;
    for (int i = 0; i < kNumCounters; ++i) counts[1 + i] = counters[i];
  }
}

}  // namespace pfnas::cuda

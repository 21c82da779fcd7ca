// SPDX-License-Identifier: Apache-2.0
// The whole contract between the binding and path_search: drawing, evolving and flooding paths of a space. No
// vector code here: the kernels of path_score do the arithmetic, called through a pointer.
#pragma once

#include <cstdint>

#include "kernels/path_score/int8_params.h"
#include "kernels/path_score/params.h"

namespace pfnas {

constexpr int kMaxSearchSlots = 256;

// What paths exist. A path is one code per slot: 0 = absent, else 1 + choice; the last slot is the
// resolution.
struct GeneSpace {
  int num_slots = 0;  // blocks + 1
  int num_stages = 0;
  const std::int32_t* stage_start = nullptr;  // [num_stages + 1], first block of each stage
  const std::int32_t* depth_start = nullptr;  // [num_stages + 1], into `depths`
  const std::int32_t* depths = nullptr;       // allowed depths, ascending, stage by stage
  const std::int32_t* slot_sizes = nullptr;   // [num_slots], choices without 'absent'
  int num_blocks() const { return num_slots - 1; }
};

// cost = (constant[r] + sum over blocks of table[r][b][code]) / unit
struct AdditiveTable {
  int num_resolutions = 0;
  int num_codes = 0;
  const double* table = nullptr;     // [num_resolutions][num_blocks][num_codes]
  const double* constant = nullptr;  // [num_resolutions]
  double unit = 1;
};

// Dynamic programming over the blocks of one resolution: masses of all ways to finish a path by the buckets
// of cost that are left (pfnas_fast/space/additive.py).
struct WalkTable {
  std::int64_t num_buckets = 0;
  std::int64_t pad = 0;            // zeros before and after each row of after_choice
  std::int64_t choice_length = 0;  // num_buckets + 2 pad or so
  double step = 1, constant = 0, residual_low = 0, residual_high = 0;  // table units
  double low = 0, high = 0;                                            // range of costs, reported unit
  const double* cumulative = nullptr;       // [num_buckets + 1], mass below each bucket
  const double* cumulative_down = nullptr;  // [num_buckets + 1], mass at and above
  const double* after_choice = nullptr;     // [num_blocks][choice_length]
  const double* after_stop = nullptr;       // [num_blocks][num_buckets]
  const std::int64_t* buckets = nullptr;    // [num_blocks][num_codes]
  const double* stop = nullptr;             // [num_blocks], mass of stopping before this block
  const double* go_on = nullptr;            // [num_blocks], mass of each of its choices
};

struct DrawParams {
  GeneSpace space;
  AdditiveTable cost;
  const WalkTable* walks = nullptr;  // [num_resolutions]
  std::uint64_t seed = 0;
  std::uint64_t first_index = 0;  // path i is a function of (seed, first_index + i) and the window alone
  std::int64_t num_paths = 0;
  double low = 0, high = 0;  // reported unit
  double window = 0;         // 0: every path in [low, high]; else target log-uniform there, window around it
  std::uint64_t resolutions = ~0ull;  // bit r: resolution r may be drawn
  std::uint8_t* codes = nullptr;      // [num_paths][num_slots]
  double* costs = nullptr;            // [num_paths] or null
  std::int64_t num_drawn = 0;         // out: walks made
  std::int64_t num_missing = 0;       // out: paths for which none was found; their codes are zero
};

void draw_paths(DrawParams& p);

// A scorer with the normalisation of its budget, z = (log cost - mean) / scale.
struct BudgetScorer {
  PathScoreModel model;
  void (*score)(const PathScoreParams&) = nullptr;
  double log_mean = 0, log_scale = 1;
};

// t(cost), linear in log cost between knots, constant beyond.
struct Thresholds {
  int num_knots = 0;  // 0: everything is accepted
  const double* knots = nullptr;
  const double* values = nullptr;
};

struct EvolveParams {
  GeneSpace space;
  AdditiveTable cost;
  BudgetScorer scorer;
  BudgetScorer judge;     // whose scores the thresholds mean; unused without thresholds
  bool own_judge = true;  // the judge is the scorer
  Thresholds thresholds;
  std::uint64_t seed = 0;
  double low = 0, high = 0;  // reported unit
  int resolution = -1;       // index to keep to, -1: free
  int population = 0, iterations = 0, num_parents = 0, num_mutants = 0;
  int patience = -1;  // -1: never stops early
  int repair_attempts = 0;
  double gene_probability = 0;
  int top_k = 0;
  const std::uint8_t* initial = nullptr;  // [num_initial][num_slots], feasible
  std::int64_t num_initial = 0;
  std::uint8_t* codes = nullptr;  // out, [top_k][num_slots]
  double* scores = nullptr;       // out, [top_k]
  std::int64_t num_found = 0;     // out
  std::int64_t num_scored = 0;    // out
};

void evolve_paths(EvolveParams& p);

// A cheaper score that is never further than `eps` from the scorer's: only paths that it cannot rule out are
// scored exactly, and the result is the same.
struct Sift {
  Int8Model model;
  void (*score)(const Int8ScoreParams&) = nullptr;  // null: no sifting
  bool use_vnni = false;
  double eps = 0;
};

struct FloodParams {
  DrawParams draw;  // its codes and costs are not used
  BudgetScorer scorer;
  Sift sift;
  Thresholds thresholds;  // of the scorer's own scores
  int top_k = 0;
  std::uint8_t* codes = nullptr;  // out, [top_k][num_slots], distinct, best first
  double* scores = nullptr;       // out, [top_k]
  double* costs = nullptr;        // out, [top_k]
  std::int64_t num_found = 0;     // out
  std::int64_t num_accepted = 0;  // out: draws that the thresholds accept
  std::int64_t num_exact = 0;     // out: draws scored exactly
};

void flood_paths(FloodParams& p);

}  // namespace pfnas

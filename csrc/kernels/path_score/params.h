// SPDX-License-Identifier: Apache-2.0
// The whole contract between the binding and the kernels of path_score: a ranker whose inputs are additive
// over the slots of a path, so that its first layer is a sum of table rows, one per slot or per pair of
// slots.
//
//   x      = offset + z * budget + z^2 * budget_square + sum over look-ups of table[row]            [width]
//   member = head . relu(dense(... relu(x's own columns))) + its lane of the linear part             networks
//          = head . exp(x's own columns)                   + its lane of the linear part             kernels
//   score  = sum over members of weight * member + curve(z),   z = the normalised budget
//
// Everything is float32. Columns come in blocks, members start at a block, padding is zero.
#pragma once

#include <cstdint>

namespace pfnas {

constexpr int kScoreColumns = 64;  // members start at a multiple of this many columns
constexpr int kMaxScoreSlots = 256;
constexpr int kScorePanel = 16;     // columns per panel of a dense layer
constexpr int kMaxDenseLayers = 3;  // after the first

// One row that every path looks up: of one slot, or of two slots at once (then a row per pair of codes).
struct ScoreLookup {
  std::int32_t first_row;
  std::int32_t slot;
  std::int32_t second_slot;
  std::int32_t
      second_stride;  // row = first_row + codes[slot] + second_stride * codes[second_slot]; 0: one slot
};

struct PathScoreModel {
  int num_slots = 0;
  int num_lookups = 0;
  const ScoreLookup* lookups = nullptr;  // [num_lookups]
  std::int64_t num_rows = 0;
  int block = 0;  // columns per block of the table: 64 or 128
  std::int64_t width = 0;
  const float* table = nullptr;          // [width / block][num_rows][block]
  const float* offset = nullptr;         // [width]
  const float* budget = nullptr;         // [width] or null: z is no input
  const float* budget_square = nullptr;  // [width] or null

  int num_members = 0;                   // networks first, then kernels
  int linear_width = 0;                  // num_members rounded up to 16, or 0: no linear part
  const float* linear = nullptr;         // [num_rows][linear_width]
  const float* linear_offset = nullptr;  // [linear_width]
  const float* linear_budget = nullptr;  // [linear_width] or null
  const float* weights = nullptr;        // [num_members]

  int num_networks = 0;
  int num_dense = 0;                         // dense layers of a network
  int widths[kMaxDenseLayers + 1] = {};      // hidden widths: of the first layer, then of each dense one
  const float* dense[kMaxDenseLayers] = {};  // [networks][out / 16 rounded up][in][16]
  const float* bias[kMaxDenseLayers] = {};   // [networks][out rounded up to 16]
  const float* head = nullptr;               // [networks][last width rounded up to 16]

  int num_kernels = 0;
  int kernel_width = 0;                // of each, a multiple of 32
  const float* kernel_head = nullptr;  // [kernels][kernel_width]

  int curve_size = 0;  // knots of curve(z), linear between them, constant beyond; 0: none
  float curve_low = 0;
  float curve_per_unit = 0;      // knots per unit of z
  const float* curve = nullptr;  // [curve_size]

  bool needs_budget() const { return budget != nullptr || linear_budget != nullptr || curve_size > 0; }
  std::int64_t first_width() const {
    return (widths[0] + kScoreColumns - 1) / kScoreColumns * static_cast<std::int64_t>(kScoreColumns);
  }
  static int padded(int width) { return (width + kScorePanel - 1) / kScorePanel * kScorePanel; }
};

// The paths of a call, and where their scores go.
struct ScoredPaths {
  std::int64_t num_paths = 0;
  const std::uint8_t* codes = nullptr;  // codes[slot * slot_stride + path * path_stride]
  std::int64_t slot_stride = 0;
  std::int64_t path_stride = 0;
  const float* z = nullptr;  // [num_paths], null where the budget is no input
  float* scores = nullptr;   // [num_paths]
};

struct PathScoreParams : ScoredPaths {
  PathScoreModel model;
  float* members = nullptr;  // [num_members][num_paths] or null: not wanted
};

namespace portable {
void path_score(const PathScoreParams& p);
}
namespace avx2 {
void path_score(const PathScoreParams& p);
}
namespace avx512 {
void path_score(const PathScoreParams& p);
}

}  // namespace pfnas

// SPDX-License-Identifier: Apache-2.0
// The contract of path_score_int8: one network with one dense layer, in integers. Column k of the first layer
// counts steps of its own size; rounded down to 8 bits it meets weights of 8 bits:
//
// clang-format off
//   q[k] = start[k](z) + sum over look-ups of table[row][k]     (prepared by Python)
//   a[k] = min(max((q[k] + 64) >> 7, 0), 255)
//   y[j] = scale[j] * (sum over k of a[k] weights[j][k]) + bias[j]
//   score = sum over j of head[j] relu(y[j]) + linear part
// clang-format on
//
// q is a sum modulo 2^16 whose value fits int16. The last two lines are float32, the rest is exact.
// Python proves how far the score can be from that of path_score.
#pragma once

#include <cstdint>

#include "kernels/path_score/params.h"

namespace pfnas {

constexpr int kInt8Columns = 128;  // columns per block of the table

struct Int8Model {
  int num_slots = 0;
  int num_lookups = 0;
  const ScoreLookup* lookups = nullptr;  // [num_lookups]
  std::int64_t num_rows = 0;
  int width = 0;      // of the first layer, a multiple of 128
  int out_width = 0;  // of the dense layer, a multiple of 64
  // Columns of each 64 lie in the order that `packus` of two vectors turns into ascending.
  const std::int16_t* table = nullptr;   // [width / 128][num_rows][128]
  const std::int16_t* start = nullptr;   // [width], in steps; columns as in the table
  const std::int16_t* budget = nullptr;  // [width], steps per half of the range of z
  float z_middle = 0;
  float z_scale = 0;
  bool needs_budget = false;             // z is an input
  const std::int8_t* weights = nullptr;  // [out_width / 64][width / 4][64][4]
  const float* scale = nullptr;          // [out_width]
  const float* bias = nullptr;           // [out_width]
  const float* head = nullptr;           // [out_width]
  const float* linear = nullptr;         // [num_rows] or null: no linear part
  float linear_offset = 0;
  float linear_budget = 0;
};

struct Int8ScoreParams : ScoredPaths {
  Int8Model model;
  bool use_vnni = false;  // 16-lane tier only: the CPU has AVX512-VNNI; the same integers either way
};

namespace portable {
void path_score_int8(const Int8ScoreParams& p);
}
namespace avx2 {
void path_score_int8(const Int8ScoreParams& p);
}
namespace avx512 {
void path_score_int8(const Int8ScoreParams& p);
}

}  // namespace pfnas

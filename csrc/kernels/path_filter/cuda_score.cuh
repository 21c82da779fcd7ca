// SPDX-License-Identifier: Apache-2.0
// Scores of 16 paths at a time by a whole block (path_score/params.h has the formula). The first layer is a
// sum of table rows: lanes are neighbouring columns. A path's arithmetic does not depend on its neighbours.
#pragma once

#include "cuda/device.h"
#include "kernels/path_filter/cuda_params.h"

namespace pfnas::cuda {

constexpr int kTilePaths = 16;
constexpr int kPathLanes = kFilterThreads / kTilePaths;  // threads that sum up one path
constexpr int kHiddenRow = kFilterHidden + 4;
constexpr int kPathsPerThread = 4;  // of a dense layer

using HiddenTile = float[kTilePaths][kHiddenRow];

struct ScoreTile {
  std::int32_t rows[kTilePaths][kFilterSlots];  // of the table
  float z[kTilePaths];
  float scores[kTilePaths];
  HiddenTile hidden[2];
};

PFNAS_DEVICE float relu_of(float x) { return x < 0.0f ? 0.0f : x; }  // NaN stays

// Natural logarithm of a positive normal number, error below 1e-14 + an ulp: 2 artanh((m - 1) / (m + 1)) of
// the mantissa. Our own, so that every compiler and device gives the same bits.
PFNAS_DEVICE double log_of(double x) {
  const long long bits = __double_as_longlong(x);
  int exponent = static_cast<int>(bits >> 52) - 1023;
  double m = __longlong_as_double((bits & 0x000fffffffffffffll) | 0x3ff0000000000000ll);  // 1 <= m < 2
  if (m > 1.4142135623730951) {
    m = __dmul_rn(m, 0.5);
    ++exponent;
  }
  const double s = __ddiv_rn(__dadd_rn(m, -1.0), __dadd_rn(m, 1.0)), square = __dmul_rn(s, s);
  double sum = 0.0;
  PFNAS_UNROLL_LOOP
  for (int k = 17; k >= 1; k -= 2) sum = __dadd_rn(__dmul_rn(sum, square), 1.0 / k);
  return __dadd_rn(__dmul_rn(2.0, __dmul_rn(s, sum)), __dmul_rn(exponent, 0.6931471805599453));
}

// exp(x), relative error below 2e-7 for -87 < x < 88, clamped beyond; NaN stays. The CPU's polynomial.
PFNAS_DEVICE float exp_of(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const float shifted = fmaf(x, 1.44269504088896341f, kRound);
  const float n = shifted - kRound;
  float r = fmaf(n, -0.693359375f, x);
  r = fmaf(n, 2.12194440e-4f, r);
  float sum = fmaf(r, 1.0f / 5040.0f, 1.0f / 720.0f);
  sum = fmaf(sum, r, 1.0f / 120.0f);
  sum = fmaf(sum, r, 1.0f / 24.0f);
  sum = fmaf(sum, r, 1.0f / 6.0f);
  sum = fmaf(sum, r, 0.5f);
  sum = fmaf(sum, r, 1.0f);
  sum = fmaf(sum, r, 1.0f);
  return sum * __uint_as_float((__float_as_uint(shifted) << 23) + (127u << 23));
}

PFNAS_DEVICE float curve_at(const PathScoreModel& m, float z) {
  const float place = (z - m.curve_low) * m.curve_per_unit;
  if (place != place) return place;
  if (!(place > 0.0f)) return m.curve[0];
  if (place >= static_cast<float>(m.curve_size - 1)) return m.curve[m.curve_size - 1];
  const int knot = static_cast<int>(place);
  return fmaf(place - static_cast<float>(knot), m.curve[knot + 1] - m.curve[knot], m.curve[knot]);
}

// Offset, budget and table rows of one column.
PFNAS_DEVICE float column_sum(const PathScoreModel& m, const std::int32_t* rows, float z,
                              std::int64_t column) {
  float sum = m.offset[column];
  if (m.budget != nullptr) sum = fmaf(z, m.budget[column], sum);
  if (m.budget_square != nullptr) sum = fmaf(z * z, m.budget_square[column], sum);
  const float* table = m.table + column / m.block * m.num_rows * m.block + column % m.block;
  for (int r = 0; r < m.num_lookups; ++r) sum += table[static_cast<std::int64_t>(rows[r]) * m.block];
  return sum;
}

// out = relu(in W + bias), 16 paths.
PFNAS_DEVICE void dense_layer(const PathScoreModel& m, int network, int layer, const HiddenTile& in,
                              HiddenTile& out) {
  const int in_width = m.widths[layer];
  const int out_width = (m.widths[layer + 1] + kScorePanel - 1) / kScorePanel * kScorePanel;
  const float* weights = m.dense[layer] + static_cast<std::int64_t>(network) * in_width * out_width;
  const float* bias = m.bias[layer] + static_cast<std::int64_t>(network) * out_width;
  const int items = out_width * (kTilePaths / kPathsPerThread);
  for (int i = static_cast<int>(threadIdx.x); i < items; i += kFilterThreads) {
    const int group = i / out_width, column = i - group * out_width, path = group * kPathsPerThread;
    const float* w = weights + column / kScorePanel * in_width * kScorePanel + column % kScorePanel;
    float sums[kPathsPerThread];
    PFNAS_UNROLL_LOOP
    for (int j = 0; j < kPathsPerThread; ++j) sums[j] = bias[column];
    for (int k = 0; k < in_width; ++k) {
      const float weight = w[k * kScorePanel];
      PFNAS_UNROLL_LOOP
      for (int j = 0; j < kPathsPerThread; ++j) sums[j] = fmaf(in[path + j][k], weight, sums[j]);
    }
    PFNAS_UNROLL_LOOP
    for (int j = 0; j < kPathsPerThread; ++j) out[path + j][column] = relu_of(sums[j]);
  }
}

// This thread's share of member `member`'s linear part.
PFNAS_DEVICE float linear_share(const PathScoreModel& m, const ScoreTile& tile, int path, int lane,
                                int member) {
  float sum = 0.0f;
  if (m.linear_width == 0) return sum;
  if (lane == 0) {
    sum = m.linear_offset[member];
    if (m.linear_budget != nullptr) sum = fmaf(tile.z[path], m.linear_budget[member], sum);
  }
  PFNAS_ROLLED_LOOP
  for (int r = lane; r < m.num_lookups; r += kPathLanes) {
    sum += m.linear[static_cast<std::int64_t>(tile.rows[path][r]) * m.linear_width + member];
  }
  return sum;
}

// Adds up the shares of a path's 16 threads and adds the member to its score.
PFNAS_DEVICE void add_member(const PathScoreModel& m, ScoreTile& tile, int path, int lane, int member,
                             float share) {
  constexpr unsigned kAllLanes32 = 0xffffffffu;
  PFNAS_UNROLL_LOOP
  for (int offset = kPathLanes / 2; offset > 0; offset /= 2) {
    share += __shfl_xor_sync(kAllLanes32, share, offset);
  }
  if (lane == 0) tile.scores[path] = fmaf(m.weights[member], share, tile.scores[path]);
}

PFNAS_DEVICE void score_network(const PathScoreModel& m, int network, ScoreTile& tile, int path, int lane) {
  const int width = (m.widths[0] + kScoreColumns - 1) / kScoreColumns * kScoreColumns;
  PFNAS_ROLLED_LOOP
  for (int i = static_cast<int>(threadIdx.x); i < kTilePaths * width; i += kFilterThreads) {
    const int row = i / width, column = i - row * width;
    const std::int64_t whole = static_cast<std::int64_t>(network) * width + column;
    tile.hidden[0][row][column] = relu_of(column_sum(m, tile.rows[row], tile.z[row], whole));
  }
  __syncthreads();
  for (int layer = 0; layer < m.num_dense; ++layer) {
    dense_layer(m, network, layer, tile.hidden[layer % 2], tile.hidden[(layer + 1) % 2]);
    __syncthreads();
  }
  const int last = (m.widths[m.num_dense] + kScorePanel - 1) / kScorePanel * kScorePanel;
  const float* head = m.head + static_cast<std::int64_t>(network) * last;
  float share = linear_share(m, tile, path, lane, network);
  for (int i = lane; i < last; i += kPathLanes) {
    share = fmaf(tile.hidden[m.num_dense % 2][path][i], head[i], share);
  }
  add_member(m, tile, path, lane, network, share);
  __syncthreads();
}

PFNAS_DEVICE void score_kernel(const PathScoreModel& m, int kernel, ScoreTile& tile, int path, int lane) {
  const int width = (m.widths[0] + kScoreColumns - 1) / kScoreColumns * kScoreColumns;
  const std::int64_t first =
      static_cast<std::int64_t>(m.num_networks) * width + static_cast<std::int64_t>(kernel) * m.kernel_width;
  const float* head = m.kernel_head + static_cast<std::int64_t>(kernel) * m.kernel_width;
  float share = linear_share(m, tile, path, lane, m.num_networks + kernel);
  PFNAS_ROLLED_LOOP
  for (int i = lane; i < m.kernel_width; i += kPathLanes) {
    share = fmaf(exp_of(column_sum(m, tile.rows[path], tile.z[path], first + i)), head[i], share);
  }
  add_member(m, tile, path, lane, m.num_networks + kernel, share);
}

// Paths first .. first + 15 of the block; `codes` and `costs` are complete. Every thread calls it.
template <int kPitch>
PFNAS_DEVICE void score_tile(const PathFilterParams& p, int first,
                             const std::uint8_t (&codes)[kFilterThreads][kPitch],
                             const double (&costs)[kFilterThreads], ScoreTile& tile) {
  const PathScoreModel& m = p.model;
  const int path = static_cast<int>(threadIdx.x) / kPathLanes,
            lane = static_cast<int>(threadIdx.x) % kPathLanes;
  PFNAS_ROLLED_LOOP
  for (int r = lane; r < m.num_lookups; r += kPathLanes) {
    const ScoreLookup look = m.lookups[r];
    const auto& row = codes[first + path];
    tile.rows[path][r] = look.first_row + row[look.slot] + look.second_stride * row[look.second_slot];
  }
  if (lane == 0) {
    const double cost = costs[first + path];
    const double log_cost = cost > 0.0 ? log_of(cost) : 0.0;
    const double z = __ddiv_rn(__dadd_rn(log_cost, -p.log_mean), p.log_scale);
    tile.z[path] = static_cast<float>(z);
    tile.scores[path] = m.curve_size > 0 ? curve_at(m, static_cast<float>(z)) : 0.0f;
  }
  __syncthreads();
  PFNAS_ROLLED_LOOP
  for (int network = 0; network < m.num_networks; ++network) score_network(m, network, tile, path, lane);
  PFNAS_ROLLED_LOOP
  for (int kernel = 0; kernel < m.num_kernels; ++kernel) score_kernel(m, kernel, tile, path, lane);
  __syncthreads();
}

}  // namespace pfnas::cuda

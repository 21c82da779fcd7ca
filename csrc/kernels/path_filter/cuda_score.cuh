// SPDX-License-Identifier: Apache-2.0
// Scores of 32 or 16 paths at a time by a whole block (path_score/params.h has the formula). The first layer
// is a sum of table rows: a lane has four neighbouring columns. A path's arithmetic does not depend on its
// neighbours.
#pragma once

#include "cuda/device.h"
#include "kernels/path_filter/cuda_params.h"

namespace pfnas::cuda {

constexpr int kHiddenPad = 4;                    // rows of neighbouring paths begin in other banks
constexpr int kRowPitch = kFilterSlots + 8;      // the same for rows of look-ups
constexpr int kHalfWarps = kFilterThreads / 16;  // 16 lanes with four columns each: a block of the table
constexpr int kPathsPerThread = 4;               // of a dense layer
constexpr unsigned kAllLanes = 0xffffffffu;

template <int kPaths>
struct ScoreTile {
  static constexpr int kLanes = kFilterThreads / kPaths;  // threads that sum up one path
  alignas(16) std::int32_t rows[kPaths][kRowPitch];       // where they begin in a block of the table
  alignas(16) float hidden[kHiddenFloats];
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

PFNAS_DEVICE float4 add(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}
PFNAS_DEVICE float4 multiply_add(float a, float4 b, float4 sum) {
  return make_float4(fmaf(a, b.x, sum.x), fmaf(a, b.y, sum.y), fmaf(a, b.z, sum.z), fmaf(a, b.w, sum.w));
}
PFNAS_DEVICE float4 relu_of(float4 x) {
  return make_float4(relu_of(x.x), relu_of(x.y), relu_of(x.z), relu_of(x.w));
}

// What does not depend on a path's codes, of four columns.
PFNAS_DEVICE float4 column_offsets(const PathScoreModel& m, float z, int column) {
  float4 sum = load_vector<float4>(m.offset + column);
  if (m.budget != nullptr) sum = multiply_add(z, load_vector<float4>(m.budget + column), sum);
  if (m.budget_square != nullptr)
    sum = multiply_add(z * z, load_vector<float4>(m.budget_square + column), sum);
  return sum;
}

// Adds the table rows that kCount paths look up, in four columns. The paths' lists are kHalfWarps apart.
template <int kCount>
PFNAS_DEVICE void add_rows(const PathScoreModel& m, const std::int32_t* rows, int column,
                           float4 (&sums)[kCount]) {
  const int block = column / kScoreColumns >> (m.block >> 7);  // of 64 or 128 columns
  const int at = block * m.block * static_cast<int>(m.num_rows) + column - block * m.block;
  const auto add_row = [&](int j, int row) {
    sums[j] = add(sums[j], load_vector<float4>(m.table + (at + row)));
  };
  int r = 0;
  PFNAS_ROLLED_LOOP
  for (; r + 4 <= m.num_lookups; r += 4) {
    PFNAS_UNROLL_LOOP
    for (int j = 0; j < kCount; ++j) {
      const int4 four = load_vector<int4>(rows + j * kHalfWarps * kRowPitch + r);
      add_row(j, four.x), add_row(j, four.y), add_row(j, four.z), add_row(j, four.w);
    }
  }
  PFNAS_ROLLED_LOOP
  for (; r < m.num_lookups; ++r) {
    PFNAS_UNROLL_LOOP
    for (int j = 0; j < kCount; ++j) add_row(j, rows[j * kHalfWarps * kRowPitch + r]);
  }
}

// hidden[path][column] = relu(offset + budget + table rows); 16 lanes have 64 columns of kPaths / 16 paths.
template <int kPaths>
PFNAS_DEVICE void first_layer(const PathFilterParams& p, int network, const float* z,
                              ScoreTile<kPaths>& tile) {
  constexpr int kCount = kPaths / kHalfWarps;
  const PathScoreModel& m = p.model;
  const int first = static_cast<int>(threadIdx.x) / 16, lane = static_cast<int>(threadIdx.x) % 16;
  const int width = (m.widths[0] + kScoreColumns - 1) / kScoreColumns * kScoreColumns;
  PFNAS_ROLLED_LOOP
  for (int column = 4 * lane; column < width; column += kScoreColumns) {
    float4 sums[kCount];
    PFNAS_UNROLL_LOOP
    for (int j = 0; j < kCount; ++j) {
      sums[j] = column_offsets(m, z[first + j * kHalfWarps], network * width + column);
    }
    add_rows(m, tile.rows[first], network * width + column, sums);
    PFNAS_UNROLL_LOOP
    for (int j = 0; j < kCount; ++j) {
      store_vector(tile.hidden + (first + j * kHalfWarps) * p.even_pitch + column, relu_of(sums[j]));
    }
  }
}

// A hidden layer of the tile: path i begins at data + i * pitch.
struct HiddenLayer {
  float* data;
  int pitch;
};

template <int kPaths>
PFNAS_DEVICE HiddenLayer hidden_layer(const PathFilterParams& p, ScoreTile<kPaths>& tile, int layer) {
  return layer % 2 == 0 ? HiddenLayer{tile.hidden, p.even_pitch}
                        : HiddenLayer{tile.hidden + kPaths * p.even_pitch, p.odd_pitch};
}

// Four paths' sums over the inputs k, k + 1 .. of four columns.
template <int kCount>
PFNAS_DEVICE void add_products(const float* in, int pitch, const float* weights,
                               float4 (&sums)[kPathsPerThread]) {
  float values[kPathsPerThread][kCount];
  PFNAS_UNROLL_LOOP
  for (int j = 0; j < kPathsPerThread; ++j) {
    if constexpr (kCount == 4) {
      const float4 four = load_vector<float4>(in + j * pitch);
      values[j][0] = four.x, values[j][1] = four.y, values[j][2] = four.z, values[j][3] = four.w;
    } else {
      values[j][0] = in[j * pitch];
    }
  }
  PFNAS_UNROLL_LOOP
  for (int i = 0; i < kCount; ++i) {
    const float4 weight = load_vector<float4>(weights + i * kScorePanel);
    PFNAS_UNROLL_LOOP
    for (int j = 0; j < kPathsPerThread; ++j) sums[j] = multiply_add(values[j][i], weight, sums[j]);
  }
}

PFNAS_DEVICE float exchange_half(float value) { return __shfl_xor_sync(kAllLanes, value, 16); }

PFNAS_DEVICE float4 exchange_half(float4 value) {
  return make_float4(exchange_half(value.x), exchange_half(value.y), exchange_half(value.z),
                     exchange_half(value.w));
}

// out = relu(in W + bias). A warp has four paths and 64 columns at a time, a lane four of these; half warps
// share out the inputs, every other four of them, and then the paths whose sums they finish.
template <int kPaths>
PFNAS_DEVICE void dense_layer(const PathScoreModel& m, int network, int layer, HiddenLayer in,
                              HiddenLayer out) {
  constexpr int kGroups = kPaths / kPathsPerThread, kChunks = kFilterThreads / 32 / kGroups;
  const int in_width = m.widths[layer];
  const int out_width = (m.widths[layer + 1] + kScorePanel - 1) / kScorePanel * kScorePanel;
  const float* const weights = m.dense[layer] + static_cast<std::int64_t>(network) * in_width * out_width;
  const float* const bias = m.bias[layer] + static_cast<std::int64_t>(network) * out_width;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 16;
  const int half = static_cast<int>(threadIdx.x) / 16 % 2, path = warp % kGroups * kPathsPerThread;
  const float* const source = in.data + path * in.pitch;
  PFNAS_ROLLED_LOOP
  for (int first = warp / kGroups * 64; first < out_width; first += kChunks * 64) {
    const bool real = first + 4 * lane < out_width;  // the others help with the last columns, in vain
    const int column = real ? first + 4 * lane : out_width - 4;
    const float* const panel =
        weights + (column / kScorePanel * in_width * kScorePanel + column % kScorePanel);
    float4 sums[kPathsPerThread];
    PFNAS_UNROLL_LOOP
    for (int j = 0; j < kPathsPerThread; ++j) {
      sums[j] = half == 0 ? load_vector<float4>(bias + column) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    const float *values = source + 4 * half, *weight = panel + 4 * half * kScorePanel;
    PFNAS_ROLLED_LOOP
    for (int n = (in_width / 4 + 1 - half) / 2; n > 0; --n) {
      add_products<4>(values, in.pitch, weight, sums);
      values += 8, weight += 8 * kScorePanel;
    }
    PFNAS_ROLLED_LOOP
    for (int k = in_width / 4 * 4 + half; k < in_width; k += 2) {
      add_products<1>(source + k, in.pitch, panel + k * kScorePanel, sums);
    }
    PFNAS_UNROLL_LOOP
    for (int j = 0; j < 2; ++j) {
      const float4 others = exchange_half(half == 0 ? sums[2 + j] : sums[j]);
      const float4 sum = add(half == 0 ? sums[j] : sums[2 + j], others);
      if (real) store_vector(out.data + (path + 2 * half + j) * out.pitch + column, relu_of(sum));
    }
  }
}

// This thread's share of member `member`'s linear part.
template <int kLanes>
PFNAS_DEVICE float linear_share(const PathScoreModel& m, const std::int32_t* rows, float z, int lane,
                                int member) {
  float sum = 0.0f;
  if (m.linear_width == 0) return sum;
  if (lane == 0) {
    sum = m.linear_offset[member];
    if (m.linear_budget != nullptr) sum = fmaf(z, m.linear_budget[member], sum);
  }
  PFNAS_ROLLED_LOOP
  for (int r = lane; r < m.num_lookups; r += kLanes) {
    sum += m.linear[static_cast<std::int64_t>(rows[r] / kScoreColumns >> (m.block >> 7)) * m.linear_width +
                    member];
  }
  return sum;
}

// Adds up the shares of a path's threads and adds the member to the path's score.
template <int kLanes>
PFNAS_DEVICE void add_member(const PathScoreModel& m, float& score, int lane, int member, float share) {
  PFNAS_UNROLL_LOOP
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    share += __shfl_xor_sync(kAllLanes, share, offset);
  }
  if (lane == 0) score = fmaf(m.weights[member], share, score);
}

// a . b of four columns added to a sum.
PFNAS_DEVICE float add_dot(float4 a, float4 b, float sum) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

// Where a thread sums up: one path's z and score, and which of its lanes the thread is.
struct PathLane {
  int path, lane;
  float z;
  float& score;
};

template <int kPaths>
PFNAS_DEVICE void score_network(const PathFilterParams& p, int network, const float* z,
                                ScoreTile<kPaths>& tile, const PathLane& own) {
  constexpr int kLanes = ScoreTile<kPaths>::kLanes;
  const PathScoreModel& m = p.model;
  first_layer(p, network, z, tile);
  __syncthreads();
  for (int layer = 0; layer < m.num_dense; ++layer) {
    dense_layer<kPaths>(m, network, layer, hidden_layer(p, tile, layer), hidden_layer(p, tile, layer + 1));
    __syncthreads();
  }
  const int last = (m.widths[m.num_dense] + kScorePanel - 1) / kScorePanel * kScorePanel;
  const float* const head = m.head + static_cast<std::int64_t>(network) * last;
  const HiddenLayer hidden = hidden_layer(p, tile, m.num_dense);
  float share = linear_share<kLanes>(m, tile.rows[own.path], own.z, own.lane, network);
  PFNAS_ROLLED_LOOP
  for (int i = 4 * own.lane; i < last; i += 4 * kLanes) {
    share = add_dot(load_vector<float4>(hidden.data + own.path * hidden.pitch + i),
                    load_vector<float4>(head + i), share);
  }
  add_member<kLanes>(m, own.score, own.lane, network, share);
  __syncthreads();
}

template <int kPaths>
PFNAS_DEVICE void score_kernel(const PathScoreModel& m, int kernel, const ScoreTile<kPaths>& tile,
                               const PathLane& own) {
  constexpr int kLanes = ScoreTile<kPaths>::kLanes;
  const int width = (m.widths[0] + kScoreColumns - 1) / kScoreColumns * kScoreColumns;
  const int first = m.num_networks * width + kernel * m.kernel_width;
  const float* const head = m.kernel_head + static_cast<std::int64_t>(kernel) * m.kernel_width;
  float share = linear_share<kLanes>(m, tile.rows[own.path], own.z, own.lane, m.num_networks + kernel);
  PFNAS_ROLLED_LOOP
  for (int i = 4 * own.lane; i < m.kernel_width; i += 4 * kLanes) {
    float4 sums[1] = {column_offsets(m, own.z, first + i)};
    add_rows(m, tile.rows[own.path], first + i, sums);
    const float4 values =
        make_float4(exp_of(sums[0].x), exp_of(sums[0].y), exp_of(sums[0].z), exp_of(sums[0].w));
    share = add_dot(values, load_vector<float4>(head + i), share);
  }
  add_member<kLanes>(m, own.score, own.lane, m.num_networks + kernel, share);
}

// The normalised budget of a path; 0 where none was found.
PFNAS_DEVICE float normalised_budget(const PathFilterParams& p, double cost) {
  const double log_cost = cost > 0.0 ? log_of(cost) : 0.0;
  return static_cast<float>(__ddiv_rn(__dadd_rn(log_cost, -p.log_mean), p.log_scale));
}

// What a score begins with.
PFNAS_DEVICE float first_score(const PathScoreModel& m, float z) {
  return m.curve_size > 0 ? curve_at(m, z) : 0.0f;
}

// Adds the members to the scores of paths first .. first + kPaths - 1 of the block, whose `codes`, `z` and
// `scores` are complete. Every thread calls it.
template <int kPaths, int kPitch>
PFNAS_DEVICE void score_tile(const PathFilterParams& p, int first,
                             const std::uint8_t (&codes)[kFilterThreads][kPitch],
                             const float (&z)[kFilterThreads], float (&scores)[kFilterThreads],
                             ScoreTile<kPaths>& tile) {
  constexpr int kLanes = ScoreTile<kPaths>::kLanes;
  const PathScoreModel& m = p.model;
  const int path = static_cast<int>(threadIdx.x) / kLanes, lane = static_cast<int>(threadIdx.x) % kLanes;
  const auto& row = codes[first + path];
  PFNAS_ROLLED_LOOP
  for (int r = lane; r < m.num_lookups; r += kLanes) {
    const auto look = load_vector<int4>(m.lookups + r);  // a ScoreLookup
    tile.rows[path][r] = (look.x + row[look.y] + look.w * row[look.z]) * m.block;
  }
  __syncthreads();
  const PathLane own{path, lane, z[first + path], scores[first + path]};
  PFNAS_ROLLED_LOOP
  for (int network = 0; network < m.num_networks; ++network) score_network(p, network, z + first, tile, own);
  if (m.num_kernels == 0) return;
  PFNAS_ROLLED_LOOP
  for (int kernel = 0; kernel < m.num_kernels; ++kernel) score_kernel(m, kernel, tile, own);
  __syncthreads();
}

}  // namespace pfnas::cuda

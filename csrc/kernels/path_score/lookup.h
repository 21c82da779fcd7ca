// SPDX-License-Identifier: Apache-2.0
// The first layer: sums of table rows. One block of columns at a time, so that its part of the table stays
// close while a batch of paths passes over it.
#pragma once

#include "common/simd.h"
#include "kernels/path_score/params.h"

namespace pfnas::PFNAS_TIER {

// Vectors of sums that one pass over the rows holds in registers, for blocks of 64 and of 128 columns.
constexpr int kNarrowVecs = kLanes == 16 ? 4 : 8;
constexpr int kWideVecs = 8;

// Paths whose rows are found at once: vectors of 16 of them, whole batches.
constexpr std::int64_t kRowStride = 192;
// Most paths per batch, and most for dense.h: whole tiles of each of its heights.
constexpr std::int64_t kBatch = kRowStride, kDenseBatch = 60;

// A batch of paths, ready for look-ups.
struct Batch {
  std::int64_t num_paths;
  const std::int32_t* rows;  // [num_lookups][kRowStride], rows of the table, times its block
  const float* z;            // [num_paths], or null
};

static PFNAS_INLINE Vec relu(Vec x) { return x < Vec{} ? Vec{} : x; }  // NaN stays NaN

// exp(x), relative error below 2e-7 for -87 < x < 88; clamped beyond; NaN stays NaN. x = n ln 2 + r, |r| <=
// ln 2 / 2, ln 2 in two parts (exact products); Taylor terms of exp(r) up to r^7.
static PFNAS_INLINE Vec exp_of(Vec x) {
  typedef std::int32_t Ints __attribute__((vector_size(kLanes * 4)));
  const Vec low = broadcast(-87.0f), high = broadcast(88.0f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const Vec shifted = x * 1.44269504088896341f + kRound;
  const Vec n = shifted - kRound;
  Vec r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Vec sum = r * (1.0f / 5040.0f) + (1.0f / 720.0f);
  sum = sum * r + (1.0f / 120.0f);
  sum = sum * r + (1.0f / 24.0f);
  sum = sum * r + (1.0f / 6.0f);
  sum = sum * r + 0.5f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  const Ints power = (reinterpret_cast<Ints>(shifted) << 23) + (127 << 23);
  return sum * reinterpret_cast<Vec>(power);
}

// A few columns: what the loops over paths need of them, in registers or at fixed addresses.
template <int kVecs>
struct Columns {
  const float* table;  // first row
  Vec offset[kVecs], budget[kVecs], budget_square[kVecs];

  Columns(const PathScoreModel& m, std::int64_t column) {
    table = m.table + column / m.block * m.num_rows * m.block + column % m.block;
    PFNAS_UNROLL for (int j = 0; j < kVecs; ++j) {
      offset[j] = load(m.offset + column + j * kLanes);
      budget[j] = m.budget == nullptr ? Vec{} : load(m.budget + column + j * kLanes);
      budget_square[j] = m.budget_square == nullptr ? Vec{} : load(m.budget_square + column + j * kLanes);
    }
  }
};

// Paths whose sums run side by side: a chain of additions alone would wait for its own results.
template <int kVecs>
constexpr int kSideBySide = kNumRegisters == 32 ? 2 : 1;

// Sums of the rows of kPaths paths; kPower = highest power of the budget that enters.
template <int kPower, int kPaths, int kVecs>
static PFNAS_INLINE void sum_rows(const Columns<kVecs>& c, const std::int32_t* rows, int num_lookups,
                                  const float* z, Vec (&sums)[kPaths][kVecs]) {
  PFNAS_UNROLL for (int i = 0; i < kPaths; ++i) {
    PFNAS_UNROLL for (int j = 0; j < kVecs; ++j) {
      sums[i][j] = c.offset[j];
      if constexpr (kPower >= 1) sums[i][j] += z[i] * c.budget[j];
      if constexpr (kPower >= 2) sums[i][j] += z[i] * z[i] * c.budget_square[j];
    }
  }
  for (int r = 0; r < num_lookups; ++r) {
    PFNAS_UNROLL for (int i = 0; i < kPaths; ++i) {
      const float* row = c.table + rows[r * kRowStride + i];
      PFNAS_UNROLL for (int j = 0; j < kVecs; ++j) sums[i][j] += load(row + j * kLanes);
    }
  }
}

// Calls use(path, its sums) for every path of a batch.
template <int kPower, int kVecs, class Use>
static PFNAS_INLINE void for_each_sum(const Columns<kVecs>& c, const Batch& batch, int num_lookups,
                                      const Use& use) {
  constexpr int kPair = kSideBySide<kVecs>;
  std::int64_t path = 0;
  for (; path + kPair <= batch.num_paths; path += kPair) {
    Vec sums[kPair][kVecs];
    sum_rows<kPower, kPair>(c, batch.rows + path, num_lookups, batch.z + path, sums);
    PFNAS_UNROLL for (int i = 0; i < kPair; ++i) use(path + i, sums[i]);
  }
  for (; path < batch.num_paths; ++path) {
    Vec sums[1][kVecs];
    sum_rows<kPower, 1>(c, batch.rows + path, num_lookups, batch.z + path, sums);
    use(path, sums[0]);
  }
}

// hidden, [num_paths][stride] = relu of `width` columns from `column` on.
template <int kPower, int kVecs>
static void lookup_relu(const PathScoreModel& m, const Batch& batch, std::int64_t column, std::int64_t width,
                        float* hidden, std::int64_t stride) {
  for (std::int64_t first = 0; first < width; first += kVecs * kLanes) {
    const Columns<kVecs> columns(m, column + first);
    for_each_sum<kPower>(columns, batch, m.num_lookups, [=](std::int64_t path, const Vec(&sums)[kVecs]) {
      float* out = hidden + path * stride + first;
      PFNAS_UNROLL for (int j = 0; j < kVecs; ++j) store(out + j * kLanes, relu(sums[j]));
    });
  }
}

// Sum of the lanes, halves first: the same order in every call of a tier.
static PFNAS_INLINE float sum_lanes(const float* lanes) {
  typedef float Quad __attribute__((vector_size(16)));
  typedef float UnalignedQuad __attribute__((vector_size(16), aligned(4), may_alias));
  Quad sum = *reinterpret_cast<const UnalignedQuad*>(lanes);
  PFNAS_UNROLL for (int i = 4; i < kLanes; i += 4) sum += *reinterpret_cast<const UnalignedQuad*>(lanes + i);
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

// member, [num_paths] = head . exp(columns).
template <int kPower, int kVecs>
static void lookup_exp(const PathScoreModel& m, const Batch& batch, std::int64_t column, std::int64_t width,
                       const float* head, float* partial, float* member) {
  for (std::int64_t first = 0; first < width; first += kVecs * kLanes) {
    const Columns<kVecs> columns(m, column + first);
    Vec weight[kVecs];
    PFNAS_UNROLL for (int j = 0; j < kVecs; ++j) weight[j] = load(head + first + j * kLanes);
    for_each_sum<kPower>(columns, batch, m.num_lookups, [&](std::int64_t path, const Vec(&sums)[kVecs]) {
      Vec total = first == 0 ? Vec{} : load(partial + path * kLanes);
      PFNAS_UNROLL for (int j = 0; j < kVecs; ++j) total += exp_of(sums[j]) * weight[j];
      store(partial + path * kLanes, total);
    });
  }
  for (std::int64_t path = 0; path < batch.num_paths; ++path) {
    member[path] = sum_lanes(partial + path * kLanes);
  }
}

// The members' linear parts: members, [num_members][num_paths] += sum over look-ups of their lanes.
static void add_linear(const PathScoreModel& m, const Batch& batch, float* members, std::int64_t stride) {
  for (std::int64_t path = 0; path < batch.num_paths; ++path) {
    const std::int32_t* rows = batch.rows + path;
    for (int first = 0; first < m.num_members; first += kLanes) {
      Vec sum = load(m.linear_offset + first);
      if (m.linear_budget != nullptr) sum += batch.z[path] * load(m.linear_budget + first);
      for (int r = 0; r < m.num_lookups; ++r) {
        sum += load(m.linear + static_cast<std::int64_t>(rows[r * kRowStride] / m.block) * m.linear_width +
                    first);
      }
      float lanes[kLanes];
      store(lanes, sum);
      for (int i = 0; i < min_of(kLanes, m.num_members - first); ++i) {
        members[(first + i) * stride + path] += lanes[i];
      }
    }
  }
}

}  // namespace pfnas::PFNAS_TIER

// SPDX-License-Identifier: Apache-2.0
// Networks of one dense layer whose look-ups hide behind its products: between two steps of a tile of 12
// paths by 32 columns, one table row of the next 12 paths is added. Rows come from L2 and additions have
// ports of their own, so both cost little more than the products alone. The arithmetic of a path is that of
// lookup.h and dense.h, operation by operation.
#pragma once

#include "common/simd.h"
#include "kernels/path_score/dense.h"
#include "kernels/path_score/lookup.h"
#include "kernels/path_score/params.h"

namespace pfnas::PFNAS_TIER {

constexpr int kTileRows = 12;  // x 2 vectors = 24 sums, and 4 of the next paths
constexpr int kTilePanels = 2;
constexpr int kUnitVecs = kScoreColumns / kLanes;

static bool can_overlap(const PathScoreModel& m) {
  return kNumRegisters == 32 && kLanes == 16 && m.num_dense == 1 &&
         PathScoreModel::padded(m.widths[1]) % (kTilePanels * kScorePanel) == 0;
}

// A network's look-ups, unit by unit: 64 columns of one path of a tile.
template <int kPower>
struct LookupUnits {
  const PathScoreModel& m;
  const Batch& batch;
  std::int64_t column;  // first of the network
  std::int64_t stride;  // of the hidden layer

  int count() const { return kTileRows * static_cast<int>(m.first_width() / kScoreColumns); }
};

// A place in a tile's units: all paths of the first 64 columns, then of the next.
struct Unit {
  int path;
  std::int64_t column;

  PFNAS_INLINE explicit Unit(int index)
      : path(index % kTileRows), column(index / kTileRows * std::int64_t{kScoreColumns}) {}
  PFNAS_INLINE void advance() {
    if (++path < kTileRows) return;
    path = 0;
    column += kScoreColumns;
  }
};

// Starts a unit of the tile at `row`: where its rows are, and its sums without them.
template <int kPower>
static PFNAS_INLINE const float* start_unit(const LookupUnits<kPower>& units, std::int64_t row, Unit unit,
                                            const std::int32_t*& rows, Vec (&sums)[kUnitVecs]) {
  const PathScoreModel& m = units.m;
  const std::int64_t path = min_of(row + unit.path, units.batch.num_paths - 1);  // the last one again
  const std::int64_t column = units.column + unit.column;
  PFNAS_UNROLL for (int j = 0; j < kUnitVecs; ++j) sums[j] = load(m.offset + column + j * kLanes);
  if constexpr (kPower >= 1) {
    const float z = units.batch.z[path];
    PFNAS_UNROLL for (int j = 0; j < kUnitVecs; ++j) sums[j] += z * load(m.budget + column + j * kLanes);
  }
  rows = units.batch.rows + path;
  const std::int64_t in_block = column & (m.block - 1);  // a block has 64 or 128 columns
  return m.table + (column - in_block) * m.num_rows + in_block;
}

static PFNAS_INLINE void finish_unit(const Vec (&sums)[kUnitVecs], Unit unit, std::int64_t stride,
                                     float* hidden) {
  float* out = hidden + unit.path * stride + unit.column;
  PFNAS_UNROLL for (int j = 0; j < kUnitVecs; ++j) store(out + j * kLanes, relu(sums[j]));
}

static PFNAS_INLINE void add_row(const float* row, Vec (&sums)[kUnitVecs]) {
  PFNAS_UNROLL for (int j = 0; j < kUnitVecs; ++j) sums[j] += load(row + j * kLanes);
}

// The look-ups of a tile by themselves: nothing goes before a batch's first.
template <int kPower>
static void look_up_tile(const LookupUnits<kPower>& units, std::int64_t row, float* hidden) {
  Unit unit(0);
  for (int i = 0; i < units.count(); ++i, unit.advance()) {
    Vec sums[kUnitVecs];
    const std::int32_t* rows;
    const float* table = start_unit(units, row, unit, rows, sums);
    for (int r = 0; r < units.m.num_lookups; ++r) add_row(table + rows[r * kRowStride], sums);
    finish_unit(sums, unit, units.stride, hidden);
  }
}

// Two panels of the tile at `row`, whose hidden layer is `in`, and units [first, last) of the next tile.
template <int kPower>
static void overlapped_tile(const LookupUnits<kPower>& units, const DenseJob& job, std::int64_t row,
                            int panel, const float* in, int first, int last, float* next) {
  const std::int64_t panel_size = static_cast<std::int64_t>(job.in_width) * kScorePanel;
  const float* weights = job.weights + panel * panel_size;
  const int num_lookups = units.m.num_lookups, in_width = job.in_width;
  const std::int64_t stride = units.stride;
  Vec sums[kTileRows][kTilePanels * kPanelVecs];
  start_sums(job, panel, sums);
  int k = 0;
  Unit unit(first);
  for (int i = first; i < last; ++i, unit.advance()) {
    Vec found[kUnitVecs];
    const std::int32_t* rows;
    const float* table = start_unit(units, row + kTileRows, unit, rows, found);
    const int both = min_of(num_lookups, in_width - k);
    int r = 0;
    for (; r < both; ++r, ++k) {
      add_unit<kTilePanels>(weights, panel_size, in, stride, k, sums);
      add_row(table + rows[r * kRowStride], found);
    }
    for (; r < num_lookups; ++r) add_row(table + rows[r * kRowStride], found);
    finish_unit(found, unit, stride, next);
  }
  for (; k < in_width; ++k) add_unit<kTilePanels>(weights, panel_size, in, stride, k, sums);
  PFNAS_UNROLL for (int i = 0; i < kTileRows; ++i) finish_row(job, row + i, panel, sums[i]);
}

// Look-ups and the dense layer of a batch; `hidden` holds two tiles.
template <int kPower>
static void overlapped_network(const PathScoreModel& m, const Batch& batch, std::int64_t column,
                               const DenseJob& job, int num_panels, float* hidden) {
  const LookupUnits<kPower> units{m, batch, column, job.in_stride};
  const int passes = num_panels / kTilePanels;
  const int per_pass = static_cast<int>(ceil_div(units.count(), passes));
  float* tiles[2] = {hidden, hidden + kTileRows * job.in_stride};
  look_up_tile(units, 0, tiles[0]);
  for (std::int64_t row = 0; row < batch.num_paths; row += kTileRows) {
    const int count = row + kTileRows < batch.num_paths ? units.count() : 0;
    for (int pass = 0; pass < passes; ++pass) {
      overlapped_tile(units, job, row, pass * kTilePanels, tiles[0], min_of(count, pass * per_pass),
                      min_of(count, (pass + 1) * per_pass), tiles[1]);
    }
    float* done = tiles[0];
    tiles[0] = tiles[1];
    tiles[1] = done;
  }
}

}  // namespace pfnas::PFNAS_TIER

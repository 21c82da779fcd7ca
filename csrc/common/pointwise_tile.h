// SPDX-License-Identifier: Apache-2.0
// The matrix product behind every 1x1 convolution: pixels x packed panels (common/panels.h), with the
// caller's epilogue applied while the sums are still in registers.
//
//   pointwise_panel : all rows of pixels x one panel -> for 2 or 3 vectors of the panel -> tiles of rows
//   PointwiseTile   : up to 8 x 3 or 16 x 1.5 sums (32 registers) or 6 x 2 (16 registers), one pass over the
//                     inputs
//
// Where at most half of a panel's last vector of 16 is used (24 or 40 outputs), two rows share it: their
// values fill one half each, against the weights twice.
//
// A Sink says where sums start and what becomes of them. Rows are counted from the start of pointwise_panel,
// vectors from the start of the panel:
//   Vec start(row, vec) const            what the sum starts from (zero, or what an earlier call left)
//   Column column(vec) const             what the rows of one vector share, e.g. scale and shift
//   Row row(row) const                   what the vectors of one row share, e.g. where it is stored
//   void finish(row, vec, column, sum) const
//   bool kAccumulates                    whether `finish` changes the column; then also
//   void close(vec, column) const        after the last row of a run of tiles
// Every sum runs over the inputs in ascending order whatever the tile, so a result does not depend on the
// cut.
#pragma once

#include "common/panels.h"
#include "common/simd.h"

namespace pfnas::PFNAS_TIER {

// 8 x 3 + 3 weights + 1 pixel = 28 registers; 6 x 2 + 2 + 1 = 15. At least 8 sums are needed to keep two
// multiply-add units of latency 4 busy.
constexpr int kTileVecs = kNumRegisters >= 32 ? 3 : 2;
constexpr int kTileRows = kNumRegisters >= 32 ? 8 : 6;
// Of tiles of one vector, or one and a half: 16 x 1.5 + 2 weights + 3 pixels = 29.
constexpr int kHighTileRows = 16;
constexpr int kVecsPerPanel = kPanelWidth / kLanes;

// Pixels as rows of a matrix: row m is at data + m * stride, the inputs of one pixel are dense.
struct PixelRows {
  const float* data;
  std::int64_t stride;
};

// Vectors of a panel that a product runs over.
struct PanelVecs {
  int count;
  bool last_is_half;  // of the last one, the first half alone is used; with 16 lanes only
};

// Vectors of panel `panel` that hold any of the first `out_channels` outputs. Of these the first
// `num_used` have weights; the others are padding, which is computed but not worth computing.
static PFNAS_INLINE PanelVecs panel_vecs(std::int64_t panel, std::int64_t out_channels,
                                         std::int64_t num_used) {
  const std::int64_t first = panel * kPanelWidth;
  const auto count =
      static_cast<int>(ceil_div(min_of<std::int64_t>(kPanelWidth, out_channels - first), kLanes));
  const std::int64_t used = min_of<std::int64_t>(kPanelWidth, num_used - first);
  return {count, kLanes == 16 && used <= count * kLanes - kLanes / 2};
}
static PFNAS_INLINE PanelVecs panel_vecs(std::int64_t panel, std::int64_t out_channels) {
  return panel_vecs(panel, out_channels, out_channels);
}

template <class Sink>
struct PointwiseTile {
  using Column = typename Sink::Column;
  PixelRows pixels;
  const float* panel;  // [in_channels][48]
  std::int64_t in_channels;
  Sink sink;

  // Rows [row, row + kRows) x vectors [vec, vec + kVecs), and half of the next one. A function of its own, so
  // that what the rest keeps in registers does not push out sums.
  template <int kRows, int kVecs, bool kHalf>
  __attribute__((noinline)) void run(std::int64_t row, int vec, Column* columns) const {
    constexpr int kLow = (kRows + 1) / 2;     // rows addressed from the first base, for few registers
    constexpr int kPairs = kHalf ? kLow : 0;  // rows i and i + kLow share a vector
    Vec sums[kRows][kVecs], pairs[kPairs + 1];
    PFNAS_UNROLL for (int i = 0; i < kRows; ++i) {
      PFNAS_UNROLL for (int j = 0; j < kVecs; ++j) sums[i][j] = sink.start(row + i, vec + j);
    }
    PFNAS_UNROLL for (int i = 0; i < kPairs; ++i) {
      pairs[i] = sink.start(row + i, vec + kVecs);
      if (i + kLow < kRows) {
        pairs[i] = join_halves(pairs[i], swap_halves(sink.start(row + i + kLow, vec + kVecs)));
      }
    }
    const std::int64_t stride = pixels.stride;
    const float* in[2] = {pixels.data + row * stride, pixels.data + (row + kLow) * stride};
    const float* weights = panel + vec * kLanes;
    for (std::int64_t c = 0; c < in_channels; ++c, weights += kPanelWidth) {
      Vec w[kVecs + 1];
      PFNAS_UNROLL for (int j = 0; j < kVecs; ++j) w[j] = load(weights + j * kLanes);
      if constexpr (kHalf) w[kVecs] = load_half_twice(weights + kVecs * kLanes);
      PFNAS_UNROLL for (int i = 0; i < kLow; ++i) {
        const Vec low = broadcast(in[0][i * stride]);
        PFNAS_UNROLL for (int j = 0; j < kVecs; ++j) sums[i][j] += low * w[j];
        if (i + kLow < kRows) {
          const Vec high = broadcast(in[1][i * stride]);
          PFNAS_UNROLL for (int j = 0; j < kVecs; ++j) sums[i + kLow][j] += high * w[j];
          if constexpr (kHalf) pairs[i] += join_halves(low, high) * w[kVecs];
        } else if constexpr (kHalf) {
          pairs[i] += low * w[kVecs];
        }
      }
      ++in[0];
      ++in[1];
    }
    finish<kRows, kVecs, kHalf>(row, vec, columns, sums, pairs);
  }

  template <int kRows, int kVecs, bool kHalf, int kPairs>
  PFNAS_INLINE void finish(std::int64_t row, int vec, Column* columns, const Vec (&sums)[kRows][kVecs],
                           const Vec (&pairs)[kPairs]) const {
    const Sink out = sink;  // a copy that no store can reach: what it holds is read once
    typename Sink::Row rows[kRows];
    PFNAS_UNROLL for (int i = 0; i < kRows; ++i) rows[i] = out.row(row + i);
    PFNAS_UNROLL for (int j = 0; j < kVecs; ++j) {
      Column column = columns[j];
      PFNAS_UNROLL for (int i = 0; i < kRows; ++i) out.finish(rows[i], vec + j, column, sums[i][j]);
      if constexpr (Sink::kAccumulates) columns[j] = column;
    }
    if constexpr (kHalf) {
      constexpr int kLow = (kRows + 1) / 2;
      Column column = columns[kVecs];
      PFNAS_UNROLL for (int i = 0; i < kRows; ++i) {
        const Vec pair = i < kLow ? pairs[i] : swap_halves(pairs[i - kLow]);
        out.finish(rows[i], vec + kVecs, column, join_halves(pair, Vec{}));
      }
      if constexpr (Sink::kAccumulates) columns[kVecs] = column;
    }
  }

  // `num_tiles` tiles of kRows rows from `row`.
  template <int kRows, int kVecs, bool kHalf>
  PFNAS_INLINE void run_tiles(std::int64_t row, std::int64_t num_tiles, int vec) const {
    Column columns[kVecs + kHalf];
    PFNAS_UNROLL for (int j = 0; j < kVecs + kHalf; ++j) columns[j] = sink.column(vec + j);
    for (std::int64_t tile = 0; tile < num_tiles; ++tile, row += kRows) {
      run<kRows, kVecs, kHalf>(row, vec, columns);
    }
    if constexpr (Sink::kAccumulates) {
      PFNAS_UNROLL for (int j = 0; j < kVecs + kHalf; ++j) sink.close(vec + j, columns[j]);
    }
  }

  // Rows [0, num_rows) cut into tiles of nearly equal height: a last tile of one row would wait for its sums.
  template <int kVecs, bool kHalf>
  void run_rows(std::int64_t num_rows, int vec) const {
    std::int64_t row = 0;
    if constexpr (kVecs == 1) {
      const std::int64_t num_high = num_rows / kHighTileRows;
      if (num_high > 0) run_tiles<kHighTileRows, kVecs, kHalf>(0, num_high, vec);
      row = num_high * kHighTileRows;
      if (row == num_rows) return;
    }
    const std::int64_t rest = num_rows - row, num_tiles = ceil_div(rest, kTileRows);
    const std::int64_t height = rest / num_tiles, num_higher = rest % num_tiles;
    if (num_higher > 0) run_height<kVecs, kHalf>(height + 1, row, num_higher, vec);
    row += num_higher * (height + 1);
    run_height<kVecs, kHalf>(height, row, num_tiles - num_higher, vec);
  }

  template <int kVecs, bool kHalf>
  PFNAS_INLINE void run_height(std::int64_t rows, std::int64_t row, std::int64_t num_tiles, int vec) const {
    switch (rows) {
      case 1:
        return run_tiles<1, kVecs, kHalf>(row, num_tiles, vec);
      case 2:
        return run_tiles<2, kVecs, kHalf>(row, num_tiles, vec);
      case 3:
        return run_tiles<3, kVecs, kHalf>(row, num_tiles, vec);
      case 4:
        return run_tiles<4, kVecs, kHalf>(row, num_tiles, vec);
      case 5:
        return run_tiles<5, kVecs, kHalf>(row, num_tiles, vec);
      case 6:
        return run_tiles<6, kVecs, kHalf>(row, num_tiles, vec);
      default:
        break;
    }
    if constexpr (kTileRows == 8) {
      if (rows == 7) return run_tiles<7, kVecs, kHalf>(row, num_tiles, vec);
      return run_tiles<8, kVecs, kHalf>(row, num_tiles, vec);
    }
  }
};

// Rows [0, num_rows) of `pixels` times vectors of a panel; num_rows >= 1.
template <class Sink>
static inline void pointwise_panel(const PixelRows& pixels, std::int64_t num_rows, const float* panel,
                                   std::int64_t in_channels, const PanelVecs& vecs, const Sink& sink) {
  const PointwiseTile<Sink> tile{pixels, panel, in_channels, sink};
  if constexpr (kLanes == 16 && kTileVecs == 3) {
    if (vecs.last_is_half && vecs.count == 3) return tile.template run_rows<2, true>(num_rows, 0);
    if (vecs.last_is_half && vecs.count == 2) return tile.template run_rows<1, true>(num_rows, 0);
  }
  int vec = 0;
  for (; vec + kTileVecs <= vecs.count; vec += kTileVecs) {
    tile.template run_rows<kTileVecs, false>(num_rows, vec);
  }
  if constexpr (kTileVecs == 3) {
    if (vecs.count - vec == 2) return tile.template run_rows<2, false>(num_rows, vec);
  }
  if (vecs.count - vec == 1) tile.template run_rows<1, false>(num_rows, vec);
}

}  // namespace pfnas::PFNAS_TIER

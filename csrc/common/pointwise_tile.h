// SPDX-License-Identifier: Apache-2.0
// The matrix product behind every 1x1 convolution: pixels x packed panels (common/panels.h), with the
// caller's epilogue applied while the sums are still in registers.
//
//   pointwise_panel : all rows of pixels x one panel -> for 2 or 3 vectors of the panel -> tiles of rows
//   PointwiseTile   : up to 8 x 3 sums (32 registers) or 6 x 2 (16 registers), one pass over the inputs
//
// A Sink says where sums start and what becomes of them. Rows are counted from the start of pointwise_panel,
// vectors from the start of the panel:
//   Vec start(row, vec) const            what the sum starts from (zero, or what an earlier call left)
//   Column column(vec) const             what the rows of one vector share, e.g. scale and shift
//   void finish(row, vec, column, sum) const
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
constexpr int kVecsPerPanel = kPanelWidth / kLanes;

// Pixels as rows of a matrix: row m is at data + m * stride, the inputs of one pixel are dense.
struct PixelRows {
  const float* data;
  std::int64_t stride;
};

template <class Sink>
struct PointwiseTile {
  PixelRows pixels;
  const float* panel;  // [in_channels][48]
  std::int64_t in_channels;
  Sink sink;

  // Rows [row, row + kRows) x vectors [vec, vec + kVecs).
  template <int kRows, int kVecs>
  __attribute__((noinline)) void run(std::int64_t row, int vec) const {
    Vec sums[kRows][kVecs];
    PFNAS_UNROLL for (int i = 0; i < kRows; ++i) {
      PFNAS_UNROLL for (int j = 0; j < kVecs; ++j) sums[i][j] = sink.start(row + i, vec + j);
    }
    const float* in[kRows];
    PFNAS_UNROLL for (int i = 0; i < kRows; ++i) in[i] = pixels.data + (row + i) * pixels.stride;
    const float* weights = panel + vec * kLanes;
    for (std::int64_t c = 0; c < in_channels; ++c, weights += kPanelWidth) {
      Vec w[kVecs];
      PFNAS_UNROLL for (int j = 0; j < kVecs; ++j) w[j] = load(weights + j * kLanes);
      PFNAS_UNROLL for (int i = 0; i < kRows; ++i) {
        const float value = in[i][c];
        PFNAS_UNROLL for (int j = 0; j < kVecs; ++j) sums[i][j] += value * w[j];
      }
    }
    PFNAS_UNROLL for (int j = 0; j < kVecs; ++j) {
      const auto column = sink.column(vec + j);
      PFNAS_UNROLL for (int i = 0; i < kRows; ++i) sink.finish(row + i, vec + j, column, sums[i][j]);
    }
  }

  // Rows [0, num_rows) cut into tiles of nearly equal height: a last tile of one row would wait for its sums.
  template <int kVecs>
  void run_rows(std::int64_t num_rows, int vec) const {
    const std::int64_t num_tiles = ceil_div(num_rows, kTileRows);
    const std::int64_t height = num_rows / num_tiles, num_higher = num_rows % num_tiles;
    std::int64_t row = 0;
    for (std::int64_t tile = 0; tile < num_tiles; ++tile) {
      const std::int64_t rows = height + (tile < num_higher ? 1 : 0);
      run_height<kVecs>(rows, row, vec);
      row += rows;
    }
  }

  template <int kVecs>
  PFNAS_INLINE void run_height(std::int64_t rows, std::int64_t row, int vec) const {
    switch (rows) {
      case 1:
        return run<1, kVecs>(row, vec);
      case 2:
        return run<2, kVecs>(row, vec);
      case 3:
        return run<3, kVecs>(row, vec);
      case 4:
        return run<4, kVecs>(row, vec);
      case 5:
        return run<5, kVecs>(row, vec);
      case 6:
        return run<6, kVecs>(row, vec);
      default:
        break;
    }
    if constexpr (kTileRows == 8) {
      if (rows == 7) return run<7, kVecs>(row, vec);
      return run<8, kVecs>(row, vec);
    }
  }
};

// Rows [0, num_rows) of `pixels` times the first `num_vecs` vectors of a panel; num_rows >= 1.
template <class Sink>
static inline void pointwise_panel(const PixelRows& pixels, std::int64_t num_rows, const float* panel,
                                   std::int64_t in_channels, int num_vecs, const Sink& sink) {
  const PointwiseTile<Sink> tile{pixels, panel, in_channels, sink};
  int vec = 0;
  for (; vec + kTileVecs <= num_vecs; vec += kTileVecs) tile.template run_rows<kTileVecs>(num_rows, vec);
  if constexpr (kTileVecs == 3) {
    if (num_vecs - vec == 2) return tile.template run_rows<2>(num_rows, vec);
  }
  if (num_vecs - vec == 1) tile.template run_rows<1>(num_rows, vec);
}

// Vectors of panel `panel` that hold any of the first `out_channels` outputs.
static PFNAS_INLINE int panel_vecs(std::int64_t panel, std::int64_t out_channels) {
  const std::int64_t width = min_of<std::int64_t>(kPanelWidth, out_channels - panel * kPanelWidth);
  return static_cast<int>(ceil_div(width, kLanes));
}

}  // namespace pfnas::PFNAS_TIER

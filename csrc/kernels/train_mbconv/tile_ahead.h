// SPDX-License-Identifier: Apache-2.0
// Memory that the next tile of pixels touches, fetched into L2 while this one is multiplied: a tile is a
// short run of many streams (one per block of channels), where the hardware's own prefetching starts anew
// each time, and the loops around the products would wait for it.
#pragma once

#include "common/simd.h"
#include "kernels/dynamic_depthwise_conv/filter.h"
#include "kernels/train_mbconv/cut.h"

namespace pfnas::PFNAS_TIER {

class TileAhead {
 public:
  TileAhead(const RowCut& cut, std::int64_t tile) : rows_of_all_(cut.rows) {
    if (tile + 1 == cut.num_tiles) return;
    first_ = cut.begin(tile + 1);
    rows_ = cut.count(tile + 1);
  }

  // A tensor in blocks, [blocks][pixels][16].
  void add_blocks(const float* data, std::int64_t blocks) {
    add(data + first_ * kBlock, rows_, (rows_of_all_ - rows_) * kBlock, blocks);
  }

  // A tensor in rows, [pixels][channels].
  void add_rows(const float* data, std::int64_t channels) {
    add(data + first_ * channels, ceil_div(rows_ * channels, kBlock), 0, 1);
  }

  // Vectors of multiply-adds of this tile, over which the lines are spread.
  void spread_over(double products) { products_per_line_ = products / static_cast<double>(lines_); }

  // Called between register tiles with the work of the next.
  PFNAS_INLINE void fetch(std::int64_t products) {
    due_ += static_cast<double>(products);
    for (; due_ >= products_per_line_ && now_ < num_; due_ -= products_per_line_) fetch_line();
  }

 private:
  struct Stream {
    const float* line;
    std::int64_t run, gap, runs, at;
  };

  void add(const float* first, std::int64_t run, std::int64_t gap, std::int64_t runs) {
    if (rows_ == 0) return;
    streams_[num_++] = {first, run, gap, runs, 0};
    lines_ += run * runs;
  }

  PFNAS_INLINE void fetch_line() {
    Stream& stream = streams_[now_];
    __builtin_prefetch(stream.line, 0, 2);
    stream.line += kBlock;
    if (++stream.at < stream.run) return;
    stream.at = 0;
    stream.line += stream.gap;
    if (--stream.runs == 0) ++now_;
  }

  static constexpr int kMaxStreams = 5;
  Stream streams_[kMaxStreams];
  int num_ = 0, now_ = 0;
  std::int64_t rows_of_all_, first_ = 0, rows_ = 0, lines_ = 0;
  double products_per_line_ = 0, due_ = 0;
};

}  // namespace pfnas::PFNAS_TIER

// SPDX-License-Identifier: Apache-2.0
// How the passes of a block are cut, by shape alone: pixels into tiles that stay in L2, tiles into groups
// that threads share out. Every group has sums of its own, folded in a fixed order.
#pragma once

#include "common/simd.h"
#include "kernels/dynamic_depthwise_conv/filter.h"
#include "kernels/dynamic_depthwise_conv/params.h"
#include "kernels/dynamic_depthwise_conv/walk.h"
#include "kernels/train_mbconv/params.h"

namespace pfnas::PFNAS_TIER {

// Rows (pixels) of a matrix.
struct RowCut {
  std::int64_t rows, tile, num_tiles, num_groups;

  std::int64_t begin(std::int64_t tile_index) const { return tile_index * tile; }
  std::int64_t count(std::int64_t tile_index) const { return min_of(tile, rows - tile_index * tile); }
  std::int64_t first_tile(std::int64_t group) const { return group * num_tiles / num_groups; }
  std::int64_t end_tile(std::int64_t group) const { return (group + 1) * num_tiles / num_groups; }
  std::int64_t group_rows(std::int64_t group) const {
    return min_of(rows, end_tile(group) * tile) - first_tile(group) * tile;
  }
};

static inline RowCut cut_rows(std::int64_t rows, std::int64_t mid_channels) {
  // A tile of all middle channels (96 x 320 floats = 120 KB) leaves L2 room for the weights. A group should
  // be long against its weight gradient, which is written and folded once per group.
  constexpr std::int64_t kRowsPerGroup = 384, kMaxGroups = 16;
  RowCut cut{};
  cut.rows = rows;
  cut.tile = mid_channels <= 320 ? 96 : 48;
  cut.num_tiles = ceil_div(rows, cut.tile);
  // An even number, so that two threads are done at the same time.
  const std::int64_t groups = ceil_div(ceil_div(rows, kRowsPerGroup), 2) * 2;
  cut.num_groups = min_of(cut.num_tiles, min_of(kMaxGroups, groups));
  return cut;
}

// Images x blocks of channels of the depthwise stage. `floats_per_row`: packed floats behind one row of y.
static inline Cut cut_depthwise(const TrainMBConvParams& p, std::int64_t floats_per_row) {
  constexpr std::int64_t kSlab = 48 * 1024, kItems = 32;
  Cut cut{};
  cut.batch = p.batch;
  cut.out_height = p.out_height;
  cut.num_blocks = cut.num_ranges = ceil_div(p.mid_channels, kBlock);
  const std::int64_t rows = max_of<std::int64_t>(4, kSlab / floats_per_row);
  cut.slab_rows = ceil_div(p.out_height, ceil_div(p.out_height, rows));
  cut.num_groups = min_of(p.batch, ceil_div(kItems, cut.num_blocks));
  const std::int64_t images = max_of<std::int64_t>(1, kSlab / (floats_per_row * p.out_height));
  cut.slab_images = min_of(images, ceil_div(p.batch, cut.num_groups));
  return cut;
}

// What the depthwise kernels want to know.
static inline DynamicDepthwiseConvParams depthwise_params(const TrainMBConvParams& p) {
  DynamicDepthwiseConvParams d;
  d.batch = p.batch;
  d.channels = p.mid_channels;
  d.height = p.height;
  d.width = p.width;
  d.out_height = p.out_height;
  d.out_width = p.out_width;
  d.kernel_size = p.kernel_size;
  d.max_kernel_size = p.max_kernel_size;
  d.stride = p.stride;
  d.bank = p.bank;
  d.matrix_5 = p.matrix_5;
  d.matrix_3 = p.matrix_3;
  d.grad_bank = p.grad_bank;
  d.grad_matrix_5 = p.grad_matrix_5;
  d.grad_matrix_3 = p.grad_matrix_3;
  return d;
}

}  // namespace pfnas::PFNAS_TIER

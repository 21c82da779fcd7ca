// SPDX-License-Identifier: Apache-2.0
// How a call is cut, by shape alone and never by the number of threads: into items (a group of images x a
// range of channel blocks) that threads share out, and each item into steps (a slab of rows or images x one
// channel block). Channel blocks are innermost: neighbouring blocks share DRAM pages, and the next block's
// lines lie one line further.
#pragma once

#include "common/simd.h"
#include "kernels/dynamic_depthwise_conv/filter.h"
#include "kernels/dynamic_depthwise_conv/planes.h"

namespace pfnas::PFNAS_TIER {

#ifndef PFNAS_SLAB_FLOATS
#define PFNAS_SLAB_FLOATS (24 * 1024)
#endif
constexpr std::int64_t kSlabFloats =
    PFNAS_SLAB_FLOATS;  // packed floats per step, 96 KB: leaves L2 room for the fetch ahead

struct Step {
  std::int64_t image, num_images;
  std::int64_t begin, end;  // rows of y
  std::int64_t block;
};

struct Cut {
  std::int64_t batch;
  std::int64_t out_height;
  std::int64_t num_blocks;   // of 16 channels
  std::int64_t slab_rows;    // rows of y per step
  std::int64_t slab_images;  // images per step; 1 where an image has several slabs
  std::int64_t num_groups;   // of images
  std::int64_t num_ranges;   // of channel blocks

  std::int64_t num_items() const { return num_groups * num_ranges; }
  std::int64_t group(std::int64_t item) const { return item / num_ranges; }
  std::int64_t first_image(std::int64_t item) const { return group(item) * batch / num_groups; }
  std::int64_t end_image(std::int64_t item) const { return (group(item) + 1) * batch / num_groups; }
  std::int64_t first_block(std::int64_t item) const { return item % num_ranges * num_blocks / num_ranges; }
  std::int64_t end_block(std::int64_t item) const {
    return (item % num_ranges + 1) * num_blocks / num_ranges;
  }

  Step at(std::int64_t item, std::int64_t image, std::int64_t begin, std::int64_t block) const {
    return {image, min_of(slab_images, end_image(item) - image), begin, min_of(out_height, begin + slab_rows),
            block};
  }
  Step first(std::int64_t item) const { return at(item, first_image(item), 0, first_block(item)); }
  bool done(std::int64_t item, const Step& step) const { return step.image >= end_image(item); }
  Step next(std::int64_t item, const Step& step) const {
    if (step.block + 1 < end_block(item)) return at(item, step.image, step.begin, step.block + 1);
    if (step.end < out_height) return at(item, step.image, step.end, first_block(item));
    return at(item, step.image + step.num_images, 0, first_block(item));
  }
};

// `floats_per_row`: packed floats behind one row of y.
static inline Cut cut_call(const DynamicDepthwiseConvParams& p, double flops, std::int64_t floats_per_row) {
  // Enough items for 16 threads or so. Image groups rather than channel ranges: an item that holds all the
  // channels of its rows walks through memory in order. But every group has its own partial sums of the
  // filter gradient to fold, so it gets enough rows to outweigh them.
  constexpr double kFlopsPerItem = 2e6;
  constexpr std::int64_t kMaxItems = 64, kPositionsPerTap = 8;
  const auto wanted = min_of(kMaxItems, 1 + static_cast<std::int64_t>(flops / kFlopsPerItem));
  const std::int64_t positions = p.batch * p.out_height * p.out_width;
  const std::int64_t taps = static_cast<std::int64_t>(p.kernel_size) * p.kernel_size;
  Cut cut{};
  cut.batch = p.batch;
  cut.out_height = p.out_height;
  cut.num_blocks = ceil_div(p.channels, kBlock);
  const std::int64_t rows = max_of<std::int64_t>(4, kSlabFloats / floats_per_row);
  cut.slab_rows = ceil_div(p.out_height, ceil_div(p.out_height, rows));
  const std::int64_t max_groups = max_of<std::int64_t>(1, positions / (kPositionsPerTap * taps));
  cut.num_groups = min_of(p.batch, min_of(max_groups, wanted));
  cut.num_ranges = min_of(cut.num_blocks, ceil_div(wanted, cut.num_groups));
  const std::int64_t images = max_of<std::int64_t>(1, kSlabFloats / (floats_per_row * p.out_height));
  cut.slab_images = min_of(images, ceil_div(p.batch, cut.num_groups));
  return cut;
}

// What the steps after `now` will touch of `image`, in terms of the rows that `now` works on. `stride` rows
// of the image belong to one row of y, `halo` more rows to a slab: all but the first slab of an image already
// saw their upper halo while the slab before was packed, so the rows to fetch lie `halo` further down.
static inline Ahead look_ahead(const Image& image, const Step& now, const Step* next, std::int64_t stride,
                               std::int64_t halo) {
  Ahead ahead;
  if (next == nullptr) return ahead;
  const std::int64_t shift = (next->begin - now.begin) * stride + (next->begin > 0 ? halo : 0);
  ahead.base =
      image.data + next->image * image.image_stride() + shift * image.row_stride() + next->block * kBlock;
  ahead.col_stride = image.channels;
  ahead.row_stride = image.row_stride();
  ahead.image_stride = image.image_stride();
  ahead.last_row = image.height - 1 - shift;
  return ahead;
}

}  // namespace pfnas::PFNAS_TIER

// SPDX-License-Identifier: Apache-2.0
// Packing: one block of 16 channels of a band of image rows is copied from channels_last memory into planes
// [vector][row][column][lanes] with zero columns left and right. The copy costs one load and one store per
// element against K^2 multiply-adds, and buys kernels without edge cases, without strided L1 sets and without
// channel tails.
#pragma once

#include "common/simd.h"
#include "kernels/dynamic_depthwise_conv/filter.h"
#include "kernels/dynamic_depthwise_conv/tiles.h"

namespace pfnas::PFNAS_TIER {

constexpr int kVecsPerBlock = kBlock / kLanes;
constexpr std::int64_t kRowsPerGroup = 8;        // rows a vector runs before the next one takes its turn: L1
constexpr std::int64_t kBandFloats = 64 * 1024;  // 256 KB of packed rows: half of the smallest L2 we meet

struct Planes {
  float* data = nullptr;
  std::int64_t pad = 0;        // zero columns on the left
  std::int64_t width = 0;      // of the image
  std::int64_t pitch = 0;      // columns of the plane
  std::int64_t num_rows = 0;   // room for
  std::int64_t first_row = 0;  // of the image, held now
  std::int64_t height = 0;     // of the image

  std::int64_t row_stride() const { return pitch * kLanes; }
  std::int64_t vec_stride() const { return num_rows * row_stride(); }
  std::int64_t size() const { return kVecsPerBlock * vec_stride(); }
  PlaneView view(int vec) const { return {data + vec * vec_stride(), row_stride(), first_row, height}; }

  void clear_borders() const {
    for (std::int64_t row = 0; row < kVecsPerBlock * num_rows; ++row) {
      float* columns = data + row * row_stride();
      for (std::int64_t i = 0; i < pad * kLanes; ++i) columns[i] = 0.0f;
      for (std::int64_t i = (pad + width) * kLanes; i < pitch * kLanes; ++i) columns[i] = 0.0f;
    }
  }

  // Rows [begin, end) of `image`, [height, width, channels] at its first wanted channel, of which `valid`
  // exist.
  void pack(const float* image, std::int64_t channels, int valid, std::int64_t begin, std::int64_t end) {
    first_row = begin;
    for (std::int64_t y = begin; y < end; ++y) {
      const float* source = image + y * width * channels;
      float* target = data + (y - begin) * row_stride() + pad * kLanes;
      if (valid == kBlock) {
        for (std::int64_t x = 0; x < width; ++x, source += channels, target += kLanes) {
          PFNAS_UNROLL for (int v = 0; v < kVecsPerBlock; ++v) {
            store(target + v * vec_stride(), load(source + v * kLanes));
          }
        }
        continue;
      }
      for (std::int64_t x = 0; x < width; ++x, source += channels, target += kLanes) {
        for (int first = 0, v = 0; first < valid; first += kLanes, ++v) {
          const int lanes = min_of(kLanes, valid - first);
          store(target + v * vec_stride(),
                lanes == kLanes ? load(source + first) : load_lanes(source + first, lanes));
        }
      }
    }
  }
};

static PFNAS_INLINE std::int64_t round_up(std::int64_t value, std::int64_t step) {
  return ceil_div(value, step) * step;
}

// How a call is cut into bands of output rows and into work items, by shape alone (never by the number of
// threads).
struct Cut {
  std::int64_t num_blocks;  // of 16 channels
  std::int64_t band_rows;   // rows of y per band
  std::int64_t num_images;  // groups of images
  std::int64_t num_ranges;  // ranges of channel blocks
  std::int64_t num_items() const { return num_images * num_ranges; }
  std::int64_t first_block(std::int64_t range) const { return range * num_blocks / num_ranges; }
};

static inline std::int64_t band_rows(const DynamicDepthwiseConvParams& p, std::int64_t floats_per_row) {
  const std::int64_t rows = max_of<std::int64_t>(kRowsPerGroup, kBandFloats / floats_per_row);
  const std::int64_t num_bands = ceil_div(p.out_height, rows);
  return ceil_div(p.out_height, num_bands);
}

}  // namespace pfnas::PFNAS_TIER

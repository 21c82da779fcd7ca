// SPDX-License-Identifier: Apache-2.0
// Packing: 16 channels of a slab (a few small images, or a band of rows of a large one) are copied from
// channels_last memory into planes [vector][image][row][column][lanes] with zero columns left and right. The
// copy costs one load and one store per element against K^2 multiply-adds, and buys kernels without edge
// cases or channel tails, and L1 sets that do not collide at strides of C floats.
#pragma once

#include "common/simd.h"
#include "kernels/dynamic_depthwise_conv/filter.h"
#include "kernels/dynamic_depthwise_conv/tiles.h"

namespace pfnas::PFNAS_TIER {

// The activations of one tensor, [N, height, width, channels].
struct Image {
  const float* data;
  std::int64_t height;
  std::int64_t width;
  std::int64_t channels;
  std::int64_t row_stride() const { return width * channels; }
  std::int64_t image_stride() const { return height * row_stride(); }
};

struct Planes {
  float* data = nullptr;
  std::int64_t pad = 0;         // zero columns on the left
  std::int64_t width = 0;       // of the image
  std::int64_t height = 0;      // of the image
  std::int64_t pitch = 0;       // columns of the plane
  std::int64_t num_rows = 0;    // room for, per image
  std::int64_t num_images = 0;  // room for
  std::int64_t first_row = 0;   // of the image, held now

  std::int64_t row_stride() const { return pitch * kLanes; }
  std::int64_t image_stride() const { return num_rows * row_stride(); }
  std::int64_t vec_stride() const { return num_images * image_stride(); }
  std::int64_t size() const { return kVecsPerBlock * vec_stride(); }
  PlaneView view(int vec) const {
    return {data + vec * vec_stride(), row_stride(), image_stride(), first_row, height};
  }

  void clear_borders() const {
    for (std::int64_t row = 0; row < kVecsPerBlock * num_images * num_rows; ++row) {
      float* columns = data + row * row_stride();
      for (std::int64_t i = 0; i < pad * kLanes; ++i) columns[i] = 0.0f;
      for (std::int64_t i = (pad + width) * kLanes; i < row_stride(); ++i) columns[i] = 0.0f;
    }
  }

  // Copies rows [begin, end) of `count` images; `source` is at the first image and channel; `valid` channels
  // exist.
  void pack(const float* source, const Image& from, int valid, std::int64_t count, std::int64_t begin,
            std::int64_t end) {
    first_row = begin;
    for (std::int64_t image = 0; image < count; ++image) {
      for (std::int64_t y = begin; y < end; ++y) {
        const float* row = source + image * from.image_stride() + y * from.row_stride();
        float* target = data + image * image_stride() + (y - begin) * row_stride() + pad * kLanes;
        if (valid == kBlock) {
          pack_row(row, from.channels, target);
        } else {
          pack_row(row, from.channels, target, valid);
        }
      }
    }
  }

 private:
  void pack_row(const float* source, std::int64_t channels, float* target) const {
    for (std::int64_t x = 0; x < width; ++x, source += channels, target += kLanes) {
      PFNAS_UNROLL for (int v = 0; v < kVecsPerBlock; ++v) {
        store(target + v * vec_stride(), load(source + v * kLanes));
      }
    }
  }

  void pack_row(const float* source, std::int64_t channels, float* target, int valid) const {
    for (std::int64_t x = 0; x < width; ++x, source += channels, target += kLanes) {
      for (int first = 0, v = 0; first < valid; first += kLanes, ++v) {
        const int lanes = min_of(kLanes, valid - first);
        store(target + v * vec_stride(),
              lanes == kLanes ? load(source + first) : load_lanes(source + first, lanes));
      }
    }
  }
};

}  // namespace pfnas::PFNAS_TIER

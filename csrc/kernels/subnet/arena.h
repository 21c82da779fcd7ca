// SPDX-License-Identifier: Apache-2.0
// Sizes of the maps of a subnet and the memory that its tensors lie in.
#pragma once

#include "common/simd.h"
#include "kernels/subnet/params.h"
#include "kernels/subnet/stem.h"

namespace pfnas::PFNAS_TIER {

struct Map {
  std::int64_t height = 0;
  std::int64_t width = 0;
  std::int64_t pixels() const { return height * width; }
  Map strided(int stride) const { return {(height + stride - 1) / stride, (width + stride - 1) / stride}; }
};

// Blocks on maps as large as this are run image by image (floats of one image's input).
constexpr std::int64_t kLargeMapFloats = 32 * 1024;

// Of the blocks, the first so many run on large maps.
static inline int count_front_blocks(const SubnetParams& p) {
  Map map = Map{p.height, p.width}.strided(2);
  int b = 0;
  for (; b < p.num_blocks; ++b) {
    if (map.pixels() * p.blocks[b].block.x_stride < kLargeMapFloats) break;
    map = map.strided(p.blocks[b].block.stride);
  }
  return b;
}

// Sizes of the arena's parts, in floats, for a group of `count` images. The stem and the first `num_front`
// blocks run image by image.
struct Layout {
  int num_front;
  Map taps[kMaxLevels];
  std::int64_t tap_size[kMaxLevels] = {};
  Map last;                     // the last block's output
  std::int64_t front_size = 0;  // each of two buffers for the tensors between front blocks, of one image
  std::int64_t turn_size = 0;   // each of the two buffers for the tensors of all images
  std::int64_t level_size = 0;  // each of the head's two buffers: the finest level
  std::int64_t pyramid_size[kMaxLevels] = {};
  std::int64_t total = 0;
  double flops = 0;

  Layout(const SubnetParams& p, std::int64_t count, int num_front_blocks) : num_front(num_front_blocks) {
    Map map = Map{p.height, p.width}.strided(2);
    const std::int64_t stem_size = map.pixels() * p.stem.out_channels;
    (num_front > 0 ? front_size : turn_size) = (num_front > 0 ? 1 : count) * stem_size;
    flops = 2.0 * kStemTaps * static_cast<double>(count * stem_size);
    for (int b = 0; b < p.num_blocks; ++b) {
      const FusedMBConvParams& block = p.blocks[b].block;
      const double expand = static_cast<double>(map.pixels() * block.in_channels);
      map = map.strided(block.stride);
      const std::int64_t size = count * map.pixels() * block.out_channels;
      flops += 2.0 * static_cast<double>(count * block.mid_channels) *
               (expand + static_cast<double>(map.pixels() * block.out_channels));
      if (p.blocks[b].tap >= 0) {
        taps[p.blocks[b].tap] = map;
        tap_size[p.blocks[b].tap] = size;
      }
      if (b + 1 < num_front) {
        front_size = max_of(front_size, size / count);
      } else {
        turn_size = max_of(turn_size, size);
      }
    }
    last = map;
    total = 2 * front_size + 2 * turn_size;
    for (int level = 0; level < p.num_levels; ++level) {
      pyramid_size[level] = count * taps[level].pixels() * p.neck_channels;
      level_size = max_of(level_size, pyramid_size[level]);
      total += tap_size[level] + pyramid_size[level] + count * taps[level].pixels();  // rows to upsample from
    }
    total += 2 * level_size;
    if (p.num_levels == 0) {
      total += count * last.pixels() * p.feature.out_channels;
    }
  }
};

// Hands out the arena's parts.
struct Arena {
  float* next;
  float* take(std::int64_t size) {
    float* part = next;
    next += size;
    return part;
  }
};

// Runs the stem and the blocks between two buffers, taps into memory of their own: fills taps[level] and
// returns the last block's output. stem(y) and block(step, map, x, y) do the work; `map` is that of x.
template <class Stem, class Block>
static inline const float* walk_backbone(const SubnetParams& p, const Layout& layout, Arena& arena,
                                         const float** taps, const Stem& stem, const Block& run_block) {
  float* turns[2] = {arena.take(layout.turn_size), arena.take(layout.turn_size)};
  Map map = Map{p.height, p.width}.strided(2);
  stem(turns[0]);
  const float* x = turns[0];
  int turn = 1;
  for (int b = 0; b < p.num_blocks; ++b) {
    const SubnetBlock& step = p.blocks[b];
    float* y = step.tap >= 0 ? arena.take(layout.tap_size[step.tap]) : turns[turn];
    run_block(step, map, x, y);
    if (step.tap >= 0) {
      taps[step.tap] = y;  // both turns are free now
    } else {
      turn = 1 - turn;
    }
    map = map.strided(step.block.stride);
    x = y;
  }
  return x;
}

// rows[m]: the pixel of the coarser map that nearest-neighbour upsampling gives to pixel m, as torch computes
// it.
static inline void fill_upsampled_rows(std::int64_t count, Map coarse, Map fine, std::int32_t* rows) {
  const float step_y = static_cast<float>(coarse.height) / static_cast<float>(fine.height);
  const float step_x = static_cast<float>(coarse.width) / static_cast<float>(fine.width);
  for (std::int64_t image = 0; image < count; ++image) {
    for (std::int64_t y = 0; y < fine.height; ++y) {
      const std::int64_t from_y =
          min_of(static_cast<std::int64_t>(static_cast<float>(y) * step_y), coarse.height - 1);
      const std::int64_t start = (image * coarse.height + from_y) * coarse.width;
      for (std::int64_t x = 0; x < fine.width; ++x) {
        const auto from_x = static_cast<std::int64_t>(static_cast<float>(x) * step_x);
        *rows++ = static_cast<std::int32_t>(start + min_of(from_x, coarse.width - 1));
      }
    }
  }
}

}  // namespace pfnas::PFNAS_TIER

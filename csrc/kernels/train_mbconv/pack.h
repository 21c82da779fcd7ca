// SPDX-License-Identifier: Apache-2.0
// Reading stored tensors: normalisation and activation (or their backward) happen while a slab is packed for
// the depthwise tiles, or a tile for a product, so that they cost no pass of their own.
#pragma once

#include "common/simd.h"
#include "kernels/dynamic_depthwise_conv/planes.h"
#include "kernels/dynamic_depthwise_conv/steps.h"
#include "kernels/train_mbconv/blocks.h"
#include "kernels/train_mbconv/params.h"

namespace pfnas::PFNAS_TIER {

// The outputs of the depthwise tiles, into one block, [N, height, width][16].
static inline ConvJob block_job(float* block, std::int64_t height, std::int64_t width, const Step& step) {
  ConvJob job{};
  job.out_col_stride = kBlock;
  job.out_row_stride = width * kBlock;
  job.out_image_stride = height * width * kBlock;
  job.out = block + step.image * job.out_image_stride;
  job.out_width = width;
  job.num_images = step.num_images;
  return job;
}

// What the step after `now` touches of a tensor in blocks, [blocks][N, height, width][16], in terms of the
// rows that `now` works on (see look_ahead).
static inline Ahead look_ahead_in_blocks(const float* data, std::int64_t batch, std::int64_t height,
                                         std::int64_t width, const Step& now, const Step& next,
                                         std::int64_t stride, std::int64_t halo) {
  Ahead ahead;
  const std::int64_t shift = (next.begin - now.begin) * stride + (next.begin > 0 ? halo : 0);
  ahead.col_stride = kBlock;
  ahead.row_stride = width * kBlock;
  ahead.image_stride = height * ahead.row_stride;
  ahead.base = data + (next.block * batch + next.image) * ahead.image_stride + shift * ahead.row_stride;
  ahead.last_row = height - 1 - shift;
  return ahead;
}

// Whether a depthwise stage fetches ahead. Its slabs are one stream per tensor, which the hardware fetches by
// itself; only long arithmetic between two bursts of packing leaves the memory idle (docs/kernels.md).
static inline bool depthwise_fetches_ahead(const TrainMBConvParams& p, bool backward) {
  return p.kernel_size > 3 || (!backward && p.stride == 1);
}

// The step that most likely follows on this thread; the last one follows itself.
static inline Step step_after(const Cut& cut, std::int64_t item, const Step& now) {
  const Step next = cut.next(item, now);
  if (!cut.done(item, next)) return next;
  return item + 1 < cut.num_items() ? cut.first(item + 1) : now;
}

// Calls row(source row, target row) for rows [begin, end) of `count` images of one block, [N, height,
// width][16].
template <class Row>
static PFNAS_INLINE void for_plane_rows(Planes& planes, std::int64_t image, std::int64_t count,
                                        std::int64_t begin, std::int64_t end, const Row& row) {
  planes.first_row = begin;
  for (std::int64_t i = 0; i < count; ++i) {
    for (std::int64_t y = begin; y < end; ++y) {
      const std::int64_t source = ((image + i) * planes.height + y) * planes.width * kBlock;
      row(source,
          planes.data + i * planes.image_stride() + (y - begin) * planes.row_stride() + planes.pad * kLanes,
          image + i);
    }
  }
}

// act(x scale + shift) of one block into planes.
template <Activation kActivation>
static inline void pack_activated(Planes& planes, const float* block, std::int64_t image, std::int64_t count,
                                  std::int64_t begin, std::int64_t end, const Norm& norm) {
  const std::int64_t width = planes.width;
  Vec scale[kVecsPerBlock], shift[kVecsPerBlock];
  PFNAS_UNROLL for (int v = 0; v < kVecsPerBlock; ++v) {
    scale[v] = load(norm.scale + v * kLanes);
    shift[v] = load(norm.shift + v * kLanes);
  }
  for_plane_rows(planes, image, count, begin, end, [&](std::int64_t source, float* to, std::int64_t) {
    const float* from = block + source;
    for (std::int64_t x = 0; x < width; ++x, from += kBlock, to += kLanes) {
      PFNAS_UNROLL for (int v = 0; v < kVecsPerBlock; ++v) {
        store(to + v * planes.vec_stride(),
              activate<kActivation>(load(from + v * kLanes) * scale[v] + shift[v]));
      }
    }
  });
}

// The inputs of the projection for rows [first, first + rows), into [Ce / 16][rows][16].
template <Activation kActivation>
static inline void activate_tile(const TrainMBConvParams& p, const Norm& norm, std::int64_t first,
                                 std::int64_t rows, float* out) {
  const std::int64_t plane = p.out_height * p.out_width, blocks = ceil_div(p.mid_channels, kBlock);
  for (std::int64_t block = 0; block < blocks; ++block) {
    const Norm here = norm.at(block);
    const float* from = p.depthwise + (block * p.out_pixels() + first) * kBlock;
    for (std::int64_t begin = 0; begin < rows;) {
      const std::int64_t image = (first + begin) / plane;
      const std::int64_t end = min_of(rows, (image + 1) * plane - first);
      const float* gate = p.has_se() ? p.gate + (block * p.batch + image) * kBlock : nullptr;
      PFNAS_UNROLL for (int v = 0; v < kVecsPerBlock; ++v) {
        const Vec scale = load(here.scale + v * kLanes), shift = load(here.shift + v * kLanes);
        const Vec gates = gate == nullptr ? broadcast(1.0f) : load(gate + v * kLanes);
        for (std::int64_t r = begin; r < end; ++r) {
          const Vec value = activate<kActivation>(load(from + r * kBlock + v * kLanes) * scale + shift);
          store(out + r * kBlock + v * kLanes, value * gates);
        }
      }
      begin = end;
    }
    out += rows * kBlock;
  }
}

}  // namespace pfnas::PFNAS_TIER

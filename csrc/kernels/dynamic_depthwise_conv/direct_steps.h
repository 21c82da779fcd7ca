// SPDX-License-Identifier: Apache-2.0
// Items (a group of images x a range of channel blocks) straight from channels_last memory, row by row.
#pragma once

#include "common/simd.h"
#include "kernels/dynamic_depthwise_conv/direct.h"
#include "kernels/dynamic_depthwise_conv/params.h"
#include "kernels/dynamic_depthwise_conv/planes.h"
#include "kernels/dynamic_depthwise_conv/rows.h"
#include "kernels/dynamic_depthwise_conv/steps.h"
#include "kernels/dynamic_depthwise_conv/walk.h"

namespace pfnas::PFNAS_TIER {

struct ChannelRange {
  std::int64_t begin, count;
  ChannelRange(const DynamicDepthwiseConvParams& p, const Cut& cut, std::int64_t item)
      : begin(cut.first_block(item) * kBlock),
        count(min_of(p.channels, cut.end_block(item) * kBlock) - begin) {}
};

// Whether fetching ahead of the hardware pays: out of L3, it costs more than it hides.
static inline bool fetches_ahead(const DynamicDepthwiseConvParams& p) {
  constexpr std::int64_t kMinFloats = 6 << 20;  // 24 MB of x and y
  return p.batch * p.channels * (p.height * p.width + p.out_height * p.out_width) >= kMinFloats;
}

static inline MapView map_view(const Image& image, const ChannelRange& channels) {
  return {image.data + channels.begin, image.height, image.width, image.channels};
}

static inline DirectConvJob direct_conv_job(const Image& in, const Image& out, std::int64_t batch,
                                            float* data, const float* filters, const ChannelRange& channels,
                                            bool fetches) {
  return {map_view(in, channels),
          filters,
          data + channels.begin,
          out.height,
          out.width,
          channels.count,
          streams_past_caches(out, batch, data),
          fetches};
}

static inline void direct_forward_item(const DynamicDepthwiseConvParams& p, const DirectKernels& kernels,
                                       const Cut& cut, std::int64_t item, const float* filters) {
  const ChannelRange channels(p, cut, item);
  const DirectConvJob job =
      direct_conv_job(x_image(p, p.x), y_image(p, p.y), p.batch, p.y, filters, channels, fetches_ahead(p));
  for (std::int64_t image = cut.first_image(item); image < cut.end_image(item); ++image) {
    for (std::int64_t y = 0; y < p.out_height; ++y) kernels.forward(job, image, y);
  }
}

// grad_x, and the filter gradients added to `sums`, [blocks of the item][K * K][16].
static inline void direct_backward_item(const DynamicDepthwiseConvParams& p, const DirectKernels& kernels,
                                        const Cut& cut, std::int64_t item, const float* filters,
                                        float* sums) {
  constexpr std::int64_t kRowsPerTurn = 8;  // grad_x is written in long runs, its grad_y is still in L2
  const ChannelRange channels(p, cut, item);
  const Image x = x_image(p, p.x), grad_y = y_image(p, p.grad_y), grad_x = x_image(p, p.grad_x);
  const DirectGradFilterJob job{map_view(x, channels), map_view(grad_y, channels), sums, channels.count,
                                fetches_ahead(p)};
  const DirectConvJob conv = direct_conv_job(grad_y, grad_x, p.batch, p.grad_x, filters, channels,
                                             p.grad_bank == nullptr && fetches_ahead(p));
  for (std::int64_t image = cut.first_image(item); image < cut.end_image(item); ++image) {
    for (std::int64_t begin = 0; begin < p.out_height; begin += kRowsPerTurn) {
      const std::int64_t end = min_of(p.out_height, begin + kRowsPerTurn);
      if (p.grad_bank != nullptr) {
        for (std::int64_t y = begin; y < end; ++y) kernels.grad_filter(job, image, y);
      }
      if (p.grad_x == nullptr) continue;
      const std::int64_t end_row = min_of(p.height, end * p.stride);
      for (std::int64_t row = begin * p.stride; row < end_row; ++row) kernels.grad_input(conv, image, row);
    }
  }
}

}  // namespace pfnas::PFNAS_TIER

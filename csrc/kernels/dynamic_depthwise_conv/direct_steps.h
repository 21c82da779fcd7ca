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
      direct_conv_job(x_image(p, p.x), y_image(p, p.y), p.batch, p.y, filters, channels, true);
  for (std::int64_t image = cut.first_image(item); image < cut.end_image(item); ++image) {
    for (std::int64_t y = 0; y < p.out_height; ++y) kernels.forward(job, image, y);
  }
}

// grad_x, and the filter gradients added to `sums`, [blocks of the item][K * K][16].
static inline void direct_backward_item(const DynamicDepthwiseConvParams& p, const DirectKernels& kernels,
                                        const Cut& cut, std::int64_t item, const float* filters,
                                        float* sums) {
  const ChannelRange channels(p, cut, item);
  const Image x = x_image(p, p.x), grad_y = y_image(p, p.grad_y), grad_x = x_image(p, p.grad_x);
  const DirectGradFilterJob job{map_view(x, channels), map_view(grad_y, channels), sums, channels.count};
  const DirectConvJob conv =
      direct_conv_job(grad_y, grad_x, p.batch, p.grad_x, filters, channels, p.grad_bank == nullptr);
  for (std::int64_t image = cut.first_image(item); image < cut.end_image(item); ++image) {
    for (std::int64_t y = 0; y < p.out_height; ++y) {
      if (p.grad_bank != nullptr) kernels.grad_filter(job, image, y);
      if (p.grad_x == nullptr) continue;
      const std::int64_t end = min_of(p.height, (y + 1) * p.stride);
      for (std::int64_t row = y * p.stride; row < end; ++row) kernels.grad_input(conv, image, row);
    }
  }
}

}  // namespace pfnas::PFNAS_TIER

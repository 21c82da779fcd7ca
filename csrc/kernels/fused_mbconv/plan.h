// SPDX-License-Identifier: Apache-2.0
// How a block is cut, from its shape alone, and where its working memory lies.
#pragma once

#include "common/panels.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "kernels/fused_mbconv/depthwise_rows.h"
#include "kernels/fused_mbconv/params.h"

namespace pfnas::PFNAS_TIER {

// A chunk is what one panel of 48 middle channels holds at a time: some rows of one image (large maps, planes
// as rings), or a few whole images (small maps).
constexpr std::int64_t kPlaneFloats = 48 * 1024;    // planes of a chunk: 192 KB of L2
constexpr std::int64_t kStoredFloats = 128 * 1024;  // depthwise outputs kept for squeeze-and-excitation
constexpr std::int64_t kChunkPixels = 96;           // at least, where the planes allow
constexpr std::int64_t kMaxChunkPixels = 256;       // at most, of several images

static PFNAS_INLINE std::int64_t round_up(std::int64_t value, std::int64_t step) {
  return ceil_div(value, step) * step;
}

struct BlockPlan {
  DepthwiseKernel depthwise;
  std::int64_t left = 0;          // zero columns before the first one of the image
  std::int64_t pitch = 0;         // columns of a plane
  std::int64_t plane_rows = 0;    // of one image
  std::int64_t num_images = 1;    // per chunk
  std::int64_t chunk_rows = 0;    // output rows per chunk
  std::int64_t depth_stride = 0;  // floats per pixel of the depthwise outputs
  std::int64_t sum_stride = 0;    // floats per pixel of the partial sums
  std::int64_t gate_stride = 0;   // floats per image of pooled means and gates
  std::int64_t hidden_stride = 0;

  std::int64_t row_stride() const { return pitch * kLanes; }
  std::int64_t image_stride() const { return plane_rows * row_stride(); }
  std::int64_t plane_stride() const { return num_images * image_stride(); }  // of one vector of channels

  explicit BlockPlan(const FusedMBConvParams& p) {
    const int K = p.kernel_size, S = p.stride;
    depthwise = select_depthwise(K, S, p.width, p.out_width);
    left = depthwise.whole_rows ? 0 : K / 2;
    const std::int64_t reach = (round_up(p.out_width, depthwise.width) - 1) * S + K;
    pitch = depthwise.whole_rows ? p.width : max_of(reach, left + p.width);
    const std::int64_t row_floats = pitch * kPanelWidth, pixels = p.out_height * p.out_width;
    const bool has_se = p.reduced_channels > 0;
    depth_stride = has_se ? round_up(p.mid_channels, kPanelWidth) : kPanelWidth;
    sum_stride = round_up(p.out_channels, kFilterBlock);
    gate_stride = round_up(p.mid_channels, kPanelWidth);
    hidden_stride = round_up(max_of<std::int64_t>(1, p.reduced_channels), kPanelWidth);
    if (p.height * row_floats <= kPlaneFloats) {
      plane_rows = p.height;
      chunk_rows = p.out_height;
      num_images =
          max_of<std::int64_t>(1, min_of(kPlaneFloats / (p.height * row_floats), kMaxChunkPixels / pixels));
      if (has_se) {
        num_images = max_of<std::int64_t>(1, min_of(num_images, kStoredFloats / (pixels * depth_stride)));
      }
      num_images = min_of(num_images, max_of<std::int64_t>(1, p.batch));
      return;
    }
    chunk_rows = min_of(p.out_height, max_of<std::int64_t>(1, kChunkPixels / p.out_width));
    plane_rows = min_of(p.height, (chunk_rows - 1) * S + K);
  }
};

// Working memory of one thread, each part 64-byte aligned.
struct BlockScratch {
  float* planes;          // [48 / lanes][num_images][plane_rows][pitch][lanes]
  float* depth;           // [pixels][depth_stride], of a chunk or (squeeze-and-excitation) of whole images
  float* sums;            // [num_images * Ho * Wo][sum_stride]
  float* means;           // [num_images][gate_stride]
  float* hidden;          // [num_images][hidden_stride]
  std::int32_t* offsets;  // [pixels of x in a chunk]

  BlockScratch(const FusedMBConvParams& p, const BlockPlan& plan) {
    const bool has_se = p.reduced_channels > 0;
    const std::int64_t image_pixels = plan.num_images * p.out_height * p.out_width;
    const std::int64_t depth_pixels = has_se ? image_pixels : plan.num_images * plan.chunk_rows * p.out_width;
    const std::int64_t sizes[] = {kVecsPerPlaneSet * plan.plane_stride(),
                                  depth_pixels * plan.depth_stride,
                                  has_se ? 0 : image_pixels * plan.sum_stride,
                                  has_se ? plan.num_images * plan.gate_stride : 0,
                                  has_se ? plan.num_images * plan.hidden_stride : 0,
                                  plan.num_images * plan.plane_rows * p.width};
    std::int64_t total = 0;
    for (std::int64_t size : sizes) total += round_up(size, kFilterBlock);
    float* memory = thread_scratch(Scratch::kThread, static_cast<std::size_t>(total));
    float** parts[] = {&planes, &depth, &sums, &means, &hidden};
    for (int i = 0; i < 5; ++i) {
      *parts[i] = memory;
      memory += round_up(sizes[i], kFilterBlock);
    }
    offsets = reinterpret_cast<std::int32_t*>(memory);
  }

 private:
  static constexpr int kVecsPerPlaneSet = kPanelWidth / kLanes;
};

}  // namespace pfnas::PFNAS_TIER

// SPDX-License-Identifier: Apache-2.0
// The steps of a block on some images of a call: expand into planes, depthwise, project, excite. The order
// and the cut are their callers'.
#pragma once

#include "common/epilogue.h"
#include "common/pointwise_tile.h"
#include "kernels/fused_mbconv/plan.h"
#include "kernels/fused_mbconv/sinks.h"

namespace pfnas::PFNAS_TIER {

static inline const float* offset_or_null(const float* values, std::int64_t offset) {
  return values == nullptr ? nullptr : values + offset;
}

// Images [image, image + num_images) of one call, with everything that does not change over its panels.
struct Work {
  const FusedMBConvParams& p;
  const BlockPlan& plan;
  const BlockScratch& memory;
  std::int64_t image;
  std::int64_t num_images;

  std::int64_t out_pixels() const { return num_images * p.out_height * p.out_width; }
  const float* x(std::int64_t row) const { return p.x + (image * p.height + row) * p.width * p.x_stride; }
  std::int64_t out_pixel(std::int64_t row) const { return (image * p.out_height + row) * p.out_width; }
};

struct Panel {
  std::int64_t index;
  std::int64_t first;  // middle channel
  std::int64_t width;  // 1 to 48
  PanelVecs vecs;
};

static inline Panel make_panel(const FusedMBConvParams& p, std::int64_t index) {
  const std::int64_t first = index * kPanelWidth;
  const std::int64_t width = min_of<std::int64_t>(kPanelWidth, p.mid_channels - first);
  return {index, first, width, panel_vecs(index, p.mid_channels)};
}

// The columns that tiles read beside the image. The image's own are rewritten by every panel.
static inline void clear_borders(const FusedMBConvParams& p, const BlockPlan& plan, float* planes) {
  const std::int64_t right = plan.left + p.width;
  if (plan.left == 0 && right == plan.pitch) return;
  const std::int64_t num_rows = kVecsPerPanel * plan.num_images * plan.plane_rows;
  for (std::int64_t row = 0; row < num_rows; ++row, planes += plan.row_stride()) {
    for (std::int64_t c = 0; c < plan.left; ++c) store(planes + c * kLanes, Vec{});
    for (std::int64_t c = right; c < plan.pitch; ++c) store(planes + c * kLanes, Vec{});
  }
}

// Where the pixels of rows [begin, end) of each image lie in a plane. Returns their number.
static inline std::int64_t fill_offsets(const Work& work, std::int64_t begin, std::int64_t end) {
  const BlockPlan& plan = work.plan;
  std::int32_t* offset = work.memory.offsets;
  for (std::int64_t image = 0; image < work.num_images; ++image) {
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int64_t start = image * plan.image_stride() + (row % plan.plane_rows) * plan.row_stride();
      for (std::int64_t c = 0; c < work.p.width; ++c) {
        *offset++ = static_cast<std::int32_t>(start + (plan.left + c) * kLanes);
      }
    }
  }
  return offset - work.memory.offsets;
}

// x itself into planes, where the block has no expansion.
static inline void copy_pixels(const Work& work, const Panel& panel, std::int64_t first_row,
                               std::int64_t num_pixels) {
  const float* x = work.x(first_row) + panel.first;
  for (std::int64_t m = 0; m < num_pixels; ++m, x += work.p.x_stride) {
    float* out = work.memory.planes + work.memory.offsets[m];
    for (int v = 0; v < panel.vecs.count; ++v) {
      const int lanes = static_cast<int>(min_of<std::int64_t>(kLanes, panel.width - v * kLanes));
      store(out + v * work.plan.plane_stride(), load_some(x + v * kLanes, lanes));
    }
  }
}

// Rows [begin, end) of the images' planes for one panel.
static inline void expand(const Work& work, const Panel& panel, std::int64_t begin, std::int64_t end) {
  const FusedMBConvParams& p = work.p;
  if (begin >= end) return;
  const std::int64_t num_pixels = fill_offsets(work, begin, end);
  if (p.expand_panels == nullptr) return copy_pixels(work, panel, begin, num_pixels);
  dispatch_activation(p.expand_activation, [&](auto tag) {
    const PlaneSink<decltype(tag)::value> sink{offset_or_null(p.expand_affine.scale, panel.first),
                                               offset_or_null(p.expand_affine.shift, panel.first),
                                               panel.width,
                                               work.memory.planes,
                                               work.plan.plane_stride(),
                                               work.memory.offsets};
    pointwise_panel({work.x(begin), p.x_stride}, num_pixels,
                    p.expand_panels + panel.index * p.max_in_channels * kPanelWidth, p.in_channels,
                    panel.vecs, sink);
  });
}

// Output rows [begin, end) of the images; `depth` is the first pixel of the first image, `image_stride`
// floats lie between images.
static inline void depthwise(const Work& work, const Panel& panel, std::int64_t begin, std::int64_t end,
                             float* depth, std::int64_t image_stride) {
  const FusedMBConvParams& p = work.p;
  const BlockPlan& plan = work.plan;
  const std::int64_t taps = p.kernel_size * p.kernel_size;
  for (int v = 0; v < panel.vecs.count; ++v) {
    const std::int64_t channel = panel.first + v * kLanes;
    const AffineVec affine = load_affine(p.depth_affine.scale, p.depth_affine.shift, channel, p.mid_channels);
    DepthwiseJob job;
    job.num_rows = plan.plane_rows;
    job.row_stride = plan.row_stride();
    job.height = p.height;
    job.filter = p.filter + channel / kFilterBlock * taps * kFilterBlock + channel % kFilterBlock;
    job.scale = affine.scale;
    job.shift = affine.shift;
    job.activation = p.depth_activation;
    job.out_col_stride = plan.depth_stride;
    job.out_row_stride = p.out_width * plan.depth_stride;
    job.out_width = p.out_width;
    job.y_begin = begin;
    job.y_end = end;
    for (std::int64_t image = 0; image < work.num_images; ++image) {
      job.plane = work.memory.planes + v * plan.plane_stride() + image * plan.image_stride();
      job.out = depth + image * image_stride + v * kLanes;
      job.pool = p.reduced_channels > 0 ? work.memory.means + image * plan.gate_stride + channel : nullptr;
      plan.depthwise.run(job);
    }
  }
}

// y for `num_pixels` pixels of the output from `first_pixel` (counted in the whole call). `partial` may be
// null.
static inline void project_last(const FusedMBConvParams& p, const PixelRows& depth, std::int64_t first_pixel,
                                std::int64_t num_pixels, std::int64_t first_channel,
                                std::int64_t num_channels, const float* partial,
                                std::int64_t partial_stride) {
  dispatch_activation(p.out_activation, [&](auto tag) {
    for (std::int64_t out = 0; out < num_panels(p.out_channels); ++out) {
      const std::int64_t o = out * kPanelWidth;
      const OutputSink<decltype(tag)::value> sink{
          offset_or_null(partial, o),
          partial_stride,
          offset_or_null(p.project_affine.scale, o),
          offset_or_null(p.project_affine.shift, o),
          offset_or_null(p.residual, first_pixel * p.residual_stride + o),
          p.residual_stride,
          nullptr,
          p.y + first_pixel * p.y_stride + o,
          p.y_stride,
          min_of<std::int64_t>(kPanelWidth, p.out_channels - o)};
      pointwise_panel(depth, num_pixels,
                      p.project_panels + (out * p.max_mid_channels + first_channel) * kPanelWidth,
                      num_channels, panel_vecs(out, p.out_channels, p.used_out_channels), sink);
    }
  });
}

// From pooled sums to gates in [0, 1], in place: [num_images][gate_stride].
static inline void excite(const Work& work) {
  const FusedMBConvParams& p = work.p;
  const BlockPlan& plan = work.plan;
  float* means = work.memory.means;
  const float per_pixel = 1.0f / static_cast<float>(p.out_height * p.out_width);
  for (std::int64_t i = 0; i < work.num_images * plan.gate_stride; ++i) means[i] *= per_pixel;
  for (std::int64_t out = 0; out < num_panels(p.reduced_channels); ++out) {
    const std::int64_t o = out * kPanelWidth;
    const OutputSink<Activation::kRelu> sink{nullptr,
                                             0,
                                             nullptr,
                                             p.reduce_bias + o,
                                             nullptr,
                                             0,
                                             nullptr,
                                             work.memory.hidden + o,
                                             plan.hidden_stride,
                                             min_of<std::int64_t>(kPanelWidth, p.reduced_channels - o)};
    pointwise_panel({means, plan.gate_stride}, work.num_images,
                    p.reduce_panels + out * p.max_mid_channels * kPanelWidth, p.mid_channels,
                    panel_vecs(out, p.reduced_channels), sink);
  }
  for (std::int64_t out = 0; out < num_panels(p.mid_channels); ++out) {
    const std::int64_t o = out * kPanelWidth;
    const OutputSink<Activation::kNone> sink{
        nullptr,          0,
        nullptr,          p.excite_bias + o,
        nullptr,          0,
        nullptr,          means + o,
        plan.gate_stride, min_of<std::int64_t>(kPanelWidth, p.mid_channels - o)};
    pointwise_panel({work.memory.hidden, plan.hidden_stride}, work.num_images,
                    p.excite_panels + out * p.max_reduced_channels * kPanelWidth, p.reduced_channels,
                    panel_vecs(out, p.mid_channels), sink);
  }
  for (std::int64_t i = 0; i < work.num_images * plan.gate_stride; i += kLanes) {
    store(means + i, hard_sigmoid(load(means + i)));
  }
}

// Scales a few pixels by their image's gates while they are in L1, then projects them.
static inline void gate_and_project(const Work& work) {
  const FusedMBConvParams& p = work.p;
  const BlockPlan& plan = work.plan;
  const std::int64_t image_pixels = p.out_height * p.out_width;
  const std::int64_t step = kTileRows * max_of<std::int64_t>(1, 16 * 1024 / (kTileRows * plan.depth_stride));
  for (std::int64_t first = 0; first < work.out_pixels(); first += step) {
    const std::int64_t end = min_of(work.out_pixels(), first + step);
    for (std::int64_t m = first; m < end; ++m) {
      float* depth = work.memory.depth + m * plan.depth_stride;
      const float* gate = work.memory.means + m / image_pixels * plan.gate_stride;
      for (std::int64_t c = 0; c < p.mid_channels; c += kLanes) {
        store(depth + c, load(depth + c) * load(gate + c));
      }
    }
    project_last(p, {work.memory.depth + first * plan.depth_stride, plan.depth_stride},
                 work.out_pixel(0) + first, end - first, 0, p.mid_channels, nullptr, 0);
  }
}

static inline double block_flops(const FusedMBConvParams& p) {
  const double expanded = static_cast<double>(p.batch * p.height * p.width * p.in_channels);
  const double rest = static_cast<double>(p.batch * p.out_height * p.out_width) *
                      static_cast<double>(p.kernel_size * p.kernel_size + p.out_channels);
  return 2.0 * static_cast<double>(p.mid_channels) * ((p.expand_panels == nullptr ? 0.0 : expanded) + rest);
}

}  // namespace pfnas::PFNAS_TIER

// SPDX-License-Identifier: Apache-2.0
// A whole inverted residual block for inference; nothing of its expanded tensor leaves the cache.
//
//   images (work items) -> panels of 48 middle channels -> chunks of pixels:
//     expand x into planes | depthwise from the planes | project, adding to the block's output
//   with squeeze-and-excitation the depthwise outputs of the images are kept until their means are known:
//     expand | depthwise, pooling    (all panels), then    gate | project
//
// plan.h cuts, block_steps.h are the steps, sinks.h finishes the 1x1 convolutions, depthwise_rows.h is the
// depthwise convolution.
#include "common/parallel.h"
#include "kernels/fused_mbconv/block_steps.h"

namespace pfnas::PFNAS_TIER {
namespace {

using Params = FusedMBConvParams;

// Adds one panel's part to the output of rows [begin, end).
void project(const Work& work, const Panel& panel, std::int64_t begin, std::int64_t end) {
  const Params& p = work.p;
  const BlockPlan& plan = work.plan;
  const std::int64_t num_pixels = work.num_images * (end - begin) * p.out_width;
  float* sums = work.memory.sums + begin * p.out_width * plan.sum_stride;
  const PixelRows depth{work.memory.depth, plan.depth_stride};
  const bool is_first = panel.index == 0;
  if (panel.first + panel.width == p.mid_channels) {
    return project_last(p, depth, work.out_pixel(begin), num_pixels, panel.first, panel.width,
                        is_first ? nullptr : sums, plan.sum_stride);
  }
  for (std::int64_t out = 0; out < num_panels(p.out_channels); ++out) {
    const PartialSink sink{sums + out * kPanelWidth, plan.sum_stride, is_first};
    pointwise_panel(depth, num_pixels,
                    p.project_panels + (out * p.max_mid_channels + panel.first) * kPanelWidth, panel.width,
                    panel_vecs(out, p.out_channels, p.used_out_channels), sink);
  }
}

// All chunks of one panel: expands the rows that are new, convolves, and projects (or, with
// squeeze-and-excitation, keeps).
void run_panel(const Work& work, const Panel& panel) {
  const Params& p = work.p;
  const BlockPlan& plan = work.plan;
  const bool has_se = p.reduced_channels > 0;
  std::int64_t expanded = 0;
  for (std::int64_t begin = 0; begin < p.out_height; begin += plan.chunk_rows) {
    const std::int64_t end = min_of(p.out_height, begin + plan.chunk_rows);
    const std::int64_t needed = min_of(p.height, (end - 1) * p.stride - p.kernel_size / 2 + p.kernel_size);
    expand(work, panel, expanded, needed);
    expanded = max_of(expanded, needed);
    const std::int64_t kept_rows = has_se ? p.out_height : end - begin;
    float* depth = work.memory.depth;
    if (has_se) depth += begin * p.out_width * plan.depth_stride + panel.first;
    depthwise(work, panel, begin, end, depth, kept_rows * p.out_width * plan.depth_stride);
    if (!has_se) project(work, panel, begin, end);
  }
}

void run_images(const Work& work) {
  const Params& p = work.p;
  const bool has_se = p.reduced_channels > 0;
  if (has_se) {
    for (std::int64_t i = 0; i < work.num_images * work.plan.gate_stride; ++i) work.memory.means[i] = 0.0f;
  }
  for (std::int64_t panel = 0; panel < num_panels(p.mid_channels); ++panel) {
    run_panel(work, make_panel(p, panel));
  }
  if (!has_se) return;
  excite(work);
  gate_and_project(work);
}

}  // namespace

void fused_mbconv(const Params& p) {
  const BlockPlan plan(p);
  parallel_for(ceil_div(p.batch, plan.num_images), block_flops(p), [&](std::int64_t item) {
    const BlockScratch memory(p, plan);
    clear_borders(p, plan, memory.planes);
    const std::int64_t first = item * plan.num_images;
    run_images({p, plan, memory, first, min_of(plan.num_images, p.batch - first)});
  });
}

}  // namespace pfnas::PFNAS_TIER

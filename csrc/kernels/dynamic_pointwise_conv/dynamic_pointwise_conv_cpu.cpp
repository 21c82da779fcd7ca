// SPDX-License-Identifier: Apache-2.0
// 1x1 convolution on prefixes of packed weights, with the epilogue of a block fused in.
//
//   blocks of pixels (one work item each) -> panels of 48 outputs -> register tiles (common/pointwise_tile.h)
//
// A block of pixels stays in L2 while the panels pass over it.
#include "common/epilogue.h"
#include "common/parallel.h"
#include "common/pointwise_tile.h"
#include "kernels/dynamic_pointwise_conv/params.h"

namespace pfnas::PFNAS_TIER {
namespace {

using Params = DynamicPointwiseConvParams;

constexpr std::int64_t kPixelsPerItem = 96;  // whole tiles of 8 and of 6 rows

const float* at(const float* values, std::int64_t offset) {
  return values == nullptr ? nullptr : values + offset;
}

template <Activation kActivation>
void run_pixels(const Params& p, std::int64_t first, std::int64_t count) {
  const PixelRows pixels{p.x + first * p.x_stride, p.x_stride};
  const bool gathers = p.residual_rows != nullptr;
  for (std::int64_t panel = 0; panel < num_panels(p.out_channels); ++panel) {
    const std::int64_t o = panel * kPanelWidth;
    const OutputSink<kActivation> sink{nullptr,
                                       0,
                                       at(p.scale, o),
                                       at(p.shift, o),
                                       at(p.residual, (gathers ? 0 : first * p.residual_stride) + o),
                                       p.residual_stride,
                                       gathers ? p.residual_rows + first : nullptr,
                                       p.y + first * p.y_stride + o,
                                       p.y_stride,
                                       min_of<std::int64_t>(kPanelWidth, p.out_channels - o)};
    pointwise_panel(pixels, count, p.panels + panel * p.max_in_channels * kPanelWidth, p.in_channels,
                    panel_vecs(panel, p.out_channels), sink);
  }
}

}  // namespace

void dynamic_pointwise_conv(const Params& p) {
  const double flops = 2.0 * static_cast<double>(p.num_pixels * p.in_channels * p.out_channels);
  dispatch_activation(p.activation, [&](auto tag) {
    parallel_for(ceil_div(p.num_pixels, kPixelsPerItem), flops, [&](std::int64_t item) {
      const std::int64_t first = item * kPixelsPerItem;
      run_pixels<decltype(tag)::value>(p, first, min_of(kPixelsPerItem, p.num_pixels - first));
    });
  });
}

}  // namespace pfnas::PFNAS_TIER

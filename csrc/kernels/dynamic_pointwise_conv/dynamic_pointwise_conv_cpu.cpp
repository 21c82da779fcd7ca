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

template <Activation kActivation>
void run_pixels(const Params& p, std::int64_t first, std::int64_t count) {
  const PixelRows pixels{p.x + first * p.in_channels, p.in_channels};
  for (std::int64_t panel = 0; panel < num_panels(p.out_channels); ++panel) {
    const std::int64_t o = panel * kPanelWidth;
    AffineSink<kActivation> sink;
    sink.scale = p.scale == nullptr ? nullptr : p.scale + o;
    sink.shift = p.shift == nullptr ? nullptr : p.shift + o;
    sink.residual = p.residual == nullptr ? nullptr : p.residual + first * p.out_channels + o;
    sink.y = p.y + first * p.out_channels + o;
    sink.residual_stride = sink.y_stride = p.out_channels;
    sink.num_channels = static_cast<int>(min_of<std::int64_t>(kPanelWidth, p.out_channels - o));
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

// SPDX-License-Identifier: Apache-2.0
#include "common/panels.h"

namespace pfnas {

void pack_panels(const float* weight, std::int64_t out_channels, std::int64_t in_channels, float* panels) {
  for (std::int64_t panel = 0; panel < num_panels(out_channels); ++panel) {
    const std::int64_t first = panel * kPanelWidth;
    for (std::int64_t i = 0; i < in_channels; ++i) {
      for (std::int64_t lane = 0; lane < kPanelWidth; ++lane) {
        const std::int64_t o = first + lane;
        *panels++ = o < out_channels ? weight[o * in_channels + i] : 0.0f;
      }
    }
  }
}

}  // namespace pfnas

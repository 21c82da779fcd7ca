// SPDX-License-Identifier: Apache-2.0
// Weights of a 1x1 convolution, packed once so that every width is a prefix.
//
// A weight [O, I] is held as panels [ceil(O / 48)][I][48], the lanes beyond O zero. The layer with the first
// o outputs and the first i inputs reads the first ceil(o / 48) panels and the first i rows of each: choosing
// a width copies nothing. All tiers share the layout: 48 is 3 vectors of 16 floats, 6 of 8 or 12 of 4.
#pragma once

#include <cstdint>

namespace pfnas {

constexpr int kPanelWidth = 48;

constexpr std::int64_t num_panels(std::int64_t out_channels) {
  return (out_channels + kPanelWidth - 1) / kPanelWidth;
}
constexpr std::int64_t panels_size(std::int64_t out_channels, std::int64_t in_channels) {
  return num_panels(out_channels) * in_channels * kPanelWidth;
}

// weight: [O, I]; panels: [ceil(O / 48), I, 48].
void pack_panels(const float* weight, std::int64_t out_channels, std::int64_t in_channels, float* panels);

}  // namespace pfnas

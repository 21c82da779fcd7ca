// SPDX-License-Identifier: Apache-2.0
// The whole contract between the binding and the kernels of dynamic_pointwise_conv. float32; activations are
// channels_last in memory, so that a tensor is a matrix of pixels.
#pragma once

#include <cstdint>

#include "common/activation_kind.h"

namespace pfnas {

// Pixels are rows of a matrix, with `stride` floats from one to the next.
struct DynamicPointwiseConvParams {
  std::int64_t num_pixels = 0;       // N * H * W
  std::int64_t in_channels = 0;      // I, active: a prefix of the panels' rows
  std::int64_t out_channels = 0;     // O, active: a prefix of the panels
  std::int64_t max_in_channels = 0;  // I_max, rows of a panel
  Activation activation = Activation::kNone;

  const float* panels = nullptr;  // [ceil(O_max / 48), I_max, 48], see common/panels.h
  const float* scale = nullptr;   // [O] or null: 1
  const float* shift = nullptr;   // [O] or null: 0
  const float* x = nullptr;       // [N, H, W, I]
  std::int64_t x_stride = 0;
  const float* residual = nullptr;  // [N, H, W, O] or null; added before the activation
  std::int64_t residual_stride = 0;
  const std::int32_t* residual_rows =
      nullptr;         // [num_pixels]: the pixel of `residual` to add; null: the same
  float* y = nullptr;  // [N, H, W, O]
  std::int64_t y_stride = 0;
};

namespace portable {
void dynamic_pointwise_conv(const DynamicPointwiseConvParams& p);
}
namespace avx2 {
void dynamic_pointwise_conv(const DynamicPointwiseConvParams& p);
}
namespace avx512 {
void dynamic_pointwise_conv(const DynamicPointwiseConvParams& p);
}

}  // namespace pfnas

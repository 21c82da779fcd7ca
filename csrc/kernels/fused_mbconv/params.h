// SPDX-License-Identifier: Apache-2.0
// The whole contract between callers and the kernel of fused_mbconv. float32; activations are channels_last
// in memory, with `stride` floats from one pixel to the next; padding is kernel_size / 2; out = ceil(in /
// stride).
#pragma once

#include <cstdint>

#include "common/activation_kind.h"

namespace pfnas {

// Folded batch normalisation: v * scale + shift.
struct Affine {
  const float* scale = nullptr;  // null: 1
  const float* shift = nullptr;  // null: 0
};

// y = act3(bn3(project(se(act2(bn2(depthwise(act1(bn1(expand(x)))))))) + residual)
struct FusedMBConvParams {
  std::int64_t batch = 0;
  std::int64_t height = 0;  // input
  std::int64_t width = 0;   // input
  std::int64_t out_height = 0;
  std::int64_t out_width = 0;
  std::int64_t in_channels = 0;
  std::int64_t mid_channels = 0;       // active width M
  std::int64_t out_channels = 0;       // O, with padding
  std::int64_t used_out_channels = 0;  // of O, those with weights
  std::int64_t reduced_channels = 0;   // R, of squeeze-and-excitation; 0: there is none
  int kernel_size = 0;                 // 3, 5 or 7
  int stride = 1;                      // 1 or 2

  const float* x = nullptr;  // [N, H, W, in_channels]
  std::int64_t x_stride = 0;
  const float* residual = nullptr;  // [N, Ho, Wo, O] or null
  std::int64_t residual_stride = 0;
  float* y = nullptr;  // [N, Ho, Wo, O]
  std::int64_t y_stride = 0;

  const float* expand_panels =
      nullptr;  // [ceil(M / 48), max_in, 48] (common/panels.h); null: M = in_channels
  std::int64_t max_in_channels = 0;
  Affine expand_affine;  // [M]
  Activation expand_activation = Activation::kNone;

  const float* filter = nullptr;  // [ceil(M / 16), kernel_size^2, 16]
  Affine depth_affine;            // [M]
  Activation depth_activation = Activation::kNone;

  const float* reduce_panels = nullptr;  // [ceil(R / 48), max_mid, 48]
  const float* reduce_bias = nullptr;    // [R]
  const float* excite_panels = nullptr;  // [ceil(M / 48), max_reduced, 48]
  const float* excite_bias = nullptr;    // [M]
  std::int64_t max_reduced_channels = 0;

  const float* project_panels = nullptr;  // [ceil(O / 48), max_mid, 48]
  std::int64_t max_mid_channels = 0;
  Affine project_affine;  // [O]
  Activation out_activation = Activation::kNone;
};

namespace portable {
void fused_mbconv(const FusedMBConvParams& p);
}
namespace avx2 {
void fused_mbconv(const FusedMBConvParams& p);
}
namespace avx512 {
void fused_mbconv(const FusedMBConvParams& p);
}

}  // namespace pfnas

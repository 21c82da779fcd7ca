// SPDX-License-Identifier: Apache-2.0
// The whole contract between the binding and the kernels of dynamic_depthwise_conv. float32; activations are
// channels_last in memory; padding is kernel_size / 2; out = ceil(in / stride).
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace pfnas {

struct DynamicDepthwiseConvParams {
  std::int64_t batch = 0;
  std::int64_t channels = 0;  // active channels C: a prefix of the bank
  std::int64_t height = 0;    // input
  std::int64_t width = 0;     // input
  std::int64_t out_height = 0;
  std::int64_t out_width = 0;
  int kernel_size = 0;      // 3, 5 or 7
  int max_kernel_size = 0;  // of the bank, >= kernel_size
  int stride = 1;           // 1 or 2

  const float* bank = nullptr;      // [C_max, 1, K_max, K_max]; only the first C rows are read
  const float* matrix_5 = nullptr;  // [25, 25], read where K_max = 7 and kernel_size < 7
  const float* matrix_3 = nullptr;  // [9, 9], read where K_max > 3 and kernel_size = 3

  const float* x = nullptr;  // [N, H, W, C]
  float* y = nullptr;        // [N, Ho, Wo, C], forward only

  const float* grad_y = nullptr;  // [N, Ho, Wo, C], backward only
  float* grad_x = nullptr;        // [N, H, W, C] or null: not wanted
  float* grad_bank = nullptr;     // [C, 1, K_max, K_max] (the active rows) or null: no filter gradient wanted
  float* grad_matrix_5 = nullptr;  // [25, 25]; not null iff grad_bank is wanted and matrix_5 is used
  float* grad_matrix_3 = nullptr;  // [9, 9]; likewise

  bool uses_matrix_5() const { return max_kernel_size == 7 && kernel_size < 7; }
  bool uses_matrix_3() const { return max_kernel_size > 3 && kernel_size == 3; }
};

// What select_dynamic_depthwise_conv_kernel chose; names are read off as f32_k7_s1_w8x8 (width block x
// lanes).
struct DynamicDepthwiseConvKernel {
  void (*forward)(const DynamicDepthwiseConvParams&) = nullptr;
  void (*backward)(const DynamicDepthwiseConvParams&) = nullptr;
  int lanes = 0;
  int forward_width = 0;      // output columns per register tile
  int grad_input_width = 0;   // input columns per register tile
  int grad_filter_width = 0;  // output columns per register tile
};

// The one place where the fast path is chosen: by sizes and tier alone.
DynamicDepthwiseConvKernel select_dynamic_depthwise_conv_kernel(const DynamicDepthwiseConvParams& params,
                                                                Isa isa);

namespace portable {
DynamicDepthwiseConvKernel select_dynamic_depthwise_conv(const DynamicDepthwiseConvParams& params);
}
namespace avx2 {
DynamicDepthwiseConvKernel select_dynamic_depthwise_conv(const DynamicDepthwiseConvParams& params);
}
namespace avx512 {
DynamicDepthwiseConvKernel select_dynamic_depthwise_conv(const DynamicDepthwiseConvParams& params);
}

}  // namespace pfnas

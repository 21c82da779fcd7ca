// SPDX-License-Identifier: Apache-2.0
// The contract between the binding and the CUDA kernels of dynamic_depthwise_conv. Activations are
// channels_last; all tensors but the workspace share one storage type and one device. Nothing here is
// allocated or waited for.
#pragma once

#include <cstdint>

#include "cuda/runtime.h"

namespace pfnas::cuda {

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
  Dtype dtype = Dtype::kFloat32;

  const void* bank = nullptr;      // [C_max, 1, K_max, K_max]; only the first C rows are read
  const void* matrix_5 = nullptr;  // [25, 25], read where K_max = 7 and kernel_size < 7
  const void* matrix_3 = nullptr;  // [9, 9], read where K_max > 3 and kernel_size = 3
  const void* x = nullptr;         // [N, H, W, C]
  void* y = nullptr;               // [N, Ho, Wo, C], forward only

  const void* grad_y = nullptr;   // [N, Ho, Wo, C], backward only
  void* grad_x = nullptr;         // [N, H, W, C] or null: not wanted
  void* grad_bank = nullptr;      // [C, 1, K_max, K_max] (the active rows) or null: no filter gradient wanted
  void* grad_matrix_5 = nullptr;  // [25, 25]; not null iff grad_bank is wanted and matrix_5 is used
  void* grad_matrix_3 = nullptr;  // [9, 9]; likewise

  float* workspace =
      nullptr;  // [workspace_floats(params, backward)], 8-byte aligned; need not be initialised

  bool uses_matrix_5() const { return max_kernel_size == 7 && kernel_size < 7; }
  bool uses_matrix_3() const { return max_kernel_size > 3 && kernel_size == 3; }
};

// Floats of scratch that a call needs. Depends on the shape alone.
std::int64_t dynamic_depthwise_conv_workspace(const DynamicDepthwiseConvParams& params, bool backward);

void dynamic_depthwise_conv_forward(const DynamicDepthwiseConvParams& params, Stream stream);
void dynamic_depthwise_conv_backward(const DynamicDepthwiseConvParams& params, Stream stream);

}  // namespace pfnas::cuda

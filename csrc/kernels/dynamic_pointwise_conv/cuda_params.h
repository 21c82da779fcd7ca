// SPDX-License-Identifier: Apache-2.0
// The contract between the binding and the CUDA kernels of dynamic_pointwise_conv. Activations are
// channels_last, so that a tensor is a matrix of pixels; x, panels, residual, y and their gradients share one
// storage type; scale, shift, moments and workspace are float.
#pragma once

#include <cstdint>

#include "common/activation_kind.h"
#include "cuda/runtime.h"

namespace pfnas::cuda {

struct DynamicPointwiseConvParams {
  std::int64_t num_pixels = 0;       // N * H * W
  std::int64_t in_channels = 0;      // I, active: a prefix of the panels' rows
  std::int64_t out_channels = 0;     // O, active: a prefix of the panels
  std::int64_t max_in_channels = 0;  // I_max, rows of a panel
  std::int64_t num_panels = 0;       // at least ceil(O / 48)
  Activation activation = Activation::kNone;
  Dtype dtype = Dtype::kFloat32;

  const void* panels = nullptr;    // [num_panels, I_max, 48], see common/panels.h; 16-byte aligned
  const void* x = nullptr;         // [N, H, W, I]
  const float* scale = nullptr;    // [O] or null: 1
  const float* shift = nullptr;    // [O] or null: 0
  const void* residual = nullptr;  // [N, H, W, O] or null; added before the activation
  void* y = nullptr;               // [N, H, W, O], forward only
  float* mean = nullptr;           // [O] or null: moments of y (as stored) are not wanted
  float* variance = nullptr;       // [O], biased; null iff mean is

  const void* grad_y = nullptr;  // [N, H, W, O], backward only
  void* grad_x = nullptr;        // [N, H, W, I] or null: not wanted
  void* grad_panels = nullptr;   // [num_panels, I_max, 48] or null; only active rows and panels are written

  float* workspace = nullptr;  // [workspace_floats(params)], 16-byte aligned; need not be initialised
};

enum class PointwiseKernel { kSimt, kTensorCore };

// 16-bit storage runs on tensor cores from sm_80 on; float32 never does (TF32 would round the inputs).
PointwiseKernel select_dynamic_pointwise_conv_kernel(Dtype dtype, int compute_capability);

// Floats of scratch: for moments, and for the gradient of the panels. Depends on the shape alone.
std::int64_t dynamic_pointwise_conv_moments_workspace(std::int64_t num_pixels, std::int64_t out_channels);
std::int64_t dynamic_pointwise_conv_backward_workspace(std::int64_t num_pixels, std::int64_t in_channels,
                                                       std::int64_t out_channels);

void dynamic_pointwise_conv(const DynamicPointwiseConvParams& params, PointwiseKernel kernel, Stream stream);
void dynamic_pointwise_conv_backward(const DynamicPointwiseConvParams& params, PointwiseKernel kernel,
                                     Stream stream);

}  // namespace pfnas::cuda

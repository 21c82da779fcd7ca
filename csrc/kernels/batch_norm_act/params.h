// SPDX-License-Identifier: Apache-2.0
// The whole contract between the binding and the kernels of batch_norm_act. float32; [M, C] are the rows of a
// channels_last tensor, M = N H W.
#pragma once

#include <cstdint>

#include "common/activation_kind.h"
#include "common/isa.h"

namespace pfnas {

struct BatchNormActParams {
  std::int64_t rows = 0;      // M, at least 2
  std::int64_t channels = 0;  // C
  Activation activation = Activation::kNone;
  float eps = 0;
  const float* x = nullptr;      // [M, C]
  const float* gamma = nullptr;  // [C]
  const float* beta = nullptr;   // [C]
  float* moments = nullptr;      // [3, C]: mean, unbiased variance, 1 / sqrt(biased variance + eps)
  float* y = nullptr;            // [M, C]; forward only

  const float* grad_y = nullptr;  // [M, C]; backward only, as the rest
  float* grad_x = nullptr;        // [M, C] or null: not wanted
  float* grad_gamma = nullptr;    // [C]
  float* grad_beta = nullptr;     // [C]
};

struct BatchNormActKernel {
  void (*forward)(const BatchNormActParams&) = nullptr;
  void (*backward)(const BatchNormActParams&) = nullptr;
};

BatchNormActKernel select_batch_norm_act_kernel(Isa isa);

namespace portable {
void batch_norm_act_forward(const BatchNormActParams& p);
void batch_norm_act_backward(const BatchNormActParams& p);
}  // namespace portable
namespace avx2 {
void batch_norm_act_forward(const BatchNormActParams& p);
void batch_norm_act_backward(const BatchNormActParams& p);
}  // namespace avx2
namespace avx512 {
void batch_norm_act_forward(const BatchNormActParams& p);
void batch_norm_act_backward(const BatchNormActParams& p);
}  // namespace avx512

}  // namespace pfnas

// SPDX-License-Identifier: Apache-2.0
// The whole contract between the binding and the kernels of train_mbconv. float32 throughout.
//
// Thin activations (x, y and their gradients) are channels_last. What only this op reads is held in blocks of
// 16 channels, [C / 16][pixels][16], the last block filled up with zeros: a block is then one stream of
// memory, whatever the width, and no loop has a channel tail.
#pragma once

#include <cstdint>

#include "common/activation_kind.h"
#include "common/isa.h"

namespace pfnas {

constexpr int kExpandStage = 0, kDepthStage = 1, kProjectStage = 2;

// Of an array of `size` floats the kernels write `columns` floats of each of the first `rows` rows.
struct WrittenPart {
  float* data = nullptr;
  std::int64_t rows = 0, columns = 0, stride = 0, size = 0;
};
constexpr int kMaxGradients = 15;

struct TrainMBConvParams {
  std::int64_t batch = 0;         // N
  std::int64_t in_channels = 0;   // Ci
  std::int64_t mid_channels = 0;  // Ce: a prefix of the weights' rows; = Ci without expansion
  std::int64_t out_channels = 0;  // Co
  std::int64_t height = 0, width = 0;
  std::int64_t out_height = 0, out_width = 0;
  int kernel_size = 0;      // 3, 5 or 7
  int max_kernel_size = 0;  // of the bank
  int stride = 1;           // 1 or 2
  bool residual = false;    // y += x; then Ci = Co and stride = 1

  // Of each stage's batch normalisation; the depthwise stage may have none (gamma null), and without
  // expansion the first stage is absent (expand_weight null).
  Activation activation[3] = {};
  float eps[3] = {};
  const float* gamma[3] = {};  // [Ce], [Ce], [Co]
  const float* beta[3] = {};   // likewise

  const float* expand_weight = nullptr;   // [>= Ce, expand_stride]
  std::int64_t expand_stride = 0;         // >= Ci
  const float* bank = nullptr;            // [>= Ce, 1, K_max, K_max]
  const float* matrix_5 = nullptr;        // [25, 25]
  const float* matrix_3 = nullptr;        // [9, 9]
  const float* project_weight = nullptr;  // [>= Co, project_stride]
  std::int64_t project_stride = 0;        // >= Ce

  // Squeeze-and-excitation after the depthwise stage's activation; se_channels = 0 without.
  std::int64_t se_channels = 0;             // R
  const float* se_reduce_weight = nullptr;  // [>= R, se_reduce_stride]
  std::int64_t se_reduce_stride = 0;        // >= Ce
  const float* se_reduce_bias = nullptr;    // [R]
  const float* se_expand_weight = nullptr;  // [>= Ce, se_expand_stride]
  std::int64_t se_expand_stride = 0;        // >= R
  const float* se_expand_bias = nullptr;    // [Ce]

  const float* x = nullptr;  // [N, H, W, Ci]

  // Written by forward, read by backward. Plan 'memory' (keep = false) passes no expanded, depthwise and
  // projected: both calls hold them in scratch, and backward computes them again.
  bool keep = true;
  float* y = nullptr;          // [N, Ho, Wo, Co]; forward only
  float* expanded = nullptr;   // [Ce / 16][N, H, W][16] before its normalisation
  float* depthwise = nullptr;  // [Ce / 16][N, Ho, Wo][16] likewise
  float* projected = nullptr;  // [Co / 16][N, Ho, Wo][16] likewise
  float* moments = nullptr;    // [3, 2 Ce + Co]: mean, unbiased variance, 1 / sqrt(biased variance + eps)
  float* pooled = nullptr;     // [Ce / 16][N][16] input of the excitation
  float* hidden = nullptr;     // [R / 16][N][16] after its ReLU
  float* gate = nullptr;       // [Ce / 16][N][16] in [0, 1]

  // Backward only. Weight gradients have the full weights' strides; the kernels add to those of bank and
  // matrices and write the others.
  const float* grad_y = nullptr;   // [N, Ho, Wo, Co]
  float* grad_x = nullptr;         // [N, H, W, Ci] or null: not wanted
  float* grad_expand = nullptr;    // as expand_weight
  float* grad_bank = nullptr;      // as bank
  float* grad_matrix_5 = nullptr;  // not null iff matrix_5 is used
  float* grad_matrix_3 = nullptr;
  float* grad_project = nullptr;
  float* grad_gamma[3] = {};
  float* grad_beta[3] = {};
  float* grad_se_reduce_weight = nullptr;
  float* grad_se_reduce_bias = nullptr;
  float* grad_se_expand_weight = nullptr;
  float* grad_se_expand_bias = nullptr;

  // All gradients of parameters, for clear_unwritten.
  WrittenPart gradients[kMaxGradients] = {};
  int num_gradients = 0;

  void note_gradient(const WrittenPart& gradient) { gradients[num_gradients++] = gradient; }
  std::int64_t in_pixels() const { return batch * height * width; }
  std::int64_t out_pixels() const { return batch * out_height * out_width; }
  bool has_expand() const { return expand_weight != nullptr; }
  bool has_depth_norm() const { return gamma[kDepthStage] != nullptr; }
  bool has_se() const { return se_channels > 0; }
};

// Clears what backward does not write of the gradients, so that none has to arrive as zeros.
void clear_unwritten(const TrainMBConvParams& p);

struct TrainMBConvKernel {
  void (*forward)(const TrainMBConvParams&) = nullptr;
  void (*backward)(const TrainMBConvParams&) = nullptr;
};

TrainMBConvKernel select_train_mbconv_kernel(Isa isa);

namespace portable {
void train_mbconv_forward(const TrainMBConvParams& p);
void train_mbconv_backward(const TrainMBConvParams& p);
}  // namespace portable
namespace avx2 {
void train_mbconv_forward(const TrainMBConvParams& p);
void train_mbconv_backward(const TrainMBConvParams& p);
}  // namespace avx2
namespace avx512 {
void train_mbconv_forward(const TrainMBConvParams& p);
void train_mbconv_backward(const TrainMBConvParams& p);
}  // namespace avx512

}  // namespace pfnas

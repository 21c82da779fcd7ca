// SPDX-License-Identifier: Apache-2.0
// The elastic kernel of Once-for-All (arXiv:1908.09791, section 3): a smaller filter is a learned linear map
// of the centre of the larger one. F5 = M5 vec(centre of the 7x7 bank); F3 = M3 vec(centre of F5). Filters
// are held as [C / 16][taps][16], so that a tap is one vector load. A whole net's derivation is about 13
// MFLOP.
#pragma once

#include "common/parallel.h"
#include "common/simd.h"
#include "kernels/dynamic_depthwise_conv/params.h"

namespace pfnas::PFNAS_TIER {

constexpr int kBlock = 16;  // channels per block in every tier: one cache line
constexpr int kMaxTaps = 49;
constexpr int kTaps5 = 25;
constexpr int kTaps3 = 9;

// What the forward derivation leaves behind for the backward one. All [num_blocks][taps][16].
struct FilterBlocks {
  float* filter;   // [.., kernel_size^2, 16]
  float* input_5;  // [.., 25, 16] what M5 is applied to
  float* input_3;  // [.., 9, 16] what M3 is applied to

  static constexpr std::int64_t kFloatsPerBlock = (kMaxTaps + kTaps5 + kTaps3) * kBlock;
  FilterBlocks(float* memory, std::int64_t num_blocks)
      : filter(memory),
        input_5(memory + num_blocks * kMaxTaps * kBlock),
        input_3(memory + num_blocks * (kMaxTaps + kTaps5) * kBlock) {}
};

// Row of a [outer^2] filter that is tap t of its centred [inner^2] part.
static PFNAS_INLINE int centre_tap(int t, int inner, int outer) {
  const int border = (outer - inner) / 2;
  return (t / inner + border) * outer + t % inner + border;
}

static inline void load_bank_centre(const DynamicDepthwiseConvParams& p, std::int64_t block, int size,
                                    float* out) {
  const std::int64_t first = block * kBlock;
  const int lanes = static_cast<int>(min_of<std::int64_t>(kBlock, p.channels - first));
  const int bank_taps = p.max_kernel_size * p.max_kernel_size;
  const float* bank = p.bank + first * bank_taps;
  for (int t = 0; t < size * size; ++t) {
    const float* source = bank + centre_tap(t, size, p.max_kernel_size);
    for (int c = 0; c < kBlock; ++c) out[t * kBlock + c] = c < lanes ? source[c * bank_taps] : 0.0f;
  }
}

// out[t] = sum_u matrix[row(t)][u] in[u] for the rows of `matrix` that are the centred [out_size^2] part of
// its output.
static inline void apply_matrix(const float* matrix, int size, int out_size, const float* in, float* out) {
  const int taps = size * size;
  for (int t = 0; t < out_size * out_size; ++t) {
    const float* row = matrix + centre_tap(t, out_size, size) * taps;
    float sum[kBlock] = {};
    for (int u = 0; u < taps; ++u) {
      for (int c = 0; c < kBlock; ++c) sum[c] += row[u] * in[u * kBlock + c];
    }
    for (int c = 0; c < kBlock; ++c) out[t * kBlock + c] = sum[c];
  }
}

// out[u] = sum_t matrix[row(t)][u] in[t]: the transpose of apply_matrix.
static inline void apply_transposed(const float* matrix, int size, int in_size, const float* in, float* out) {
  const int taps = size * size;
  for (int u = 0; u < taps; ++u) {
    float sum[kBlock] = {};
    for (int t = 0; t < in_size * in_size; ++t) {
      const float weight = matrix[centre_tap(t, in_size, size) * taps + u];
      for (int c = 0; c < kBlock; ++c) sum[c] += weight * in[t * kBlock + c];
    }
    for (int c = 0; c < kBlock; ++c) out[u * kBlock + c] = sum[c];
  }
}

static inline void derive_filter_block(const DynamicDepthwiseConvParams& p, std::int64_t block,
                                       const FilterBlocks& f) {
  const int k = p.kernel_size;
  float* filter = f.filter + block * k * k * kBlock;
  float* input_5 = f.input_5 + block * kTaps5 * kBlock;
  float* input_3 = f.input_3 + block * kTaps3 * kBlock;
  if (!p.uses_matrix_5() && !p.uses_matrix_3()) return load_bank_centre(p, block, k, filter);
  if (p.uses_matrix_5()) {
    load_bank_centre(p, block, 5, input_5);
    apply_matrix(p.matrix_5, 5, k, input_5, k == 5 ? filter : input_3);
  } else {
    load_bank_centre(p, block, 3, input_3);
  }
  if (p.uses_matrix_3()) apply_matrix(p.matrix_3, 3, 3, input_3, filter);
}

static inline void derive_filters(const DynamicDepthwiseConvParams& p, std::int64_t num_blocks,
                                  const FilterBlocks& f) {
  const double flops = 2.0 * kBlock * (kTaps5 * kTaps5 + kTaps3 * kTaps3) * static_cast<double>(num_blocks);
  parallel_for(num_blocks, flops, [&](std::int64_t block) { derive_filter_block(p, block, f); });
}

// grad_matrix[row(t)][u] = sum over all channels of grad_out[t] in[u]; rows outside the centred part stay
// zero.
static inline void grad_matrix_rows(const float* grad_out, std::int64_t out_block, const float* in, int size,
                                    int out_size, std::int64_t num_blocks, float* grad_matrix) {
  const int taps = size * size;
  const double flops = 2.0 * kBlock * taps * out_size * out_size * static_cast<double>(num_blocks);
  parallel_for(out_size * out_size, flops, [&](std::int64_t t) {
    float sums[kTaps5][kBlock] = {};
    for (std::int64_t block = 0; block < num_blocks; ++block) {
      const float* g = grad_out + block * out_block + t * kBlock;
      const float* values = in + block * taps * kBlock;
      for (int u = 0; u < taps; ++u) {
        for (int c = 0; c < kBlock; ++c) sums[u][c] += g[c] * values[u * kBlock + c];
      }
    }
    float* row = grad_matrix + centre_tap(static_cast<int>(t), out_size, size) * taps;
    for (int u = 0; u < taps; ++u) {
      float total = 0.0f;
      for (int c = 0; c < kBlock; ++c) total += sums[u][c];
      row[u] = total;
    }
  });
}

static inline void scatter_to_bank(const DynamicDepthwiseConvParams& p, std::int64_t block, int size,
                                   const float* grad) {
  const std::int64_t first = block * kBlock;
  const int lanes = static_cast<int>(min_of<std::int64_t>(kBlock, p.channels - first));
  const int bank_taps = p.max_kernel_size * p.max_kernel_size;
  for (int t = 0; t < size * size; ++t) {
    float* target = p.grad_bank + first * bank_taps + centre_tap(t, size, p.max_kernel_size);
    for (int c = 0; c < lanes; ++c) target[c * bank_taps] = grad[t * kBlock + c];
  }
}

// From the gradient of the derived filters, [num_blocks][k^2][16], to those of the bank and of the matrices
// in use. Overwrites f.input_5 and f.input_3 with their gradients once they are no longer needed.
static inline void derive_filters_backward(const DynamicDepthwiseConvParams& p, std::int64_t num_blocks,
                                           const float* grad_filter, const FilterBlocks& f) {
  const float* grad = grad_filter;
  int size = p.kernel_size;
  if (p.uses_matrix_3()) {
    grad_matrix_rows(grad, kTaps3 * kBlock, f.input_3, 3, 3, num_blocks, p.grad_matrix_3);
    for (std::int64_t b = 0; b < num_blocks; ++b) {
      apply_transposed(p.matrix_3, 3, 3, grad + b * kTaps3 * kBlock, f.input_3 + b * kTaps3 * kBlock);
    }
    grad = f.input_3;
  }
  if (p.uses_matrix_5()) {
    const std::int64_t grad_block = size * size * kBlock;
    grad_matrix_rows(grad, grad_block, f.input_5, 5, size, num_blocks, p.grad_matrix_5);
    for (std::int64_t b = 0; b < num_blocks; ++b) {
      apply_transposed(p.matrix_5, 5, size, grad + b * grad_block, f.input_5 + b * kTaps5 * kBlock);
    }
    grad = f.input_5;
    size = 5;
  }
  for (std::int64_t b = 0; b < num_blocks; ++b) scatter_to_bank(p, b, size, grad + b * size * size * kBlock);
}

}  // namespace pfnas::PFNAS_TIER

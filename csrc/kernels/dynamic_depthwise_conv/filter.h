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
constexpr int kVecsPerBlock = kBlock / kLanes;
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

// The rows of a square matrix that lead to the centred [inner^2] part of its output (for k = 3 only 9 of M5's
// 25 are needed), and their transpose. Copied once a call: the loops over channel blocks then walk over dense
// memory.
struct CentreRows {
  int rows = 0;  // 0: the matrix takes no part
  int cols = 0;
  float dense[kTaps5 * kTaps5];       // [rows][cols]
  float transposed[kTaps5 * kTaps5];  // [cols][rows]

  void take(const float* matrix, int size, int inner) {
    rows = inner * inner;
    cols = size * size;
    for (int t = 0; t < rows; ++t) {
      for (int u = 0; u < cols; ++u) {
        dense[t * cols + u] = transposed[u * rows + t] = matrix[centre_tap(t, inner, size) * cols + u];
      }
    }
  }
};

struct Derivation {
  CentreRows matrix_5, matrix_3;

  explicit Derivation(const DynamicDepthwiseConvParams& p) {
    if (p.uses_matrix_5()) matrix_5.take(p.matrix_5, 5, p.kernel_size);
    if (p.uses_matrix_3()) matrix_3.take(p.matrix_3, 3, 3);
  }
  bool uses_5() const { return matrix_5.rows > 0; }
  bool uses_3() const { return matrix_3.rows > 0; }
};

static inline void load_bank_centre(const DynamicDepthwiseConvParams& p, std::int64_t block, int size,
                                    float* out) {
  const std::int64_t first = block * kBlock;
  const int lanes = static_cast<int>(min_of<std::int64_t>(kBlock, p.channels - first));
  const int bank_taps = p.max_kernel_size * p.max_kernel_size;
  const float* bank = p.bank + first * bank_taps;
  for (int t = 0; t < size * size; ++t, out += kBlock) {
    const float* source = bank + centre_tap(t, size, p.max_kernel_size);
    for (int c = 0; c < lanes; ++c) out[c] = source[c * bank_taps];
    for (int c = lanes; c < kBlock; ++c) out[c] = 0.0f;
  }
}

static inline void store_bank_centre(const DynamicDepthwiseConvParams& p, std::int64_t block, int size,
                                     const float* in) {
  const std::int64_t first = block * kBlock;
  const int lanes = static_cast<int>(min_of<std::int64_t>(kBlock, p.channels - first));
  const int bank_taps = p.max_kernel_size * p.max_kernel_size;
  for (int t = 0; t < size * size; ++t, in += kBlock) {
    float* target = p.grad_bank + first * bank_taps + centre_tap(t, size, p.max_kernel_size);
    for (int c = 0; c < lanes; ++c) target[c * bank_taps] = in[c];
  }
}

template <int kRows>
static PFNAS_INLINE void multiply_rows(const float* matrix, int cols, const float* in, float* out) {
  Vec sums[kRows][kVecsPerBlock] = {};
  for (int u = 0; u < cols; ++u, in += kBlock) {
    PFNAS_UNROLL for (int v = 0; v < kVecsPerBlock; ++v) {
      const Vec value = load(in + v * kLanes);
      PFNAS_UNROLL for (int t = 0; t < kRows; ++t) sums[t][v] += matrix[t * cols + u] * value;
    }
  }
  PFNAS_UNROLL for (int t = 0; t < kRows; ++t) {
    PFNAS_UNROLL for (int v = 0; v < kVecsPerBlock; ++v) store(out + t * kBlock + v * kLanes, sums[t][v]);
  }
}

// One block of channels: out, [rows][16] = matrix, [rows][cols] x in, [cols][16]; rows is 9 or 25.
static inline void multiply(const float* matrix, int rows, int cols, const float* in, float* out) {
  if (rows == kTaps5) {
    for (int t = 0; t < rows; t += 5) multiply_rows<5>(matrix + t * cols, cols, in, out + t * kBlock);
  } else {
    for (int t = 0; t < rows; t += 3) multiply_rows<3>(matrix + t * cols, cols, in, out + t * kBlock);
  }
}

static inline void derive_filter_block(const DynamicDepthwiseConvParams& p, const Derivation& d,
                                       std::int64_t block, const FilterBlocks& f) {
  const int k = p.kernel_size;
  float* filter = f.filter + block * k * k * kBlock;
  float* input_5 = f.input_5 + block * kTaps5 * kBlock;
  float* input_3 = f.input_3 + block * kTaps3 * kBlock;
  if (d.uses_5()) {
    load_bank_centre(p, block, 5, input_5);
    multiply(d.matrix_5.dense, d.matrix_5.rows, d.matrix_5.cols, input_5, k == 5 ? filter : input_3);
  } else {
    load_bank_centre(p, block, k, d.uses_3() ? input_3 : filter);
  }
  if (d.uses_3()) multiply(d.matrix_3.dense, d.matrix_3.rows, d.matrix_3.cols, input_3, filter);
}

static inline void derive_filters(const DynamicDepthwiseConvParams& p, const Derivation& d,
                                  std::int64_t num_blocks, const FilterBlocks& f) {
  const double flops = 2.0 * kBlock * (kTaps5 + kTaps3) * kTaps5 * static_cast<double>(num_blocks);
  parallel_for(num_blocks, flops, [&](std::int64_t block) { derive_filter_block(p, d, block, f); });
}

// Rows t .. t + kRows - 1 of grad_matrix[row(t)][u] = sum over all channels of grad_out[t] in[u].
template <int kRows, int kCols>
static inline void grad_matrix_tile(const float* grad_out, int out_size, const float* in, int size, int t,
                                    int u, std::int64_t num_blocks, float* grad_matrix) {
  const int taps = size * size, rows = out_size * out_size;
  Vec sums[kRows][kCols] = {};
  for (std::int64_t block = 0; block < num_blocks; ++block) {
    const float* grads = grad_out + (block * rows + t) * kBlock;
    const float* values = in + (block * taps + u) * kBlock;
    for (int v = 0; v < kVecsPerBlock; ++v, grads += kLanes, values += kLanes) {
      PFNAS_UNROLL for (int i = 0; i < kRows; ++i) {
        const Vec grad = load(grads + i * kBlock);
        PFNAS_UNROLL for (int j = 0; j < kCols; ++j) sums[i][j] += grad * load(values + j * kBlock);
      }
    }
  }
  for (int i = 0; i < kRows; ++i) {
    float* row = grad_matrix + centre_tap(t + i, out_size, size) * taps + u;
    for (int j = 0; j < kCols; ++j) {
      float total = 0.0f;
      for (int lane = 0; lane < kLanes; ++lane) total += sums[i][j][lane];
      row[j] = total;
    }
  }
}

// Rows outside the centred part are left as they are: zero.
static inline void grad_matrix(const float* grad_out, int out_size, const float* in, int size,
                               std::int64_t num_blocks, float* grad) {
  const std::int64_t tiles = out_size * out_size / 3;  // 3 rows each; of 25 rows, the last tile has 4
  const double flops = 2.0 * kBlock * size * size * out_size * out_size * static_cast<double>(num_blocks);
  parallel_for(tiles, flops, [&](std::int64_t tile) {
    const int t = static_cast<int>(tile) * 3;
    for (int u = 0; u < size * size; u += size) {
      if (size == 5) {
        grad_matrix_tile<3, 5>(grad_out, out_size, in, size, t, u, num_blocks, grad);
        if (t == 21) grad_matrix_tile<1, 5>(grad_out, out_size, in, size, t + 3, u, num_blocks, grad);
      } else {
        grad_matrix_tile<3, 3>(grad_out, out_size, in, size, t, u, num_blocks, grad);
      }
    }
  });
}

// From the gradient of the derived filters, [num_blocks][k^2][16], to those of the bank and of the matrices
// in use. Overwrites f.input_5 and f.input_3 with their gradients once they are no longer needed.
static inline void derive_filters_backward(const DynamicDepthwiseConvParams& p, const Derivation& d,
                                           std::int64_t num_blocks, const float* grad_filter,
                                           const FilterBlocks& f) {
  const int k = p.kernel_size;
  if (d.uses_3()) grad_matrix(grad_filter, 3, f.input_3, 3, num_blocks, p.grad_matrix_3);
  const double flops = 2.0 * kBlock * (kTaps5 + kTaps3) * kTaps5 * static_cast<double>(num_blocks);
  float* grad_3 = f.input_3;
  if (d.uses_3()) {
    for (std::int64_t b = 0; b < num_blocks; ++b) {
      multiply(d.matrix_3.transposed, kTaps3, kTaps3, grad_filter + b * kTaps3 * kBlock,
               grad_3 + b * kTaps3 * kBlock);
    }
  }
  const float* grad_out =
      d.uses_3() ? grad_3 : grad_filter;  // [num_blocks][k^2][16], of what M5 gives (or the bank)
  if (d.uses_5()) grad_matrix(grad_out, k, f.input_5, 5, num_blocks, p.grad_matrix_5);
  parallel_for(num_blocks, flops, [&](std::int64_t b) {
    const float* grad = grad_out + b * k * k * kBlock;
    if (!d.uses_5()) return store_bank_centre(p, b, k, grad);
    float* grad_5 = f.input_5 + b * kTaps5 * kBlock;
    multiply(d.matrix_5.transposed, kTaps5, k * k, grad, grad_5);
    store_bank_centre(p, b, 5, grad_5);
  });
}

}  // namespace pfnas::PFNAS_TIER

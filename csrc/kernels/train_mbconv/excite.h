// SPDX-License-Identifier: Apache-2.0
// Squeeze-and-excitation (arXiv:1709.01507) of a block in training mode:
// gate = hard_sigmoid(W2 relu(W1 pooled + b1) + b2), pooled = the mean of the activated depthwise output over
// the pixels. All small matrices are in blocks, [channels / 16][N][16].
#pragma once

#include "common/parallel.h"
#include "common/simd.h"
#include "kernels/train_mbconv/blocks.h"
#include "kernels/train_mbconv/gemm.h"
#include "kernels/train_mbconv/params.h"

namespace pfnas::PFNAS_TIER {

// Of the forward pass: both weights, packed.
static inline std::int64_t excite_floats(const TrainMBConvParams& p) {
  const std::int64_t mid = ceil_div(p.mid_channels, kBlock), reduced = ceil_div(p.se_channels, kBlock);
  return (reduced * p.mid_channels + mid * p.se_channels) * kBlock;
}

template <Activation kActivation>
static inline void pool_image(const TrainMBConvParams& p, const Norm& norm, std::int64_t image) {
  const std::int64_t plane = p.out_height * p.out_width;
  for (std::int64_t block = 0; block < ceil_div(p.mid_channels, kBlock); ++block) {
    const Norm here = norm.at(block);
    const float* from = p.depthwise + (block * p.out_pixels() + image * plane) * kBlock;
    PFNAS_UNROLL for (int v = 0; v < kVecsPerBlock; ++v) {
      const Vec scale = load(here.scale + v * kLanes), shift = load(here.shift + v * kLanes);
      Vec total{};
      for (std::int64_t begin = 0; begin < plane; begin += kRowsPerSum) {
        const std::int64_t end = min_of(plane, begin + kRowsPerSum);
        Vec sums[2] = {};
        std::int64_t r = begin;
        for (; r + 2 <= end; r += 2) {
          PFNAS_UNROLL for (int u = 0; u < 2; ++u) {
            sums[u] += activate<kActivation>(load(from + (r + u) * kBlock + v * kLanes) * scale + shift);
          }
        }
        if (r < end) sums[0] += activate<kActivation>(load(from + r * kBlock + v * kLanes) * scale + shift);
        total += sums[0] + sums[1];
      }
      store(p.pooled + (block * p.batch + image) * kBlock + v * kLanes, total / static_cast<float>(plane));
    }
  }
}

// Adds a bias to [channels / 16][rows][16] and applies `function`; lanes beyond `channels` become zero.
template <class Function>
static inline void finish_small(float* data, std::int64_t rows, std::int64_t channels, const float* bias,
                                const Function& function) {
  for (std::int64_t first = 0; first < channels; first += kBlock) {
    for (std::int64_t r = 0; r < rows; ++r, data += kBlock) {
      for (std::int64_t c = 0; c < kBlock; ++c) {
        data[c] = first + c < channels ? function(data[c] + bias[first + c]) : 0.0f;
      }
    }
  }
}

static inline void excite(const TrainMBConvParams& p, const Norm& norm, float* memory) {
  const std::int64_t plane = p.out_height * p.out_width;
  parallel_for(p.batch, 8.0 * static_cast<double>(p.batch * plane * p.mid_channels), [&](std::int64_t image) {
    dispatch_activation(p.activation[kDepthStage],
                        [&](auto tag) { pool_image<decltype(tag)::value>(p, norm, image); });
  });
  const std::int64_t mid = ceil_div(p.mid_channels, kBlock), reduced = ceil_div(p.se_channels, kBlock);
  float* reduce = memory;
  float* expand = memory + reduced * p.mid_channels * kBlock;
  pack_transposed(p.se_reduce_weight, p.se_channels, p.mid_channels, p.se_reduce_stride, reduce);
  pack_transposed(p.se_expand_weight, p.mid_channels, p.se_channels, p.se_expand_stride, expand);
  multiply_blocks<kBlock, Start::kZero>(p.batch, reduced, p.mid_channels, blocks_of(p.pooled, p.batch),
                                        {reduce, p.mid_channels * kBlock},
                                        {p.hidden, kBlock, p.batch * kBlock, kBlock});
  finish_small(p.hidden, p.batch, p.se_channels, p.se_reduce_bias,
               [](float value) { return value < 0.0f ? 0.0f : value; });
  multiply_blocks<kBlock, Start::kZero>(p.batch, mid, p.se_channels, blocks_of(p.hidden, p.batch),
                                        {expand, p.se_channels * kBlock},
                                        {p.gate, kBlock, p.batch * kBlock, kBlock});
  finish_small(p.gate, p.batch, p.mid_channels, p.se_expand_bias, [](float value) {
    const float t = value * (1.0f / 6.0f) + 0.5f;
    const float low = t < 0.0f ? 0.0f : t;
    return low > 1.0f ? 1.0f : low;
  });
}

// Working memory of the backward pass, in the order of use.
struct ExciteGradients {
  float* grad_gate;    // [Ce / 16][N][16]: sum over pixels of g a2; then the gradient before the hard sigmoid
  float* grad_hidden;  // [R / 16][N][16]
  float* grad_pixel;   // [Ce / 16][N][16]: gradient that every pixel gets through the mean
  float* expand;       // W2 packed for g W2
  float* reduce;       // W1 packed for g W1

  static ExciteGradients take(const TrainMBConvParams& p, Carver& memory) {
    const std::int64_t mid = ceil_div(p.mid_channels, kBlock), reduced = ceil_div(p.se_channels, kBlock);
    ExciteGradients g{};
    g.grad_gate = memory.take(mid * p.batch * kBlock);
    g.grad_hidden = memory.take(reduced * p.batch * kBlock);
    g.grad_pixel = memory.take(mid * p.batch * kBlock);
    g.expand = memory.take(reduced * p.mid_channels * kBlock);
    g.reduce = memory.take(mid * p.se_channels * kBlock);
    return g;
  }
};

// grad[r, c] = sum over n of left[n, r] right[n, c]: a weight gradient, into rows of `stride` floats. Both in
// blocks of N rows.
static inline void small_weight_gradient(const float* left, std::int64_t rows, const float* right,
                                         std::int64_t columns, std::int64_t batch, float* grad,
                                         std::int64_t stride) {
  const std::int64_t blocks = ceil_div(columns, kBlock);
  const int last = static_cast<int>(columns - (blocks - 1) * kBlock);
  for (std::int64_t first = 0; first < rows; first += kBlock, left += batch * kBlock) {
    multiply_blocks<1, Start::kZero>(min_of<std::int64_t>(kBlock, rows - first), blocks, batch,
                                     transposed_rows_of(left, kBlock), {right, batch * kBlock},
                                     {grad + first * stride, stride, kBlock, last});
  }
}

static inline void small_bias_gradient(const float* grads, std::int64_t channels, std::int64_t batch,
                                       float* grad) {
  for (std::int64_t c = 0; c < channels; ++c) {
    float sum = 0.0f;
    for (std::int64_t n = 0; n < batch; ++n) sum += grads[(c / kBlock * batch + n) * kBlock + c % kBlock];
    grad[c] = sum;
  }
}

// From grad_gate (the sums) to grad_pixel, and the gradients of the excitation's parameters.
static inline void excite_backward(const TrainMBConvParams& p, const ExciteGradients& g) {
  const std::int64_t mid = ceil_div(p.mid_channels, kBlock), reduced = ceil_div(p.se_channels, kBlock);
  for (std::int64_t i = 0; i < mid * p.batch * kBlock; ++i) {
    // Flat at both ends; written so that a gate that is NaN passes its gradient on.
    if (p.gate[i] <= 0.0f || p.gate[i] >= 1.0f) g.grad_gate[i] = 0.0f;
    g.grad_gate[i] *= 1.0f / 6.0f;
  }
  small_weight_gradient(g.grad_gate, p.mid_channels, p.hidden, p.se_channels, p.batch,
                        p.grad_se_expand_weight, p.se_expand_stride);
  small_bias_gradient(g.grad_gate, p.mid_channels, p.batch, p.grad_se_expand_bias);
  pack_straight(p.se_expand_weight, p.mid_channels, p.se_channels, p.se_expand_stride, g.expand);
  multiply_blocks<kBlock, Start::kZero>(p.batch, reduced, p.mid_channels, blocks_of(g.grad_gate, p.batch),
                                        {g.expand, p.mid_channels * kBlock},
                                        {g.grad_hidden, kBlock, p.batch * kBlock, kBlock});
  for (std::int64_t i = 0; i < reduced * p.batch * kBlock; ++i) {
    if (p.hidden[i] <= 0.0f) g.grad_hidden[i] = 0.0f;
  }
  small_weight_gradient(g.grad_hidden, p.se_channels, p.pooled, p.mid_channels, p.batch,
                        p.grad_se_reduce_weight, p.se_reduce_stride);
  small_bias_gradient(g.grad_hidden, p.se_channels, p.batch, p.grad_se_reduce_bias);
  pack_straight(p.se_reduce_weight, p.se_channels, p.mid_channels, p.se_reduce_stride, g.reduce);
  multiply_blocks<kBlock, Start::kZero>(p.batch, mid, p.se_channels, blocks_of(g.grad_hidden, p.batch),
                                        {g.reduce, p.se_channels * kBlock},
                                        {g.grad_pixel, kBlock, p.batch * kBlock, kBlock});
  const float share = 1.0f / static_cast<float>(p.out_height * p.out_width);
  for (std::int64_t i = 0; i < mid * p.batch * kBlock; ++i) g.grad_pixel[i] *= share;
}

}  // namespace pfnas::PFNAS_TIER

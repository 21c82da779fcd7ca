// SPDX-License-Identifier: Apache-2.0
// The element-wise parts of the backward pass, a block of 16 channels x a run of rows at a time.
#pragma once

#include "common/simd.h"
#include "kernels/train_mbconv/backward_workspace.h"
#include "kernels/train_mbconv/blocks.h"
#include "kernels/train_mbconv/pack.h"
#include "kernels/train_mbconv/params.h"

namespace pfnas::PFNAS_TIER {

// Calls body(gradient before the last activation, projected value, row) for the rows of one vector of
// channels.
template <Activation kActivation, class Body>
static PFNAS_INLINE void for_output_gradients(const TrainMBConvParams& p, const Norm& norm,
                                              std::int64_t block, int v, std::int64_t first,
                                              std::int64_t rows, const Body& body) {
  const Vec scale = load(norm.scale + v * kLanes), shift = load(norm.shift + v * kLanes);
  const int lanes = lanes_of(p.out_channels, block, v);
  const float* grads = p.grad_y + first * p.out_channels + block * kBlock + v * kLanes;
  const float* values = p.projected + (block * p.out_pixels() + first) * kBlock + v * kLanes;
  for (std::int64_t r = 0; r < rows; ++r, grads += p.out_channels, values += kBlock) {
    const Vec value = load(values);
    body(slope_times<kActivation>(value * scale + shift, load_up_to(grads, lanes)), value, r);
  }
}

// Adds to the sums of the last normalisation.
template <Activation kActivation>
static inline void sum_output_gradients(const TrainMBConvParams& p, const BackwardWorkspace& w,
                                        std::int64_t first, std::int64_t rows, const GradientSums& sums) {
  for (std::int64_t block = 0; block < w.out_blocks; ++block) {
    const Norm norm = w.norms[kProjectStage].at(block);
    Vec plain[kVecsPerBlock] = {}, normalised[kVecsPerBlock] = {};
    PFNAS_UNROLL for (int v = 0; v < kVecsPerBlock; ++v) {
      if (lanes_of(p.out_channels, block, v) == 0) continue;
      const Vec mean = load(norm.mean + v * kLanes), invstd = load(norm.invstd + v * kLanes);
      Vec sum{}, product{};
      for_output_gradients<kActivation>(p, norm, block, v, first, rows,
                                        [&](Vec grad, Vec value, std::int64_t) {
                                          sum += grad;
                                          product += grad * (value - mean);
                                        });
      plain[v] = sum;
      normalised[v] = product * invstd;
    }
    add_lanes(sums.plain + block * kBlock, plain);
    add_lanes(sums.normalised + block * kBlock, normalised);
  }
}

// The gradient of the projection's output for a tile, into [Co / 16][rows][16].
template <Activation kActivation>
static inline void grad_projected_tile(const TrainMBConvParams& p, const BackwardWorkspace& w,
                                       std::int64_t first, std::int64_t rows, float* out) {
  for (std::int64_t block = 0; block < w.out_blocks; ++block, out += rows * kBlock) {
    const Norm norm = w.norms[kProjectStage].at(block);
    const NormGradient g = w.gradients[kProjectStage].at(block);
    for (int v = 0; v < kVecsPerBlock; ++v) {
      float* to = out + v * kLanes;
      const Vec scale = load(g.scale + v * kLanes), slope = load(g.slope + v * kLanes);
      const Vec offset = load(g.offset + v * kLanes), mean = load(norm.mean + v * kLanes);
      if (lanes_of(p.out_channels, block, v) == 0) {
        for (std::int64_t r = 0; r < rows; ++r) store(to + r * kBlock, Vec{});
        continue;
      }
      for_output_gradients<kActivation>(
          p, norm, block, v, first, rows, [&](Vec grad, Vec value, std::int64_t r) {
            store(to + r * kBlock, grad * scale + ((value - mean) * slope + offset));
          });
    }
  }
}

// One block of a tile without excitation: `grad` (of the projection's input) becomes dz2 in place, `active`
// gets the projection's input, and the sums of the depthwise normalisation grow.
template <Activation kActivation>
static inline void grad_activated_rows(const float* depthwise, const Norm& norm, std::int64_t rows,
                                       float* grad, float* active, const GradientSums& sums) {
  Vec plain[kVecsPerBlock] = {}, normalised[kVecsPerBlock] = {};
  PFNAS_UNROLL for (int v = 0; v < kVecsPerBlock; ++v) {
    const Vec scale = load(norm.scale + v * kLanes), shift = load(norm.shift + v * kLanes);
    const Vec mean = load(norm.mean + v * kLanes), invstd = load(norm.invstd + v * kLanes);
    Vec sum{}, product{};
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t at = r * kBlock + v * kLanes;
      const Vec value = load(depthwise + at), z = value * scale + shift;
      const Vec slope = slope_times<kActivation>(z, load(grad + at));
      store(active + at, activate<kActivation>(z));
      store(grad + at, slope);
      sum += slope;
      product += slope * (value - mean);
    }
    plain[v] = sum;
    normalised[v] = product * invstd;
  }
  add_lanes(sums.plain, plain);
  add_lanes(sums.normalised, normalised);
}

// The same with excitation, for rows of one image: `grad` stays, and the five sums of the segment are
// written.
template <Activation kActivation>
static inline void grad_gated_rows(const float* depthwise, const Norm& norm, const float* gate,
                                   std::int64_t rows, const float* grad, float* active, float* segment,
                                   std::int64_t segment_stride) {
  PFNAS_UNROLL for (int v = 0; v < kVecsPerBlock; ++v) {
    const Vec scale = load(norm.scale + v * kLanes), shift = load(norm.shift + v * kLanes);
    const Vec mean = load(norm.mean + v * kLanes), gates = load(gate + v * kLanes);
    Vec sums[kSegmentSums] = {};
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t at = r * kBlock + v * kLanes;
      const Vec value = load(depthwise + at), z = value * scale + shift, g = load(grad + at);
      const Vec activated = activate<kActivation>(z), centred = value - mean;
      const Vec slope = slope_times<kActivation>(z, broadcast(1.0f)), slope_grad = slope * g;
      store(active + at, activated * gates);
      sums[kGradTimesActive] += g * activated;
      sums[kSlopeGrad] += slope_grad;
      sums[kSlope] += slope;
      sums[kSlopeGradCentred] += slope_grad * centred;
      sums[kSlopeCentred] += slope * centred;
    }
    PFNAS_UNROLL for (int s = 0; s < kSegmentSums; ++s) {
      store(segment + s * segment_stride + v * kLanes, sums[s]);
    }
  }
}

// The gradient of the depthwise output (through its normalisation) of one block into planes. With excitation
// it starts from the gradient of the projection's input, else from dz2. `excited`: gate and gradient through
// the mean, [N][16] each.
template <Activation kActivation, bool kExcited>
static inline void pack_grad_depthwise(Planes& planes, const float* grad, const float* depthwise,
                                       std::int64_t image, std::int64_t count, std::int64_t begin,
                                       std::int64_t end, const Norm& norm, const NormGradient& gradient,
                                       const float* gate, const float* grad_pixel) {
  const std::int64_t width = planes.width;
  for_plane_rows(planes, image, count, begin, end, [&](std::int64_t source, float* to, std::int64_t n) {
    PFNAS_UNROLL for (int v = 0; v < kVecsPerBlock; ++v) {
      const Vec scale = load(gradient.scale + v * kLanes), slope = load(gradient.slope + v * kLanes);
      const Vec offset = load(gradient.offset + v * kLanes), mean = load(norm.mean + v * kLanes);
      const Vec z_scale = load(norm.scale + v * kLanes), z_shift = load(norm.shift + v * kLanes);
      const Vec gates = kExcited ? load(gate + n * kBlock + v * kLanes) : Vec{};
      const Vec pixel = kExcited ? load(grad_pixel + n * kBlock + v * kLanes) : Vec{};
      const float* grads = grad + source + v * kLanes;
      const float* values = depthwise + source + v * kLanes;
      float* target = to + v * planes.vec_stride();
      for (std::int64_t x = 0; x < width; ++x) {
        const Vec value = load(values + x * kBlock);
        Vec dz = load(grads + x * kBlock);
        if constexpr (kExcited) dz = slope_times<kActivation>(value * z_scale + z_shift, dz * gates + pixel);
        store(target + x * kLanes, dz * scale + ((value - mean) * slope + offset));
      }
    }
  });
}

// Turns the gradient of the depthwise input into dz1 in place and adds to the sums of the first
// normalisation.
template <Activation kActivation>
static inline void grad_expanded_rows(const float* expanded, const Norm& norm, std::int64_t rows, float* grad,
                                      const GradientSums& sums) {
  for (std::int64_t begin = 0; begin < rows; begin += kRowsPerSum) {
    const std::int64_t end = min_of(rows, begin + kRowsPerSum);
    Vec plain[kVecsPerBlock] = {}, normalised[kVecsPerBlock] = {};
    PFNAS_UNROLL for (int v = 0; v < kVecsPerBlock; ++v) {
      const Vec scale = load(norm.scale + v * kLanes), shift = load(norm.shift + v * kLanes);
      const Vec mean = load(norm.mean + v * kLanes), invstd = load(norm.invstd + v * kLanes);
      Vec sum{}, product{};
      for (std::int64_t r = begin; r < end; ++r) {
        const std::int64_t at = r * kBlock + v * kLanes;
        const Vec value = load(expanded + at);
        const Vec slope = slope_times<kActivation>(value * scale + shift, load(grad + at));
        store(grad + at, slope);
        sum += slope;
        product += slope * (value - mean);
      }
      plain[v] = sum;
      normalised[v] = product * invstd;
    }
    add_lanes(sums.plain, plain);
    add_lanes(sums.normalised, normalised);
  }
}

// The gradient of the expansion's output for a tile, into [Ce / 16][rows][16].
static inline void grad_expansion_tile(const TrainMBConvParams& p, const BackwardWorkspace& w,
                                       std::int64_t first, std::int64_t rows, float* out) {
  for (std::int64_t block = 0; block < w.mid_blocks; ++block, out += rows * kBlock) {
    const std::int64_t from = (block * p.in_pixels() + first) * kBlock;
    const Norm norm = w.norms[kExpandStage].at(block);
    const NormGradient g = w.gradients[kExpandStage].at(block);
    PFNAS_UNROLL for (int v = 0; v < kVecsPerBlock; ++v) {
      const Vec scale = load(g.scale + v * kLanes), slope = load(g.slope + v * kLanes);
      const Vec offset = load(g.offset + v * kLanes), mean = load(norm.mean + v * kLanes);
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t at = r * kBlock + v * kLanes;
        const Vec value = load(p.expanded + from + at) - mean;
        store(out + at, load(w.grad_expanded + from + at) * scale + (value * slope + offset));
      }
    }
  }
}

// Blocks of rows (the gradient of x) into channels_last rows, plus the residual's gradient.
static inline void store_grad_x(const TrainMBConvParams& p, std::int64_t first, std::int64_t rows,
                                const float* blocks, std::int64_t block_stride) {
  for (std::int64_t block = 0; block * kBlock < p.in_channels; ++block, blocks += block_stride) {
    for (int v = 0; v < kVecsPerBlock; ++v) {
      const int lanes = lanes_of(p.in_channels, block, v);
      if (lanes == 0) break;
      const std::int64_t start = first * p.in_channels + block * kBlock + v * kLanes;
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t at = start + r * p.in_channels;
        Vec value = load(blocks + r * kBlock + v * kLanes);
        if (p.residual) value += load_up_to(p.grad_y + at, lanes);
        if (lanes == kLanes) {
          store(p.grad_x + at, value);
        } else {
          store_lanes(p.grad_x + at, value, lanes);
        }
      }
    }
  }
}

}  // namespace pfnas::PFNAS_TIER

// SPDX-License-Identifier: Apache-2.0
// Element-wise steps on blocks of 16 channels, [rows][16]: activations and their slopes, batch normalisation
// folded to a scale and a shift, and moments that are summed in float32 over a few hundred rows and in
// float64 beyond.
#pragma once

#include "common/activation.h"
#include "common/simd.h"
#include "kernels/dynamic_depthwise_conv/filter.h"
#include "kernels/train_mbconv/params.h"

namespace pfnas::PFNAS_TIER {

// Memory handed out piece by piece; a first round without memory finds the size.
struct Carver {
  float* base = nullptr;
  std::int64_t used = 0;

  float* take(std::int64_t count) {
    float* piece = base == nullptr ? nullptr : base + used;
    used += ceil_div(count, kBlock) * kBlock;
    return piece;
  }
  double* take_doubles(std::int64_t count) { return reinterpret_cast<double*>(take(2 * count)); }
};

static inline void clear(float* data, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) data[i] = 0.0f;
}
static inline void clear(double* data, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) data[i] = 0.0;
}

// Derivative of the activation at z, times g.
template <Activation kActivation>
static PFNAS_INLINE Vec slope_times(Vec z, Vec g) {
  if constexpr (kActivation == Activation::kRelu) return z <= Vec{} ? Vec{} : g;
  if constexpr (kActivation == Activation::kHswish) {
    const Vec low = broadcast(-3.0f), high = broadcast(3.0f);
    Vec slope = z * (1.0f / 3.0f) + 0.5f;
    slope = z < low ? Vec{} : slope;
    slope = z > high ? broadcast(1.0f) : slope;
    return slope * g;
  }
  return g;
}

// A batch normalisation of this batch. All [ceil(C / 16) * 16]; channels beyond C have scale and shift 0.
struct Norm {
  float* mean;
  float* invstd;
  float* scale;  // gamma * invstd
  float* shift;  // beta - mean * scale

  Norm at(std::int64_t block) const {
    const std::int64_t i = block * kBlock;
    return {mean + i, invstd + i, scale + i, shift + i};
  }
};

static inline Norm take_norm(Carver& memory, std::int64_t blocks) {
  float* data = memory.take(4 * blocks * kBlock);
  const std::int64_t n = data == nullptr ? 0 : blocks * kBlock;
  return {data, data + n, data + 2 * n, data + 3 * n};
}

static inline void fold_norm(const float* gamma, const float* beta, std::int64_t channels,
                             std::int64_t blocks, const Norm& norm) {
  for (std::int64_t c = 0; c < blocks * kBlock; ++c) {
    const bool exists = c < channels;
    if (!exists) norm.mean[c] = norm.invstd[c] = 0.0f;
    norm.scale[c] = exists ? gamma[c] * norm.invstd[c] : 0.0f;
    norm.shift[c] = exists ? beta[c] - norm.mean[c] * norm.scale[c] : 0.0f;
  }
}

// Where a stage has no normalisation.
static inline void identity_norm(std::int64_t channels, std::int64_t blocks, const Norm& norm) {
  for (std::int64_t c = 0; c < blocks * kBlock; ++c) {
    norm.mean[c] = norm.shift[c] = 0.0f;
    norm.invstd[c] = norm.scale[c] = c < channels ? 1.0f : 0.0f;
  }
}

// From the moments that forward returned.
static inline void load_norm(const TrainMBConvParams& p, int stage, const Norm& norm) {
  const std::int64_t channels = stage == kProjectStage ? p.out_channels : p.mid_channels;
  const std::int64_t blocks = ceil_div(channels, kBlock);
  if (p.gamma[stage] == nullptr) return identity_norm(channels, blocks, norm);
  const std::int64_t total = 2 * p.mid_channels + p.out_channels;
  const float* moments = p.moments + stage * p.mid_channels;
  for (std::int64_t c = 0; c < channels; ++c) {
    norm.mean[c] = moments[c];
    norm.invstd[c] = moments[2 * total + c];
  }
  fold_norm(p.gamma[stage], p.beta[stage], channels, blocks, norm);
}

// Vectors of the channels of a block that exist in channels_last rows of `channels`.
static PFNAS_INLINE Vec load_up_to(const float* from, int lanes) {
  return lanes >= kLanes ? load(from) : load_lanes(from, lanes);
}

// Lanes of vector v of a block that exist.
static PFNAS_INLINE int lanes_of(std::int64_t channels, std::int64_t block, int v) {
  const std::int64_t left = channels - block * kBlock - v * kLanes;
  return static_cast<int>(left < 0 ? 0 : min_of<std::int64_t>(left, kLanes));
}

constexpr std::int64_t kRowsPerSum = 256;  // summed in float32 before a float64 sum takes over

// Mean and sum of squared deviations of [channels], over `count` rows so far.
struct Moments {
  double* mean;
  double* deviation;
};

static inline void join_moments(const Moments& into, std::int64_t count, const double* mean,
                                const double* deviation, std::int64_t more) {
  const double share = static_cast<double>(more) / static_cast<double>(count + more);
  for (int c = 0; c < kBlock; ++c) {
    const double delta = mean[c] - into.mean[c];
    into.mean[c] += delta * share;
    into.deviation[c] += deviation[c] + delta * delta * static_cast<double>(count) * share;
  }
}

// One block: adds `rows` rows to moments of `count` rows. Shifted by the first row, so that a large mean does
// not eat the variance.
static inline void add_moments(const Moments& into, std::int64_t count, const float* data,
                               std::int64_t rows) {
  for (std::int64_t begin = 0; begin < rows; begin += kRowsPerSum) {
    const std::int64_t n = min_of(kRowsPerSum, rows - begin);
    const float* from = data + begin * kBlock;
    float sums[kBlock], squares[kBlock];
    PFNAS_UNROLL for (int v = 0; v < kVecsPerBlock; ++v) {
      const float* lane = from + v * kLanes;
      const Vec first = load(lane);
      Vec sum[2] = {}, square[2] = {};
      std::int64_t r = 0;
      for (; r + 2 <= n; r += 2, lane += 2 * kBlock) {
        PFNAS_UNROLL for (int u = 0; u < 2; ++u) {
          const Vec value = load(lane + u * kBlock) - first;
          sum[u] += value;
          square[u] += value * value;
        }
      }
      if (r < n) {
        const Vec value = load(lane) - first;
        sum[0] += value;
        square[0] += value * value;
      }
      store(sums + v * kLanes, sum[0] + sum[1]);
      store(squares + v * kLanes, square[0] + square[1]);
    }
    double mean[kBlock], deviation[kBlock];
    const double inverse = 1.0 / static_cast<double>(n);
    for (int c = 0; c < kBlock; ++c) {
      const double sum = sums[c];
      mean[c] = from[c] + sum * inverse;
      deviation[c] = squares[c] - sum * sum * inverse;
    }
    join_moments(into, count, mean, deviation, n);
    count += n;
  }
}

// Two sums per channel of one block in float64: of g, and of g times the normalised value.
struct GradientSums {
  double* plain;
  double* normalised;

  GradientSums at(std::int64_t channel) const { return {plain + channel, normalised + channel}; }
};

static inline GradientSums take_sums(Carver& memory, std::int64_t count) {
  double* data = memory.take_doubles(2 * count);
  return {data, data == nullptr ? nullptr : data + count};
}

static PFNAS_INLINE void add_lanes(double* into, const Vec (&sums)[kVecsPerBlock]) {
  float lanes[kBlock];
  PFNAS_UNROLL for (int v = 0; v < kVecsPerBlock; ++v) store(lanes + v * kLanes, sums[v]);
  for (int c = 0; c < kBlock; ++c) into[c] += lanes[c];
}

// The gradient through a batch normalisation is linear in the gradient and the input:
// scale * (g - S1 / M - xhat S2 / M) = scale * g + slope * (x - mean) + offset.
struct NormGradient {
  float* scale;
  float* slope;
  float* offset;

  NormGradient at(std::int64_t block) const {
    const std::int64_t i = block * kBlock;
    return {scale + i, slope + i, offset + i};
  }
};

static inline NormGradient take_norm_gradient(Carver& memory, std::int64_t blocks) {
  float* data = memory.take(3 * blocks * kBlock);
  const std::int64_t n = data == nullptr ? 0 : blocks * kBlock;
  return {data, data + n, data + 2 * n};
}

// `normalised`: whether the stage has a normalisation at all.
static inline void fold_norm_gradient(const Norm& norm, const GradientSums& sums, bool normalised,
                                      std::int64_t blocks, std::int64_t count, const NormGradient& out) {
  for (std::int64_t c = 0; c < blocks * kBlock; ++c) {
    const double scale = norm.scale[c], per_row = normalised ? scale / static_cast<double>(count) : 0.0;
    out.scale[c] = norm.scale[c];
    out.slope[c] = static_cast<float>(-per_row * norm.invstd[c] * sums.normalised[c]);
    out.offset[c] = static_cast<float>(-per_row * sums.plain[c]);
  }
}

static inline void store_norm_gradient(const GradientSums& sums, std::int64_t channels, float* grad_gamma,
                                       float* grad_beta) {
  for (std::int64_t c = 0; c < channels; ++c) {
    grad_gamma[c] = static_cast<float>(sums.normalised[c]);
    grad_beta[c] = static_cast<float>(sums.plain[c]);
  }
}

}  // namespace pfnas::PFNAS_TIER

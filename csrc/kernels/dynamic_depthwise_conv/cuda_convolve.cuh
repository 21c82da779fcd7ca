// SPDX-License-Identifier: Apache-2.0
// Depthwise convolution and its transpose. A thread owns two channels and a strip of kStrip output columns
// and walks down a band of rows: every input row is loaded once per strip, straight into registers, and added
// to the sums of all output rows that it reaches. No barrier after the taps are in shared memory, no halo in
// y; the lanes of a warp are neighbouring channel pairs, so rows of any channel count are read densely.
#pragma once

#include <type_traits>

#include "cuda/storage.h"
#include "kernels/dynamic_depthwise_conv/cuda_plan.h"

namespace pfnas::cuda {

// Whether a row is loaded while the one before is computed. Not for 7x7: registers would spill, and three
// warps computing 392 multiply-adds a row each cover the latency of a fourth one's loads.
template <int kK>
constexpr bool kPrefetch = kK < 7;

struct ConvolveParams {
  const void* in;     // [N, in_height, in_width, C]
  const float* taps;  // [k^2, row]
  void* out;          // [N, out_height, out_width, C]
  std::int64_t channels;
  int row;
  int in_height, in_width;
  int out_height, out_width;
  ConvolvePlan plan;
};

// What one thread works on.
struct StripPosition {
  bool active;
  int pair;              // within the block
  int slot;              // of its taps
  std::int64_t channel;  // of the pair's first channel
  PairAccess access;
  std::int64_t image;
  int first_row, end_row;  // of the output
  int first_column;        // of the output
};

// Shared memory serves 8-byte reads half a warp at a time. Where strips meet in the middle of one, its lanes
// would start again at pair 0, in banks that are taken; so the first pairs are stored once more behind the
// last, and every half warp reads kHalfWarp neighbouring slots.
constexpr int kHalfWarp = 16;
constexpr int kTapSlots = kMaxPairs + kHalfWarp;

PFNAS_DEVICE StripPosition locate_strip(const ConvolveParams& p) {
  StripPosition at;
  const int thread = static_cast<int>(threadIdx.x);
  const int strip_in_block = thread / p.plan.pairs;
  at.pair = thread - strip_in_block * p.plan.pairs;
  at.slot = thread / kHalfWarp * kHalfWarp % p.plan.pairs + thread % kHalfWarp;
  at.channel = 2 * (static_cast<std::int64_t>(blockIdx.y) * p.plan.pairs + at.pair);
  at.access = {p.channels % 2 == 0, at.channel + 1 < p.channels};
  const std::int64_t strip = static_cast<std::int64_t>(blockIdx.x) * p.plan.strips + strip_in_block;
  at.active = strip_in_block < p.plan.strips && strip < p.plan.num_strips && at.channel < p.channels;
  const std::int64_t band = strip / p.plan.strips_per_row;
  at.first_column = static_cast<int>(strip - band * p.plan.strips_per_row) * kStrip;
  at.image = band / p.plan.bands;
  at.first_row = static_cast<int>(band - at.image * p.plan.bands) * p.plan.band_rows;
  const int end_row = at.first_row + p.plan.band_rows;
  at.end_row = end_row < p.out_height ? end_row : p.out_height;
  return at;
}

template <int kTaps>
PFNAS_DEVICE void load_taps(const ConvolveParams& p, float2 (&taps)[kTaps][kTapSlots]) {
  const int first = static_cast<int>(blockIdx.y) * p.plan.pairs;
  for (int i = static_cast<int>(threadIdx.x); i < kTaps * kTapSlots; i += static_cast<int>(blockDim.x)) {
    const int tap = i / kTapSlots, slot = i - tap * kTapSlots;
    const int channel = 2 * (first + slot % p.plan.pairs);
    if (slot < p.plan.pairs + kHalfWarp - 1 && channel < p.row) {
      const float* source = p.taps + static_cast<std::int64_t>(tap) * p.row + channel;
      store_vector(&taps[tap][slot], load_vector<float2>(source));
    }
  }
}

// Columns first .. first + kCount - 1 of an image's row, zero outside the image. `kFrugal`: nothing is kept
// from one row to the next.
template <bool kFrugal = false, class T, int kCount>
PFNAS_DEVICE void load_columns(const T* image, std::int64_t channels, int row, int height, int first,
                               int width, PairAccess access, Pair<T> (&pixels)[kCount]) {
  const bool row_inside = row >= 0 && row < height;
  const T* base = image + (static_cast<std::int64_t>(row) * width + first) * channels;
  auto step = static_cast<std::conditional_t<kFrugal, int, std::int64_t>>(channels);
  if constexpr (kFrugal) {  // or offsets and tests of all columns stay in registers, and 7x7 spills
    forget_origin(step);
    forget_origin(first);
  }
  PFNAS_UNROLL_LOOP
  for (int i = 0; i < kCount; ++i) {
    const bool inside = row_inside && first + i >= 0 && first + i < width;
    pixels[i] = inside ? load_pair(base + i * step, access) : zero_pair<T>();
  }
}

template <class T>
PFNAS_DEVICE void store_strip(T* image, const ConvolveParams& p, const StripPosition& at, int row,
                              const float2 (&sums)[kStrip]) {
  T* base = image + (static_cast<std::int64_t>(row) * p.out_width + at.first_column) * p.channels;
  PFNAS_UNROLL_LOOP
  for (int i = 0; i < kStrip; ++i) {
    if (at.first_column + i < p.out_width) store_pair(base + i * p.channels, sums[i], at.access);
  }
}

// y[o] = sum over r, s of x[kS o + (r, s) - kK / 2] taps[r, s]. Step q brings in the kS input rows that
// follow; sums[j] belongs to output row first_row + q - j, which filter row r = kS j + e reaches from input
// row e of the step.
template <class T, int kK, int kS>
__global__ void __launch_bounds__(kThreads, 2) convolve(ConvolveParams p) {
  constexpr int kHalf = kK / 2;
  constexpr int kColumns = kS * (kStrip - 1) + kK;
  constexpr int kPending = (kK + kS - 1) / kS;
  PFNAS_SHARED(float2, taps, [kK * kK][kTapSlots]);
  load_taps(p, taps);
  __syncthreads();
  const StripPosition at = locate_strip(p);
  if (!at.active) return;

  const T* in = static_cast<const T*>(p.in) + at.image * p.in_height * p.in_width * p.channels + at.channel;
  T* out = static_cast<T*>(p.out) + at.image * p.out_height * p.out_width * p.channels + at.channel;
  const int first_in_column = at.first_column * kS - kHalf;
  const int first_in_row = at.first_row * kS - kHalf;
  const int last_needed = (at.end_row - 1) * kS + kHalf;
  const int end_in_row = last_needed < p.in_height ? last_needed + 1 : p.in_height;
  const int rows = at.end_row - at.first_row;

  float2 sums[kPending][kStrip] = {};
  Pair<T> next[kColumns];
  if (kPrefetch<kK>) {
    load_columns(in, p.channels, first_in_row, end_in_row, first_in_column, p.in_width, at.access, next);
  }
  for (int q = 0; q < rows + kPending - 1; ++q) {
    PFNAS_UNROLL_LOOP
    for (int e = 0; e < kS; ++e) {
      const int in_row = first_in_row + q * kS + e;
      if (!kPrefetch<kK>) {
        load_columns<true>(in, p.channels, in_row, end_in_row, first_in_column, p.in_width, at.access, next);
      }
      float2 x[kColumns];
      PFNAS_UNROLL_LOOP
      for (int i = 0; i < kColumns; ++i) x[i] = to_float2(next[i]);
      if (kPrefetch<kK>) {
        load_columns(in, p.channels, in_row + 1, end_in_row, first_in_column, p.in_width, at.access, next);
      }
      if (in_row < 0 || in_row >= end_in_row) continue;
      PFNAS_UNROLL_LOOP
      for (int j = 0; kS * j + e < kK; ++j) {
        if (j > q || q - j >= rows) continue;  // belongs to another band
        PFNAS_UNROLL_LOOP
        for (int s = 0; s < kK; ++s) {
          const auto tap = load_vector<float2>(&taps[(kS * j + e) * kK + s][at.slot]);
          PFNAS_UNROLL_LOOP
          for (int i = 0; i < kStrip; ++i) sums[j][i] = multiply_add(x[kS * i + s], tap, sums[j][i]);
        }
      }
    }
    if (q >= kPending - 1) store_strip(out, p, at, at.first_row + q - (kPending - 1), sums[kPending - 1]);
    PFNAS_UNROLL_LOOP
    for (int i = 0; i < kStrip; ++i) {
      PFNAS_UNROLL_LOOP
      for (int j = kPending - 1; j > 0; --j) sums[j][i] = sums[j - 1][i];
      sums[0][i] = make_float2(0.0f, 0.0f);
    }
  }
}

// The transpose of stride 2: out[i] = sum over r, s of in[(i + kK / 2 - (r, s)) / 2] taps[r, s] where that is
// whole. Input row q reaches output rows 2 q - kHalf + r; sums[r] belongs to that row, and rows 0 and 1 are
// complete after the step.
template <class T, int kK>
__global__ void __launch_bounds__(kThreads, 2) convolve_transposed(ConvolveParams p) {
  constexpr int kHalf = kK / 2;
  constexpr int kColumns = (kStrip - 1 + kHalf) / 2 + kHalf / 2 + 1;
  PFNAS_SHARED(float2, taps, [kK * kK][kTapSlots]);
  load_taps(p, taps);
  __syncthreads();
  const StripPosition at = locate_strip(p);
  if (!at.active) return;

  const T* in = static_cast<const T*>(p.in) + at.image * p.in_height * p.in_width * p.channels + at.channel;
  T* out = static_cast<T*>(p.out) + at.image * p.out_height * p.out_width * p.channels + at.channel;
  const int first_in_column = at.first_column / 2 - kHalf / 2;
  const int first_in_row = at.first_row / 2 - kHalf / 2;  // of those that reach first_row, which is even

  float2 sums[kK + 1][kStrip] = {};
  Pair<T> next[kColumns];
  load_columns(in, p.channels, first_in_row, p.in_height, first_in_column, p.in_width, at.access, next);
  for (int q = first_in_row; 2 * q - kHalf < at.end_row; ++q) {
    float2 x[kColumns];
    PFNAS_UNROLL_LOOP
    for (int i = 0; i < kColumns; ++i) x[i] = to_float2(next[i]);
    load_columns(in, p.channels, q + 1, p.in_height, first_in_column, p.in_width, at.access, next);
    if (q >= 0 && q < p.in_height) {
      PFNAS_UNROLL_LOOP
      for (int r = 0; r < kK; ++r) {
        PFNAS_UNROLL_LOOP
        for (int s = 0; s < kK; ++s) {
          const auto tap = load_vector<float2>(&taps[r * kK + s][at.slot]);
          PFNAS_UNROLL_LOOP
          for (int i = 0; i < kStrip; ++i) {
            const int twice_column = i + kHalf + 2 * (kHalf / 2) - s;  // relative to first_in_column
            if (twice_column < 0 || twice_column % 2 != 0) continue;
            sums[r][i] = multiply_add(x[twice_column / 2], tap, sums[r][i]);
          }
        }
      }
    }
    PFNAS_UNROLL_LOOP
    for (int r = 0; r < 2; ++r) {
      const int out_row = 2 * q - kHalf + r;
      if (out_row >= at.first_row && out_row < at.end_row) store_strip(out, p, at, out_row, sums[r]);
    }
    PFNAS_UNROLL_LOOP
    for (int i = 0; i < kStrip; ++i) {
      PFNAS_UNROLL_LOOP
      for (int r = 0; r < kK - 1; ++r) sums[r][i] = sums[r + 2][i];
      sums[kK - 1][i] = sums[kK][i] = make_float2(0.0f, 0.0f);
    }
  }
}

}  // namespace pfnas::cuda

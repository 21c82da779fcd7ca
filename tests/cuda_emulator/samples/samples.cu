// SPDX-License-Identifier: Apache-2.0
#include "samples.h"

#include "cuda/async_copy.h"
#include "cuda/device.h"

namespace samples {

using pfnas::cuda::Dim3;

constexpr int kTile = 32, kRowsPerPass = 8, kBlockThreads = 256;
constexpr unsigned kFullMask = 0xffffffffu;

// C = A B in tiles of 32 x 32; a thread owns four rows of one column.
__global__ void __launch_bounds__(kBlockThreads) tile_multiply_kernel(MultiplyParams p) {
  PFNAS_SHARED(float, a, [kTile * (kTile + 1)]);  // transposed
  PFNAS_SHARED(float, b, [kTile][kTile]);
  const int pitch = p.bug == Bug::kBankConflict ? kTile : kTile + 1;
  const int column = static_cast<int>(threadIdx.x) % kTile, first_row = static_cast<int>(threadIdx.x) / kTile;
  const int row0 = static_cast<int>(blockIdx.y) * kTile, column0 = static_cast<int>(blockIdx.x) * kTile;
  float sums[kTile / kRowsPerPass] = {};
  for (int k0 = 0; k0 < p.n; k0 += kTile) {
    for (int r = first_row; r < kTile; r += kRowsPerPass) {
      a[column * pitch + r] = p.a[(row0 + r) * p.n + k0 + column];
      b[r][column] = p.b[(k0 + r) * p.n + column0 + column];
    }
    __syncthreads();
    for (int k = 0; k < kTile; ++k) {
      for (int i = 0; i < kTile / kRowsPerPass; ++i) {
        sums[i] = fmaf(a[k * pitch + first_row + i * kRowsPerPass], b[k][column], sums[i]);
      }
    }
    if (p.bug != Bug::kNoBarrierBeforeOverwrite) __syncthreads();
  }
  for (int i = 0; i < kTile / kRowsPerPass; ++i) {
    p.c[(row0 + first_row + i * kRowsPerPass) * p.n + column0 + column] = sums[i];
  }
}

__device__ __forceinline__ float warp_sum(float value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullMask, value, offset);
  return value;
}

// partial[block] = sum of the block's share of x.
__global__ void __launch_bounds__(kBlockThreads) block_sum_kernel(SumParams p) {
  constexpr int kWarps = kBlockThreads / 32;
  PFNAS_SHARED(float, sums, [kWarps]);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  float sum = 0.0f;
  const int step = p.blocks * kBlockThreads;
  for (int i = static_cast<int>(blockIdx.x) * kBlockThreads + thread; i < p.count; i += step) sum += p.x[i];
  sum = warp_sum(sum);
  const bool skips = p.bug == Bug::kUninitialisedShared && warp == kWarps - 1;
  if (lane == 0 && !skips) sums[warp + (p.bug == Bug::kSharedOutOfBounds ? 1 : 0)] = sum;
  if (p.bug != Bug::kNoBarrierBetweenWarps) __syncthreads();
  if (warp > 0) return;
  sum = lane < kWarps ? sums[lane] : 0.0f;
  if (p.bug != Bug::kPartialShuffle || lane < 16) sum = warp_sum(sum);
  if (lane > 0) return;
  p.partial[blockIdx.x] = sum;
  if (p.bug == Bug::kPlainAddAcrossBlocks) *p.total += sum;
}

// y = 2 x through two buffers filled by cp.async: one warp walks over its tiles of 128.
__global__ void __launch_bounds__(32) staged_scale_kernel(ScaleParams p) {
  constexpr int kFloats = 128, kPerLane = 4;
  PFNAS_SHARED_ALIGNED(16, float, tiles, [2][kFloats]);
  const int at = static_cast<int>(threadIdx.x) * kPerLane;
  const int first = static_cast<int>(blockIdx.x) * 2 * kFloats;
  pfnas::cuda::copy_async_16(&tiles[0][at], p.x + first + at);
  pfnas::cuda::commit_copies();
  pfnas::cuda::copy_async_16(&tiles[1][at], p.x + first + kFloats + at);
  pfnas::cuda::commit_copies();
  for (int stage = 0; stage < 2; ++stage) {
    if (p.bug == Bug::kOneGroupTooFew) {
      pfnas::cuda::wait_copies<2>();
    } else if (stage == 0) {
      pfnas::cuda::wait_copies<1>();
    } else {
      pfnas::cuda::wait_copies<0>();
    }
    const int skew = p.bug == Bug::kMisalignedVector ? 1 : 0;
    float4 value = pfnas::cuda::load_vector<float4>(&tiles[stage][at > 0 ? at - skew : at]);
    value = make_float4(2 * value.x, 2 * value.y, 2 * value.z, 2 * value.w);
    float* y = p.y + first + stage * kFloats + at + (p.bug == Bug::kGlobalOffByOne ? 1 : 0);
    y[0] = value.x, y[1] = value.y, y[2] = value.z, y[3] = value.w;
  }
}

void tile_multiply(const MultiplyParams& params) {
  const auto tiles = static_cast<unsigned>(params.n / kTile);
  pfnas::cuda::launch(tile_multiply_kernel, Dim3(tiles, tiles), kBlockThreads, nullptr, params);
}

void block_sum(const SumParams& params) {
  pfnas::cuda::launch(block_sum_kernel, static_cast<unsigned>(params.blocks), kBlockThreads, nullptr, params);
}

void staged_scale(const ScaleParams& params) {
  pfnas::cuda::launch(staged_scale_kernel, static_cast<unsigned>(params.count / 256), 32, nullptr, params);
}

}  // namespace samples

// SPDX-License-Identifier: Apache-2.0
// What the backward pass needs of the forward pass under plan 'memory'.
#pragma once

#include "common/simd.h"
#include "kernels/train_mbconv/blocks.h"
#include "kernels/train_mbconv/params.h"

namespace pfnas::PFNAS_TIER {

// Working memory of `forward_again`, in floats.
std::int64_t forward_floats(const TrainMBConvParams& p);

// Writes expanded, depthwise and projected again, to the same bits, from x, moments and gate.
void forward_again(const TrainMBConvParams& p, float* memory);

// Plan 'memory': takes what is not kept for backward from the call's scratch. Under 'speed' it does nothing.
static inline void place_kept(TrainMBConvParams& p, Carver& memory) {
  if (p.keep) return;
  const std::int64_t mid = ceil_div(p.mid_channels, kBlock) * kBlock;
  p.expanded = memory.take(mid * p.in_pixels());
  p.depthwise = memory.take(mid * p.out_pixels());
  p.projected = memory.take(ceil_div(p.out_channels, kBlock) * kBlock * p.out_pixels());
}

}  // namespace pfnas::PFNAS_TIER

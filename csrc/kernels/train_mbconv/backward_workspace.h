// SPDX-License-Identifier: Apache-2.0
// What a backward call holds besides its tensors.
#pragma once

#include "common/simd.h"
#include "kernels/dynamic_depthwise_conv/filter.h"
#include "kernels/dynamic_depthwise_conv/rows.h"
#include "kernels/dynamic_depthwise_conv/steps.h"
#include "kernels/train_mbconv/blocks.h"
#include "kernels/train_mbconv/cut.h"
#include "kernels/train_mbconv/excite.h"
#include "kernels/train_mbconv/params.h"

namespace pfnas::PFNAS_TIER {

// Sums per channel and segment that the gradient through squeeze-and-excitation needs (each [Ce]); with them
// one pass suffices, because dz2 = act'(z2) (gate g + t) is linear in what is known only after the pass.
constexpr int kSegmentSums = 5;
enum SegmentSum { kGradTimesActive, kSlopeGrad, kSlope, kSlopeGradCentred, kSlopeCentred };

struct BackwardWorkspace {
  std::int64_t in_blocks, mid_blocks, out_blocks, taps;
  RowCut in_rows, out_rows;
  RowKernels tiles;
  BackwardScratch planes;
  Cut depth_cut;
  Norm norms[3];
  NormGradient gradients[3];
  GradientSums sums[3];     // [groups][channels]
  float* expand_weight;     // [Ci / 16][Ce][16]
  float* project_weight;    // [Ce / 16][Co][16]
  float* filters;           // see FilterBlocks
  float* filter_gradients;  // [groups][Ce / 16][taps][16]
  float* grad_depthwise;  // [Ce / 16][out pixels][16]: dz2, or with SE the gradient of the projection's input
  float* grad_expanded;   // [Ce / 16][in pixels][16]: dz1
  float* expand_gradients;        // [groups][Ce / 16][Ci][16]
  float* project_gradients;       // [groups][Ce / 16][Co][16]
  float* segment_sums = nullptr;  // [tiles + N][5][channels]
  ExciteGradients excitation{};

  BackwardWorkspace(const TrainMBConvParams& p, Carver& memory) {
    const DynamicDepthwiseConvParams depth = depthwise_params(p);
    in_blocks = ceil_div(p.in_channels, kBlock);
    mid_blocks = ceil_div(p.mid_channels, kBlock);
    out_blocks = ceil_div(p.out_channels, kBlock);
    taps = p.kernel_size * p.kernel_size;
    in_rows = cut_rows(p.in_pixels(), p.mid_channels);
    out_rows = cut_rows(p.out_pixels(), p.out_channels);
    tiles = select_rows(depth);
    planes = {input_planes(depth, tiles), grad_planes(depth, tiles), nullptr, nullptr};
    depth_cut = cut_depthwise(p, (p.stride * planes.x.pitch + planes.grad_y.pitch) * kBlock);
    planes.x.num_rows = min_of<std::int64_t>(p.height, (depth_cut.slab_rows - 1) * p.stride + p.kernel_size);
    planes.grad_y.num_rows = min_of<std::int64_t>(p.out_height, depth_cut.slab_rows + p.kernel_size - 1);
    planes.x.num_images = planes.grad_y.num_images = depth_cut.slab_images;
    const std::int64_t blocks[3] = {mid_blocks, mid_blocks, out_blocks};
    const std::int64_t groups[3] = {depth_cut.num_groups, out_rows.num_groups, out_rows.num_groups};
    for (int stage = 0; stage < 3; ++stage) {
      norms[stage] = take_norm(memory, blocks[stage]);
      gradients[stage] = take_norm_gradient(memory, blocks[stage]);
      sums[stage] = take_sums(memory, groups[stage] * blocks[stage] * kBlock);
    }
    expand_weight = memory.take(p.has_expand() ? in_blocks * p.mid_channels * kBlock : 0);
    project_weight = memory.take(mid_blocks * p.out_channels * kBlock);
    filters = memory.take(mid_blocks * FilterBlocks::kFloatsPerBlock);
    filter_gradients = memory.take(depth_cut.num_groups * mid_blocks * taps * kBlock);
    expand_gradients =
        memory.take(p.has_expand() ? in_rows.num_groups * mid_blocks * p.in_channels * kBlock : 0);
    project_gradients = memory.take(out_rows.num_groups * mid_blocks * p.out_channels * kBlock);
    if (p.has_se()) {
      segment_sums = memory.take(num_segments(p) * kSegmentSums * mid_blocks * kBlock);
      excitation = ExciteGradients::take(p, memory);
    }
    grad_depthwise = memory.take(mid_blocks * p.out_pixels() * kBlock);
    grad_expanded = memory.take(mid_blocks * p.in_pixels() * kBlock);
  }

  // A segment is the part of a tile that lies in one image. Tile t and image n meet in segment t + n: the
  // next one in order begins a new tile, a new image, or both (then a number stays free).
  std::int64_t num_segments(const TrainMBConvParams& p) const { return out_rows.num_tiles + p.batch; }
  float* segment(std::int64_t tile, std::int64_t image) const {
    return segment_sums + (tile + image) * kSegmentSums * mid_blocks * kBlock;
  }

  // The sums of one group of a stage.
  GradientSums group_sums(int stage, std::int64_t group) const {
    return sums[stage].at(group * (stage == kProjectStage ? out_blocks : mid_blocks) * kBlock);
  }
};

}  // namespace pfnas::PFNAS_TIER

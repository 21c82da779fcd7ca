// SPDX-License-Identifier: Apache-2.0
// Backward of a block in training mode, plan 'store'. z = normalised, before the activation; E = one pass
// over an expanded tensor.
//
//   output    read dy, p: sums of the last normalisation
//   project   read dy, p, d (1 E): dp tile by tile, its products with the weight and with the activated d;
//             write dz2 (1 E) and its sums
//   depthwise read dz2, d, e (3 E): both depthwise gradients while they are packed;
//             write dz1 (1 E) and its sums
//   expand    read dz1, e, x (2 E): de tile by tile, its products with the weight (dx) and with x
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "kernels/dynamic_depthwise_conv/filter.h"
#include "kernels/dynamic_depthwise_conv/planes.h"
#include "kernels/dynamic_depthwise_conv/rows.h"
#include "kernels/dynamic_depthwise_conv/steps.h"
#include "kernels/train_mbconv/backward_rows.h"
#include "kernels/train_mbconv/backward_workspace.h"
#include "kernels/train_mbconv/blocks.h"
#include "kernels/train_mbconv/cut.h"
#include "kernels/train_mbconv/excite.h"
#include "kernels/train_mbconv/forward.h"
#include "kernels/train_mbconv/gemm.h"
#include "kernels/train_mbconv/pack.h"
#include "kernels/train_mbconv/params.h"

namespace pfnas::PFNAS_TIER {
namespace {

using Params = TrainMBConvParams;
using Workspace = BackwardWorkspace;

// Folds the groups' sums into the first group's, and derives the gradient through the normalisation.
void finish_sums(const Params& p, const Workspace& w, int stage, std::int64_t num_groups,
                 std::int64_t count) {
  const std::int64_t blocks = stage == kProjectStage ? w.out_blocks : w.mid_blocks;
  const GradientSums& sums = w.sums[stage];
  for (std::int64_t group = 1; group < num_groups; ++group) {
    const GradientSums more = w.group_sums(stage, group);
    for (std::int64_t c = 0; c < blocks * kBlock; ++c) {
      sums.plain[c] += more.plain[c];
      sums.normalised[c] += more.normalised[c];
    }
  }
  const bool normalised = p.gamma[stage] != nullptr;
  fold_norm_gradient(w.norms[stage], sums, normalised, blocks, count, w.gradients[stage]);
  if (!normalised) return;
  const std::int64_t channels = stage == kProjectStage ? p.out_channels : p.mid_channels;
  store_norm_gradient(sums, channels, p.grad_gamma[stage], p.grad_beta[stage]);
}

void clear_sums(const GradientSums& sums, std::int64_t count) {
  clear(sums.plain, count);
  clear(sums.normalised, count);
}

void output_backward(const Params& p, const Workspace& w) {
  const RowCut& cut = w.out_rows;
  parallel_for(cut.num_groups, 8.0 * static_cast<double>(cut.rows * p.out_channels), [&](std::int64_t group) {
    const GradientSums sums = w.group_sums(kProjectStage, group);
    clear_sums(sums, w.out_blocks * kBlock);
    for (std::int64_t tile = cut.first_tile(group); tile < cut.end_tile(group); ++tile) {
      dispatch_activation(p.activation[kProjectStage], [&](auto tag) {
        sum_output_gradients<decltype(tag)::value>(p, w, cut.begin(tile), cut.count(tile), sums);
      });
    }
  });
  finish_sums(p, w, kProjectStage, cut.num_groups, cut.rows);
}

// The element-wise part of the projection's backward for one block of a tile.
void grad_activated(const Params& p, const Workspace& w, std::int64_t tile, std::int64_t block, float* grad,
                    float* active, const GradientSums& sums) {
  const std::int64_t first = w.out_rows.begin(tile), rows = w.out_rows.count(tile);
  const float* values = p.depthwise + (block * p.out_pixels() + first) * kBlock;
  const Norm norm = w.norms[kDepthStage].at(block);
  dispatch_activation(p.activation[kDepthStage], [&](auto tag) {
    constexpr Activation kActivation = decltype(tag)::value;
    if (!p.has_se()) {
      grad_activated_rows<kActivation>(values, norm, rows, grad, active, sums.at(block * kBlock));
      return;
    }
    const std::int64_t plane = p.out_height * p.out_width;
    for (std::int64_t begin = 0; begin < rows;) {
      const std::int64_t image = (first + begin) / plane;
      const std::int64_t end = min_of(rows, (image + 1) * plane - first), at = begin * kBlock;
      grad_gated_rows<kActivation>(values + at, norm, p.gate + (block * p.batch + image) * kBlock,
                                   end - begin, grad + at, active + at,
                                   w.segment(tile, image) + block * kBlock, w.mid_blocks * kBlock);
      begin = end;
    }
  });
}

void project_backward(const Params& p, const Workspace& w) {
  const RowCut& cut = w.out_rows;
  pack_straight(p.project_weight, p.out_channels, p.mid_channels, p.project_stride, w.project_weight);
  if (p.has_se()) clear(w.segment_sums, w.num_segments(p) * kSegmentSums * w.mid_blocks * kBlock);
  const std::int64_t weight_floats = w.mid_blocks * p.out_channels * kBlock;
  const double flops = 4.0 * static_cast<double>(cut.rows * p.mid_channels * p.out_channels);
  parallel_for(cut.num_groups, flops, [&](std::int64_t group) {
    const std::int64_t floats = (w.out_blocks + kMaxTileBlocks) * cut.tile * kBlock;
    float* grad_projected = thread_scratch(Scratch::kThread, static_cast<std::size_t>(floats));
    float* active = grad_projected + w.out_blocks * cut.tile * kBlock;
    float* weight_gradient = w.project_gradients + group * weight_floats;
    const GradientSums sums = w.group_sums(kDepthStage, group);
    clear_sums(sums, w.mid_blocks * kBlock);
    clear(weight_gradient, weight_floats);
    for (std::int64_t tile = cut.first_tile(group); tile < cut.end_tile(group); ++tile) {
      const std::int64_t first = cut.begin(tile), rows = cut.count(tile);
      dispatch_activation(p.activation[kProjectStage], [&](auto tag) {
        grad_projected_tile<decltype(tag)::value>(p, w, first, rows, grad_projected);
      });
      TileAhead ahead(cut, tile);
      ahead.add_rows(p.grad_y, p.out_channels);
      ahead.add_blocks(p.projected, w.out_blocks);
      ahead.add_blocks(p.depthwise, w.mid_blocks);
      ahead.add_blocks(w.grad_depthwise, w.mid_blocks);
      ahead.spread_over(static_cast<double>(2 * rows * w.mid_blocks * p.out_channels));
      for (std::int64_t block = 0; block < w.mid_blocks; block += kMaxTileBlocks) {
        const std::int64_t take = min_of<std::int64_t>(kMaxTileBlocks, w.mid_blocks - block);
        float* grad = w.grad_depthwise + (block * cut.rows + first) * kBlock;
        multiply_blocks<kBlock, Start::kZero>(
            rows, take, p.out_channels, blocks_of(grad_projected, rows),
            {w.project_weight + block * p.out_channels * kBlock, p.out_channels * kBlock},
            {grad, kBlock, cut.rows * kBlock, kBlock}, &ahead);
        for (std::int64_t b = 0; b < take; ++b) {
          grad_activated(p, w, tile, block + b, grad + b * cut.rows * kBlock, active + b * rows * kBlock,
                         sums);
        }
        for (std::int64_t o = 0; o < p.out_channels; o += kBlock) {
          multiply_blocks<1, Start::kOut>(min_of<std::int64_t>(kBlock, p.out_channels - o), take, rows,
                                          transposed_rows_of(grad_projected + o * rows, kBlock),
                                          {active, rows * kBlock},
                                          {weight_gradient + (block * p.out_channels + o) * kBlock, kBlock,
                                           p.out_channels * kBlock, kBlock},
                                          &ahead);
        }
      }
    }
  });
}

// From the segments' sums to the gate's gradient and on to the sums of the depthwise normalisation.
void excitation_backward(const Params& p, const Workspace& w) {
  const std::int64_t channels = w.mid_blocks * kBlock, plane = p.out_height * p.out_width;
  // The first segment of an image takes the sum over all of them.
  for (std::int64_t image = 0; image < p.batch; ++image) {
    const std::int64_t first = image * plane / w.out_rows.tile;
    const std::int64_t last = ((image + 1) * plane - 1) / w.out_rows.tile;
    float* sums = w.segment(first, image);
    for (std::int64_t tile = first + 1; tile <= last; ++tile) {
      const float* more = w.segment(tile, image);
      for (std::int64_t i = 0; i < kSegmentSums * channels; ++i) sums[i] += more[i];
    }
    for (std::int64_t c = 0; c < channels; ++c) {
      w.excitation.grad_gate[(c / kBlock * p.batch + image) * kBlock + c % kBlock] =
          sums[kGradTimesActive * channels + c];
    }
  }
  excite_backward(p, w.excitation);
  clear_sums(w.sums[kDepthStage], channels);
  for (std::int64_t image = 0; image < p.batch; ++image) {
    const float* sums = w.segment(image * plane / w.out_rows.tile, image);
    for (std::int64_t c = 0; c < channels; ++c) {
      const std::int64_t at = (c / kBlock * p.batch + image) * kBlock + c % kBlock;
      const double gate = p.gate[at], pixel = w.excitation.grad_pixel[at];
      w.sums[kDepthStage].plain[c] +=
          gate * sums[kSlopeGrad * channels + c] + pixel * sums[kSlope * channels + c];
      w.sums[kDepthStage].normalised[c] +=
          (gate * sums[kSlopeGradCentred * channels + c] + pixel * sums[kSlopeCentred * channels + c]) *
          w.norms[kDepthStage].invstd[c];
    }
  }
}

void pack_step(const Params& p, const Workspace& w, const DynamicDepthwiseConvParams& depth, const Step& step,
               BackwardScratch& s) {
  const std::int64_t half = p.kernel_size / 2, out_begin = max_of<std::int64_t>(0, step.begin - half),
                     out_end = min_of(p.out_height, step.end + half),
                     offset = step.block * p.out_pixels() * kBlock;
  const Norm norm = w.norms[kDepthStage].at(step.block);
  const NormGradient gradient = w.gradients[kDepthStage].at(step.block);
  if (p.has_se()) {
    const std::int64_t small = step.block * p.batch * kBlock;
    dispatch_activation(p.activation[kDepthStage], [&](auto tag) {
      pack_grad_depthwise<decltype(tag)::value, true>(
          s.grad_y, w.grad_depthwise + offset, p.depthwise + offset, step.image, step.num_images, out_begin,
          out_end, norm, gradient, p.gate + small, w.excitation.grad_pixel + small);
    });
  } else {
    pack_grad_depthwise<Activation::kNone, false>(s.grad_y, w.grad_depthwise + offset, p.depthwise + offset,
                                                  step.image, step.num_images, out_begin, out_end, norm,
                                                  gradient, nullptr, nullptr);
  }
  dispatch_activation(p.activation[kExpandStage], [&](auto tag) {
    pack_activated<decltype(tag)::value>(s.x, p.expanded + step.block * p.in_pixels() * kBlock, step.image,
                                         step.num_images, first_input_row(depth, step.begin),
                                         end_input_row(depth, step.end),
                                         w.norms[kExpandStage].at(step.block));
  });
}

void depthwise_step(const Params& p, const Workspace& w, const DynamicDepthwiseConvParams& depth,
                    const Step& step, const Step& next, float* filter_gradient, const GradientSums& sums,
                    BackwardScratch& s) {
  pack_step(p, w, depth, step, s);
  const std::int64_t half = p.kernel_size / 2;
  GradFilterJob job{};
  if (depthwise_fetches_ahead(p, true)) {
    job.ahead_x = look_ahead_in_blocks(p.expanded, p.batch, p.height, p.width, step, next, p.stride, half);
    job.ahead_grad_y =
        look_ahead_in_blocks(w.grad_depthwise, p.batch, p.out_height, p.out_width, step, next, 1, half);
  }
  grad_filter_step(depth, w.tiles, s, step, job, filter_gradient);
  float* grad = w.grad_expanded + step.block * p.in_pixels() * kBlock;
  const std::int64_t begin = step.begin * p.stride, end = min_of(p.height, step.end * p.stride);
  ConvJob conv = block_job(grad, p.height, p.width, step);
  if (depthwise_fetches_ahead(p, true)) {
    conv.ahead_in =
        look_ahead_in_blocks(p.depthwise, p.batch, p.out_height, p.out_width, step, next, 1, half);
  }
  run_conv(w.tiles.grad_input, conv, s.grad_y, w.filters + step.block * w.taps * kBlock, kBlock, begin, end);
  const float* expanded = p.expanded + step.block * p.in_pixels() * kBlock;
  for (std::int64_t image = step.image; image < step.image + step.num_images; ++image) {
    const std::int64_t at = (image * p.height + begin) * p.width * kBlock;
    dispatch_activation(p.activation[kExpandStage], [&](auto tag) {
      grad_expanded_rows<decltype(tag)::value>(expanded + at, w.norms[kExpandStage].at(step.block),
                                               (end - begin) * p.width, grad + at, sums);
    });
  }
}

void depthwise_backward(const Params& p, const Workspace& w) {
  const DynamicDepthwiseConvParams depth = depthwise_params(p);
  const FilterBlocks filters(w.filters, w.mid_blocks);
  const Derivation derivation(depth);
  derive_filters(depth, derivation, w.mid_blocks, filters);
  const Cut& cut = w.depth_cut;
  const std::int64_t group_floats = w.mid_blocks * w.taps * kBlock;
  parallel_for(cut.num_items(), 2 * conv_flops(depth), [&](std::int64_t item) {
    BackwardScratch scratch = w.planes;
    scratch.place(thread_scratch(Scratch::kThread, static_cast<std::size_t>(scratch.size())));
    const std::int64_t block = cut.first_block(item);
    float* filter_gradient = w.filter_gradients + cut.group(item) * group_floats + block * w.taps * kBlock;
    const GradientSums sums = w.group_sums(kExpandStage, cut.group(item)).at(block * kBlock);
    clear(filter_gradient, w.taps * kBlock);
    clear_sums(sums, kBlock);
    for (Step step = cut.first(item); !cut.done(item, step); step = cut.next(item, step)) {
      depthwise_step(p, w, depth, step, step_after(cut, item, step), filter_gradient, sums, scratch);
    }
  });
  for (std::int64_t group = 1; group < cut.num_groups; ++group) {
    const float* more = w.filter_gradients + group * group_floats;
    for (std::int64_t i = 0; i < group_floats; ++i) w.filter_gradients[i] += more[i];
  }
  derive_filters_backward(depth, derivation, w.mid_blocks, w.filter_gradients, filters);
  finish_sums(p, w, kExpandStage, cut.num_groups, p.in_pixels());
}

void copy_grad_x(const Params& p, const Workspace& w) {
  if (p.grad_x == nullptr) return;
  const RowCut& cut = w.in_rows;
  parallel_for(cut.num_tiles, 2.0 * static_cast<double>(cut.rows * p.in_channels), [&](std::int64_t tile) {
    store_grad_x(p, cut.begin(tile), cut.count(tile), w.grad_expanded + cut.begin(tile) * kBlock,
                 cut.rows * kBlock);
  });
}

void expand_backward(const Params& p, const Workspace& w) {
  if (!p.has_expand()) return copy_grad_x(p, w);
  const RowCut& cut = w.in_rows;
  pack_straight(p.expand_weight, p.mid_channels, p.in_channels, p.expand_stride, w.expand_weight);
  const std::int64_t weight_floats = w.mid_blocks * p.in_channels * kBlock;
  const double flops = 4.0 * static_cast<double>(cut.rows * p.mid_channels * p.in_channels);
  parallel_for(cut.num_groups, flops, [&](std::int64_t group) {
    const std::int64_t floats = (w.mid_blocks + w.in_blocks) * cut.tile * kBlock;
    float* grad = thread_scratch(Scratch::kThread, static_cast<std::size_t>(floats));
    float* grad_x = grad + w.mid_blocks * cut.tile * kBlock;
    float* weight_gradient = w.expand_gradients + group * weight_floats;
    clear(weight_gradient, weight_floats);
    for (std::int64_t tile = cut.first_tile(group); tile < cut.end_tile(group); ++tile) {
      const std::int64_t first = cut.begin(tile), rows = cut.count(tile);
      grad_expansion_tile(p, w, first, rows, grad);
      TileAhead ahead(cut, tile);
      ahead.add_blocks(p.expanded, w.mid_blocks);
      ahead.add_blocks(w.grad_expanded, w.mid_blocks);
      ahead.add_rows(p.x, p.in_channels);
      if (p.residual && p.grad_x != nullptr) ahead.add_rows(p.grad_y, p.in_channels);
      if (p.grad_x != nullptr) ahead.add_rows(p.grad_x, p.in_channels);
      ahead.spread_over(static_cast<double>(rows * w.mid_blocks * (p.in_channels + w.in_blocks * kBlock)));
      multiply_blocks<1, Start::kOut>(
          p.in_channels, w.mid_blocks, rows, transposed_rows_of(p.x + first * p.in_channels, p.in_channels),
          {grad, rows * kBlock}, {weight_gradient, kBlock, p.in_channels * kBlock, kBlock}, &ahead);
      if (p.grad_x == nullptr) continue;
      multiply_blocks<kBlock, Start::kZero>(rows, w.in_blocks, p.mid_channels, blocks_of(grad, rows),
                                            {w.expand_weight, p.mid_channels * kBlock},
                                            {grad_x, kBlock, rows * kBlock, kBlock}, &ahead);
      store_grad_x(p, first, rows, grad_x, rows * kBlock);
    }
  });
}

// Folds the groups' weight gradients, [groups][Ce / 16][columns][16], and writes them as the weights lie.
void fold_weight_gradients(const Params& p, const Workspace& w, float* partial, std::int64_t num_groups,
                           std::int64_t columns, float* grad, std::int64_t mid_stride,
                           std::int64_t column_stride) {
  const std::int64_t block_floats = columns * kBlock, group_floats = w.mid_blocks * block_floats;
  parallel_for(w.mid_blocks, static_cast<double>(num_groups * group_floats), [&](std::int64_t block) {
    float* sums = partial + block * block_floats;
    for (std::int64_t group = 1; group < num_groups; ++group) {
      const float* more = sums + group * group_floats;
      for (std::int64_t i = 0; i < block_floats; ++i) sums[i] += more[i];
    }
    const std::int64_t lanes = min_of<std::int64_t>(kBlock, p.mid_channels - block * kBlock);
    for (std::int64_t k = 0; k < columns; ++k) {
      float* to = grad + block * kBlock * mid_stride + k * column_stride;
      for (std::int64_t lane = 0; lane < lanes; ++lane) to[lane * mid_stride] = sums[k * kBlock + lane];
    }
  });
}

}  // namespace

void train_mbconv_backward(const TrainMBConvParams& given) {
  Params p = given;
  Carver size;
  const Workspace measured(p, size);
  place_kept(p, size);
  float* again = size.take(p.keep ? 0 : forward_floats(p));
  Carver memory{thread_scratch(Scratch::kCall, static_cast<std::size_t>(size.used))};
  const Workspace w(p, memory);
  place_kept(p, memory);
  again = memory.take(p.keep ? 0 : forward_floats(p));
  if (!p.keep) forward_again(p, again);
  for (int stage = 0; stage < 3; ++stage) load_norm(p, stage, w.norms[stage]);
  output_backward(p, w);
  project_backward(p, w);
  if (p.has_se()) {
    excitation_backward(p, w);
    finish_sums(p, w, kDepthStage, 1, w.out_rows.rows);
  } else {
    finish_sums(p, w, kDepthStage, w.out_rows.num_groups, w.out_rows.rows);
  }
  depthwise_backward(p, w);
  expand_backward(p, w);
  fold_weight_gradients(p, w, w.project_gradients, w.out_rows.num_groups, p.out_channels, p.grad_project, 1,
                        p.project_stride);
  if (p.has_expand()) {
    fold_weight_gradients(p, w, w.expand_gradients, w.in_rows.num_groups, p.in_channels, p.grad_expand,
                          p.expand_stride, 1);
  }
}

}  // namespace pfnas::PFNAS_TIER

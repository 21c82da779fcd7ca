// SPDX-License-Identifier: Apache-2.0
// Forward of a block in training mode, plan 'store': each normalisation needs the moments of a whole tensor,
// so there are as many passes as normalisations. E = one pass over an expanded tensor.
//
//   expand    read x, write e (1 E) and its moments
//   depthwise read e (1 E), normalise and activate while packing, write d (1 E) and its moments
//   excite    read d (1 E), pool, two small products (only with squeeze-and-excitation)
//   project   read d (1 E), normalise, activate and gate tile by tile, write p and its moments
//   finish    read p, normalise, activate, add x, write y
//
// Plan 'memory' keeps neither e, d nor p: they live in scratch, and backward runs the first passes again with
// the moments that forward returned, to the same bits.
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "kernels/dynamic_depthwise_conv/filter.h"
#include "kernels/dynamic_depthwise_conv/planes.h"
#include "kernels/dynamic_depthwise_conv/rows.h"
#include "kernels/dynamic_depthwise_conv/steps.h"
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

// Everything a call holds besides its tensors.
struct Workspace {
  std::int64_t mid_blocks, out_blocks;
  RowCut in_rows, out_rows;
  RowKernels tiles;
  Planes planes;
  Cut depth_cut;
  Norm norms[3];
  float *expand_weight, *project_weight, *filters, *excitation;
  Moments moments;     // [most groups][channels]
  bool again = false;  // for backward: the moments are there already

  Workspace(const Params& p, Carver& memory) {
    const DynamicDepthwiseConvParams depth = depthwise_params(p);
    mid_blocks = ceil_div(p.mid_channels, kBlock);
    out_blocks = ceil_div(p.out_channels, kBlock);
    in_rows = cut_rows(p.in_pixels(), p.in_channels);
    out_rows = cut_rows(p.out_pixels(), p.mid_channels);
    tiles = select_rows(depth);
    planes = input_planes(depth, tiles);
    depth_cut = cut_depthwise(p, p.stride * planes.pitch * kBlock);
    planes.num_rows = min_of<std::int64_t>(p.height, (depth_cut.slab_rows - 1) * p.stride + p.kernel_size);
    planes.num_images = depth_cut.slab_images;
    norms[kExpandStage] = take_norm(memory, mid_blocks);
    norms[kDepthStage] = take_norm(memory, mid_blocks);
    norms[kProjectStage] = take_norm(memory, out_blocks);
    expand_weight = memory.take(p.has_expand() ? mid_blocks * p.in_channels * kBlock : 0);
    project_weight = memory.take(out_blocks * p.mid_channels * kBlock);
    filters = memory.take(mid_blocks * FilterBlocks::kFloatsPerBlock);
    excitation = memory.take(p.has_se() ? excite_floats(p) : 0);
    const std::int64_t groups = max_of(max_of(in_rows.num_groups, out_rows.num_groups), depth_cut.num_groups);
    const std::int64_t channels = max_of(mid_blocks, out_blocks) * kBlock;
    moments = {memory.take_doubles(groups * channels), memory.take_doubles(groups * channels)};
  }
};

// Folds the groups' moments into the first group's, writes them out and derives the normalisation.
void finish_moments(const Params& p, int stage, std::int64_t channels, std::int64_t blocks,
                    std::int64_t num_groups, const std::int64_t* counts, const Moments& moments,
                    const Norm& norm) {
  std::int64_t count = counts[0];
  for (std::int64_t group = 1; group < num_groups; ++group) {
    for (std::int64_t c = 0; c < blocks * kBlock; c += kBlock) {
      const std::int64_t from = group * blocks * kBlock + c;
      join_moments({moments.mean + c, moments.deviation + c}, count, moments.mean + from,
                   moments.deviation + from, counts[group]);
    }
    count += counts[group];
  }
  const std::int64_t total = 2 * p.mid_channels + p.out_channels;
  float* out = p.moments + stage * p.mid_channels;
  for (std::int64_t c = 0; c < channels; ++c) {
    const double deviation = moments.deviation[c] < 0 ? 0.0 : moments.deviation[c];
    const double variance = deviation / static_cast<double>(count);
    norm.mean[c] = out[c] = static_cast<float>(moments.mean[c]);
    out[total + c] = static_cast<float>(deviation / static_cast<double>(count - 1));
    norm.invstd[c] = out[2 * total + c] = static_cast<float>(1.0 / __builtin_sqrt(variance + p.eps[stage]));
  }
  fold_norm(p.gamma[stage], p.beta[stage], channels, blocks, norm);
}

// The normalisation of a stage, from the groups' moments or from those that an earlier call returned.
void finish_stage(const Params& p, const Workspace& w, int stage, std::int64_t num_groups,
                  const std::int64_t* counts) {
  const std::int64_t channels = stage == kProjectStage ? p.out_channels : p.mid_channels;
  const std::int64_t blocks = ceil_div(channels, kBlock);
  if (p.gamma[stage] == nullptr && !w.again) {
    const std::int64_t total = 2 * p.mid_channels + p.out_channels;
    for (std::int64_t c = 0; c < channels; ++c) {
      for (int row = 0; row < 3; ++row) {
        p.moments[row * total + stage * p.mid_channels + c] = __builtin_nanf("");
      }
    }
  }
  if (w.again || p.gamma[stage] == nullptr) return load_norm(p, stage, w.norms[stage]);
  finish_moments(p, stage, channels, blocks, num_groups, counts, w.moments, w.norms[stage]);
}

constexpr int kMaxGroups = 64;

void count_rows(const RowCut& cut, std::int64_t (&counts)[kMaxGroups]) {
  for (std::int64_t g = 0; g < cut.num_groups; ++g) counts[g] = cut.group_rows(g);
}

// Where a group gathers the moments of `count` channels; `first` counts channels over all groups.
Moments cleared_moments(const Workspace& w, std::int64_t first, std::int64_t count) {
  const Moments moments{w.moments.mean + first, w.moments.deviation + first};
  clear(moments.mean, count);
  clear(moments.deviation, count);
  return moments;
}

// Without expansion: x moves into blocks as it is.
void copy_to_blocks(const Params& p, const Workspace& w) {
  const RowCut& cut = w.in_rows;
  parallel_for(cut.num_groups, static_cast<double>(cut.rows * p.in_channels), [&](std::int64_t group) {
    const std::int64_t begin = cut.begin(cut.first_tile(group)), end = begin + cut.group_rows(group);
    for (std::int64_t block = 0; block < w.mid_blocks; ++block) {
      const std::int64_t at = block * cut.rows + begin;
      for (int v = 0; v < kVecsPerBlock; ++v) {
        const int lanes = lanes_of(p.in_channels, block, v);
        float* to = p.expanded + at * kBlock + v * kLanes;
        const float* from = p.x + begin * p.in_channels + block * kBlock + v * kLanes;
        for (std::int64_t r = begin; r < end; ++r, to += kBlock, from += p.in_channels) {
          store(to, lanes == 0 ? Vec{} : load_up_to(from, lanes));
        }
      }
    }
  });
  finish_stage(p, w, kExpandStage, 0, nullptr);
}

void expand(const Params& p, const Workspace& w) {
  if (!p.has_expand()) return copy_to_blocks(p, w);
  const RowCut& cut = w.in_rows;
  pack_transposed(p.expand_weight, p.mid_channels, p.in_channels, p.expand_stride, w.expand_weight);
  const double flops = 2.0 * static_cast<double>(cut.rows * p.in_channels * p.mid_channels);
  std::int64_t counts[kMaxGroups];
  count_rows(cut, counts);
  const std::int64_t channels = w.mid_blocks * kBlock;
  parallel_for(cut.num_groups, flops, [&](std::int64_t group) {
    const Moments moments = cleared_moments(w, group * channels, channels);
    std::int64_t count = 0;
    for (std::int64_t tile = cut.first_tile(group); tile < cut.end_tile(group); ++tile) {
      const std::int64_t first = cut.begin(tile), rows = cut.count(tile);
      const LeftMatrix x = rows_of(p.x + first * p.in_channels, p.in_channels);
      TileAhead ahead(cut, tile);
      ahead.add_rows(p.x, p.in_channels);
      ahead.add_blocks(p.expanded, w.mid_blocks);
      ahead.spread_over(static_cast<double>(rows * w.mid_blocks * p.in_channels));
      for (std::int64_t block = 0; block < w.mid_blocks; block += kMaxTileBlocks) {
        const std::int64_t take = min_of<std::int64_t>(kMaxTileBlocks, w.mid_blocks - block);
        float* out = p.expanded + (block * cut.rows + first) * kBlock;
        multiply_blocks<0, Start::kZero>(
            rows, take, p.in_channels, x,
            {w.expand_weight + block * p.in_channels * kBlock, p.in_channels * kBlock},
            {out, kBlock, cut.rows * kBlock, kBlock}, &ahead);
        for (std::int64_t b = 0; b < take && !w.again; ++b) {
          const std::int64_t c = (block + b) * kBlock;
          add_moments({moments.mean + c, moments.deviation + c}, count, out + b * cut.rows * kBlock, rows);
        }
      }
      count += rows;
    }
  });
  finish_stage(p, w, kExpandStage, cut.num_groups, counts);
}

void depthwise_step(const Params& p, const Workspace& w, const DynamicDepthwiseConvParams& depth,
                    const Step& step, const Step& next, Planes& planes) {
  const float* in = p.expanded + step.block * p.in_pixels() * kBlock;
  float* out = p.depthwise + step.block * p.out_pixels() * kBlock;
  const Norm norm = w.norms[kExpandStage].at(step.block);
  const std::int64_t begin = first_input_row(depth, step.begin), end = end_input_row(depth, step.end);
  dispatch_activation(p.activation[kExpandStage], [&](auto tag) {
    pack_activated<decltype(tag)::value>(planes, in, step.image, step.num_images, begin, end, norm);
  });
  ConvJob job = block_job(out, p.out_height, p.out_width, step);
  if (depthwise_fetches_ahead(p, false)) {
    job.ahead_in =
        look_ahead_in_blocks(p.expanded, p.batch, p.height, p.width, step, next, p.stride, p.kernel_size / 2);
  }
  run_conv(w.tiles.forward, job, planes, w.filters + step.block * p.kernel_size * p.kernel_size * kBlock,
           kBlock, step.begin, step.end);
}

void depthwise(const Params& p, const Workspace& w) {
  const DynamicDepthwiseConvParams depth = depthwise_params(p);
  const FilterBlocks filters(w.filters, w.mid_blocks);
  const Derivation derivation(depth);
  derive_filters(depth, derivation, w.mid_blocks, filters);
  const Cut& cut = w.depth_cut;
  const std::int64_t channels = w.mid_blocks * kBlock, plane = p.out_height * p.out_width;
  std::int64_t counts[kMaxGroups];
  for (std::int64_t g = 0; g < cut.num_groups; ++g) {
    counts[g] = (cut.end_image(g * cut.num_ranges) - cut.first_image(g * cut.num_ranges)) * plane;
  }
  parallel_for(cut.num_items(), conv_flops(depth), [&](std::int64_t item) {
    Planes planes = w.planes;
    planes.data = thread_scratch(Scratch::kThread, static_cast<std::size_t>(planes.size()));
    planes.clear_borders();
    const std::int64_t c = cut.group(item) * channels + cut.first_block(item) * kBlock;
    const Moments moments = cleared_moments(w, c, kBlock);
    std::int64_t count = 0;
    for (Step step = cut.first(item); !cut.done(item, step); step = cut.next(item, step)) {
      depthwise_step(p, w, depth, step, step_after(cut, item, step), planes);
      if (w.again || !p.has_depth_norm()) continue;
      const float* written =
          p.depthwise +
          (step.block * p.out_pixels() + step.image * plane + step.begin * p.out_width) * kBlock;
      const std::int64_t rows = step.num_images * (step.end - step.begin) * p.out_width;
      add_moments(moments, count, written, rows);
      count += rows;
    }
  });
  finish_stage(p, w, kDepthStage, cut.num_groups, counts);
}

void project(const Params& p, const Workspace& w) {
  const RowCut& cut = w.out_rows;
  pack_transposed(p.project_weight, p.out_channels, p.mid_channels, p.project_stride, w.project_weight);
  const double flops = 2.0 * static_cast<double>(cut.rows * p.mid_channels * p.out_channels);
  std::int64_t counts[kMaxGroups];
  count_rows(cut, counts);
  const std::int64_t channels = w.out_blocks * kBlock;
  parallel_for(cut.num_groups, flops, [&](std::int64_t group) {
    float* activated =
        thread_scratch(Scratch::kThread, static_cast<std::size_t>(w.mid_blocks * cut.tile * kBlock));
    const Moments moments = cleared_moments(w, group * channels, channels);
    std::int64_t count = 0;
    for (std::int64_t tile = cut.first_tile(group); tile < cut.end_tile(group); ++tile) {
      const std::int64_t first = cut.begin(tile), rows = cut.count(tile);
      dispatch_activation(p.activation[kDepthStage], [&](auto tag) {
        activate_tile<decltype(tag)::value>(p, w.norms[kDepthStage], first, rows, activated);
      });
      float* out = p.projected + first * kBlock;
      TileAhead ahead(cut, tile);
      ahead.add_blocks(p.depthwise, w.mid_blocks);
      ahead.add_blocks(p.projected, w.out_blocks);
      ahead.spread_over(static_cast<double>(rows * w.out_blocks * p.mid_channels));
      multiply_blocks<kBlock, Start::kZero>(rows, w.out_blocks, p.mid_channels, blocks_of(activated, rows),
                                            {w.project_weight, p.mid_channels * kBlock},
                                            {out, kBlock, cut.rows * kBlock, kBlock}, &ahead);
      for (std::int64_t b = 0; b < w.out_blocks && !w.again; ++b) {
        add_moments({moments.mean + b * kBlock, moments.deviation + b * kBlock}, count,
                    out + b * cut.rows * kBlock, rows);
      }
      count += rows;
    }
  });
  finish_stage(p, w, kProjectStage, cut.num_groups, counts);
}

template <Activation kActivation>
void finish_rows(const Params& p, const Workspace& w, std::int64_t begin, std::int64_t rows) {
  const std::int64_t stride = p.out_channels;
  for (std::int64_t block = 0; block < w.out_blocks; ++block) {
    const Norm norm = w.norms[kProjectStage].at(block);
    const float* from = p.projected + (block * p.out_pixels() + begin) * kBlock;
    float* to = p.y + begin * stride + block * kBlock;
    const float* add = p.residual ? p.x + begin * stride + block * kBlock : nullptr;
    const std::int64_t channels = min_of<std::int64_t>(kBlock, p.out_channels - block * kBlock);
    for (int v = 0; v * kLanes < channels; ++v) {
      const int lanes = static_cast<int>(min_of<std::int64_t>(kLanes, channels - v * kLanes));
      const Vec scale = load(norm.scale + v * kLanes), shift = load(norm.shift + v * kLanes);
      for (std::int64_t r = 0; r < rows; ++r) {
        Vec value = activate<kActivation>(load(from + r * kBlock + v * kLanes) * scale + shift);
        const std::int64_t at = r * stride + v * kLanes;
        if (lanes == kLanes) {
          if (add != nullptr) value += load(add + at);
          store(to + at, value);
        } else {
          if (add != nullptr) value += load_lanes(add + at, lanes);
          store_lanes(to + at, value, lanes);
        }
      }
    }
  }
}

void finish(const Params& p, const Workspace& w) {
  const RowCut& cut = w.out_rows;
  parallel_for(cut.num_tiles, 4.0 * static_cast<double>(cut.rows * p.out_channels), [&](std::int64_t tile) {
    dispatch_activation(p.activation[kProjectStage], [&](auto tag) {
      finish_rows<decltype(tag)::value>(p, w, cut.begin(tile), cut.count(tile));
    });
  });
}

}  // namespace

std::int64_t forward_floats(const TrainMBConvParams& p) {
  Carver size;
  const Workspace measured(p, size);
  return size.used;
}

void forward_again(const TrainMBConvParams& p, float* memory) {
  Carver carver{memory};
  Workspace w(p, carver);
  w.again = true;
  expand(p, w);
  depthwise(p, w);
  project(p, w);
}

void train_mbconv_forward(const TrainMBConvParams& given) {
  Params p = given;
  Carver size;
  const Workspace measured(p, size);
  place_kept(p, size);
  Carver memory{thread_scratch(Scratch::kCall, static_cast<std::size_t>(size.used))};
  const Workspace w(p, memory);
  place_kept(p, memory);
  expand(p, w);
  depthwise(p, w);
  if (p.has_se()) {
    excite(p, w.norms[kDepthStage], w.excitation);
  }
  project(p, w);
  finish(p, w);
}

}  // namespace pfnas::PFNAS_TIER

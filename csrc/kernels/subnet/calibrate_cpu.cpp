// SPDX-License-Identifier: Apache-2.0
// One path on one batch, each layer normalised with the moments of the batch: what recalibration needs. Every
// normalisation waits for its whole input, so layers run one after another over all images:
//
//   stem | expand: moments only | expand again, depthwise: d and its moments | from d: activate, excite,
//   project: moments | normalise, activate, add the input | ... laterals, head or feature
//
// Of an expanded tensor only d is written (1 write, 1 read); the first expansion is recomputed, which costs
// less than a round trip through memory. Nothing behind the last normalisation runs.
#include "common/parallel.h"
#include "common/scratch.h"
#include "kernels/fused_mbconv/block_steps.h"
#include "kernels/subnet/arena.h"
#include "kernels/subnet/moments.h"
#include "kernels/subnet/params.h"

namespace pfnas::PFNAS_TIER {
namespace {

constexpr std::int64_t kPixelsPerItem = 2048;  // of a pass over a thin tensor
constexpr std::int64_t kPixelsPerStep = 96;    // activated, projected and summed while in L2

// What all layers share.
struct Run {
  const SubnetParams& p;
  const CalibrationParams& call;
  MomentTable table;
  float* depth;  // [N, Ho, Wo, mid padded to 48] of the block that runs

  MomentTable moments_of(std::int64_t channels) const { return {table.data, channels}; }
};

struct Sizes {
  std::int64_t depth = 0;        // floats
  std::int64_t items = 0;        // of a layer, at most
  std::int64_t channels = 0;     // of a normalisation, at most
  std::int64_t feature = 0;      // floats
  std::int64_t stem_affine = 0;  // floats

  void add_block(const FusedMBConvParams& block, std::int64_t batch, Map out) {
    depth = max_of(depth, batch * out.pixels() * round_up(block.mid_channels, kPanelWidth));
    channels = max_of(channels, round_up(max_of(block.mid_channels, block.out_channels), kPanelWidth));
  }

  Sizes(const SubnetParams& p, const Layout& layout) {
    Map map = Map{p.height, p.width}.strided(2);
    items = max_of(p.batch, ceil_div(p.batch * map.pixels(), kPixelsPerItem));
    channels = round_up(max_of(p.stem.out_channels, p.neck_channels), kPanelWidth);
    stem_affine = 2 * round_up(p.stem.out_channels, kPanelWidth);
    for (int b = 0; b < p.num_blocks; ++b) {
      map = map.strided(p.blocks[b].block.stride);
      add_block(p.blocks[b].block, p.batch, map);
    }
    for (int level = 0; level < p.num_levels; ++level) {
      for (int conv = 0; conv < p.num_convs; ++conv) {
        add_block(p.convs[conv * p.num_levels + level].block, p.batch, layout.taps[level]);
      }
    }
    if (p.num_levels == 0) {
      channels = max_of(channels, round_up(p.feature.out_channels, kPanelWidth));
      feature = p.batch * layout.last.pixels() * p.feature.out_channels;
    }
  }
  std::int64_t table_floats() const { return 2 * items * 2 * channels; }  // doubles
};

// Joins the items of a layer and sets the normalisation that `affine` belongs to. `counts(i)`: pixels of item
// i.
template <class Counts>
void finish(const Run& run, const Affine& affine, std::int64_t channels, std::int64_t num_items,
            const Counts& counts) {
  CalibratedNorm* norm = run.call.norms;
  while (norm->scale != affine.scale) ++norm;  // the affines of a subnet are those of its norms
  const MomentTable table = run.moments_of(channels);
  const ItemMoments all = table.item(0);
  std::int64_t count = counts(0);
  for (std::int64_t i = 1; i < num_items; ++i) {
    const ItemMoments item = table.item(i);
    for (std::int64_t c = 0; c < channels; ++c) {
      all.join(c, count, item.mean[c], item.deviation[c], counts(i));
    }
    count += counts(i);
  }
  norm->count = count;
  norm->measured_channels = min_of(channels, norm->channels);
  for (std::int64_t c = 0; c < norm->measured_channels; ++c) {
    const double deviation = all.deviation[c] < 0 ? 0.0 : all.deviation[c];
    const double variance = deviation / static_cast<double>(count);
    const double scale = norm->gamma[c] / __builtin_sqrt(variance + static_cast<double>(norm->eps));
    norm->mean[c] = static_cast<float>(all.mean[c]);
    norm->unbiased_var[c] = static_cast<float>(deviation / static_cast<double>(count - 1));
    norm->scale[c] = static_cast<float>(scale);
    norm->shift[c] = static_cast<float>(norm->beta[c] - all.mean[c] * scale);
  }
}

// y = act(y * scale + shift + residual) in place; pixels of y are `channels` floats, a multiple of 16.
void normalize(const Affine& affine, Activation activation, std::int64_t num_pixels, std::int64_t channels,
               float* y, const float* residual, std::int64_t residual_stride, const std::int32_t* rows) {
  dispatch_activation(activation, [&](auto tag) {
    const double flops = 8.0 * static_cast<double>(num_pixels * channels);
    parallel_for(ceil_div(num_pixels, kPixelsPerItem), flops, [&](std::int64_t item) {
      const std::int64_t end = min_of(num_pixels, (item + 1) * kPixelsPerItem);
      for (std::int64_t m = item * kPixelsPerItem; m < end; ++m) {
        float* pixel = y + m * channels;
        const float* add =
            residual == nullptr ? nullptr : residual + (rows == nullptr ? m : rows[m]) * residual_stride;
        for (std::int64_t c = 0; c < channels; c += kLanes) {
          Vec value = load(pixel + c) * load(affine.scale + c) + load(affine.shift + c);
          if (add != nullptr) value += load(add + c);
          store(pixel + c, activate<decltype(tag)::value>(value));
        }
      }
    });
  });
}

// Moments of a thin tensor [num_pixels][channels].
void measure(const Run& run, const Affine& affine, std::int64_t num_pixels, std::int64_t channels,
             const float* y) {
  const MomentTable table = run.moments_of(channels);
  const auto count = [&](std::int64_t i) { return min_of(kPixelsPerItem, num_pixels - i * kPixelsPerItem); };
  const std::int64_t num_items = ceil_div(num_pixels, kPixelsPerItem);
  parallel_for(num_items, 3.0 * static_cast<double>(num_pixels * channels), [&](std::int64_t item) {
    add_pixels(table.item(item), 0, channels, 0, y + item * kPixelsPerItem * channels, channels, count(item));
  });
  finish(run, affine, channels, num_items, count);
}

void calibrate_stem(const Run& run, float* ones, float* y) {
  SubnetParams p = run.p;
  const std::int64_t channels = p.stem.out_channels;
  for (std::int64_t c = 0; c < channels; ++c) {
    ones[c] = 1.0f;
    ones[channels + c] = 0.0f;
  }
  p.stem.affine = {ones, ones + channels};
  p.stem.activation = Activation::kNone;
  const std::int64_t pixels = Map{p.height, p.width}.strided(2).pixels();
  const MomentTable table = run.moments_of(channels);
  const double flops = 2.0 * kStemTaps * static_cast<double>(p.batch * pixels * channels);
  parallel_for(p.batch, flops, [&](std::int64_t image) {
    float* out = y + image * pixels * channels;
    run_stem(p, image, 1, out);
    add_pixels(table.item(image), 0, channels, 0, out, channels, pixels);
  });
  finish(run, run.p.stem.affine, channels, p.batch, [&](std::int64_t) { return pixels; });
  normalize(run.p.stem.affine, run.p.stem.activation, p.batch * pixels, channels, y, nullptr, 0, nullptr);
}

// Moments of the expanded tensor of some images; nothing of it is stored.
void measure_expansion(const Work& work, const ItemMoments& moments) {
  const FusedMBConvParams& p = work.p;
  const std::int64_t num_pixels = work.num_images * p.height * p.width;
  const float* x = work.x(0);
  alignas(64) float pivot[kPanelWidth], sums[kPanelWidth], squares[kPanelWidth];
  for (std::int64_t index = 0; index < num_panels(p.mid_channels); ++index) {
    const Panel panel = make_panel(p, index);
    const float* weights = p.expand_panels + index * p.max_in_channels * kPanelWidth;
    for (std::int64_t begin = 0; begin < num_pixels; begin += kPixelsPerSum) {
      const std::int64_t n = min_of(kPixelsPerSum, num_pixels - begin);
      const PixelRows rows{x + begin * p.x_stride, p.x_stride};
      pointwise_panel(rows, 1, weights, p.in_channels, panel.vecs, PivotSink{pivot});
      for (int c = 0; c < kPanelWidth; ++c) sums[c] = squares[c] = 0.0f;
      pointwise_panel(rows, n, weights, p.in_channels, panel.vecs, MomentSink{pivot, sums, squares});
      moments.join_sums(panel.first, panel.width, begin, pivot, sums, squares, n);
    }
  }
}

// d of some images before its normalisation, with its moments.
void convolve(const Work& work, float* depth, const ItemMoments& moments) {
  const FusedMBConvParams& p = work.p;
  const BlockPlan& plan = work.plan;
  const std::int64_t image_pixels = p.out_height * p.out_width;
  for (std::int64_t index = 0; index < num_panels(p.mid_channels); ++index) {
    const Panel panel = make_panel(p, index);
    std::int64_t expanded = 0, count = 0;
    for (std::int64_t begin = 0; begin < p.out_height; begin += plan.chunk_rows) {
      const std::int64_t end = min_of(p.out_height, begin + plan.chunk_rows);
      const std::int64_t needed = min_of(p.height, (end - 1) * p.stride - p.kernel_size / 2 + p.kernel_size);
      expand(work, panel, expanded, needed);
      expanded = max_of(expanded, needed);
      float* out = depth + begin * p.out_width * plan.depth_stride + panel.first;
      depthwise(work, panel, begin, end, out, image_pixels * plan.depth_stride);
      for (std::int64_t image = 0; image < work.num_images; ++image) {
        const std::int64_t pixels = (end - begin) * p.out_width;
        add_pixels(moments, panel.first, panel.width, count, out + image * image_pixels * plan.depth_stride,
                   plan.depth_stride, pixels);
        count += pixels;
      }
    }
  }
}

// Pixels [begin, end) of d, counted from `depth`: normalised and activated in place; `pool` may be null.
void activate_depth(const FusedMBConvParams& p, std::int64_t stride, float* depth, std::int64_t begin,
                    std::int64_t end, float* pool) {
  dispatch_activation(p.depth_activation, [&](auto tag) {
    for (std::int64_t c = 0; c < p.mid_channels; c += kLanes) {
      const AffineVec affine = load_affine(p.depth_affine.scale, p.depth_affine.shift, c, p.mid_channels);
      Vec total{};
      for (std::int64_t m = begin; m < end; ++m) {
        float* at = depth + m * stride + c;
        const Vec value = activate<decltype(tag)::value>(load(at) * affine.scale + affine.shift);
        store(at, value);
        total += value;
      }
      if (pool != nullptr) store(pool + c, load(pool + c) + total);
    }
  });
}

// From d to y before its normalisation, with its moments.
void project_images(const Work& work, const BlockScratch& memory, const ItemMoments& moments) {
  const FusedMBConvParams& p = work.p;
  const std::int64_t stride = work.plan.depth_stride, image_pixels = p.out_height * p.out_width;
  const std::int64_t first = work.out_pixel(0), num_pixels = work.out_pixels();
  const float* y = p.y + first * p.y_stride;
  if (p.reduced_channels > 0) {
    for (std::int64_t i = 0; i < work.num_images * work.plan.gate_stride; ++i) memory.means[i] = 0.0f;
    for (std::int64_t image = 0; image < work.num_images; ++image) {
      activate_depth(p, stride, memory.depth, image * image_pixels, (image + 1) * image_pixels,
                     memory.means + image * work.plan.gate_stride);
    }
    excite(work);
    gate_and_project(work);
    add_pixels(moments, 0, p.out_channels, 0, y, p.y_stride, num_pixels);
    return;
  }
  for (std::int64_t begin = 0; begin < num_pixels; begin += kPixelsPerStep) {
    const std::int64_t end = min_of(num_pixels, begin + kPixelsPerStep);
    activate_depth(p, stride, memory.depth, begin, end, nullptr);
    project_last(p, {memory.depth + begin * stride, stride}, first + begin, end - begin, 0, p.mid_channels,
                 nullptr, 0);
    add_pixels(moments, 0, p.out_channels, begin, y + begin * p.y_stride, p.y_stride, end - begin);
  }
}

void calibrate_block(const Run& run, const SubnetBlock& step, Map in, const float* x, float* y) {
  FusedMBConvParams block = step.block;
  const Map out = in.strided(block.stride);
  block.batch = run.p.batch;
  block.height = in.height;
  block.width = in.width;
  block.out_height = out.height;
  block.out_width = out.width;
  block.x = x;
  block.y = y;
  block.y_stride = block.out_channels;
  BlockPlan plan(block);
  plan.depth_stride = round_up(block.mid_channels, kPanelWidth);

  // The same block with its normalisations left to us.
  FusedMBConvParams convolving = block, projecting = block;
  convolving.depth_affine = projecting.project_affine = {};
  convolving.depth_activation = projecting.out_activation = Activation::kNone;
  convolving.reduced_channels = 0;

  const std::int64_t num_items = ceil_div(block.batch, plan.num_images);
  const auto images = [&](std::int64_t item) {
    return min_of(plan.num_images, block.batch - item * plan.num_images);
  };
  const auto in_pixels = [&](std::int64_t item) { return images(item) * in.pixels(); };
  const auto out_pixels = [&](std::int64_t item) { return images(item) * out.pixels(); };
  const auto depth_of = [&](std::int64_t item) {
    return run.depth + item * plan.num_images * out.pixels() * plan.depth_stride;
  };
  const double flops = block_flops(block);
  const MomentTable mid = run.moments_of(block.mid_channels), thin = run.moments_of(block.out_channels);

  if (block.expand_panels != nullptr) {
    parallel_for(num_items, flops, [&](std::int64_t item) {
      const BlockScratch memory(block, plan);
      measure_expansion({block, plan, memory, item * plan.num_images, images(item)}, mid.item(item));
    });
    finish(run, block.expand_affine, block.mid_channels, num_items, in_pixels);
  }
  parallel_for(num_items, flops, [&](std::int64_t item) {
    const BlockScratch memory(block, plan);
    clear_borders(block, plan, memory.planes);
    const Work work{convolving, plan, memory, item * plan.num_images, images(item)};
    convolve(work, depth_of(item), mid.item(item));
  });
  if (block.depth_affine.scale != nullptr) {
    finish(run, block.depth_affine, block.mid_channels, num_items, out_pixels);
  }
  parallel_for(num_items, flops, [&](std::int64_t item) {
    BlockScratch memory(block, plan);
    memory.depth = depth_of(item);
    project_images({projecting, plan, memory, item * plan.num_images, images(item)}, memory, thin.item(item));
  });
  finish(run, block.project_affine, block.out_channels, num_items, out_pixels);
  normalize(block.project_affine, block.out_activation, block.batch * out.pixels(), block.out_channels, y,
            step.has_residual ? x : nullptr, block.x_stride, nullptr);
}

const float* calibrate_backbone(const Run& run, const Layout& layout, Arena& arena, float* ones,
                                const float** taps) {
  return walk_backbone(
      run.p, layout, arena, taps, [&](float* y) { calibrate_stem(run, ones, y); },
      [&](const SubnetBlock& step, Map map, const float* x, float* y) {
        calibrate_block(run, step, map, x, y);
      });
}

void calibrate_neck(const Run& run, const Layout& layout, Arena& arena, const float* const* taps,
                    float** pyramid) {
  const SubnetParams& p = run.p;
  for (int level = p.num_levels - 1; level >= 0; --level) {
    const Map map = layout.taps[level];
    DynamicPointwiseConvParams lateral = p.levels[level].lateral;
    const Affine affine{lateral.scale, lateral.shift};
    const Activation activation = lateral.activation;
    pyramid[level] = arena.take(layout.pyramid_size[level]);
    lateral.num_pixels = p.batch * map.pixels();
    lateral.x = taps[level];
    lateral.y = pyramid[level];
    lateral.y_stride = p.neck_channels;
    lateral.scale = lateral.shift = nullptr;
    lateral.activation = Activation::kNone;
    dynamic_pointwise_conv(lateral);
    measure(run, affine, lateral.num_pixels, p.neck_channels, lateral.y);
    auto* rows = reinterpret_cast<std::int32_t*>(arena.take(lateral.num_pixels));
    const bool has_coarser = level + 1 < p.num_levels;
    if (has_coarser) fill_upsampled_rows(p.batch, layout.taps[level + 1], map, rows);
    normalize(affine, activation, lateral.num_pixels, p.neck_channels, lateral.y,
              has_coarser ? pyramid[level + 1] : nullptr, p.neck_channels, rows);
  }
}

void calibrate_head(const Run& run, const Layout& layout, Arena& arena, float* const* pyramid) {
  const SubnetParams& p = run.p;
  float* turns[2] = {arena.take(layout.level_size), arena.take(layout.level_size)};
  for (int level = 0; level < p.num_levels; ++level) {
    const float* x = pyramid[level];
    for (int conv = 0; conv < p.num_convs; ++conv) {
      calibrate_block(run, p.convs[conv * p.num_levels + level], layout.taps[level], x, turns[conv % 2]);
      x = turns[conv % 2];
    }
  }
}

void calibrate_feature(const Run& run, const Layout& layout, Arena& arena, const float* x,
                       std::int64_t size) {
  DynamicPointwiseConvParams feature = run.p.feature;
  const Affine affine{feature.scale, feature.shift};
  feature.num_pixels = run.p.batch * layout.last.pixels();
  feature.x = x;
  feature.y = arena.take(size);
  feature.y_stride = feature.out_channels;
  feature.scale = feature.shift = nullptr;
  feature.activation = Activation::kNone;
  dynamic_pointwise_conv(feature);
  measure(run, affine, feature.num_pixels, feature.out_channels, feature.y);
}

}  // namespace

void calibrate(const CalibrationParams& call) {
  const SubnetParams& p = call.net;
  const Layout layout(p, p.batch, 0);
  const Sizes sizes(p, layout);
  const std::int64_t total =
      layout.total + sizes.depth + sizes.table_floats() + sizes.feature + sizes.stem_affine;
  Arena arena{thread_scratch(Scratch::kCall, static_cast<std::size_t>(total))};
  auto* table = reinterpret_cast<double*>(arena.take(sizes.table_floats()));
  float* depth = arena.take(sizes.depth);
  float* ones = arena.take(sizes.stem_affine);
  const Run run{p, call, {table, sizes.channels}, depth};
  const float* taps[kMaxLevels] = {};
  const float* last = calibrate_backbone(run, layout, arena, ones, taps);
  if (p.num_levels == 0) return calibrate_feature(run, layout, arena, last, sizes.feature);
  float* pyramid[kMaxLevels] = {};
  calibrate_neck(run, layout, arena, taps, pyramid);
  calibrate_head(run, layout, arena, pyramid);
}

}  // namespace pfnas::PFNAS_TIER

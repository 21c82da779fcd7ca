// SPDX-License-Identifier: Apache-2.0
// One path of a supernet in one call.
//
//   groups of images (work items) -> stem -> blocks -> laterals, top down -> head -> predictor   (detector)
//                                               -> feature -> pool -> hidden -> classifier       (classifier)
//
// A group's tensors lie in one arena: the backbone alternates between two buffers, tapped outputs have their
// own. Groups are small enough for the tensors to stay in L2 or L3 and large enough for weights to be read
// rarely. With one group, blocks share its images out to threads, 1x1 and dense layers pixels or outputs.
#include "common/check.h"
#include "common/panels.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "kernels/subnet/arena.h"
#include "kernels/subnet/params.h"
#include "kernels/subnet/stem.h"

namespace pfnas::PFNAS_TIER {
namespace {

using Params = SubnetParams;

constexpr std::int64_t kImagesPerGroup = 8;

// Images [first, first + count) on their way through the net.
struct Group {
  const Params& p;
  const Layout& layout;
  std::int64_t first;
  std::int64_t count;
};

void run_block(const SubnetBlock& step, std::int64_t count, Map in, const float* x, float* y) {
  FusedMBConvParams block = step.block;
  const Map out = in.strided(block.stride);
  block.batch = count;
  block.height = in.height;
  block.width = in.width;
  block.out_height = out.height;
  block.out_width = out.width;
  block.x = x;
  block.y = y;
  block.y_stride = block.out_channels;
  if (step.has_residual) {
    block.residual = x;
    block.residual_stride = block.x_stride;
  }
  fused_mbconv(block);
}

// Two buffers between which tensors alternate.
struct Turns {
  float* buffers[2];
  int next = 0;

  float* take() {
    next = 1 - next;
    return buffers[1 - next];
  }
  // Where the output of `step` goes. A block that adds its input writes over it: every row is read before its
  // place is written, as one thread does a whole image. (A tap is in neither buffer.)
  float* output_of(const SubnetBlock& step, float* x) {
    const bool fits = step.has_residual && step.block.x_stride == step.block.out_channels;
    return fits && (x == buffers[0] || x == buffers[1]) ? x : take();
  }
};

// One image through the stem and the blocks on large maps, so that a tensor is still in L2 when the next
// block reads it. `last` is where the last of these layers writes, for the whole group, as `taps` are.
void run_front(const Group& group, std::int64_t image, float* const* taps, Turns turns, float* last) {
  const Params& p = group.p;
  const int num_front = group.layout.num_front;
  Map map = Map{p.height, p.width}.strided(2);
  float* x = num_front > 0 ? turns.take() : last + image * map.pixels() * p.stem.out_channels;
  run_stem(p, group.first + image, 1, x);
  for (int b = 0; b < num_front; ++b) {
    const SubnetBlock& step = p.blocks[b];
    const Map out = map.strided(step.block.stride);
    const bool is_kept = step.tap >= 0 || b + 1 == num_front;
    float* y = step.tap >= 0 ? taps[step.tap] : last;
    y = is_kept ? y + image * out.pixels() * step.block.out_channels : turns.output_of(step, x);
    run_block(step, 1, map, x, y);
    map = out;
    x = y;
  }
}

const float* run_backbone(const Group& group, Arena& arena, float** taps) {
  const Params& p = group.p;
  const Layout& layout = group.layout;
  const int num_front = layout.num_front;
  const Turns front{{arena.take(layout.front_size), arena.take(layout.front_size)}};
  Turns turns{{arena.take(layout.turn_size), arena.take(layout.turn_size)}};
  for (int b = 0; b < p.num_blocks; ++b) {
    const int tap = p.blocks[b].tap;
    if (tap >= 0) taps[tap] = arena.take(layout.tap_size[tap]);
  }
  const int front_tap = num_front > 0 ? p.blocks[num_front - 1].tap : -1;
  float* x = front_tap >= 0 ? taps[front_tap] : turns.take();
  for (std::int64_t image = 0; image < group.count; ++image) run_front(group, image, taps, front, x);
  Map map = Map{p.height, p.width}.strided(2);
  for (int b = 0; b < p.num_blocks; ++b) {
    const SubnetBlock& step = p.blocks[b];
    if (b >= num_front) {
      float* y = step.tap >= 0 ? taps[step.tap] : turns.output_of(step, x);
      run_block(step, group.count, map, x, y);
      x = y;
    }
    map = map.strided(step.block.stride);
  }
  return x;
}

void run_neck(const Group& group, Arena& arena, float* const* taps, float** pyramid) {
  const Params& p = group.p;
  for (int level = p.num_levels - 1; level >= 0; --level) {
    const Map map = group.layout.taps[level];
    DynamicPointwiseConvParams lateral = p.levels[level].lateral;
    pyramid[level] = arena.take(group.layout.pyramid_size[level]);
    lateral.num_pixels = group.count * map.pixels();
    lateral.x = taps[level];
    lateral.y = pyramid[level];
    lateral.y_stride = p.neck_channels;
    auto* rows = reinterpret_cast<std::int32_t*>(arena.take(lateral.num_pixels));
    if (level + 1 < p.num_levels) {
      fill_upsampled_rows(group.count, group.layout.taps[level + 1], map, rows);
      lateral.residual = pyramid[level + 1];
      lateral.residual_stride = p.neck_channels;
      lateral.residual_rows = rows;
    }
    dynamic_pointwise_conv(lateral);
  }
}

void run_head(const Group& group, Arena& arena, float* const* pyramid) {
  const Params& p = group.p;
  float* turns[2] = {arena.take(group.layout.level_size), arena.take(group.layout.level_size)};
  std::int64_t location = 0;
  for (int level = 0; level < p.num_levels; ++level) {
    const Map map = group.layout.taps[level];
    const float* x = pyramid[level];
    for (int conv = 0; conv < p.num_convs; ++conv) {
      run_block(p.convs[conv * p.num_levels + level], group.count, map, x, turns[conv % 2]);
      x = turns[conv % 2];
    }
    DynamicPointwiseConvParams predictor = p.predictor;
    predictor.num_pixels = map.pixels();
    predictor.scale = p.levels[level].predictor_affine.scale;
    predictor.shift = p.levels[level].predictor_affine.shift;
    predictor.y_stride = predictor.out_channels;
    for (std::int64_t image = 0; image < group.count; ++image) {
      predictor.x = x + image * map.pixels() * p.neck_channels;
      predictor.y = p.raw + ((group.first + image) * p.num_locations + location) * predictor.out_channels;
      dynamic_pointwise_conv(predictor);
    }
    location += map.pixels();
  }
}

// Means over the pixels of each image: [count, pixels, channels] -> [count, channels].
void pool(std::int64_t count, std::int64_t pixels, std::int64_t channels, const float* x, float* y) {
  const float per_pixel = 1.0f / static_cast<float>(pixels);
  for (std::int64_t image = 0; image < count; ++image, x += pixels * channels, y += channels) {
    for (std::int64_t c = 0; c < channels; c += kLanes) {
      Vec total{};
      for (std::int64_t m = 0; m < pixels; ++m) total += load(x + m * channels + c);
      store(y + c, total * per_pixel);
    }
  }
}

void run_dense(DynamicPointwiseConvParams layer, std::int64_t num_pixels, const float* x, float* y) {
  layer.num_pixels = num_pixels;
  layer.x = x;
  layer.y = y;
  layer.y_stride = layer.out_channels;
  dynamic_pointwise_conv(layer);
}

void run_feature(const Group& group, Arena& arena, const float* x, float* pooled) {
  const Params& p = group.p;
  const std::int64_t pixels = group.layout.last.pixels(), channels = p.feature.out_channels;
  float* feature = arena.take(group.count * pixels * channels);
  run_dense(p.feature, group.count * pixels, x, feature);
  pool(group.count, pixels, channels, feature, pooled + group.first * channels);
}

// As run_dense; threads share out the outputs, of which each reads its own weights.
void run_dense_by_outputs(const DynamicPointwiseConvParams& layer, std::int64_t batch, const float* x,
                          float* y) {
  const double flops = 2.0 * static_cast<double>(batch * layer.in_channels * layer.out_channels);
  parallel_for(num_panels(layer.out_channels), flops, [&](std::int64_t panel) {
    const std::int64_t first = panel * kPanelWidth;
    DynamicPointwiseConvParams part = layer;
    part.num_pixels = batch;
    part.x = x;
    part.y = y + first;
    part.y_stride = layer.out_channels;
    part.panels += panel * layer.max_in_channels * kPanelWidth;
    part.out_channels = min_of<std::int64_t>(kPanelWidth, layer.out_channels - first);
    if (layer.scale != nullptr) part.scale += first;
    if (layer.shift != nullptr) part.shift += first;
    dynamic_pointwise_conv(part);
  });
}

// `pooled`: [batch of the call][channels], what is left of a classifier's images.
void run_group(const Group& group, float* pooled) {
  Arena arena{thread_scratch(Scratch::kCall, static_cast<std::size_t>(group.layout.total))};
  float* taps[kMaxLevels] = {};
  const float* last = run_backbone(group, arena, taps);
  if (group.p.num_levels == 0) return run_feature(group, arena, last, pooled);
  float* pyramid[kMaxLevels] = {};
  run_neck(group, arena, taps, pyramid);
  run_head(group, arena, pyramid);
}

}  // namespace

void subnet(const Params& p) {
  const std::int64_t per_thread = ceil_div(p.batch, max_threads());
  const std::int64_t per_group = max_of<std::int64_t>(1, min_of(kImagesPerGroup, per_thread));
  const Layout layout(p, per_group, count_front_blocks(p));
  std::int64_t num_locations = 0;
  for (int level = 0; level < p.num_levels; ++level) num_locations += layout.taps[level].pixels();
  PFNAS_CHECK(num_locations == p.num_locations);
  const std::int64_t num_groups = ceil_div(p.batch, per_group);
  // The dense layers behind the pool read millions of weights for few images: once for all groups.
  const bool is_classifier = p.num_levels == 0;
  const std::int64_t per_image = is_classifier ? p.feature.out_channels + p.hidden.out_channels : 0;
  float* pooled = thread_scratch(Scratch::kResult, static_cast<std::size_t>(p.batch * per_image));
  parallel_for(num_groups, layout.flops * static_cast<double>(num_groups), [&](std::int64_t item) {
    const std::int64_t first = item * per_group;
    const std::int64_t count = min_of(per_group, p.batch - first);
    run_group({p, layout, first, count}, pooled);
  });
  if (!is_classifier) return;
  float* hidden = pooled + p.batch * p.feature.out_channels;
  run_dense_by_outputs(p.hidden, p.batch, pooled, hidden);
  run_dense_by_outputs(p.classifier, p.batch, hidden, p.logits);
}

}  // namespace pfnas::PFNAS_TIER

// SPDX-License-Identifier: Apache-2.0
// Depthwise convolution whose filter is derived at run time from a larger one (Once-for-All,
// arXiv:1908.09791, sec. 3).
//
//   select -> forward : derive filters | per (image, channel blocks): pack a band, run register tiles, write
//   y
//          -> backward: derive filters | per (images, channel blocks): pack grad_y and x once, both gradients
//          from them
//                       | fold the partial filter gradients, then back through the matrices to the bank
//
// Included headers hold one step each: filter.h (derivation), planes.h (packing), tiles.h (registers), rows.h
// (which tiles a shape runs), walk.h (cutting), steps.h (a step on packed planes).
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "kernels/dynamic_depthwise_conv/direct.h"
#include "kernels/dynamic_depthwise_conv/direct_steps.h"
#include "kernels/dynamic_depthwise_conv/filter.h"
#include "kernels/dynamic_depthwise_conv/params.h"
#include "kernels/dynamic_depthwise_conv/planes.h"
#include "kernels/dynamic_depthwise_conv/rows.h"
#include "kernels/dynamic_depthwise_conv/steps.h"
#include "kernels/dynamic_depthwise_conv/tiles.h"
#include "kernels/dynamic_depthwise_conv/walk.h"

namespace pfnas::PFNAS_TIER {
namespace {

using Params = DynamicDepthwiseConvParams;

void forward_step(const Params& p, const RowKernels& rows, const Step& step, const Step* next,
                  const float* filter, Planes& x) {
  const Image from = x_image(p, p.x), to = y_image(p, p.y);
  const int valid = valid_channels(p, step.block);
  x.pack(p.x + step.image * from.image_stride() + step.block * kBlock, from, valid, step.num_images,
         first_input_row(p, step.begin), end_input_row(p, step.end));
  ConvJob job = conv_job(to, p.batch, p.y, step);
  job.ahead_in = look_ahead(from, step, next, p.stride, p.kernel_size / 2);
  if (!job.streams) job.ahead_out = look_ahead(to, step, next, 1, 0);
  run_conv(rows.forward, job, x, filter, valid, step.begin, step.end);
}

void forward(const Params& p) {
  const RowKernels rows = select_rows(p);
  const DirectKernels direct = select_direct_kernels(p);
  const bool packs = direct.forward == nullptr;
  const std::int64_t taps = p.kernel_size * p.kernel_size;
  Planes plan = input_planes(p, rows);
  const Cut cut = cut_call(p, conv_flops(p), p.stride * plan.pitch * kBlock);
  plan.num_rows = min_of<std::int64_t>(p.height, (cut.slab_rows - 1) * p.stride + p.kernel_size);
  plan.num_images = cut.slab_images;

  const FilterBlocks filters(
      thread_scratch(Scratch::kCall,
                     static_cast<std::size_t>(cut.num_blocks * FilterBlocks::kFloatsPerBlock)),
      cut.num_blocks);
  const Derivation derivation(p);
  derive_filters(p, derivation, cut.num_blocks, filters);
  parallel_for(cut.num_items(), conv_flops(p), [&](std::int64_t item) {
    if (!packs) {
      direct_forward_item(p, direct, cut, item, filters.filter + cut.first_block(item) * taps * kBlock);
      return stream_fence();
    }
    Planes x = plan;
    x.data = thread_scratch(Scratch::kThread, static_cast<std::size_t>(x.size()));
    x.clear_borders();
    for (Step step = cut.first(item); !cut.done(item, step);) {
      const Step next = cut.next(item, step);
      const float* filter = filters.filter + step.block * taps * kBlock;
      forward_step(p, rows, step, cut.done(item, next) ? nullptr : &next, filter, x);
      step = next;
    }
    stream_fence();
  });
}

// One slab of one block of channels: grad_x, and the filter gradient added to `sum`. grad_y is packed once
// for both.
void backward_step(const Params& p, const RowKernels& rows, const Step& step, const Step* next,
                   const float* filter, float* sum, BackwardScratch& s) {
  const Image x = x_image(p, p.x), grad_y = y_image(p, p.grad_y), grad_x = x_image(p, p.grad_x);
  const int valid = valid_channels(p, step.block);
  const std::int64_t half = p.kernel_size / 2;
  const Ahead ahead_x = look_ahead(x, step, p.grad_bank == nullptr ? nullptr : next, p.stride, half);
  const Ahead ahead_grad_y = look_ahead(grad_y, step, next, 1, half);
  s.grad_y.pack(p.grad_y + step.image * grad_y.image_stride() + step.block * kBlock, grad_y, valid,
                step.num_images, max_of<std::int64_t>(0, step.begin - half),
                min_of(p.out_height, step.end + half));
  if (p.grad_bank != nullptr) {
    s.x.pack(p.x + step.image * x.image_stride() + step.block * kBlock, x, valid, step.num_images,
             first_input_row(p, step.begin), end_input_row(p, step.end));
    GradFilterJob job{};
    if (p.grad_x ==
        nullptr) {  // else the other half fetches: its tiles last longer, so the fetches spread better
      job.ahead_x = ahead_x;
      job.ahead_grad_y = ahead_grad_y;
    }
    grad_filter_step(p, rows, s, step, job, sum);
  }
  if (p.grad_x == nullptr) return;
  ConvJob job = conv_job(grad_x, p.batch, p.grad_x, step);
  job.ahead_in = ahead_grad_y;
  job.ahead_x = ahead_x;
  if (!job.streams) job.ahead_out = look_ahead(grad_x, step, next, p.stride, 0);
  run_conv(rows.grad_input, job, s.grad_y, filter, valid, step.begin * p.stride,
           min_of(p.height, step.end * p.stride));
}

void backward(const Params& p) {
  const RowKernels rows = select_rows(p);
  const std::int64_t taps = p.kernel_size * p.kernel_size;
  const DirectKernels direct = select_direct_kernels(p);
  const bool packs = direct.grad_input == nullptr || direct.grad_filter == nullptr;
  BackwardScratch plan{input_planes(p, rows), grad_planes(p, rows), nullptr, nullptr};
  const Cut cut = cut_call(p, conv_flops(p), (p.stride * plan.x.pitch + plan.grad_y.pitch) * kBlock);
  plan.x.num_rows = min_of<std::int64_t>(p.height, (cut.slab_rows - 1) * p.stride + p.kernel_size);
  plan.grad_y.num_rows = min_of<std::int64_t>(p.out_height, cut.slab_rows + p.kernel_size - 1);
  plan.x.num_images = plan.grad_y.num_images = cut.slab_images;

  const std::int64_t group_size = cut.num_blocks * taps * kBlock;  // filter gradients of one group of images
  const std::int64_t filter_size = cut.num_blocks * FilterBlocks::kFloatsPerBlock;
  float* memory =
      thread_scratch(Scratch::kCall, static_cast<std::size_t>(filter_size + cut.num_groups * group_size));
  const FilterBlocks filters(memory, cut.num_blocks);
  float* partial = memory + filter_size;  // [num_groups][num_blocks][K * K][16]
  const Derivation derivation(p);
  derive_filters(p, derivation, cut.num_blocks, filters);

  parallel_for(cut.num_items(), 2 * conv_flops(p), [&](std::int64_t item) {
    float* sums = partial + cut.group(item) * group_size;
    const std::int64_t begin = cut.first_block(item) * taps * kBlock,
                       end = cut.end_block(item) * taps * kBlock;
    for (std::int64_t i = begin; i < end; ++i) sums[i] = 0.0f;
    if (!packs) {
      direct_backward_item(p, direct, cut, item, filters.filter + begin, sums + begin);
      return stream_fence();
    }
    BackwardScratch scratch = plan;
    scratch.place(thread_scratch(Scratch::kThread, static_cast<std::size_t>(scratch.size())));
    for (Step step = cut.first(item); !cut.done(item, step);) {
      const Step next = cut.next(item, step);
      const std::int64_t offset = step.block * taps * kBlock;
      backward_step(p, rows, step, cut.done(item, next) ? nullptr : &next, filters.filter + offset,
                    sums + offset, scratch);
      step = next;
    }
    stream_fence();
  });
  if (p.grad_bank == nullptr) return;
  for (std::int64_t group = 1; group < cut.num_groups; ++group) {
    const float* sums = partial + group * group_size;
    for (std::int64_t i = 0; i < group_size; ++i) partial[i] += sums[i];
  }
  derive_filters_backward(p, derivation, cut.num_blocks, partial, filters);
}

}  // namespace

DynamicDepthwiseConvKernel select_dynamic_depthwise_conv(const DynamicDepthwiseConvParams& p) {
  const RowKernels rows = select_rows(p);
  return {forward, backward, kLanes, rows.forward_width, rows.grad_input_width, rows.grad_filter_width};
}

}  // namespace pfnas::PFNAS_TIER

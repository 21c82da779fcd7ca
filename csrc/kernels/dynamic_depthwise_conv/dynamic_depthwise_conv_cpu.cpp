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
// Included headers hold one step each: filter.h (derivation), planes.h (packing and cutting), tiles.h
// (registers).
#include "common/check.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "kernels/dynamic_depthwise_conv/filter.h"
#include "kernels/dynamic_depthwise_conv/params.h"
#include "kernels/dynamic_depthwise_conv/planes.h"
#include "kernels/dynamic_depthwise_conv/tiles.h"
#include "kernels/dynamic_depthwise_conv/walk.h"

namespace pfnas::PFNAS_TIER {
namespace {

using Params = DynamicDepthwiseConvParams;

// The functions a shape runs, with the widths of their tiles.
struct RowKernels {
  void (*forward)(const ConvJob&) = nullptr;
  void (*grad_input)(const ConvJob&) = nullptr;
  void (*grad_filter)(const GradFilterJob&) = nullptr;
  int forward_width = 0;
  int grad_input_width = 0;
  int grad_filter_width = 0;
};

// Columns computed when `width` is covered by tiles of `tile`, plus what starting a tile costs (K loads of
// the taps).
double cover_cost(std::int64_t width, int tile) {
  return static_cast<double>(ceil_div(width, tile)) * (tile + 1.0);
}

template <int K, int S, int kWidth>
void offer_width(std::int64_t width, std::int64_t out_width, RowKernels& best) {
  if constexpr (kWidth + K + 1 <= kNumRegisters) {
    if (best.forward == nullptr ||
        cover_cost(out_width, kWidth) < cover_cost(out_width, best.forward_width)) {
      best.forward = forward_rows<K, S, kWidth>;
      best.forward_width = kWidth;
    }
    if constexpr (kWidth % S == 0) {
      if (best.grad_input == nullptr ||
          cover_cost(width, kWidth) < cover_cost(width, best.grad_input_width)) {
        best.grad_input = grad_input_rows<K, S, kWidth>;
        best.grad_input_width = kWidth;
      }
    }
  }
  if constexpr (kWidth + K * grad_filter_num_rows(K) + 1 <= kNumRegisters) {
    if (best.grad_filter == nullptr ||
        cover_cost(out_width, kWidth) < cover_cost(out_width, best.grad_filter_width)) {
      best.grad_filter = grad_filter_rows<K, S, kWidth>;
      best.grad_filter_width = kWidth;
    }
  }
}

// Widths that tile the maps of 160- and 224-px nets (5, 10, 20, 40, 80 and 7, 14, 28, 56) with little waste.
template <int K, int S>
RowKernels select_rows(const Params& p) {
  RowKernels best;
  offer_width<K, S, 4>(p.width, p.out_width, best);
  offer_width<K, S, 5>(p.width, p.out_width, best);
  offer_width<K, S, 6>(p.width, p.out_width, best);
  offer_width<K, S, 7>(p.width, p.out_width, best);
  offer_width<K, S, 8>(p.width, p.out_width, best);
  offer_width<K, S, 10>(p.width, p.out_width, best);
  offer_width<K, S, 14>(p.width, p.out_width, best);
  return best;
}

RowKernels select_rows(const Params& p) {
  switch (p.kernel_size * 10 + p.stride) {
    case 31:
      return select_rows<3, 1>(p);
    case 32:
      return select_rows<3, 2>(p);
    case 51:
      return select_rows<5, 1>(p);
    case 52:
      return select_rows<5, 2>(p);
    case 71:
      return select_rows<7, 1>(p);
    case 72:
      return select_rows<7, 2>(p);
    default:
      PFNAS_CHECK(false);
  }
  return {};
}

double conv_flops(const Params& p) {
  return 2.0 * static_cast<double>(p.batch * p.channels * p.out_height * p.out_width) * p.kernel_size *
         p.kernel_size;
}

int valid_channels(const Params& p, std::int64_t block) {
  return static_cast<int>(min_of<std::int64_t>(kBlock, p.channels - block * kBlock));
}

Image x_image(const Params& p, const float* data) { return {data, p.height, p.width, p.channels}; }
Image y_image(const Params& p, const float* data) { return {data, p.out_height, p.out_width, p.channels}; }

std::int64_t round_up(std::int64_t value, std::int64_t step) { return ceil_div(value, step) * step; }

// Pitches: the columns that the tiles read, which may reach beyond the image where a tile does.
Planes input_planes(const Params& p, const RowKernels& rows) {
  const std::int64_t tiled =
      max_of(round_up(p.out_width, rows.forward_width), round_up(p.out_width, rows.grad_filter_width));
  Planes x;
  x.pad = p.kernel_size / 2;
  x.width = p.width;
  x.height = p.height;
  x.pitch = max_of(x.pad + x.width, (tiled - 1) * p.stride + p.kernel_size);
  return x;
}

Planes grad_planes(const Params& p, const RowKernels& rows) {
  const std::int64_t half = p.kernel_size / 2;
  const std::int64_t last_read = (round_up(p.width, rows.grad_input_width) - 1 + half) / p.stride;
  Planes g;
  g.pad = half;
  g.width = p.out_width;
  g.height = p.out_height;
  g.pitch = half + max_of(round_up(p.out_width, rows.grad_filter_width), last_read + 1);
  return g;
}

// Rows of x that rows [begin, end) of y read.
std::int64_t first_input_row(const Params& p, std::int64_t begin) {
  return max_of<std::int64_t>(0, begin * p.stride - p.kernel_size / 2);
}
std::int64_t end_input_row(const Params& p, std::int64_t end) {
  return min_of<std::int64_t>(p.height, (end - 1) * p.stride - p.kernel_size / 2 + p.kernel_size);
}

ConvJob conv_job(const Image& out, float* data, const Step& step) {
  ConvJob job{};
  job.out = data + step.image * out.image_stride() + step.block * kBlock;
  job.out_image_stride = out.image_stride();
  job.out_row_stride = out.row_stride();
  job.out_col_stride = out.channels;
  job.out_width = out.width;
  job.num_images = step.num_images;
  return job;
}

// Runs one kind of tile over rows [begin, end) of the output; a few rows for one vector of channels, then for
// the next, so that the two halves of an output line are written while it is in L1. The first vector also
// fetches ahead.
void run_conv(void (*kernel)(const ConvJob&), ConvJob job, const Planes& in, const float* filter, int valid,
              std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t kRowsPerTurn = 8;
  float* out = job.out;
  const ConvJob fetching = job;
  for (std::int64_t y = begin; y < end; y += kRowsPerTurn) {
    for (int v = 0; v * kLanes < valid; ++v) {
      job.ahead_in = v == 0 ? fetching.ahead_in : Ahead{};
      job.ahead_x = v == 0 ? fetching.ahead_x : Ahead{};
      job.ahead_out = v == 0 ? fetching.ahead_out : Ahead{};
      job.in = in.view(v);
      job.filter = filter + v * kLanes;
      job.out = out + v * kLanes;
      job.lanes = min_of(kLanes, valid - v * kLanes);
      job.y_begin = y;
      job.y_end = min_of(end, y + kRowsPerTurn);
      kernel(job);
    }
  }
}

void forward_step(const Params& p, const RowKernels& rows, const Step& step, const Step* next,
                  const float* filter, Planes& x) {
  const Image from = x_image(p, p.x), to = y_image(p, p.y);
  const int valid = valid_channels(p, step.block);
  x.pack(p.x + step.image * from.image_stride() + step.block * kBlock, from, valid, step.num_images,
         first_input_row(p, step.begin), end_input_row(p, step.end));
  ConvJob job = conv_job(to, p.y, step);
  job.ahead_in = look_ahead(from, step, next, p.stride, p.kernel_size / 2);
  job.ahead_out = look_ahead(to, step, next, 1, 0);
  run_conv(rows.forward, job, x, filter, valid, step.begin, step.end);
}

void forward(const Params& p) {
  const RowKernels rows = select_rows(p);
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
    Planes x = plan;
    x.data = thread_scratch(Scratch::kThread, static_cast<std::size_t>(x.size()));
    x.clear_borders();
    for (Step step = cut.first(item); !cut.done(item, step);) {
      const Step next = cut.next(item, step);
      forward_step(p, rows, step, cut.done(item, next) ? nullptr : &next,
                   filters.filter + step.block * taps * kBlock, x);
      step = next;
    }
  });
}

// What one worker of the backward pass holds.
struct BackwardScratch {
  Planes x;
  Planes grad_y;
  float* zero_row;     // [columns of x][lanes]
  float* grad_filter;  // [K * K][16], of one step

  std::int64_t size() const { return x.size() + grad_y.size() + x.row_stride() + kMaxTaps * kBlock; }
  void place(float* memory) {
    x.data = memory;
    grad_y.data = x.data + x.size();
    zero_row = grad_y.data + grad_y.size();
    grad_filter = zero_row + x.row_stride();
    x.clear_borders();
    grad_y.clear_borders();
    for (std::int64_t i = 0; i < x.row_stride(); ++i) zero_row[i] = 0.0f;
  }
};

// Rows (or images, where they are small) are taken in turns whose planes stay in L1 while every filter row
// passes over them. `sum`, [K * K][16], is added to: first summed over the step, then folded, which keeps the
// rounding small.
void grad_filter_step(const Params& p, const RowKernels& rows, BackwardScratch& s, const Step& step,
                      GradFilterJob job, float* sum) {
  constexpr std::int64_t kTurnFloats = 4 * 1024;
  const std::int64_t taps = p.kernel_size * p.kernel_size;
  const std::int64_t row_floats = p.stride * s.x.row_stride() + s.grad_y.row_stride();
  const std::int64_t turn_rows =
      min_of(step.end - step.begin, max_of<std::int64_t>(1, kTurnFloats / row_floats));
  const std::int64_t turn_images = max_of<std::int64_t>(1, kTurnFloats / (row_floats * p.out_height));
  const int valid = valid_channels(p, step.block);
  const GradFilterJob fetching = job;
  job.zero_row = s.zero_row;
  job.out_width = p.out_width;
  for (std::int64_t i = 0; i < taps * kBlock; ++i) s.grad_filter[i] = 0.0f;
  for (job.image_begin = 0; job.image_begin < step.num_images; job.image_begin = job.image_end) {
    job.image_end = min_of(step.num_images, job.image_begin + turn_images);
    for (job.y_begin = step.begin; job.y_begin < step.end; job.y_begin = job.y_end) {
      job.y_end = min_of(step.end, job.y_begin + turn_rows);
      for (int v = 0; v * kLanes < valid; ++v) {
        job.ahead_x = v == 0 ? fetching.ahead_x : Ahead{};
        job.ahead_grad_y = v == 0 ? fetching.ahead_grad_y : Ahead{};
        job.x = s.x.view(v);
        job.grad_y = s.grad_y.view(v);
        job.grad = s.grad_filter + v * kLanes;
        rows.grad_filter(job);
      }
    }
  }
  for (std::int64_t i = 0; i < taps * kBlock; ++i) sum[i] += s.grad_filter[i];
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
  ConvJob job = conv_job(grad_x, p.grad_x, step);
  job.ahead_in = ahead_grad_y;
  job.ahead_x = ahead_x;
  job.ahead_out = look_ahead(grad_x, step, next, p.stride, 0);
  run_conv(rows.grad_input, job, s.grad_y, filter, valid, step.begin * p.stride,
           min_of(p.height, step.end * p.stride));
}

void backward(const Params& p) {
  const RowKernels rows = select_rows(p);
  const std::int64_t taps = p.kernel_size * p.kernel_size;
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
    BackwardScratch scratch = plan;
    scratch.place(thread_scratch(Scratch::kThread, static_cast<std::size_t>(scratch.size())));
    float* sums = partial + cut.group(item) * group_size;
    const std::int64_t end = cut.end_block(item) * taps * kBlock;
    for (std::int64_t i = cut.first_block(item) * taps * kBlock; i < end; ++i) sums[i] = 0.0f;
    for (Step step = cut.first(item); !cut.done(item, step);) {
      const Step next = cut.next(item, step);
      const std::int64_t offset = step.block * taps * kBlock;
      backward_step(p, rows, step, cut.done(item, next) ? nullptr : &next, filters.filter + offset,
                    sums + offset, scratch);
      step = next;
    }
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

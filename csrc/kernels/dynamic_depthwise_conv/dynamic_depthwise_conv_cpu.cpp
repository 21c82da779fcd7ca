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

Planes input_planes(const Params& p, const RowKernels& rows) {
  const int widest = max_of(rows.forward_width, rows.grad_filter_width);
  Planes x;
  x.pad = p.kernel_size / 2;
  x.width = p.width;
  x.height = p.height;
  x.pitch = max_of(x.pad + x.width, (p.out_width + widest - 1) * p.stride + p.kernel_size);
  return x;
}

Planes grad_planes(const Params& p, const RowKernels& rows) {
  const std::int64_t half = p.kernel_size / 2;
  const std::int64_t last_tile = round_up(p.width, rows.grad_input_width) - rows.grad_input_width;
  const std::int64_t grad_input_columns =
      (last_tile + rows.grad_input_width - 1 + half) / p.stride + half + 1;
  Planes g;
  g.pad = half;
  g.width = p.out_width;
  g.height = p.out_height;
  g.pitch = max_of(half + round_up(p.out_width, rows.grad_filter_width), grad_input_columns + half);
  return g;
}

// Rows of x that rows [begin, end) of y read.
std::int64_t first_input_row(const Params& p, std::int64_t begin) {
  return max_of<std::int64_t>(0, begin * p.stride - p.kernel_size / 2);
}
std::int64_t end_input_row(const Params& p, std::int64_t end) {
  return min_of<std::int64_t>(p.height, (end - 1) * p.stride - p.kernel_size / 2 + p.kernel_size);
}

// Runs one kind of tile over rows [begin, end) of the output, a group of rows at a time for each vector of
// channels.
void run_conv(void (*kernel)(const ConvJob&), ConvJob job, const Planes& in, const float* filter, int valid,
              std::int64_t begin, std::int64_t end) {
  float* out = job.out;
  for (std::int64_t y = begin; y < end; y += kRowsPerGroup) {
    for (int v = 0; v * kLanes < valid; ++v) {
      job.in = in.view(v);
      job.filter = filter + v * kLanes;
      job.out = out + v * kLanes;
      job.lanes = min_of(kLanes, valid - v * kLanes);
      job.y_begin = y;
      job.y_end = min_of(end, y + kRowsPerGroup);
      kernel(job);
    }
  }
}

void forward_block(const Params& p, const RowKernels& rows, std::int64_t band, std::int64_t image,
                   std::int64_t block, const float* filter, Planes& x) {
  const int valid = valid_channels(p, block);
  const float* source = p.x + image * p.height * p.width * p.channels + block * kBlock;
  ConvJob job{};
  job.out = p.y + image * p.out_height * p.out_width * p.channels + block * kBlock;
  job.out_row_stride = p.out_width * p.channels;
  job.out_col_stride = p.channels;
  job.out_width = p.out_width;
  for (std::int64_t begin = 0; begin < p.out_height; begin += band) {
    const std::int64_t end = min_of(p.out_height, begin + band);
    x.pack(source, p.channels, valid, first_input_row(p, begin), end_input_row(p, end));
    run_conv(rows.forward, job, x, filter, valid, begin, end);
  }
}

void forward(const Params& p) {
  const RowKernels rows = select_rows(p);
  const std::int64_t taps = p.kernel_size * p.kernel_size;
  Planes plan = input_planes(p, rows);
  Cut cut{};
  cut.num_blocks = ceil_div(p.channels, kBlock);
  cut.band_rows = band_rows(p, p.stride * plan.pitch * kBlock);
  cut.num_images = p.batch;
  cut.num_ranges = min_of(cut.num_blocks, ceil_div(16, p.batch));
  plan.num_rows = min_of<std::int64_t>(p.height, (cut.band_rows - 1) * p.stride + p.kernel_size);

  const FilterBlocks filters(
      thread_scratch(Scratch::kCall,
                     static_cast<std::size_t>(cut.num_blocks * FilterBlocks::kFloatsPerBlock)),
      cut.num_blocks);
  derive_filters(p, cut.num_blocks, filters);
  parallel_for(cut.num_items(), conv_flops(p), [&](std::int64_t item) {
    Planes x = plan;
    x.data = thread_scratch(Scratch::kThread, static_cast<std::size_t>(x.size()));
    x.clear_borders();
    const std::int64_t image = item / cut.num_ranges, range = item % cut.num_ranges;
    for (std::int64_t block = cut.first_block(range); block < cut.first_block(range + 1); ++block) {
      forward_block(p, rows, cut.band_rows, image, block, filters.filter + block * taps * kBlock, x);
    }
  });
}

// What one worker of the backward pass holds.
struct BackwardScratch {
  Planes x;
  Planes grad_y;
  float* zero_row;     // [columns of x][lanes]
  float* grad_filter;  // [K * K][16], of one image

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

void grad_filter_band(const Params& p, const RowKernels& rows, const BackwardScratch& s, int valid,
                      std::int64_t begin, std::int64_t end) {
  GradFilterJob job{};
  job.zero_row = s.zero_row;
  job.out_width = p.out_width;
  for (std::int64_t y = begin; y < end; y += kRowsPerGroup) {
    job.y_begin = y;
    job.y_end = min_of(end, y + kRowsPerGroup);
    for (int v = 0; v * kLanes < valid; ++v) {
      job.x = s.x.view(v);
      job.grad_y = s.grad_y.view(v);
      job.grad = s.grad_filter + v * kLanes;
      rows.grad_filter(job);
    }
  }
}

// One image, one block of channels: grad_x, and the filter gradient added to `sum`, [K * K][16].
void backward_block(const Params& p, const RowKernels& rows, std::int64_t band, std::int64_t image,
                    std::int64_t block, const float* filter, float* sum, BackwardScratch& s) {
  const int valid = valid_channels(p, block);
  const std::int64_t taps = p.kernel_size * p.kernel_size;
  const std::int64_t image_size = p.height * p.width * p.channels;
  const float* grad_y = p.grad_y + image * p.out_height * p.out_width * p.channels + block * kBlock;
  ConvJob job{};
  job.out = p.grad_x == nullptr ? nullptr : p.grad_x + image * image_size + block * kBlock;
  job.out_row_stride = p.width * p.channels;
  job.out_col_stride = p.channels;
  job.out_width = p.width;
  for (std::int64_t i = 0; i < taps * kBlock; ++i) s.grad_filter[i] = 0.0f;
  for (std::int64_t begin = 0; begin < p.out_height; begin += band) {
    const std::int64_t end = min_of(p.out_height, begin + band);
    s.grad_y.pack(grad_y, p.channels, valid, max_of<std::int64_t>(0, begin - p.kernel_size / 2),
                  min_of(p.out_height, end + p.kernel_size / 2));
    if (p.grad_bank != nullptr) {
      s.x.pack(p.x + image * image_size + block * kBlock, p.channels, valid, first_input_row(p, begin),
               end_input_row(p, end));
      grad_filter_band(p, rows, s, valid, begin, end);
    }
    if (p.grad_x != nullptr) {
      run_conv(rows.grad_input, job, s.grad_y, filter, valid, begin * p.stride,
               min_of(p.height, end * p.stride));
    }
  }
  if (p.grad_bank == nullptr) return;
  for (std::int64_t i = 0; i < taps * kBlock; ++i) sum[i] += s.grad_filter[i];
}

Cut cut_backward(const Params& p, std::int64_t floats_per_row) {
  // Enough items to balance 16 threads or so, few enough that folding the partial sums stays below a percent.
  constexpr double kFlopsPerItem = 2e6;
  const std::int64_t wanted =
      min_of<std::int64_t>(64, 1 + static_cast<std::int64_t>(conv_flops(p) / kFlopsPerItem));
  Cut cut{};
  cut.num_blocks = ceil_div(p.channels, kBlock);
  cut.band_rows = band_rows(p, floats_per_row);
  cut.num_ranges = min_of<std::int64_t>(cut.num_blocks, min_of<std::int64_t>(8, wanted));
  cut.num_images = min_of(p.batch, ceil_div(wanted, cut.num_ranges));
  return cut;
}

void backward(const Params& p) {
  const RowKernels rows = select_rows(p);
  const std::int64_t taps = p.kernel_size * p.kernel_size;
  BackwardScratch plan{input_planes(p, rows), grad_planes(p, rows), nullptr, nullptr};
  const Cut cut = cut_backward(p, (p.stride * plan.x.pitch + plan.grad_y.pitch) * kBlock);
  plan.x.num_rows = min_of<std::int64_t>(p.height, (cut.band_rows - 1) * p.stride + p.kernel_size);
  plan.grad_y.num_rows = min_of<std::int64_t>(p.out_height, cut.band_rows + p.kernel_size - 1);

  const std::int64_t group_size = cut.num_blocks * taps * kBlock;  // filter gradients of one group of images
  const std::int64_t filter_size = cut.num_blocks * FilterBlocks::kFloatsPerBlock;
  float* memory =
      thread_scratch(Scratch::kCall, static_cast<std::size_t>(filter_size + cut.num_images * group_size));
  const FilterBlocks filters(memory, cut.num_blocks);
  float* partial = memory + filter_size;  // [num_images][num_blocks][K * K][16]
  derive_filters(p, cut.num_blocks, filters);

  parallel_for(cut.num_items(), 2 * conv_flops(p), [&](std::int64_t item) {
    BackwardScratch scratch = plan;
    scratch.place(thread_scratch(Scratch::kThread, static_cast<std::size_t>(scratch.size())));
    const std::int64_t group = item / cut.num_ranges, range = item % cut.num_ranges;
    const std::int64_t first = cut.first_block(range), end = cut.first_block(range + 1);
    float* sums = partial + group * group_size;
    for (std::int64_t i = first * taps * kBlock; i < end * taps * kBlock; ++i) sums[i] = 0.0f;
    for (std::int64_t image = group * p.batch / cut.num_images;
         image < (group + 1) * p.batch / cut.num_images; ++image) {
      for (std::int64_t block = first; block < end; ++block) {
        const std::int64_t offset = block * taps * kBlock;
        backward_block(p, rows, cut.band_rows, image, block, filters.filter + offset, sums + offset, scratch);
      }
    }
  });
  if (p.grad_bank == nullptr) return;
  for (std::int64_t group = 1; group < cut.num_images; ++group) {
    const float* sums = partial + group * group_size;
    for (std::int64_t i = 0; i < group_size; ++i) partial[i] += sums[i];
  }
  derive_filters_backward(p, cut.num_blocks, partial, filters);
}

}  // namespace

DynamicDepthwiseConvKernel select_dynamic_depthwise_conv(const DynamicDepthwiseConvParams& p) {
  const RowKernels rows = select_rows(p);
  return {forward, backward, kLanes, rows.forward_width, rows.grad_input_width, rows.grad_filter_width};
}

}  // namespace pfnas::PFNAS_TIER

// SPDX-License-Identifier: Apache-2.0
// One step (a slab of rows or images x one block of channels) on planes that are already packed.
#pragma once

#include "common/simd.h"
#include "kernels/dynamic_depthwise_conv/params.h"
#include "kernels/dynamic_depthwise_conv/planes.h"
#include "kernels/dynamic_depthwise_conv/rows.h"
#include "kernels/dynamic_depthwise_conv/tiles.h"
#include "kernels/dynamic_depthwise_conv/walk.h"

namespace pfnas::PFNAS_TIER {

// Whether whole lines of an output are written and there are more of them than a cache keeps until the next
// op reads them.
static inline bool streams_past_caches(const Image& out, std::int64_t batch, const float* data) {
  constexpr std::int64_t kMinFloats = 4 << 20;  // 16 MB
  return kCanStream && out.channels % kLanes == 0 &&
         reinterpret_cast<std::uintptr_t>(data) % sizeof(Vec) == 0 &&
         batch * out.image_stride() >= kMinFloats;
}

static inline ConvJob conv_job(const Image& out, std::int64_t batch, float* data, const Step& step) {
  ConvJob job{};
  job.out = data + step.image * out.image_stride() + step.block * kBlock;
  job.out_image_stride = out.image_stride();
  job.out_row_stride = out.row_stride();
  job.out_col_stride = out.channels;
  job.out_width = out.width;
  job.num_images = step.num_images;
  job.streams = streams_past_caches(out, batch, data);
  return job;
}

// Runs one kind of tile over rows [begin, end) of the output; a few rows for one vector of channels, then for
// the next, so that the two halves of an output line are written while it is in L1. The first vector also
// fetches ahead.
static inline void run_conv(void (*kernel)(const ConvJob&), ConvJob job, const Planes& in,
                            const float* filter, int valid, std::int64_t begin, std::int64_t end) {
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
static inline void grad_filter_step(const DynamicDepthwiseConvParams& p, const RowKernels& rows,
                                    BackwardScratch& s, const Step& step, GradFilterJob job, float* sum) {
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

}  // namespace pfnas::PFNAS_TIER

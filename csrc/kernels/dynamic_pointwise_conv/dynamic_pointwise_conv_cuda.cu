// SPDX-License-Identifier: Apache-2.0
// Launches the CUDA kernels of dynamic_pointwise_conv.
//
//   forward  -> pointwise_tensor_core or pointwise_simt                              : y
//            -> fold_moments                                                         : mean, variance
//   backward -> the same kernels on transposed panels                                : grad_x
//            -> panel_gradient_tensor_core or panel_gradient_simt -> fold_panels     : grad_panels
#include "kernels/dynamic_pointwise_conv/cuda_panel_gradient.cuh"
#include "kernels/dynamic_pointwise_conv/cuda_params.h"
#include "kernels/dynamic_pointwise_conv/cuda_plan.h"
#include "kernels/dynamic_pointwise_conv/cuda_simt.cuh"
#include "kernels/dynamic_pointwise_conv/cuda_tensor_core.cuh"

namespace pfnas::cuda {
namespace {

using Params = DynamicPointwiseConvParams;

bool is_aligned(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; }

// Rows of a kernel's operand may be loaded as vectors.
bool allows_vectors(const void* rows, std::int64_t channels, PointwiseKernel kernel) {
  return channels % (kernel == PointwiseKernel::kTensorCore ? kChunk : kQuad) == 0 && is_aligned(rows);
}

// Calls f with a value of the stored type; tensor cores know no float32.
template <class F>
void dispatch_halves(Dtype dtype, F&& f) {
  dtype == Dtype::kBfloat16 ? f(__nv_bfloat16{}) : f(__half{});
}

template <bool kTransposed>
void launch_tiles(const Params& op, PointwiseKernel kernel, float* partial_moments, Stream stream) {
  PointwiseTileParams p{};
  p.op = op;
  p.partial_moments = partial_moments;
  p.output_tiles = static_cast<int>(divide_up(op.out_channels, kTileOutputs));
  p.vector_rows = allows_vectors(op.x, op.in_channels, kernel);
  p.vector_outputs = op.out_channels % kQuad == 0 && is_aligned(op.y) && is_aligned(op.residual) &&
                     is_aligned(op.scale) && is_aligned(op.shift);
  const auto blocks = static_cast<unsigned>(divide_up(op.num_pixels, kTilePixels) * p.output_tiles);
  if (kernel == PointwiseKernel::kTensorCore) {
    dispatch_halves(op.dtype, [&](auto zero) {
      launch(pointwise_tensor_core<decltype(zero), kTransposed>, blocks, kPointwiseThreads, stream, p);
    });
  } else {
    dispatch_storage(op.dtype, [&](auto zero) {
      launch(pointwise_simt<decltype(zero), kTransposed>, blocks, kPointwiseThreads, stream, p);
    });
  }
}

void input_gradient(const Params& params, PointwiseKernel kernel, Stream stream) {
  Params op{};
  op.num_pixels = params.num_pixels;
  op.in_channels = params.out_channels;
  op.out_channels = params.in_channels;
  op.max_in_channels = params.max_in_channels;
  op.num_panels = params.num_panels;
  op.dtype = params.dtype;
  op.panels = params.panels;
  op.x = params.grad_y;
  op.y = params.grad_x;
  launch_tiles<true>(op, kernel, nullptr, stream);
}

void panel_gradient(const Params& params, PointwiseKernel kernel, Stream stream) {
  PanelGradientParams p{};
  p.x = params.x;
  p.grad_y = params.grad_y;
  p.partial = params.workspace;
  p.num_pixels = params.num_pixels;
  p.in_channels = params.in_channels;
  p.out_channels = params.out_channels;
  p.plan = plan_panel_gradient(p.num_pixels, p.in_channels, p.out_channels);
  p.vector_x = allows_vectors(p.x, p.in_channels, kernel);
  p.vector_grad_y = allows_vectors(p.grad_y, p.out_channels, kernel);
  const auto blocks = static_cast<unsigned>(p.plan.splits * p.plan.input_tiles * p.plan.output_tiles);
  if (kernel == PointwiseKernel::kTensorCore) {
    dispatch_halves(params.dtype, [&](auto zero) {
      launch(panel_gradient_tensor_core<decltype(zero)>, blocks, kPointwiseThreads, stream, p);
    });
  } else {
    dispatch_storage(params.dtype, [&](auto zero) {
      launch(panel_gradient_simt<decltype(zero)>, blocks, kPointwiseThreads, stream, p);
    });
  }
  const FoldPanelsParams fold{p.partial,     params.grad_panels, p.plan.floats,
                              p.plan.splits, p.in_channels,      params.max_in_channels};
  dispatch_storage(params.dtype, [&](auto zero) {
    launch(fold_panels<decltype(zero)>, static_cast<unsigned>(divide_up(fold.count, kPanelColumns)),
           kPanelColumns * kPanelRows, stream, fold);
  });
}

}  // namespace

PointwiseKernel select_dynamic_pointwise_conv_kernel(Dtype dtype, int compute_capability) {
  constexpr int kFirstWithCopies = 80;
  const bool tensor_cores = dtype != Dtype::kFloat32 && compute_capability >= kFirstWithCopies;
  return tensor_cores ? PointwiseKernel::kTensorCore : PointwiseKernel::kSimt;
}

std::int64_t dynamic_pointwise_conv_moments_workspace(std::int64_t num_pixels, std::int64_t out_channels) {
  return divide_up(num_pixels, kTilePixels) * 2 * out_channels;
}

std::int64_t dynamic_pointwise_conv_backward_workspace(std::int64_t num_pixels, std::int64_t in_channels,
                                                       std::int64_t out_channels) {
  const PanelGradientPlan plan = plan_panel_gradient(num_pixels, in_channels, out_channels);
  return plan.splits * plan.floats;
}

void dynamic_pointwise_conv(const Params& params, PointwiseKernel kernel, Stream stream) {
  const bool moments = params.mean != nullptr;
  launch_tiles<false>(params, kernel, moments ? params.workspace : nullptr, stream);
  if (!moments) return;
  const FoldMomentsParams fold{params.workspace, params.mean, params.variance, params.num_pixels,
                               params.out_channels};
  launch(fold_moments, static_cast<unsigned>(divide_up(params.out_channels, kMomentColumns)),
         kMomentColumns * kMomentRows, stream, fold);
}

void dynamic_pointwise_conv_backward(const Params& params, PointwiseKernel kernel, Stream stream) {
  if (params.grad_x != nullptr) input_gradient(params, kernel, stream);
  if (params.grad_panels != nullptr) panel_gradient(params, kernel, stream);
}

}  // namespace pfnas::cuda

// SPDX-License-Identifier: Apache-2.0
// Launches the CUDA kernels of dynamic_depthwise_conv.
//
//   forward  -> derive_filter -> convolve
//   backward -> derive_filter -> convolve with flipped taps (stride 1) or convolve_transposed (stride 2)  :
//   grad_x
//            -> filter_gradient -> fold_splits -> filter_backward -> matrix_backward    : grad_bank,
//            grad_matrix_*
#include "kernels/dynamic_depthwise_conv/cuda_convolve.cuh"
#include "kernels/dynamic_depthwise_conv/cuda_filter.cuh"
#include "kernels/dynamic_depthwise_conv/cuda_filter_gradient.cuh"
#include "kernels/dynamic_depthwise_conv/cuda_params.h"
#include "kernels/dynamic_depthwise_conv/cuda_plan.h"

namespace pfnas::cuda {
namespace {

using Params = DynamicDepthwiseConvParams;

unsigned blocks(std::int64_t items, std::int64_t per_block) {
  return static_cast<unsigned>(divide_up(items, per_block));
}

FilterParams filter_params(const Params& p, const WorkspacePlan& at, bool flip) {
  FilterParams f{};
  f.bank = p.bank;
  f.matrix_5 = p.uses_matrix_5() ? p.matrix_5 : nullptr;
  f.matrix_3 = p.uses_matrix_3() ? p.matrix_3 : nullptr;
  f.taps = p.workspace + at.taps;
  f.channels = static_cast<int>(p.channels);
  f.row = static_cast<int>(at.row);
  f.kernel_size = p.kernel_size;
  f.max_kernel_size = p.max_kernel_size;
  f.flip = flip;
  return f;
}

ConvolveParams forward_params(const Params& p, const WorkspacePlan& at) {
  ConvolveParams c{};
  c.in = p.x;
  c.taps = p.workspace + at.taps;
  c.out = p.y;
  c.channels = p.channels;
  c.row = static_cast<int>(at.row);
  c.in_height = static_cast<int>(p.height), c.in_width = static_cast<int>(p.width);
  c.out_height = static_cast<int>(p.out_height), c.out_width = static_cast<int>(p.out_width);
  c.plan = plan_convolve(p.batch, p.channels, p.out_height, p.out_width, 1);
  return c;
}

ConvolveParams grad_input_params(const Params& p, const WorkspacePlan& at) {
  ConvolveParams c{};
  c.in = p.grad_y;
  c.taps = p.workspace + at.taps;
  c.out = p.grad_x;
  c.channels = p.channels;
  c.row = static_cast<int>(at.row);
  c.in_height = static_cast<int>(p.out_height), c.in_width = static_cast<int>(p.out_width);
  c.out_height = static_cast<int>(p.height), c.out_width = static_cast<int>(p.width);
  c.plan = plan_convolve(p.batch, p.channels, p.height, p.width, p.stride);
  return c;
}

FilterGradientParams filter_gradient_params(const Params& p, const WorkspacePlan& at) {
  FilterGradientParams g{};
  g.x = p.x;
  g.grad_y = p.grad_y;
  g.partial = p.workspace + at.partial;
  g.batch = p.batch;
  g.channels = p.channels;
  g.row = static_cast<int>(at.row);
  g.height = static_cast<int>(p.height), g.width = static_cast<int>(p.width);
  g.out_height = static_cast<int>(p.out_height), g.out_width = static_cast<int>(p.out_width);
  g.plan = plan_filter_gradient(p);
  return g;
}

template <class T>
void launch_derive_filter(const FilterParams& f, Stream stream) {
  launch(derive_filter<T>, blocks(f.row, kChannelsPerBlock), kThreads, stream, f);
}

template <class T, int kK>
void launch_convolve(const ConvolveParams& c, int stride, Stream stream) {
  const Dim3 grid(static_cast<unsigned>(c.plan.blocks()), static_cast<unsigned>(c.plan.chunks));
  if (stride == 1) {
    launch(convolve<T, kK, 1>, grid, kThreads, stream, c);
  } else {
    launch(convolve<T, kK, 2>, grid, kThreads, stream, c);
  }
}

template <class T, int kK>
void forward(const Params& p, Stream stream) {
  const WorkspacePlan at = plan_workspace(p, false);
  launch_derive_filter<T>(filter_params(p, at, false), stream);
  launch_convolve<T, kK>(forward_params(p, at), p.stride, stream);
}

template <class T, int kK>
void input_gradient(const Params& p, const WorkspacePlan& at, Stream stream) {
  launch_derive_filter<T>(filter_params(p, at, p.stride == 1), stream);
  const ConvolveParams c = grad_input_params(p, at);
  if (p.stride == 1) {
    launch_convolve<T, kK>(c, 1, stream);
  } else {
    const Dim3 grid(static_cast<unsigned>(c.plan.blocks()), static_cast<unsigned>(c.plan.chunks));
    launch(convolve_transposed<T, kK>, grid, kThreads, stream, c);
  }
}

template <class T, int kK>
void bank_gradient(const Params& p, const WorkspacePlan& at, Stream stream) {
  const FilterGradientParams g = filter_gradient_params(p, at);
  const Dim3 grid(static_cast<unsigned>(g.plan.splits), static_cast<unsigned>(g.plan.chunks));
  const auto threads = static_cast<unsigned>(g.plan.threads(kK));
  if (p.stride == 1) {
    launch(filter_gradient<T, kK, 1>, grid, threads, stream, g);
  } else {
    launch(filter_gradient<T, kK, 2>, grid, threads, stream, g);
  }
  const FoldParams fold{g.partial, p.workspace + at.grad_taps, kK * kK * at.row, g.plan.splits};
  launch(fold_splits, blocks(fold.count, kFoldColumns), kFoldColumns * kFoldRows, stream, fold);

  FilterParams f = filter_params(p, at, false);
  f.grad_taps = fold.sum;
  f.derivation = p.workspace + at.derivation;
  f.grad_bank = p.grad_bank;
  f.grad_matrix_5 = p.uses_matrix_5() ? p.grad_matrix_5 : nullptr;
  f.grad_matrix_3 = p.uses_matrix_3() ? p.grad_matrix_3 : nullptr;
  launch(filter_backward<T>, blocks(f.channels, kChannelsPerBlock), kThreads, stream, f);
  if (f.grad_matrix_5 == nullptr && f.grad_matrix_3 == nullptr) return;
  constexpr int kEntries = kTaps5 * kTaps5 + kTaps3 * kTaps3;
  launch(matrix_backward<T>, blocks(kEntries, kThreads / kWarp), kThreads, stream, f);
}

// Calls f with a value of the stored type and the kernel size as a constant.
template <class F>
void dispatch(const Params& p, F&& f) {
  dispatch_storage(p.dtype, [&](auto zero) {
    switch (p.kernel_size) {
      case 3:
        return f(zero, std::integral_constant<int, 3>{});
      case 5:
        return f(zero, std::integral_constant<int, 5>{});
      default:
        return f(zero, std::integral_constant<int, 7>{});
    }
  });
}

}  // namespace

std::int64_t dynamic_depthwise_conv_workspace(const Params& params, bool backward) {
  return plan_workspace(params, backward).total;
}

void dynamic_depthwise_conv_forward(const Params& params, Stream stream) {
  dispatch(params, [&](auto zero, auto kernel_size) {
    forward<decltype(zero), decltype(kernel_size)::value>(params, stream);
  });
}

void dynamic_depthwise_conv_backward(const Params& params, Stream stream) {
  const WorkspacePlan at = plan_workspace(params, true);
  dispatch(params, [&](auto zero, auto kernel_size) {
    using T = decltype(zero);
    constexpr int kK = decltype(kernel_size)::value;
    if (params.grad_x != nullptr) input_gradient<T, kK>(params, at, stream);
    if (params.grad_bank != nullptr) bank_gradient<T, kK>(params, at, stream);
  });
}

}  // namespace pfnas::cuda

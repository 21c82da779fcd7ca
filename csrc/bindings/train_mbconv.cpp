// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "bindings/ops.h"
#include "bindings/tensor_arg.h"
#include "common/check.h"
#include "common/isa.h"
#include "kernels/train_mbconv/params.h"

namespace py = pybind11;

namespace pfnas {

TrainMBConvKernel select_train_mbconv_kernel(Isa isa) {
#ifdef PFNAS_HAS_AVX512
  if (isa == Isa::kAvx512) return {avx512::train_mbconv_forward, avx512::train_mbconv_backward};
#endif
#ifdef PFNAS_HAS_AVX2
  if (isa == Isa::kAvx2) return {avx2::train_mbconv_forward, avx2::train_mbconv_backward};
#endif
  PFNAS_CHECK(isa == Isa::kPortable);
  return {portable::train_mbconv_forward, portable::train_mbconv_backward};
}

namespace {

constexpr const char* kOp = "train_mbconv";
constexpr std::int64_t kBlock = 16;

// Positions in the tuple of inputs; gradients come in the same order.
enum Input : std::size_t {
  kX,
  kExpandWeight,
  kBank,
  kMatrix5,
  kMatrix3,
  kProjectWeight,
  kNorms,  // gamma and beta of each stage: 6 entries
  kSeReduceWeight = kNorms + 6,
  kSeReduceBias,
  kSeExpandWeight,
  kSeExpandBias,
  kNumInputs
};
enum Kept : std::size_t { kExpanded, kDepthwise, kProjected, kMoments, kPooled, kHidden, kGate, kNumKept };

std::int64_t blocks(std::int64_t channels) { return (channels + kBlock - 1) / kBlock; }

TensorView view_floats(py::handle object, const char* argument) {
  const TensorView view = view_tensor(object, kOp, argument);
  PFNAS_CHECK(view.is_float32() && view.is_cpu());
  return view;
}

// A dense tensor of at least `count` floats.
float* dense(py::handle object, const char* argument, std::int64_t count) {
  const TensorView view = view_floats(object, argument);
  PFNAS_CHECK(view.is_contiguous() && view.numel() >= count);
  return static_cast<float*>(view.data);
}

float* activation(py::handle object, const char* argument, const std::array<std::int64_t, 4>& shape) {
  const TensorView view = view_floats(object, argument);
  PFNAS_CHECK(view.is_channels_last());
  for (std::size_t d = 0; d < 4; ++d) PFNAS_CHECK(view.shape[d] == shape[d]);
  return static_cast<float*>(view.data);
}

// A weight of [>= rows, stride >= columns] and whatever sizes of 1; returns the stride.
std::int64_t weight(py::handle object, const char* argument, std::int64_t rows, std::int64_t columns,
                    const float** data) {
  const TensorView view = view_floats(object, argument);
  PFNAS_CHECK(view.is_contiguous() && view.ndim >= 2 && view.shape[0] >= rows && view.shape[1] >= columns);
  PFNAS_CHECK(view.numel() == view.shape[0] * view.shape[1]);
  *data = static_cast<const float*>(view.data);
  return view.shape[1];
}

struct Sizes {
  std::int64_t mid_channels, out_channels, se_channels;
  int kernel_size, stride;
  bool residual;
  std::array<int, 3> activations;
  std::array<float, 3> eps;
  bool keep;
};

void set_sizes(TrainMBConvParams& p, py::handle x, const Sizes& sizes) {
  const TensorView view = view_floats(x, "x");
  PFNAS_CHECK(view.ndim == 4 && view.is_channels_last());
  p.batch = view.shape[0];
  p.in_channels = view.shape[1];
  p.height = view.shape[2];
  p.width = view.shape[3];
  p.x = static_cast<const float*>(view.data);
  p.mid_channels = sizes.mid_channels;
  p.out_channels = sizes.out_channels;
  p.se_channels = sizes.se_channels;
  p.kernel_size = sizes.kernel_size;
  p.stride = sizes.stride;
  p.residual = sizes.residual;
  p.keep = sizes.keep;
  p.out_height = (p.height + p.stride - 1) / p.stride;
  p.out_width = (p.width + p.stride - 1) / p.stride;
  for (std::size_t stage = 0; stage < 3; ++stage) {
    PFNAS_CHECK(sizes.activations[stage] >= 0 && sizes.activations[stage] <= 2);
    p.activation[stage] = static_cast<Activation>(sizes.activations[stage]);
    p.eps[stage] = sizes.eps[stage];
  }
  PFNAS_CHECK(p.stride == 1 || p.stride == 2);
  PFNAS_CHECK(p.kernel_size == 3 || p.kernel_size == 5 || p.kernel_size == 7);
  PFNAS_CHECK(p.mid_channels >= 1 && p.out_channels >= 1 && p.out_pixels() >= 2);
  PFNAS_CHECK(!p.residual || (p.stride == 1 && p.in_channels == p.out_channels));
}

void set_weights(TrainMBConvParams& p, const py::tuple& in) {
  PFNAS_CHECK(in.size() == kNumInputs);
  if (in[kExpandWeight].is_none()) {
    PFNAS_CHECK(p.in_channels == p.mid_channels && in[kNorms].is_none());
  } else {
    p.expand_stride =
        weight(in[kExpandWeight], "expand_weight", p.mid_channels, p.in_channels, &p.expand_weight);
  }
  const TensorView bank = view_floats(in[kBank], "depth_weight");
  PFNAS_CHECK(bank.is_contiguous() && bank.ndim == 4 && bank.shape[0] >= p.mid_channels &&
              bank.shape[1] == 1);
  PFNAS_CHECK(bank.shape[2] == bank.shape[3] && bank.shape[2] >= p.kernel_size && bank.shape[2] <= 7);
  p.bank = static_cast<const float*>(bank.data);
  p.max_kernel_size = static_cast<int>(bank.shape[2]);
  if (p.max_kernel_size == 7 && p.kernel_size < 7) p.matrix_5 = dense(in[kMatrix5], "matrix_5", 25 * 25);
  if (p.max_kernel_size > 3 && p.kernel_size == 3) p.matrix_3 = dense(in[kMatrix3], "matrix_3", 9 * 9);
  p.project_stride =
      weight(in[kProjectWeight], "project_weight", p.out_channels, p.mid_channels, &p.project_weight);
  const std::int64_t channels[3] = {p.mid_channels, p.mid_channels, p.out_channels};
  for (std::size_t stage = 0; stage < 3; ++stage) {
    if (in[kNorms + 2 * stage].is_none()) {
      PFNAS_CHECK(stage != kProjectStage && (stage != kExpandStage || !p.has_expand()));
      continue;
    }
    p.gamma[stage] = dense(in[kNorms + 2 * stage], "gamma", channels[stage]);
    p.beta[stage] = dense(in[kNorms + 2 * stage + 1], "beta", channels[stage]);
  }
  if (!p.has_se()) return;
  p.se_reduce_stride =
      weight(in[kSeReduceWeight], "se_reduce_weight", p.se_channels, p.mid_channels, &p.se_reduce_weight);
  p.se_reduce_bias = dense(in[kSeReduceBias], "se_reduce_bias", p.se_channels);
  p.se_expand_stride =
      weight(in[kSeExpandWeight], "se_expand_weight", p.mid_channels, p.se_channels, &p.se_expand_weight);
  p.se_expand_bias = dense(in[kSeExpandBias], "se_expand_bias", p.mid_channels);
}

void set_kept(TrainMBConvParams& p, const py::tuple& kept) {
  PFNAS_CHECK(kept.size() == kNumKept);
  const std::int64_t mid = blocks(p.mid_channels) * kBlock;
  if (p.keep) {
    p.expanded = dense(kept[kExpanded], "expanded", mid * p.in_pixels());
    p.depthwise = dense(kept[kDepthwise], "depthwise", mid * p.out_pixels());
    p.projected = dense(kept[kProjected], "projected", blocks(p.out_channels) * kBlock * p.out_pixels());
  }
  p.moments = dense(kept[kMoments], "moments", 3 * (2 * p.mid_channels + p.out_channels));
  if (!p.has_se()) return;
  p.pooled = dense(kept[kPooled], "pooled", mid * p.batch);
  p.hidden = dense(kept[kHidden], "hidden", blocks(p.se_channels) * kBlock * p.batch);
  p.gate = dense(kept[kGate], "gate", mid * p.batch);
}

// Gradients arrive uninitialised: what the kernels do not write is noted for clear_unwritten.
float* dense_gradient(TrainMBConvParams& p, py::handle object, std::int64_t count) {
  float* data = dense(object, "gradient", count);
  p.note_gradient({data, 1, count, count, view_floats(object, "gradient").numel()});
  return data;
}

// One that the kernels add to.
float* summed_gradient(TrainMBConvParams& p, py::handle object, std::int64_t count) {
  float* data = dense(object, "gradient", count);
  p.note_gradient({data, 0, 0, 0, view_floats(object, "gradient").numel()});
  return data;
}

float* weight_gradient(TrainMBConvParams& p, py::handle object, std::int64_t rows, std::int64_t columns,
                       std::int64_t stride) {
  const float* data = nullptr;
  PFNAS_CHECK(weight(object, "gradient", rows, columns, &data) == stride);
  auto* grad = const_cast<float*>(data);
  p.note_gradient({grad, rows, columns, stride, view_floats(object, "gradient").numel()});
  return grad;
}

void set_gradients(TrainMBConvParams& p, const py::tuple& grads) {
  PFNAS_CHECK(grads.size() == kNumInputs);
  if (!grads[kX].is_none()) {
    p.grad_x = activation(grads[kX], "grad_x", {p.batch, p.in_channels, p.height, p.width});
  }
  if (p.has_expand()) {
    p.grad_expand = weight_gradient(p, grads[kExpandWeight], p.mid_channels, p.in_channels, p.expand_stride);
  }
  p.grad_bank = summed_gradient(p, grads[kBank], p.mid_channels * p.max_kernel_size * p.max_kernel_size);
  if (p.matrix_5 != nullptr) p.grad_matrix_5 = summed_gradient(p, grads[kMatrix5], 25 * 25);
  if (p.matrix_3 != nullptr) p.grad_matrix_3 = summed_gradient(p, grads[kMatrix3], 9 * 9);
  p.grad_project =
      weight_gradient(p, grads[kProjectWeight], p.out_channels, p.mid_channels, p.project_stride);
  for (std::size_t stage = 0; stage < 3; ++stage) {
    if (p.gamma[stage] == nullptr) continue;
    const std::int64_t channels = stage == kProjectStage ? p.out_channels : p.mid_channels;
    p.grad_gamma[stage] = dense_gradient(p, grads[kNorms + 2 * stage], channels);
    p.grad_beta[stage] = dense_gradient(p, grads[kNorms + 2 * stage + 1], channels);
  }
  if (!p.has_se()) return;
  p.grad_se_reduce_weight =
      weight_gradient(p, grads[kSeReduceWeight], p.se_channels, p.mid_channels, p.se_reduce_stride);
  p.grad_se_reduce_bias = dense_gradient(p, grads[kSeReduceBias], p.se_channels);
  p.grad_se_expand_weight =
      weight_gradient(p, grads[kSeExpandWeight], p.mid_channels, p.se_channels, p.se_expand_stride);
  p.grad_se_expand_bias = dense_gradient(p, grads[kSeExpandBias], p.mid_channels);
}

TrainMBConvParams make_params(const py::tuple& inputs, const py::tuple& kept, const Sizes& sizes) {
  TrainMBConvParams p;
  PFNAS_CHECK(inputs.size() == kNumInputs);
  set_sizes(p, inputs[kX], sizes);
  set_weights(p, inputs);
  set_kept(p, kept);
  return p;
}

void forward(const py::tuple& inputs, const py::tuple& kept, py::handle y, std::int64_t mid_channels,
             std::int64_t out_channels, std::int64_t se_channels, int kernel_size, int stride, bool residual,
             const std::array<int, 3>& activations, const std::array<float, 3>& eps, bool keep) {
  TrainMBConvParams p = make_params(
      inputs, kept,
      {mid_channels, out_channels, se_channels, kernel_size, stride, residual, activations, eps, keep});
  p.y = activation(y, "y", {p.batch, p.out_channels, p.out_height, p.out_width});
  const auto kernel = select_train_mbconv_kernel(active_isa());
  const py::gil_scoped_release released;
  kernel.forward(p);
}

// `gradients`: one per input; None where the input is absent, or (x only) not wanted.
void backward(py::handle grad_y, const py::tuple& inputs, const py::tuple& kept, const py::tuple& gradients,
              std::int64_t mid_channels, std::int64_t out_channels, std::int64_t se_channels, int kernel_size,
              int stride, bool residual, const std::array<int, 3>& activations,
              const std::array<float, 3>& eps, bool keep) {
  TrainMBConvParams p = make_params(
      inputs, kept,
      {mid_channels, out_channels, se_channels, kernel_size, stride, residual, activations, eps, keep});
  p.grad_y = activation(grad_y, "grad_y", {p.batch, p.out_channels, p.out_height, p.out_width});
  set_gradients(p, gradients);
  const auto kernel = select_train_mbconv_kernel(active_isa());
  const py::gil_scoped_release released;
  clear_unwritten(p);
  kernel.backward(p);
}

}  // namespace

void register_train_mbconv(py::module_& m) {
  m.def("train_mbconv_forward", &forward);
  m.def("train_mbconv_backward", &backward);
}

}  // namespace pfnas

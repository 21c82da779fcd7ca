// SPDX-License-Identifier: Apache-2.0
// Checks what Python hands over, fills Params, launches on torch's current stream and returns. No
// synchronisation.
#include <pybind11/pybind11.h>

#include "bindings/cuda_arg.h"
#include "bindings/ops.h"
#include "common/check.h"
#include "common/panels.h"
#include "kernels/dynamic_pointwise_conv/cuda_params.h"

namespace py = pybind11;

namespace pfnas {
namespace {

using cuda::CallArguments;
using Params = cuda::DynamicPointwiseConvParams;
constexpr const char* kOp = "dynamic_pointwise_conv";

TensorView activation(const CallArguments& call, py::handle object, const char* argument) {
  const TensorView view = call.stored(object, argument);
  PFNAS_CHECK(view.is_channels_last());
  return view;
}

// null for None; else [size], float32.
const float* optional_vector(const CallArguments& call, py::handle object, const char* argument,
                             std::int64_t size) {
  if (object.is_none()) return nullptr;
  const TensorView view = call.floats(object, argument);
  PFNAS_CHECK(view.ndim == 1 && view.shape[0] == size);
  return static_cast<const float*>(view.data);
}

TensorView panels(const CallArguments& call, py::handle object, const char* argument) {
  const TensorView view = call.stored(object, argument);
  PFNAS_CHECK(view.is_contiguous() && view.ndim == 3 && view.shape[2] == kPanelWidth);
  PFNAS_CHECK(reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0);  // copied 16 bytes at a time
  return view;
}

// Sizes, from the tensors of I and of O channels.
Params make_params(const CallArguments& call, const TensorView& in, const TensorView& packed,
                   const TensorView& out) {
  Params p;
  p.num_pixels = in.shape[0] * in.shape[2] * in.shape[3];
  p.in_channels = in.shape[1];
  p.out_channels = out.shape[1];
  p.max_in_channels = packed.shape[1];
  p.num_panels = packed.shape[0];
  PFNAS_CHECK(p.num_pixels == out.shape[0] * out.shape[2] * out.shape[3]);
  PFNAS_CHECK(p.in_channels >= 1 && p.in_channels <= p.max_in_channels);
  PFNAS_CHECK(num_panels(p.out_channels) <= p.num_panels);
  p.dtype = call.dtype();
  p.panels = packed.data;
  return p;
}

float* workspace_arg(const CallArguments& call, py::handle object, std::int64_t floats) {
  const TensorView view = call.floats(object, "workspace");
  PFNAS_CHECK(view.numel() >= floats);
  PFNAS_CHECK(reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0);
  return static_cast<float*>(view.data);
}

void run(const CallArguments& call, const Params& p,
         void (*function)(const Params&, cuda::PointwiseKernel, cuda::Stream)) {
  const cuda::DeviceGuard guard(call.device());
  const auto kernel =
      cuda::select_dynamic_pointwise_conv_kernel(p.dtype, cuda::compute_capability(call.device()));
  const py::gil_scoped_release released;
  function(p, kernel, call.stream());
}

void forward(py::handle x, py::handle packed, py::handle scale, py::handle shift, py::handle residual,
             int activation_kind, py::handle y) {
  const CallArguments call(kOp, x, "x");
  const TensorView in = activation(call, x, "x"), out = activation(call, y, "y");
  Params p = make_params(call, in, panels(call, packed, "panels"), out);
  PFNAS_CHECK(activation_kind >= 0 && activation_kind <= 2);
  p.activation = static_cast<Activation>(activation_kind);
  p.x = in.data;
  p.y = out.data;
  p.scale = optional_vector(call, scale, "scale", p.out_channels);
  p.shift = optional_vector(call, shift, "shift", p.out_channels);
  if (!residual.is_none()) {
    const TensorView added = activation(call, residual, "residual");
    for (int d = 0; d < 4; ++d) PFNAS_CHECK(added.shape[d] == out.shape[d]);
    p.residual = added.data;
  }
  if (p.num_pixels == 0) return;
  run(call, p, cuda::dynamic_pointwise_conv);
}

// The plain product, with mean and biased variance of every output over all pixels of y as stored.
void moments(py::handle x, py::handle packed, py::handle workspace, py::handle y, py::handle mean,
             py::handle variance) {
  const CallArguments call(kOp, x, "x");
  const TensorView in = activation(call, x, "x"), out = activation(call, y, "y");
  Params p = make_params(call, in, panels(call, packed, "panels"), out);
  PFNAS_CHECK(p.num_pixels > 0);
  p.x = in.data;
  p.y = out.data;
  for (const py::handle vector : {mean, variance}) {
    const TensorView view = call.floats(vector, "moments");
    PFNAS_CHECK(view.ndim == 1 && view.shape[0] == p.out_channels);
    (vector.is(mean) ? p.mean : p.variance) = static_cast<float*>(view.data);
  }
  p.workspace = workspace_arg(call, workspace,
                              cuda::dynamic_pointwise_conv_moments_workspace(p.num_pixels, p.out_channels));
  run(call, p, cuda::dynamic_pointwise_conv);
}

// grad_x, grad_panels: None where not wanted. grad_panels arrives filled with zeros.
void backward(py::handle grad_y, py::handle x, py::handle packed, py::handle workspace, py::handle grad_x,
              py::handle grad_panels) {
  const CallArguments call(kOp, x, "x");
  const TensorView in = activation(call, x, "x"), out = activation(call, grad_y, "grad_y");
  const TensorView weights = panels(call, packed, "panels");
  Params p = make_params(call, in, weights, out);
  p.x = in.data;
  p.grad_y = out.data;
  if (!grad_x.is_none()) {
    const TensorView gradient = activation(call, grad_x, "grad_x");
    for (int d = 0; d < 4; ++d) PFNAS_CHECK(gradient.shape[d] == in.shape[d]);
    p.grad_x = gradient.data;
  }
  if (!grad_panels.is_none()) {
    const TensorView gradient = panels(call, grad_panels, "grad_panels");
    for (int d = 0; d < 3; ++d) PFNAS_CHECK(gradient.shape[d] == weights.shape[d]);
    p.grad_panels = gradient.data;
    p.workspace = workspace_arg(
        call, workspace,
        cuda::dynamic_pointwise_conv_backward_workspace(p.num_pixels, p.in_channels, p.out_channels));
  }
  if (p.num_pixels == 0) return;
  run(call, p, cuda::dynamic_pointwise_conv_backward);
}

}  // namespace

void register_dynamic_pointwise_conv_cuda(py::module_& m) {
  m.def("dynamic_pointwise_conv_cuda_forward", &forward);
  m.def("dynamic_pointwise_conv_cuda_moments", &moments);
  m.def("dynamic_pointwise_conv_cuda_backward", &backward);
  m.def("dynamic_pointwise_conv_cuda_moments_workspace", &cuda::dynamic_pointwise_conv_moments_workspace);
  m.def("dynamic_pointwise_conv_cuda_backward_workspace", &cuda::dynamic_pointwise_conv_backward_workspace);
}

}  // namespace pfnas

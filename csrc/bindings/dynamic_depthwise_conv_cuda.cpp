// SPDX-License-Identifier: Apache-2.0
// Checks what Python hands over, fills Params, launches on torch's current stream and returns. No
// synchronisation.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "bindings/cuda_arg.h"
#include "bindings/ops.h"
#include "common/check.h"
#include "kernels/dynamic_depthwise_conv/cuda_params.h"
#include "kernels/dynamic_depthwise_conv/cuda_plan.h"

namespace py = pybind11;

namespace pfnas {
namespace {

using cuda::CallArguments;
using Params = cuda::DynamicDepthwiseConvParams;
constexpr const char* kOp = "dynamic_depthwise_conv";

void set_sizes(Params& p, const std::int64_t (&x_shape)[4], int kernel_size, int max_kernel_size,
               int stride) {
  p.batch = x_shape[0];
  p.channels = x_shape[1];
  p.height = x_shape[2];
  p.width = x_shape[3];
  p.kernel_size = kernel_size;
  p.max_kernel_size = max_kernel_size;
  p.stride = stride;
  p.out_height = (p.height + stride - 1) / stride;
  p.out_width = (p.width + stride - 1) / stride;
  PFNAS_CHECK(stride == 1 || stride == 2);
  PFNAS_CHECK(kernel_size == 3 || kernel_size == 5 || kernel_size == 7);
  PFNAS_CHECK(max_kernel_size >= kernel_size && max_kernel_size <= 7 && max_kernel_size % 2 == 1);
  PFNAS_CHECK(p.channels >= 1 && p.height >= 1 && p.width >= 1);
  constexpr std::int64_t kMaxSize = 1 << 24;  // rows, columns and channels are 32-bit in the kernels
  PFNAS_CHECK(p.channels < kMaxSize && p.height < kMaxSize && p.width < kMaxSize);
}

void* activation(const CallArguments& call, py::handle object, const char* argument, const Params& p,
                 bool output) {
  const TensorView view = call.stored(object, argument);
  PFNAS_CHECK(view.is_channels_last());
  PFNAS_CHECK(view.shape[0] == p.batch && view.shape[1] == p.channels);
  PFNAS_CHECK(view.shape[2] == (output ? p.out_height : p.height));
  PFNAS_CHECK(view.shape[3] == (output ? p.out_width : p.width));
  return view.data;
}

void* matrix(const CallArguments& call, py::handle object, const char* argument, std::int64_t size) {
  const TensorView view = call.stored(object, argument);
  PFNAS_CHECK(view.is_contiguous() && view.ndim == 2 && view.shape[0] == size && view.shape[1] == size);
  return view.data;
}

TensorView bank(const CallArguments& call, py::handle object, const char* argument) {
  const TensorView view = call.stored(object, argument);
  PFNAS_CHECK(view.is_contiguous() && view.ndim == 4 && view.shape[1] == 1 && view.shape[2] == view.shape[3]);
  return view;
}

Params make_params(const CallArguments& call, py::handle x, py::handle weight, py::handle matrix_5,
                   py::handle matrix_3, int kernel_size, int stride, py::handle workspace, bool backward) {
  const TensorView in = call.stored(x, "x"), filters = bank(call, weight, "weight");
  PFNAS_CHECK(in.ndim == 4);
  const std::int64_t shape[4] = {in.shape[0], in.shape[1], in.shape[2], in.shape[3]};
  Params p;
  set_sizes(p, shape, kernel_size, static_cast<int>(filters.shape[2]), stride);
  PFNAS_CHECK(p.channels <= filters.shape[0]);
  p.dtype = call.dtype();
  p.bank = filters.data;
  p.x = activation(call, x, "x", p, false);
  if (p.uses_matrix_5()) p.matrix_5 = matrix(call, matrix_5, "matrix_5", 25);
  if (p.uses_matrix_3()) p.matrix_3 = matrix(call, matrix_3, "matrix_3", 9);
  const TensorView scratch = call.floats(workspace, "workspace");
  PFNAS_CHECK(scratch.numel() >= cuda::dynamic_depthwise_conv_workspace(p, backward));
  p.workspace = static_cast<float*>(scratch.data);
  return p;
}

void forward(py::handle x, py::handle weight, py::handle matrix_5, py::handle matrix_3, int kernel_size,
             int stride, py::handle workspace, py::handle y) {
  const CallArguments call(kOp, x, "x");
  Params p = make_params(call, x, weight, matrix_5, matrix_3, kernel_size, stride, workspace, false);
  p.y = activation(call, y, "y", p, true);
  if (p.batch == 0) return;
  const cuda::DeviceGuard guard(call.device());
  const py::gil_scoped_release released;
  cuda::dynamic_depthwise_conv_forward(p, call.stream());
}

// grad_x, grad_weight: None where not wanted. grad_weight and the matrices' gradients arrive filled with
// zeros.
void backward(py::handle grad_y, py::handle x, py::handle weight, py::handle matrix_5, py::handle matrix_3,
              int kernel_size, int stride, py::handle workspace, py::handle grad_x, py::handle grad_weight,
              py::handle grad_matrix_5, py::handle grad_matrix_3) {
  const CallArguments call(kOp, x, "x");
  Params p = make_params(call, x, weight, matrix_5, matrix_3, kernel_size, stride, workspace, true);
  p.grad_y = activation(call, grad_y, "grad_y", p, true);
  if (!grad_x.is_none()) p.grad_x = activation(call, grad_x, "grad_x", p, false);
  if (!grad_weight.is_none()) {
    p.grad_bank = bank(call, grad_weight, "grad_weight").data;
    if (p.uses_matrix_5()) p.grad_matrix_5 = matrix(call, grad_matrix_5, "grad_matrix_5", 25);
    if (p.uses_matrix_3()) p.grad_matrix_3 = matrix(call, grad_matrix_3, "grad_matrix_3", 9);
  }
  if (p.batch == 0) return;
  const cuda::DeviceGuard guard(call.device());
  const py::gil_scoped_release released;
  cuda::dynamic_depthwise_conv_backward(p, call.stream());
}

std::int64_t workspace(const std::array<std::int64_t, 4>& x_shape, int kernel_size, int max_kernel_size,
                       int stride, bool for_backward) {
  Params p;
  set_sizes(p, {x_shape[0], x_shape[1], x_shape[2], x_shape[3]}, kernel_size, max_kernel_size, stride);
  return cuda::dynamic_depthwise_conv_workspace(p, for_backward);
}

// How a convolution that writes [batch, channels, height, width] is cut, for tests of its traffic.
py::dict plan(std::int64_t batch, std::int64_t channels, std::int64_t height, std::int64_t width, int step) {
  const cuda::ConvolvePlan plan = cuda::plan_convolve(batch, channels, height, width, step);
  py::dict result;
  result["pairs"] = plan.pairs;
  result["strips"] = plan.strips;
  result["chunks"] = plan.chunks;
  result["strips_per_row"] = plan.strips_per_row;
  result["bands"] = plan.bands;
  result["band_rows"] = plan.band_rows;
  return result;
}

// How the gradient of the filter is cut, for tests of its traffic.
py::dict filter_plan(const std::array<std::int64_t, 4>& x_shape, int kernel_size, int stride) {
  Params p;
  set_sizes(p, {x_shape[0], x_shape[1], x_shape[2], x_shape[3]}, kernel_size, kernel_size, stride);
  const cuda::FilterPlan plan = cuda::plan_filter_gradient(p);
  py::dict result;
  result["pairs"] = plan.pairs;
  result["chunks"] = plan.chunks;
  result["splits"] = plan.splits;
  result["rows_per_split"] = plan.rows_per_split;
  return result;
}

}  // namespace

void register_dynamic_depthwise_conv_cuda(py::module_& m) {
  m.def("dynamic_depthwise_conv_cuda_forward", &forward);
  m.def("dynamic_depthwise_conv_cuda_backward", &backward);
  m.def("dynamic_depthwise_conv_cuda_workspace", &workspace);
  m.def("dynamic_depthwise_conv_cuda_plan", &plan);
  m.def("dynamic_depthwise_conv_cuda_filter_plan", &filter_plan);
}

}  // namespace pfnas

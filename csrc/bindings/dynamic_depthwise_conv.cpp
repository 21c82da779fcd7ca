// SPDX-License-Identifier: Apache-2.0
// Checks what Python hands over, fills Params, picks the kernel, calls it without the GIL. No loops over data
// here.
#include <pybind11/pybind11.h>

#include <string>

#include "bindings/ops.h"
#include "bindings/tensor_arg.h"
#include "common/check.h"
#include "kernels/dynamic_depthwise_conv/params.h"

namespace py = pybind11;

namespace pfnas {

DynamicDepthwiseConvKernel select_dynamic_depthwise_conv_kernel(const DynamicDepthwiseConvParams& params,
                                                                Isa isa) {
#ifdef PFNAS_HAS_AVX512
  if (isa == Isa::kAvx512) return avx512::select_dynamic_depthwise_conv(params);
#endif
#ifdef PFNAS_HAS_AVX2
  if (isa == Isa::kAvx2) return avx2::select_dynamic_depthwise_conv(params);
#endif
  PFNAS_CHECK(isa == Isa::kPortable);
  return portable::select_dynamic_depthwise_conv(params);
}

namespace {

constexpr const char* kOp = "dynamic_depthwise_conv";

// The public function has checked the user's arguments; what fails here is a defect of the Python layer.
const float* activation(py::handle object, const char* argument, const std::int64_t (&shape)[4]) {
  const TensorView view = view_tensor(object, kOp, argument);
  PFNAS_CHECK(view.is_float32() && view.is_cpu() && view.is_channels_last());
  for (int d = 0; d < 4; ++d) PFNAS_CHECK(view.shape[d] == shape[d]);
  return static_cast<const float*>(view.data);
}

float* matrix(py::handle object, const char* argument, std::int64_t size) {
  const TensorView view = view_tensor(object, kOp, argument);
  PFNAS_CHECK(view.is_float32() && view.is_cpu() && view.is_contiguous());
  PFNAS_CHECK(view.ndim == 2 && view.shape[0] == size && view.shape[1] == size);
  return static_cast<float*>(view.data);
}

TensorView checked_bank(py::handle object, const char* argument) {
  const TensorView view = view_tensor(object, kOp, argument);
  PFNAS_CHECK(view.is_float32() && view.is_cpu() && view.is_contiguous());
  PFNAS_CHECK(view.ndim == 4 && view.shape[1] == 1 && view.shape[2] == view.shape[3]);
  return view;
}

DynamicDepthwiseConvParams make_params(py::handle weight, py::handle matrix_5, py::handle matrix_3,
                                       const std::int64_t (&x_shape)[4], int kernel_size, int stride) {
  const TensorView bank = checked_bank(weight, "weight");
  DynamicDepthwiseConvParams p;
  p.batch = x_shape[0];
  p.channels = x_shape[1];
  p.height = x_shape[2];
  p.width = x_shape[3];
  p.kernel_size = kernel_size;
  p.stride = stride;
  p.max_kernel_size = static_cast<int>(bank.shape[2]);
  PFNAS_CHECK(stride == 1 || stride == 2);
  PFNAS_CHECK(kernel_size == 3 || kernel_size == 5 || kernel_size == 7);
  PFNAS_CHECK(p.max_kernel_size >= kernel_size && p.max_kernel_size <= 7 && p.max_kernel_size % 2 == 1);
  PFNAS_CHECK(p.channels >= 1 && p.channels <= bank.shape[0] && p.height >= 1 && p.width >= 1);
  p.out_height = (p.height + stride - 1) / stride;
  p.out_width = (p.width + stride - 1) / stride;
  p.bank = static_cast<const float*>(bank.data);
  if (p.uses_matrix_5()) p.matrix_5 = matrix(matrix_5, "matrix_5", 25);
  if (p.uses_matrix_3()) p.matrix_3 = matrix(matrix_3, "matrix_3", 9);
  return p;
}

void shape_of(py::handle object, const char* argument, std::int64_t (&shape)[4]) {
  const TensorView view = view_tensor(object, kOp, argument);
  PFNAS_CHECK(view.ndim == 4);
  for (int d = 0; d < 4; ++d) shape[d] = view.shape[d];
}

void forward(py::handle x, py::handle weight, py::handle matrix_5, py::handle matrix_3, int kernel_size,
             int stride, py::handle y) {
  std::int64_t shape[4];
  shape_of(x, "x", shape);
  DynamicDepthwiseConvParams p = make_params(weight, matrix_5, matrix_3, shape, kernel_size, stride);
  p.x = activation(x, "x", shape);
  p.y = const_cast<float*>(activation(y, "y", {p.batch, p.channels, p.out_height, p.out_width}));
  if (p.batch == 0) return;
  const auto kernel = select_dynamic_depthwise_conv_kernel(p, active_isa());
  const py::gil_scoped_release released;
  kernel.forward(p);
}

// grad_x, grad_weight: None where not wanted. grad_weight and the matrices' gradients arrive filled with
// zeros.
void backward(py::handle grad_y, py::handle x, py::handle weight, py::handle matrix_5, py::handle matrix_3,
              int kernel_size, int stride, py::handle grad_x, py::handle grad_weight,
              py::handle grad_matrix_5, py::handle grad_matrix_3) {
  std::int64_t shape[4];
  shape_of(x, "x", shape);
  DynamicDepthwiseConvParams p = make_params(weight, matrix_5, matrix_3, shape, kernel_size, stride);
  p.x = activation(x, "x", shape);
  p.grad_y = activation(grad_y, "grad_y", {p.batch, p.channels, p.out_height, p.out_width});
  if (!grad_x.is_none()) p.grad_x = const_cast<float*>(activation(grad_x, "grad_x", shape));
  if (!grad_weight.is_none()) {
    p.grad_bank = static_cast<float*>(checked_bank(grad_weight, "grad_weight").data);
    if (p.uses_matrix_5()) p.grad_matrix_5 = matrix(grad_matrix_5, "grad_matrix_5", 25);
    if (p.uses_matrix_3()) p.grad_matrix_3 = matrix(grad_matrix_3, "grad_matrix_3", 9);
  }
  if (p.batch == 0) return;
  const auto kernel = select_dynamic_depthwise_conv_kernel(p, active_isa());
  const py::gil_scoped_release released;
  kernel.backward(p);
}

// The name of what would run, for tests: e.g. "f32_k7_s1_l8_fwd8_gin8_gw8" (lanes, then tile widths).
std::string selected(std::int64_t height, std::int64_t width, int kernel_size, int stride) {
  DynamicDepthwiseConvParams p;
  p.batch = p.channels = 1;
  p.height = height;
  p.width = width;
  p.out_height = (height + stride - 1) / stride;
  p.out_width = (width + stride - 1) / stride;
  p.kernel_size = p.max_kernel_size = kernel_size;
  p.stride = stride;
  const auto kernel = select_dynamic_depthwise_conv_kernel(p, active_isa());
  return "f32_k" + std::to_string(kernel_size) + "_s" + std::to_string(stride) + "_l" +
         std::to_string(kernel.lanes) + "_fwd" + std::to_string(kernel.forward_width) + "_gin" +
         std::to_string(kernel.grad_input_width) + "_gw" + std::to_string(kernel.grad_filter_width);
}

}  // namespace

void register_dynamic_depthwise_conv(py::module_& m) {
  m.def("dynamic_depthwise_conv_forward", &forward);
  m.def("dynamic_depthwise_conv_backward", &backward);
  m.def("select_dynamic_depthwise_conv_kernel", &selected, py::arg("height"), py::arg("width"),
        py::arg("kernel_size"), py::arg("stride"));
}

}  // namespace pfnas

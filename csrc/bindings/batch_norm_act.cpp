// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>

#include "bindings/ops.h"
#include "bindings/tensor_arg.h"
#include "common/check.h"
#include "common/isa.h"
#include "kernels/batch_norm_act/params.h"

namespace py = pybind11;

namespace pfnas {

BatchNormActKernel select_batch_norm_act_kernel(Isa isa) {
#ifdef PFNAS_HAS_AVX512
  if (isa == Isa::kAvx512) return {avx512::batch_norm_act_forward, avx512::batch_norm_act_backward};
#endif
#ifdef PFNAS_HAS_AVX2
  if (isa == Isa::kAvx2) return {avx2::batch_norm_act_forward, avx2::batch_norm_act_backward};
#endif
  PFNAS_CHECK(isa == Isa::kPortable);
  return {portable::batch_norm_act_forward, portable::batch_norm_act_backward};
}

namespace {

constexpr const char* kOp = "batch_norm_act";

// A dense tensor of `count` floats.
float* dense(py::handle object, const char* argument, std::int64_t count) {
  const TensorView view = view_tensor(object, kOp, argument);
  PFNAS_CHECK(view.is_float32() && view.is_cpu() && view.is_contiguous() && view.numel() == count);
  return static_cast<float*>(view.data);
}

// [N, C, H, W] in channels_last with the sizes of the call.
float* rows(py::handle object, const char* argument, const BatchNormActParams& p) {
  const TensorView view = view_tensor(object, kOp, argument);
  PFNAS_CHECK(view.is_float32() && view.is_cpu() && view.ndim == 4 && view.is_channels_last());
  PFNAS_CHECK(view.shape[1] == p.channels && view.numel() == p.rows * p.channels);
  return static_cast<float*>(view.data);
}

BatchNormActParams make_params(py::handle x, py::handle gamma, py::handle beta, py::handle moments,
                               int activation, float eps) {
  const TensorView view = view_tensor(x, kOp, "x");
  PFNAS_CHECK(view.ndim == 4 && view.shape[1] >= 1);
  PFNAS_CHECK(activation >= 0 && activation <= 2);
  BatchNormActParams p;
  p.channels = view.shape[1];
  p.rows = view.shape[0] * view.shape[2] * view.shape[3];
  PFNAS_CHECK(p.rows >= 2);
  p.activation = static_cast<Activation>(activation);
  p.eps = eps;
  p.x = rows(x, "x", p);
  p.gamma = dense(gamma, "gamma", p.channels);
  p.beta = dense(beta, "beta", p.channels);
  p.moments = dense(moments, "moments", 3 * p.channels);
  return p;
}

void forward(py::handle x, py::handle gamma, py::handle beta, int activation, float eps, py::handle moments,
             py::handle y) {
  BatchNormActParams p = make_params(x, gamma, beta, moments, activation, eps);
  p.y = rows(y, "y", p);
  const auto kernel = select_batch_norm_act_kernel(active_isa());
  const py::gil_scoped_release released;
  kernel.forward(p);
}

// grad_x: None where it is not wanted.
void backward(py::handle grad_y, py::handle x, py::handle gamma, py::handle beta, py::handle moments,
              int activation, float eps, py::handle grad_x, py::handle grad_gamma, py::handle grad_beta) {
  BatchNormActParams p = make_params(x, gamma, beta, moments, activation, eps);
  p.grad_y = rows(grad_y, "grad_y", p);
  if (!grad_x.is_none()) p.grad_x = rows(grad_x, "grad_x", p);
  p.grad_gamma = dense(grad_gamma, "grad_gamma", p.channels);
  p.grad_beta = dense(grad_beta, "grad_beta", p.channels);
  const auto kernel = select_batch_norm_act_kernel(active_isa());
  const py::gil_scoped_release released;
  kernel.backward(p);
}

}  // namespace

void register_batch_norm_act(py::module_& m) {
  m.def("batch_norm_act_forward", &forward);
  m.def("batch_norm_act_backward", &backward);
}

}  // namespace pfnas

// SPDX-License-Identifier: Apache-2.0
// Checks what Python hands over, fills Params, picks the tier, calls it without the GIL. No loops over data
// here.
#include <pybind11/pybind11.h>

#include "bindings/ops.h"
#include "bindings/tensor_arg.h"
#include "common/check.h"
#include "common/isa.h"
#include "common/panels.h"
#include "kernels/dynamic_pointwise_conv/params.h"

namespace py = pybind11;

namespace pfnas {
namespace {

constexpr const char* kOp = "dynamic_pointwise_conv";

TensorView activation(py::handle object, const char* argument) {
  const TensorView view = view_tensor(object, kOp, argument);
  PFNAS_CHECK(view.is_float32() && view.is_cpu() && view.is_channels_last());
  return view;
}

TensorView dense(py::handle object, const char* argument, int ndim) {
  const TensorView view = view_tensor(object, kOp, argument);
  PFNAS_CHECK(view.is_float32() && view.is_cpu() && view.is_contiguous() && view.ndim == ndim);
  return view;
}

// null for None; else [size].
const float* optional_vector(py::handle object, const char* argument, std::int64_t size) {
  if (object.is_none()) return nullptr;
  const TensorView view = dense(object, argument, 1);
  PFNAS_CHECK(view.shape[0] == size);
  return static_cast<const float*>(view.data);
}

void run(const DynamicPointwiseConvParams& p) {
  switch (active_isa()) {
#ifdef PFNAS_HAS_AVX512
    case Isa::kAvx512:
      return avx512::dynamic_pointwise_conv(p);
#endif
#ifdef PFNAS_HAS_AVX2
    case Isa::kAvx2:
      return avx2::dynamic_pointwise_conv(p);
#endif
    default:
      return portable::dynamic_pointwise_conv(p);
  }
}

void forward(py::handle x, py::handle panels, py::handle scale, py::handle shift, py::handle residual,
             int activation_kind, py::handle y) {
  const TensorView in = activation(x, "x"), out = activation(y, "y"), packed = dense(panels, "panels", 3);
  DynamicPointwiseConvParams p;
  p.num_pixels = in.shape[0] * in.shape[2] * in.shape[3];
  p.in_channels = in.shape[1];
  p.out_channels = out.shape[1];
  p.max_in_channels = packed.shape[1];
  PFNAS_CHECK(p.num_pixels == out.shape[0] * out.shape[2] * out.shape[3]);
  PFNAS_CHECK(p.in_channels >= 1 && p.in_channels <= p.max_in_channels);
  PFNAS_CHECK(packed.shape[2] == kPanelWidth && num_panels(p.out_channels) <= packed.shape[0]);
  PFNAS_CHECK(activation_kind >= 0 && activation_kind <= 2);
  p.activation = static_cast<Activation>(activation_kind);
  p.panels = static_cast<const float*>(packed.data);
  p.x = static_cast<const float*>(in.data);
  p.y = static_cast<float*>(out.data);
  p.x_stride = p.in_channels;
  p.y_stride = p.residual_stride = p.out_channels;
  p.scale = optional_vector(scale, "scale", p.out_channels);
  p.shift = optional_vector(shift, "shift", p.out_channels);
  if (!residual.is_none()) {
    const TensorView added = activation(residual, "residual");
    for (int d = 0; d < 4; ++d) PFNAS_CHECK(added.shape[d] == out.shape[d]);
    p.residual = static_cast<const float*>(added.data);
  }
  if (p.num_pixels == 0) return;
  const py::gil_scoped_release released;
  run(p);
}

void pack(py::handle weight, py::handle panels) {
  const TensorView from = dense(weight, "weight", 4), to = dense(panels, "panels", 3);
  PFNAS_CHECK(from.shape[2] == 1 && from.shape[3] == 1 && to.shape[2] == kPanelWidth);
  PFNAS_CHECK(to.shape[0] == num_panels(from.shape[0]) && to.shape[1] == from.shape[1]);
  pack_panels(static_cast<const float*>(from.data), from.shape[0], from.shape[1],
              static_cast<float*>(to.data));
}

}  // namespace

void register_dynamic_pointwise_conv(py::module_& m) {
  m.attr("panel_width") = kPanelWidth;
  m.def("pack_pointwise_weight", &pack);
  m.def("dynamic_pointwise_conv_forward", &forward);
}

}  // namespace pfnas

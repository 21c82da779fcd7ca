// SPDX-License-Identifier: Apache-2.0
// The kernels of a build: all CUDA ops of the package. One line per op.
#include "bindings/ops.h"

void register_kernels(pybind11::module_& m);

void register_kernels(pybind11::module_& m) {
  pfnas::register_dynamic_depthwise_conv_cuda(m);
  pfnas::register_dynamic_pointwise_conv_cuda(m);
  pfnas::register_path_filter_cuda(m);
}

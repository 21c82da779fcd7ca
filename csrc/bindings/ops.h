// SPDX-License-Identifier: Apache-2.0
// One line per op: the function that adds its entry points to pfnas_fast._C.
#pragma once

#include <pybind11/pybind11.h>

namespace pfnas {

void register_batch_norm_act(pybind11::module_& m);
void register_dynamic_depthwise_conv(pybind11::module_& m);
void register_dynamic_pointwise_conv(pybind11::module_& m);
void register_path_cost(pybind11::module_& m);
void register_path_score(pybind11::module_& m);
void register_path_score_int8(pybind11::module_& m);
void register_path_search(pybind11::module_& m);
void register_subnet(pybind11::module_& m);
void register_tensor_pool(pybind11::module_& m);
void register_train_mbconv(pybind11::module_& m);
void register_versions(pybind11::module_& m);

// Built with PFNAS_CUDA, and by the tests for the emulator.
void register_dynamic_depthwise_conv_cuda(pybind11::module_& m);
void register_dynamic_pointwise_conv_cuda(pybind11::module_& m);
void register_path_filter_cuda(pybind11::module_& m);

}  // namespace pfnas

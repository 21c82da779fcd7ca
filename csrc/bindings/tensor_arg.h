// SPDX-License-Identifier: Apache-2.0
// Turns a Python tensor into a TensorView through the DLPack C exchange API (no copy, no reference taken).
#pragma once

#include <pybind11/pybind11.h>

#include "common/tensor_view.h"

namespace pfnas {

// Throws TypeMismatch where `object` is no tensor with a DLPack C exchange API, or has more than kMaxDims
// dimensions.
TensorView view_tensor(pybind11::handle object, const char* op, const char* argument);

// Hands a tensor with its owner to the framework of `like` (torch), which calls the deleter when the tensor
// dies: the new tensor.
pybind11::object make_tensor(pybind11::handle like, dlpack::ManagedTensorVersioned* tensor);

// The stream that the producer of `object` works on at the moment (torch: torch.cuda.current_stream).
void* current_stream(pybind11::handle object, dlpack::Device device);

}  // namespace pfnas

// SPDX-License-Identifier: Apache-2.0
// Tensors for CUDA kernels, as bindings see them. In the emulator's build (PFNAS_EMULATED_CUDA) they lie on
// the CPU.
#pragma once

#include <pybind11/pybind11.h>

#include "bindings/tensor_arg.h"
#include "cuda/runtime.h"

namespace pfnas::cuda {

#ifdef PFNAS_EMULATED_CUDA
constexpr std::int32_t kDeviceType = dlpack::kCpu;
#else
constexpr std::int32_t kDeviceType = dlpack::kCuda;
#endif

// The tensors of one call: they share a device and a storage type, which the first one sets.
class CallArguments {
 public:
  CallArguments(const char* op, pybind11::handle first, const char* argument);

  TensorView view(pybind11::handle object, const char* argument) const;    // any type, on the call's device
  TensorView stored(pybind11::handle object, const char* argument) const;  // of the call's storage type
  TensorView floats(pybind11::handle object, const char* argument) const;  // float32, contiguous
  Dtype dtype() const { return dtype_; }
  int device() const { return device_.id; }
  Stream stream() const { return stream_; }  // torch's current stream of the device

 private:
  const char* op_;
  dlpack::Device device_;
  Dtype dtype_;
  Stream stream_;
};

}  // namespace pfnas::cuda

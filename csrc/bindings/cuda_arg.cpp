// SPDX-License-Identifier: Apache-2.0
#include "bindings/cuda_arg.h"

#include "common/check.h"

namespace py = pybind11;

namespace pfnas::cuda {
namespace {

bool find_dtype(const dlpack::DataType& type, Dtype& dtype) {
  if (type.lanes != 1) return false;
  if (type.code == dlpack::kFloat && type.bits == 32) return dtype = Dtype::kFloat32, true;
  if (type.code == dlpack::kFloat && type.bits == 16) return dtype = Dtype::kFloat16, true;
  if (type.code == dlpack::kBfloat && type.bits == 16) return dtype = Dtype::kBfloat16, true;
  return false;
}

}  // namespace

CallArguments::CallArguments(const char* op, py::handle first, const char* argument) : op_(op) {
  const TensorView view = view_tensor(first, op, argument);
  device_ = view.device;
  PFNAS_CHECK(device_.type == kDeviceType && find_dtype(view.dtype, dtype_));
  stream_ = kDeviceType == dlpack::kCuda ? current_stream(first, device_) : nullptr;
}

TensorView CallArguments::view(py::handle object, const char* argument) const {
  const TensorView view = view_tensor(object, op_, argument);
  PFNAS_CHECK(view.device.type == device_.type && view.device.id == device_.id);
  return view;
}

TensorView CallArguments::stored(py::handle object, const char* argument) const {
  const TensorView tensor = view(object, argument);
  Dtype dtype;
  PFNAS_CHECK(find_dtype(tensor.dtype, dtype) && dtype == dtype_);
  return tensor;
}

TensorView CallArguments::floats(py::handle object, const char* argument) const {
  const TensorView tensor = view(object, argument);
  PFNAS_CHECK(tensor.is_float32() && tensor.is_contiguous());
  return tensor;
}

}  // namespace pfnas::cuda

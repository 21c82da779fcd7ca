// SPDX-License-Identifier: Apache-2.0
#include "bindings/tensor_arg.h"

#include <string>

#include "common/check.h"

namespace py = pybind11;

namespace pfnas {
namespace {

const dlpack::ExchangeApi* lookup_exchange_api(PyTypeObject* type) {
  PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), dlpack::kExchangeAttribute);
  if (capsule == nullptr) {
    PyErr_Clear();
    return nullptr;
  }
  void* pointer = PyCapsule_GetPointer(capsule, dlpack::kExchangeCapsule);
  Py_DECREF(capsule);  // the table itself is static in the producer
  if (pointer == nullptr) {
    PyErr_Clear();
    return nullptr;
  }
  auto* header = static_cast<dlpack::ExchangeApiHeader*>(pointer);
  while (header != nullptr && header->version.major != dlpack::kMajorVersion) header = header->prev_api;
  auto* api = reinterpret_cast<const dlpack::ExchangeApi*>(header);
  return api != nullptr && api->tensor_from_py_object != nullptr ? api : nullptr;
}

// The GIL guards the cache. One entry is enough: a call's arguments share a type (torch.Tensor, now and then
// Parameter).
const dlpack::ExchangeApi* exchange_api(PyTypeObject* type) {
  static PyTypeObject* cached_type = nullptr;
  static const dlpack::ExchangeApi* cached_api = nullptr;
  if (type != cached_type) {
    cached_api = lookup_exchange_api(type);
    Py_INCREF(type);  // keep the address from being reused by another type
    Py_XDECREF(cached_type);
    cached_type = type;
  }
  return cached_api;
}

}  // namespace

TensorView view_tensor(py::handle object, const char* op, const char* argument) {
  PyTypeObject* type = Py_TYPE(object.ptr());
  const dlpack::ExchangeApi* api = exchange_api(type);
  if (api == nullptr) {
    throw TypeMismatch(describe(op, "a torch.Tensor of torch 2.10 or newer", argument, type->tp_name));
  }
  dlpack::Tensor tensor{};
  if (api->tensor_from_py_object(object.ptr(), &tensor) != 0) throw py::error_already_set();
  if (tensor.ndim > kMaxDims) {
    throw TypeMismatch(describe(op, "at most 4 dimensions", argument, std::to_string(tensor.ndim)));
  }
  TensorView view;
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  view.device = tensor.device;
  view.dtype = tensor.dtype;
  view.ndim = tensor.ndim;
  for (int d = 0; d < tensor.ndim; ++d) {
    view.shape[d] = tensor.shape[d];
    view.strides[d] = tensor.strides[d];
  }
  return view;
}

py::object make_tensor(py::handle like, dlpack::ManagedTensorVersioned* tensor) {
  const dlpack::ExchangeApi* api = exchange_api(Py_TYPE(like.ptr()));
  PFNAS_CHECK(api != nullptr && api->managed_tensor_to_py_object != nullptr);
  void* object = nullptr;
  if (api->managed_tensor_to_py_object(tensor, &object) != 0) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
}

void* current_stream(py::handle object, dlpack::Device device) {
  const dlpack::ExchangeApi* api = exchange_api(Py_TYPE(object.ptr()));
  PFNAS_CHECK(api != nullptr && api->current_work_stream != nullptr);
  void* stream = nullptr;
  if (api->current_work_stream(device.type, device.id, &stream) != 0) throw py::error_already_set();
  return stream;
}

}  // namespace pfnas

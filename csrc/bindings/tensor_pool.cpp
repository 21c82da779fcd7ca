// SPDX-License-Identifier: Apache-2.0
// Tensors whose memory comes from the pool and goes back to it.
#include "common/tensor_pool.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <vector>

#include "bindings/ops.h"
#include "bindings/tensor_arg.h"
#include "common/check.h"

namespace py = pybind11;

namespace pfnas {
namespace {

struct PooledTensor {
  dlpack::ManagedTensorVersioned managed{};
  PoolBlock block{};
  std::int64_t shape[kMaxDims];
  std::int64_t strides[kMaxDims];

  static void destroy(dlpack::ManagedTensorVersioned* self) {
    auto* tensor = static_cast<PooledTensor*>(self->manager_context);
    give_back_to_pool(tensor->block);
    delete tensor;
  }
};

// `like`: any tensor of the framework that shall own the result.
py::object empty(py::handle like, const std::vector<std::int64_t>& shape,
                 const std::vector<std::int64_t>& strides) {
  PFNAS_CHECK(shape.size() == strides.size() && shape.size() <= kMaxDims);
  auto tensor = std::make_unique<PooledTensor>();
  std::int64_t count = 1;
  for (std::size_t d = 0; d < shape.size(); ++d) {
    PFNAS_CHECK(shape[d] >= 1 && strides[d] >= 1);
    tensor->shape[d] = shape[d];
    tensor->strides[d] = strides[d];
    PFNAS_CHECK(!__builtin_mul_overflow(count, shape[d], &count));
  }
  dlpack::ManagedTensorVersioned& managed = tensor->managed;
  managed.version = {dlpack::kMajorVersion, 0};
  managed.manager_context = tensor.get();
  managed.deleter = &PooledTensor::destroy;
  managed.tensor.device = {dlpack::kCpu, 0};
  managed.tensor.ndim = static_cast<std::int32_t>(shape.size());
  managed.tensor.dtype = {dlpack::kFloat, 32, 1};
  managed.tensor.shape = tensor->shape;
  managed.tensor.strides = tensor->strides;
  tensor->block = take_from_pool(static_cast<std::size_t>(count) * sizeof(float));
  managed.tensor.data = tensor->block.data;
  return make_tensor(like, &tensor.release()->managed);
}

}  // namespace

void register_tensor_pool(py::module_& m) {
  m.def("pooled_empty", &empty);
  m.def("tensor_pool_bytes", [] {
    const PoolUse use = pool_use();
    return py::make_tuple(use.in_use_bytes, use.waiting_bytes);
  });
  m.def("release_tensor_pool", &release_pool);
  m.def("poison_tensor_pool", &poison_pool);
}

}  // namespace pfnas

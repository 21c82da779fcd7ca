// SPDX-License-Identifier: Apache-2.0
// Contiguous CPU tensors of a known type and shape, as plain pointers. What fails here is a defect of our own
// Python layer, which has checked the user's arguments.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>

#include "bindings/tensor_arg.h"
#include "common/check.h"

namespace pfnas {

template <class T>
struct DtypeOf;
template <>
struct DtypeOf<float> {
  static constexpr int code = dlpack::kFloat, bits = 32;
};
template <>
struct DtypeOf<double> {
  static constexpr int code = dlpack::kFloat, bits = 64;
};
template <>
struct DtypeOf<std::uint8_t> {
  static constexpr int code = dlpack::kUInt, bits = 8;
};
template <>
struct DtypeOf<std::int8_t> {
  static constexpr int code = dlpack::kInt, bits = 8;
};
template <>
struct DtypeOf<std::int16_t> {
  static constexpr int code = dlpack::kInt, bits = 16;
};
template <>
struct DtypeOf<std::int32_t> {
  static constexpr int code = dlpack::kInt, bits = 32;
};
template <>
struct DtypeOf<std::uint32_t> {
  static constexpr int code = dlpack::kUInt, bits = 32;
};
template <>
struct DtypeOf<std::int64_t> {
  static constexpr int code = dlpack::kInt, bits = 64;
};

template <class T>
bool has_dtype(const TensorView& view) {
  return view.dtype.code == DtypeOf<T>::code && view.dtype.bits == DtypeOf<T>::bits && view.dtype.lanes == 1;
}

// A contiguous array of exactly this shape.
template <class T>
T* array_arg(pybind11::handle object, const char* op, const char* argument,
             std::initializer_list<std::int64_t> shape) {
  const TensorView view = view_tensor(object, op, argument);
  PFNAS_CHECK(view.is_cpu() && view.is_contiguous() && has_dtype<T>(view));
  PFNAS_CHECK(view.ndim == static_cast<int>(shape.size()));
  int d = 0;
  for (const std::int64_t size : shape) PFNAS_CHECK(view.shape[d++] == size);
  return static_cast<T*>(view.data);
}

template <class T>
T* optional_array_arg(pybind11::handle object, const char* op, const char* argument,
                      std::initializer_list<std::int64_t> shape) {
  return object.is_none() ? nullptr : array_arg<T>(object, op, argument, shape);
}

// Codes of a population, [num_paths, num_slots] uint8 with any strides.
struct CodesArg {
  const std::uint8_t* data;
  std::int64_t num_paths;
  std::int64_t path_stride;
  std::int64_t slot_stride;
};

inline CodesArg codes_arg(pybind11::handle object, const char* op, int num_slots) {
  const TensorView view = view_tensor(object, op, "codes");
  PFNAS_CHECK(view.is_cpu() && has_dtype<std::uint8_t>(view) && view.ndim == 2);
  PFNAS_CHECK(view.shape[1] == num_slots);
  return {static_cast<const std::uint8_t*>(view.data), view.shape[0], view.strides[0], view.strides[1]};
}

}  // namespace pfnas

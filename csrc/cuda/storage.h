// SPDX-License-Identifier: Apache-2.0
// Tensors are stored as float, bfloat16 or half; every kernel computes in float.
#pragma once

#include "cuda/device.h"
#include "cuda/runtime.h"

namespace pfnas::cuda {

PFNAS_DEVICE float to_float(float value) { return value; }
PFNAS_DEVICE float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
PFNAS_DEVICE float to_float(__half value) { return __half2float(value); }

template <class T>
PFNAS_DEVICE T from_float(float value);
template <>
PFNAS_DEVICE float from_float<float>(float value) {
  return value;
}
template <>
PFNAS_DEVICE __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
PFNAS_DEVICE __half from_float<__half>(float value) {
  return __float2half_rn(value);
}

// Two neighbouring channels of one pixel: the unit in which threads read and write activations.
template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T first, second;
};

// How a thread reaches its pair. A row of pixels is aligned for vector access only where C is even.
struct PairAccess {
  bool vector;  // C is even
  bool second;  // the second channel exists
};

template <class T>
PFNAS_DEVICE Pair<T> zero_pair() {
  return {from_float<T>(0.0f), from_float<T>(0.0f)};
}

template <class T>
PFNAS_DEVICE Pair<T> load_pair(const T* source, PairAccess access) {
  if (access.vector) return load_vector<Pair<T>>(source);
  return {source[0], access.second ? source[1] : from_float<T>(0.0f)};
}

template <class T>
PFNAS_DEVICE void store_pair(T* target, float2 value, PairAccess access) {
  const Pair<T> rounded{from_float<T>(value.x), from_float<T>(value.y)};
  if (access.vector) {
    store_vector(target, rounded);
  } else {
    target[0] = rounded.first;
    if (access.second) target[1] = rounded.second;
  }
}

template <class T>
PFNAS_DEVICE float2 to_float2(Pair<T> pair) {
  return make_float2(to_float(pair.first), to_float(pair.second));
}

PFNAS_DEVICE float2 multiply_add(float2 a, float2 b, float2 sum) {
  return make_float2(fmaf(a.x, b.x, sum.x), fmaf(a.y, b.y, sum.y));
}

PFNAS_DEVICE float2 add(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }

// Calls f with a value of the stored type: dispatch_storage(dtype, [&](auto zero) { using T = decltype(zero);
// ... }).
template <class F>
void dispatch_storage(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(float{});
    case Dtype::kBfloat16:
      return f(__nv_bfloat16{});
    case Dtype::kFloat16:
      return f(__half{});
  }
}

}  // namespace pfnas::cuda

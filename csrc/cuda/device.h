// SPDX-License-Identifier: Apache-2.0
// The one door between kernel source and its compiler: nvcc gets CUDA itself, any other compiler the emulator
// of tests/cuda_emulator. Kernels use plain CUDA C++ plus what is defined here; `<<<>>>`, inline assembly and
// __shared__ appear in this file only.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/check.h"

// The emulator puts red zones around these and fills them with NaN.
#define PFNAS_SHARED(type, name, dims) __shared__ type name dims
#define PFNAS_SHARED_ALIGNED(alignment, type, name, dims) \
  __shared__ __align__(alignment)                         \
  type name dims

namespace pfnas::cuda {

using Dim3 = dim3;

template <class V>
__device__ __forceinline__ V load_vector(const void* source) {
  return *static_cast<const V*>(source);
}

template <class V>
constexpr bool kOfHalves = false;  // a Pair or Quad of 16-bit floats
template <template <class> class V>
constexpr bool kOfHalves<V<__half>> = true;
template <template <class> class V>
constexpr bool kOfHalves<V<__nv_bfloat16>> = true;

// 16-bit floats as one word that the compiler may not take apart again: it would store a struct in pieces.
template <class V>
__device__ __forceinline__ void store_vector(void* target, const V& value) {
  if constexpr (kOfHalves<V>) {
    static_assert(sizeof(V) == 4 || sizeof(V) == 8);
    std::conditional_t<sizeof(V) == 4, unsigned, unsigned long long> word;
    memcpy(&word, &value, sizeof word);
    if constexpr (sizeof word == 4) asm volatile("" : "+r"(word));
    if constexpr (sizeof word == 8) asm volatile("" : "+l"(word));
    *static_cast<decltype(word)*>(target) = word;
  } else {
    *static_cast<V*>(target) = value;
  }
}

// Hides where a number comes from: what is made of it in a loop is then computed there, and not ahead of the
// loop in registers that stay taken.
__device__ __forceinline__ void forget_origin(int& value) { asm volatile("" : "+r"(value)); }

// All kernels take one struct by value. The launch is checked, never waited for.
template <class P>
void launch(void (*kernel)(P), Dim3 grid, Dim3 block, void* stream, const P& params) {
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(params);
  check_launch();
}

}  // namespace pfnas::cuda

#else

#include "device_emulator.h"

#endif

#define PFNAS_DEVICE __device__ __forceinline__

#if defined(__CUDACC__)
#define PFNAS_UNROLL_LOOP _Pragma("unroll")
#define PFNAS_ROLLED_LOOP _Pragma("unroll 1")
#else
#define PFNAS_UNROLL_LOOP _Pragma("GCC unroll 16")
#define PFNAS_ROLLED_LOOP
#endif

// SPDX-License-Identifier: Apache-2.0
// Tensor cores through mma.sync m16n8k16 (from sm_80 on) and the loads that feed them. Fragments are laid out
// as the PTX ISA documents: lane l holds rows l / 4 (and + 8) and columns 2 (l % 4), + 1 (and + 8).
#pragma once

#include "cuda/device.h"

#if defined(__CUDACC__)

namespace pfnas::cuda {

// Four 8x8 matrices of 16-bit numbers. Lane 8 i + r passes the 16-byte row r of matrix i; register i then
// holds elements (l / 4, 2 (l % 4)) and the next one of matrix i.
__device__ __forceinline__ void load_matrix(std::uint32_t (&fragment)[4], const void* row) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(address)
               : "memory");
}

// The same with every matrix transposed.
__device__ __forceinline__ void load_matrix_transposed(std::uint32_t (&fragment)[4], const void* row) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(address)
               : "memory");
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
// sums [16, 8] += a [16, 16] b [16, 8]; T is __half or __nv_bfloat16.
template <class T>
__device__ __forceinline__ void multiply_tile(float (&sums)[4], const std::uint32_t (&a)[4],
                                              const std::uint32_t (&b)[2]);

#define PFNAS_MULTIPLY_TILE(type, name)                                                              \
  template <>                                                                                        \
  __device__ __forceinline__ void multiply_tile<type>(float (&sums)[4], const std::uint32_t (&a)[4], \
                                                      const std::uint32_t (&b)[2]) {                 \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                              \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"              \
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                        \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                \
  }
PFNAS_MULTIPLY_TILE(__half, "f16")
PFNAS_MULTIPLY_TILE(__nv_bfloat16, "bf16")
#undef PFNAS_MULTIPLY_TILE
#endif

}  // namespace pfnas::cuda

#else

#include "tensor_core_emulator.h"

#endif

// SPDX-License-Identifier: Apache-2.0
// cp.async: copies from global to shared memory that run beside the arithmetic. From sm_80 on; for an older
// architecture nothing is declared, so that a kernel cannot fall back to something else unnoticed.
#pragma once

#include "cuda/device.h"

#if defined(__CUDACC__)

namespace pfnas::cuda {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
// Starts copying 16 bytes; of these, those from `valid_bytes` on are not read but zero. Both addresses are
// 16-byte aligned.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, int valid_bytes = 16) {
  const auto target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global), "r"(valid_bytes)
               : "memory");
}

// Closes the group of the copies started since the last call.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's groups are unfinished. Other threads' copies need a barrier
// besides.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
#endif

}  // namespace pfnas::cuda

#else

#include "async_copy_emulator.h"

#endif

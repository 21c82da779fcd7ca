// SPDX-License-Identifier: Apache-2.0
// CUDA's device vocabulary on top of the scheduler. csrc/cuda/device.h includes this wherever nvcc is not
// compiling.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#include "scheduler.h"
#include "types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (::cuda_emulator::machine().current->index)
#define blockIdx (::cuda_emulator::machine().block_index)
#define blockDim (::cuda_emulator::machine().block)
#define gridDim (::cuda_emulator::machine().grid)

#define PFNAS_SHARED_ALIGNED(alignment, type, name, dims) \
  static char name##_key;                                 \
  auto& name = *reinterpret_cast<type(*) dims>(           \
      ::cuda_emulator::shared_array(&name##_key, sizeof(type dims), alignment))
#define PFNAS_SHARED(type, name, dims) PFNAS_SHARED_ALIGNED(alignof(type), type, name, dims)

namespace cuda_emulator {

// Tells the tracer about an access that a helper makes for its caller; `caller` is a return address.
#ifdef CUDA_EMULATOR_TRACED
void note_access(const void* address, int size, bool write, const void* caller);
#define CUDA_EMULATOR_VECTOR_ACCESS __attribute__((noinline, weak, no_sanitize("thread")))
#else
inline void note_access(const void*, int, bool, const void*) {}
#define CUDA_EMULATOR_VECTOR_ACCESS inline
#endif

// Launches through the translated PTX of `kernel` where one is loaded, else through its source.
void launch_kernel(void* kernel, Index3 grid, Index3 block, const void* arguments, std::size_t arguments_size,
                   const std::function<void()>& source);

enum class Shuffle { kFrom, kUp, kDown, kXor };

template <Shuffle kKind>
void combine_shuffle(Thread* const (&lanes)[kWarpSize]) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (lanes[lane] == nullptr) continue;
    const Collective& c = lanes[lane]->collective;
    const int first = lane & ~(c.width - 1), end = first + c.width;
    int source = lane;
    if (kKind == Shuffle::kFrom) source = first | (c.argument & (c.width - 1));
    if (kKind == Shuffle::kUp && lane - c.argument >= first) source = lane - c.argument;
    if (kKind == Shuffle::kDown && lane + c.argument < end) source = lane + c.argument;
    if (kKind == Shuffle::kXor && (lane ^ c.argument) < end) source = lane ^ c.argument;
    if (lanes[source] != nullptr) {
      std::memcpy(c.out, lanes[source]->collective.in, static_cast<std::size_t>(c.size));
    } else {
      std::memset(c.out, 0xFF, static_cast<std::size_t>(c.size));  // a lane outside the mask: NaN
    }
  }
}

template <Shuffle kKind, class T>
T shuffle(unsigned mask, T value, int argument, int width, std::source_location place) {
  T result;
  wait_at_collective({combine_shuffle<kKind>, mask, &value, &result, sizeof(T), argument, width}, place);
  return result;
}

inline void combine_ballot(Thread* const (&lanes)[kWarpSize]) {
  std::uint32_t votes = 0;
  for (const Thread* lane : lanes) {
    if (lane != nullptr && *static_cast<const int*>(lane->collective.in) != 0) votes |= 1u << lane->lane;
  }
  for (const Thread* lane : lanes) {
    if (lane != nullptr) *static_cast<std::uint32_t*>(lane->collective.out) = votes;
  }
}

inline void combine_syncwarp(Thread* const (&lanes)[kWarpSize]) {
  for (Thread* lane : lanes) {
    if (lane != nullptr) ++lane->warp_epoch;
  }
}

inline void check_aligned(const void* address, std::size_t size, const std::source_location& place) {
  if (reinterpret_cast<std::uintptr_t>(address) % size == 0) return;
  Thread& thread = *machine().current;
  thread.place = place;
  throw Error("misaligned " + std::to_string(size) + "-byte access: " + who(thread));
}

}  // namespace cuda_emulator

// Barriers and collectives. The defaulted source location is what error messages name.
using EmulatedPlace = std::source_location;

inline void __syncthreads(EmulatedPlace place = EmulatedPlace::current()) {
  cuda_emulator::wait_at_block_barrier(place);
}
inline int __syncthreads_count(int predicate, EmulatedPlace place = EmulatedPlace::current()) {
  return cuda_emulator::count_at_block_barrier(predicate != 0, place);
}
inline void __syncwarp(unsigned mask = cuda_emulator::kFullMask,
                       EmulatedPlace place = EmulatedPlace::current()) {
  cuda_emulator::wait_at_collective({cuda_emulator::combine_syncwarp, mask}, place);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32,
              EmulatedPlace place = EmulatedPlace::current()) {
  return cuda_emulator::shuffle<cuda_emulator::Shuffle::kFrom>(mask, value, lane, width, place);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 EmulatedPlace place = EmulatedPlace::current()) {
  return cuda_emulator::shuffle<cuda_emulator::Shuffle::kUp>(mask, value, static_cast<int>(delta), width,
                                                             place);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   EmulatedPlace place = EmulatedPlace::current()) {
  return cuda_emulator::shuffle<cuda_emulator::Shuffle::kDown>(mask, value, static_cast<int>(delta), width,
                                                               place);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                  EmulatedPlace place = EmulatedPlace::current()) {
  return cuda_emulator::shuffle<cuda_emulator::Shuffle::kXor>(mask, value, lanes, width, place);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EmulatedPlace place = EmulatedPlace::current()) {
  unsigned votes;
  cuda_emulator::wait_at_collective(
      {cuda_emulator::combine_ballot, mask, &predicate, &votes, sizeof predicate}, place);
  return votes;
}

// Integers
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(std::uint64_t{a} * b >> 32); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

// Atomics: one worker, so nothing can come between.
inline unsigned atomicAdd(unsigned* target, unsigned value) {
  return __atomic_fetch_add(target, value, __ATOMIC_RELAXED);
}
inline int atomicAdd(int* target, int value) { return __atomic_fetch_add(target, value, __ATOMIC_RELAXED); }

namespace pfnas::cuda {

using Dim3 = cuda_emulator::Index3;

// gcc splits a struct copy into scalar accesses; these stay one request, and a misaligned one is an error as
// on a GPU.
template <class V>
CUDA_EMULATOR_VECTOR_ACCESS V load_vector(const void* source,
                                          EmulatedPlace place = EmulatedPlace::current()) {
  cuda_emulator::check_aligned(source, sizeof(V), place);
  cuda_emulator::note_access(source, sizeof(V), false, __builtin_return_address(0));
  V value;
  std::memcpy(&value, source, sizeof(V));
  return value;
}
template <class V>
CUDA_EMULATOR_VECTOR_ACCESS void store_vector(void* target, const V& value,
                                              EmulatedPlace place = EmulatedPlace::current()) {
  cuda_emulator::check_aligned(target, sizeof(V), place);
  cuda_emulator::note_access(target, sizeof(V), true, __builtin_return_address(0));
  std::memcpy(target, &value, sizeof(V));
}

inline void forget_origin(int&) {}  // about registers, of which a fiber has enough

// All kernels take one struct by value.
template <class P>
void launch(void (*kernel)(P), Dim3 grid, Dim3 block, void* /*stream*/, const P& params) {
  cuda_emulator::launch_kernel(reinterpret_cast<void*>(kernel), grid, block, &params, sizeof params,
                               [&] { kernel(params); });
}

}  // namespace pfnas::cuda

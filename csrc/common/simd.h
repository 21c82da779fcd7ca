// SPDX-License-Identifier: Apache-2.0
// Vectors of float, written once with the compiler's vector extension and compiled per instruction-set tier.
// Everything here is static or in the tier's own namespace: an inline function shared between tiers would be
// merged by the linker, and the portable tier could end up with AVX-512 code.
#pragma once

#include <cstdint>
#include <cstring>

#ifndef PFNAS_TIER
#error "compile kernels with -DPFNAS_TIER=<tier>"
#endif

// Both can be given on the command line, so that a test compiles the 16-lane source for a machine without
// AVX-512.
#ifndef PFNAS_LANES
#if defined(__AVX512F__)
#define PFNAS_LANES 16
#elif defined(__AVX__)
#define PFNAS_LANES 8
#else
#define PFNAS_LANES 4
#endif
#endif
#ifndef PFNAS_REGISTERS
#if defined(__AVX512F__) || defined(__aarch64__)
#define PFNAS_REGISTERS 32
#else
#define PFNAS_REGISTERS 16
#endif
#endif

#define PFNAS_INLINE inline __attribute__((always_inline))
// Complete unrolling of a loop with a constant trip count turns the arrays of vectors below into registers.
#define PFNAS_UNROLL _Pragma("GCC unroll 32")
// GCC likes to gather the loads of an unrolled loop at its top, and then has to spill the sums it wanted
// registers for.
#define PFNAS_KEEP_ORDER __asm__ volatile("" ::: "memory")

namespace pfnas::PFNAS_TIER {

constexpr int kLanes = PFNAS_LANES;
constexpr int kNumRegisters = PFNAS_REGISTERS;

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef float UnalignedVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

static PFNAS_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
static PFNAS_INLINE void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }
static PFNAS_INLINE Vec broadcast(float value) {
  return value - Vec{};
}  // minus, not plus: keeps the sign of -0.0

static PFNAS_INLINE Vec load_lanes(const float* p, int num_lanes) {  // the lanes beyond num_lanes are zero
  Vec v{};
  std::memcpy(&v, p, static_cast<std::size_t>(num_lanes) * sizeof(float));
  return v;
}
static PFNAS_INLINE void store_lanes(float* p, Vec v, int num_lanes) {
  std::memcpy(p, &v, static_cast<std::size_t>(num_lanes) * sizeof(float));
}

template <class T>
static PFNAS_INLINE T min_of(T a, T b) {
  return b < a ? b : a;
}
template <class T>
static PFNAS_INLINE T max_of(T a, T b) {
  return a < b ? b : a;
}
static PFNAS_INLINE std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace pfnas::PFNAS_TIER

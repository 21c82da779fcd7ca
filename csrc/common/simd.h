// SPDX-License-Identifier: Apache-2.0
// Vectors of float, written once with the compiler's vector extension and compiled per instruction-set tier.
// Everything here is static or in the tier's own namespace: an inline function shared between tiers would be
// merged by the linker, and the portable tier could end up with AVX-512 code.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

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
// Past the caches, for outputs that would not stay in them: a plain store first reads the line it overwrites.
// `p` is aligned to the vector, which is a whole cache line; ends with `stream_fence` on the same thread.
#if defined(__AVX512F__) && PFNAS_LANES == 16
constexpr bool kCanStream = true;
static PFNAS_INLINE void stream(float* p, Vec v) { _mm512_stream_ps(p, reinterpret_cast<__m512>(v)); }
static PFNAS_INLINE void stream_fence() { _mm_sfence(); }
#else
constexpr bool kCanStream = false;
static PFNAS_INLINE void stream(float* p, Vec v) { store(p, v); }
static PFNAS_INLINE void stream_fence() {}
#endif
static PFNAS_INLINE Vec broadcast(float value) {
  return value - Vec{};
}  // minus, not plus: keeps the sign of -0.0

// Whether kLanes floats are one register of these instructions. (A test compiles 16 lanes for narrower CPUs.)
#if defined(__AVX512F__) && PFNAS_LANES == 16
#define PFNAS_NATIVE_512 1
#elif defined(__AVX2__) && PFNAS_LANES == 8
#define PFNAS_NATIVE_256 1
#endif

// Loads once: without, GCC repeats a load as the memory operand of every multiply-add that uses the value.
static PFNAS_INLINE Vec load_once(const float* p) {
  Vec v = load(p);
#if defined(PFNAS_NATIVE_512) || defined(PFNAS_NATIVE_256)
  __asm__("" : "+v"(v));
#endif
  return v;
}

// num_lanes in [0, kLanes]; the lanes beyond it are read as zero and not written.
#if defined(PFNAS_NATIVE_512)
static PFNAS_INLINE __mmask16 lane_mask(int num_lanes) {
  return static_cast<__mmask16>((1u << num_lanes) - 1u);
}
static PFNAS_INLINE Vec load_lanes(const float* p, int num_lanes) {
  return _mm512_maskz_loadu_ps(lane_mask(num_lanes), p);
}
static PFNAS_INLINE void store_lanes(float* p, Vec v, int num_lanes) {
  _mm512_mask_storeu_ps(p, lane_mask(num_lanes), v);
}
#elif defined(PFNAS_NATIVE_256)
static PFNAS_INLINE __m256i lane_mask(int num_lanes) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(num_lanes), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static PFNAS_INLINE Vec load_lanes(const float* p, int num_lanes) {
  return _mm256_maskload_ps(p, lane_mask(num_lanes));
}
static PFNAS_INLINE void store_lanes(float* p, Vec v, int num_lanes) {
  _mm256_maskstore_ps(p, lane_mask(num_lanes), v);
}
#else
static PFNAS_INLINE Vec load_lanes(const float* p, int num_lanes) {
  Vec v{};
  std::memcpy(&v, p, static_cast<std::size_t>(num_lanes) * sizeof(float));
  return v;
}
static PFNAS_INLINE void store_lanes(float* p, Vec v, int num_lanes) {
  std::memcpy(p, &v, static_cast<std::size_t>(num_lanes) * sizeof(float));
}
#endif

#if defined(PFNAS_NATIVE_512)
// The first half of `low` and the second of `high`.
static PFNAS_INLINE Vec join_halves(Vec low, Vec high) { return _mm512_mask_blend_ps(0xff00, low, high); }
static PFNAS_INLINE Vec swap_halves(Vec v) { return _mm512_maskz_shuffle_f32x4(0xffff, v, v, 0x4e); }
// Half a vector of floats from `p`, twice.
static PFNAS_INLINE Vec load_half_twice(const float* p) {
  return _mm512_maskz_broadcast_f32x8(0xffff, _mm256_loadu_ps(p));
}
#else
static PFNAS_INLINE Vec join_halves(Vec low, Vec high) {
  for (int i = kLanes / 2; i < kLanes; ++i) low[i] = high[i];
  return low;
}
static PFNAS_INLINE Vec swap_halves(Vec v) {
  Vec swapped{};
  for (int i = 0; i < kLanes; ++i) swapped[i] = v[i ^ (kLanes / 2)];
  return swapped;
}
static PFNAS_INLINE Vec load_half_twice(const float* p) {
  Vec v{};
  for (int i = 0; i < kLanes; ++i) v[i] = p[i % (kLanes / 2)];
  return v;
}
#endif

// max(v, low) and min(v, high) that let NaN in v through: x86 returns the second operand where one is NaN.
#if defined(PFNAS_NATIVE_512)
// (The zero-masking forms, because GCC 12 warns of its own header's _mm512_undefined_ps in the plain ones.)
static PFNAS_INLINE Vec at_least(Vec v, Vec low) { return _mm512_maskz_max_ps(0xffff, low, v); }
static PFNAS_INLINE Vec at_most(Vec v, Vec high) { return _mm512_maskz_min_ps(0xffff, high, v); }
#elif defined(PFNAS_NATIVE_256)
static PFNAS_INLINE Vec at_least(Vec v, Vec low) { return _mm256_max_ps(low, v); }
static PFNAS_INLINE Vec at_most(Vec v, Vec high) { return _mm256_min_ps(high, v); }
#else
static PFNAS_INLINE Vec at_least(Vec v, Vec low) { return v < low ? low : v; }
static PFNAS_INLINE Vec at_most(Vec v, Vec high) { return high < v ? high : v; }
#endif

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

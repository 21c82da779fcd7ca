// SPDX-License-Identifier: Apache-2.0
// Costs of 64 paths of one resolution, byte by byte: the codes of four blocks of a path are brought side by
// side (vpunpck, four a cycle), one vpermb looks up a byte of the steps of 16 paths times four blocks, and
// one vpdpbusd adds the four. A vector of 32-bit look-ups needs a widening and a shuffle per block instead.
#pragma once

#include "common/scratch.h"
#include "common/simd.h"
#include "kernels/path_cost/params.h"

#ifdef __AVX512BW__
#include <immintrin.h>

namespace pfnas::PFNAS_TIER {

typedef std::uint32_t Words16 __attribute__((vector_size(64)));
typedef std::uint8_t Bytes64 __attribute__((vector_size(64)));
typedef std::uint8_t UnalignedBytes64 __attribute__((vector_size(64), aligned(1), may_alias));

constexpr int kAhead = 512;                  // bytes: one stream per slot is more than the hardware follows
constexpr int kMaxPlanes = 3;                // bytes of a step: below 2^24
constexpr std::int64_t kFewPaths = 4 * 64;   // below, the tables are not worth building
constexpr int kPlaneBytes = 4 * kCostCodes;  // a byte of the steps of four blocks

// Bytes of the steps, [num_resolutions][ceil(num_blocks / 4)][num_planes][4 blocks][16 codes]; zeros for
// blocks that are none.
struct BytePlanes {
  const std::uint8_t* bytes = nullptr;  // null: steps are too large, or paths too few
  int num_planes = 0;
  int num_quads = 0;
};

// The tables of a call, in its scratch.
static BytePlanes byte_planes(const PathCostParams& p) {
  BytePlanes planes;
  if (!p.use_vnni || p.steps == nullptr || p.path_stride != 1 || p.num_paths < kFewPaths) return planes;
  const int num_blocks = p.num_slots - 1;
  const std::int64_t num_rows = static_cast<std::int64_t>(p.num_resolutions) * num_blocks;
  std::uint32_t any = 0;
  for (std::int64_t i = 0; i < num_rows * kCostCodes; ++i) any |= p.steps[i];
  if (any >> (8 * kMaxPlanes) != 0 || num_blocks == 0) return planes;
  planes.num_planes = any >> 16 != 0 ? 3 : 2;
  planes.num_quads = static_cast<int>(ceil_div(num_blocks, 4));
  const std::int64_t size =
      static_cast<std::int64_t>(p.num_resolutions) * planes.num_quads * planes.num_planes * kPlaneBytes;
  auto* bytes = reinterpret_cast<std::uint8_t*>(
      thread_scratch(Scratch::kCall, static_cast<std::size_t>(ceil_div(size, sizeof(float)))));
  planes.bytes = bytes;
  const std::uint32_t* row = p.steps;
  for (int r = 0; r < p.num_resolutions; ++r) {
    for (int slot = 0; slot < 4 * planes.num_quads; ++slot) {
      std::uint8_t* out = bytes + slot / 4 * planes.num_planes * kPlaneBytes + slot % 4 * kCostCodes;
      for (int plane = 0; plane < planes.num_planes; ++plane) {
        for (int code = 0; code < kCostCodes; ++code) {
          const std::uint32_t step = slot < num_blocks ? row[code] : 0u;
          out[plane * kPlaneBytes + code] = static_cast<std::uint8_t>(step >> (8 * plane));
        }
      }
      if (slot < num_blocks) row += kCostCodes;
    }
    bytes += static_cast<std::int64_t>(planes.num_quads) * planes.num_planes * kPlaneBytes;
  }
  return planes;
}

// Inline assembly: the tier is compiled for CPUs without VBMI and VNNI, and GCC 12 would store every sum.
static PFNAS_INLINE void add_bytes(Words16& sum, Bytes64 table, Bytes64 index, Bytes64 ones) {
  Bytes64 found;
  __asm__("vpermb %1, %2, %0" : "=v"(found) : "v"(table), "v"(index));
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(found), "v"(ones));
}

// The codes of four blocks of 64 paths, path by path: vector q, 128-bit lane l has paths 16 l + 4 q to + 3.
static PFNAS_INLINE void interleave(const Bytes64 (&codes)[4], Bytes64 (&paths)[4]) {
  const auto bits = [](Bytes64 x) { return reinterpret_cast<__m512i>(x); };
  constexpr __mmask64 kAll8 = ~static_cast<__mmask64>(0);  // GCC 12 warns about the plain intrinsics
  constexpr __mmask32 kAll16 = ~static_cast<__mmask32>(0);
  const __m512i low01 = _mm512_maskz_unpacklo_epi8(kAll8, bits(codes[0]), bits(codes[1]));
  const __m512i high01 = _mm512_maskz_unpackhi_epi8(kAll8, bits(codes[0]), bits(codes[1]));
  const __m512i low23 = _mm512_maskz_unpacklo_epi8(kAll8, bits(codes[2]), bits(codes[3]));
  const __m512i high23 = _mm512_maskz_unpackhi_epi8(kAll8, bits(codes[2]), bits(codes[3]));
  paths[0] = reinterpret_cast<Bytes64>(_mm512_maskz_unpacklo_epi16(kAll16, low01, low23));
  paths[1] = reinterpret_cast<Bytes64>(_mm512_maskz_unpackhi_epi16(kAll16, low01, low23));
  paths[2] = reinterpret_cast<Bytes64>(_mm512_maskz_unpacklo_epi16(kAll16, high01, high23));
  paths[3] = reinterpret_cast<Bytes64>(_mm512_maskz_unpackhi_epi16(kAll16, high01, high23));
}

// Back to the order of the paths: a transpose of 4 x 4 lanes.
static PFNAS_INLINE void sort_lanes(const Words16 (&sums)[4], Words16 (&total)[4]) {
  constexpr __mmask16 kAll = 0xffff;
  const auto bits = [](Words16 x) { return reinterpret_cast<__m512i>(x); };
  const __m512i a = _mm512_maskz_shuffle_i32x4(kAll, bits(sums[0]), bits(sums[1]), 0x44);
  const __m512i b = _mm512_maskz_shuffle_i32x4(kAll, bits(sums[0]), bits(sums[1]), 0xee);
  const __m512i c = _mm512_maskz_shuffle_i32x4(kAll, bits(sums[2]), bits(sums[3]), 0x44);
  const __m512i d = _mm512_maskz_shuffle_i32x4(kAll, bits(sums[2]), bits(sums[3]), 0xee);
  total[0] = reinterpret_cast<Words16>(_mm512_maskz_shuffle_i32x4(kAll, a, c, 0x88));
  total[1] = reinterpret_cast<Words16>(_mm512_maskz_shuffle_i32x4(kAll, a, c, 0xdd));
  total[2] = reinterpret_cast<Words16>(_mm512_maskz_shuffle_i32x4(kAll, b, d, 0x88));
  total[3] = reinterpret_cast<Words16>(_mm512_maskz_shuffle_i32x4(kAll, b, d, 0xdd));
}

// Whether 64 paths from `resolutions` on have one resolution.
static PFNAS_INLINE bool same_resolution(const std::uint8_t* resolutions) {
  const Bytes64 all = *reinterpret_cast<const UnalignedBytes64*>(resolutions);
  return _mm512_cmpneq_epi8_mask(reinterpret_cast<__m512i>(all),
                                 _mm512_set1_epi8(static_cast<char>(*resolutions))) == 0;
}

// Adds the steps of four blocks; `far` = how many slots each is beyond the first.
template <int kPlanes>
static PFNAS_INLINE void add_quad(const std::uint8_t* codes, std::int64_t stride,
                                  const std::int64_t (&far)[4], const std::uint8_t* table,
                                  Words16 (&sums)[kPlanes][4]) {
  Bytes64 block[4], index[4];
  PFNAS_UNROLL for (int s = 0; s < 4; ++s) {
    __builtin_prefetch(codes + far[s] * stride + kAhead);
    block[s] = *reinterpret_cast<const UnalignedBytes64*>(codes + far[s] * stride) |
               static_cast<std::uint8_t>(s * kCostCodes);
  }
  interleave(block, index);
  PFNAS_UNROLL for (int plane = 0; plane < kPlanes; ++plane) {
    const Bytes64 row = *reinterpret_cast<const UnalignedBytes64*>(table + plane * kPlaneBytes);
    PFNAS_UNROLL for (int v = 0; v < 4; ++v) add_bytes(sums[plane][v], row, index[v], Bytes64{} + 1);
  }
}

// Sums of 64 paths that have one resolution; codes of the first of them.
template <int kPlanes>
static PFNAS_INLINE void sum_by_bytes(const PathCostParams& p, const BytePlanes& planes,
                                      const std::uint8_t* codes, Words16 (&total)[4]) {
  const int num_blocks = p.num_slots - 1, resolution = codes[num_blocks * p.slot_stride] - 1;
  const std::uint8_t* table =
      planes.bytes + static_cast<std::int64_t>(resolution) * planes.num_quads * kPlanes * kPlaneBytes;
  const std::int64_t stride = p.slot_stride;
  Words16 sums[kPlanes][4] = {};
  PFNAS_UNROLL for (int v = 0; v < 4; ++v) sums[0][v] += p.constant_steps[resolution];
  for (int quad = 0; quad < num_blocks / 4; ++quad, table += kPlanes * kPlaneBytes, codes += 4 * stride) {
    add_quad<kPlanes>(codes, stride, {0, 1, 2, 3}, table, sums);
  }
  if (const int left = num_blocks % 4; left > 0) {  // blocks that are none look up zeros
    add_quad<kPlanes>(codes, stride, {0, min_of(1, left - 1), min_of(2, left - 1), 0}, table, sums);
  }
  PFNAS_UNROLL for (int v = 0; v < 4; ++v) {
    PFNAS_UNROLL for (int plane = 1; plane < kPlanes; ++plane) sums[0][v] += sums[plane][v] << (8 * plane);
  }
  sort_lanes(sums[0], total);
}

}  // namespace pfnas::PFNAS_TIER

#endif

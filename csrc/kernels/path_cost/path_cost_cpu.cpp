// SPDX-License-Identifier: Apache-2.0
// Additive costs of a population: one table look-up per block and path, and a sum.
//
//   path_cost -> sum_by_bytes  (byte_planes.h: structure of arrays, 64 paths of one resolution, VBMI and
//   VNNI)
//             -> sum_by_words  (structure of arrays: 16 paths a vector, the table's row held in one register)
//             -> sum_of_path   (any strides, or costs that are no whole numbers: path by path)
//
// Whole numbers are summed in 32-bit integers, hence exactly; others in double, in the order constant, block
// 0, block 1, ...: the same bits in every tier.
#include "common/parallel.h"
#include "common/simd.h"
#include "kernels/path_cost/byte_planes.h"
#include "kernels/path_cost/params.h"

namespace pfnas::PFNAS_TIER {
namespace {

using Params = PathCostParams;

constexpr std::int64_t kChunk = 4096;  // paths per item of work
constexpr int kGroup = 64;             // paths whose sums stay in registers

void write_cost(const Params& p, std::int64_t path, double cost) {
  if (p.cost_f64 != nullptr) {
    p.cost_f64[path] = cost;
  } else {
    p.cost_f32[path] = static_cast<float>(cost);
  }
}

double sum_of_path(const Params& p, std::int64_t path) {
  const std::uint8_t* codes = p.codes + path * p.path_stride;
  const int num_blocks = p.num_slots - 1;
  const std::int64_t resolution = codes[num_blocks * p.slot_stride] - 1;
  if (p.steps != nullptr) {
    const std::uint32_t* row = p.steps + resolution * num_blocks * kCostCodes;
    std::uint32_t sum = p.constant_steps[resolution];
    for (int b = 0; b < num_blocks; ++b, row += kCostCodes) sum += row[codes[b * p.slot_stride]];
    return static_cast<double>(sum) * p.step;
  }
  const double* row = p.table + resolution * num_blocks * p.num_codes;
  double sum = p.constant[resolution];
  for (int b = 0; b < num_blocks; ++b, row += p.num_codes) sum += row[codes[b * p.slot_stride]];
  return sum;
}

#ifdef __AVX512BW__

typedef std::uint32_t UnalignedWords16 __attribute__((vector_size(64), aligned(4), may_alias));

// Intrinsics, because GCC 12 turns __builtin_convertvector of bytes into scalar code; masked, because it
// warns about the plain one.
PFNAS_INLINE Words16 widen(const std::uint8_t* bytes) {
  return reinterpret_cast<Words16>(
      _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))));
}

PFNAS_INLINE Words16 load_row(const std::uint32_t* row) {
  return *reinterpret_cast<const UnalignedWords16*>(row);
}

// Sums of kGroup paths whose resolutions are `first` or `first` + 1: codes 16 to 31 mean the latter.
template <bool kTwo>
PFNAS_INLINE void add_slots(const Params& p, const std::uint8_t* codes, int first, Words16 (&sums)[4]) {
  const int num_blocks = p.num_slots - 1;
  const std::uint32_t* low = p.steps + static_cast<std::int64_t>(first) * num_blocks * kCostCodes;
  const std::uint32_t* high = low + num_blocks * kCostCodes;
  Words16 side[4];
  if constexpr (kTwo) {
    PFNAS_UNROLL for (int v = 0; v < 4; ++v) {
      side[v] = ((widen(codes + num_blocks * p.slot_stride + 16 * v) - 1) & 1) << 4;
    }
  }
  for (int b = 0; b < num_blocks; ++b, codes += p.slot_stride, low += kCostCodes, high += kCostCodes) {
    const Words16 row = load_row(low);
    PFNAS_UNROLL for (int v = 0; v < 4; ++v) {
      const Words16 code = widen(codes + 16 * v);
      if constexpr (kTwo) {
        sums[v] += __builtin_shuffle(row, load_row(high), code | side[v]);
      } else {
        sums[v] += __builtin_shuffle(row, code);
      }
    }
  }
}

// Resolutions are taken in pairs, because one shuffle reads two rows; lanes of other pairs are masked out.
PFNAS_INLINE void sum_by_words(const Params& p, const std::uint8_t* codes, Words16 (&total)[4]) {
  const std::uint8_t* resolutions = codes + (p.num_slots - 1) * p.slot_stride;
  std::uint32_t present = 1;  // bit g: some path has a resolution of pair g
  if (p.num_resolutions > 2) {
    present = 0;
    for (int i = 0; i < kGroup; ++i) present |= 1u << ((resolutions[i] - 1) >> 1);
  }
  PFNAS_UNROLL for (int v = 0; v < 4; ++v) total[v] = Words16{};
  for (int first = 0; first < p.num_resolutions; first += 2) {
    if ((present >> (first / 2) & 1) == 0) continue;
    Words16 sums[4], mine[4];
    PFNAS_UNROLL for (int v = 0; v < 4; ++v) {
      const Words16 index = widen(resolutions + 16 * v) - 1;
      mine[v] = reinterpret_cast<Words16>((index >> 1) == static_cast<std::uint32_t>(first >> 1));
      sums[v] = Words16{} + p.constant_steps[first];
      if (first + 1 < p.num_resolutions) {
        const std::uint32_t difference = p.constant_steps[first + 1] - p.constant_steps[first];
        sums[v] += difference * (index & 1);
      }
    }
    if (first + 1 < p.num_resolutions) {
      add_slots<true>(p, codes, first, sums);
    } else {
      add_slots<false>(p, codes, first, sums);
    }
    PFNAS_UNROLL for (int v = 0; v < 4; ++v) total[v] |= sums[v] & mine[v];
  }
}

PFNAS_INLINE void sum_group(const Params& p, const BytePlanes& planes, float scale, std::int64_t path) {
  const std::uint8_t* codes = p.codes + path;
  Words16 total[4];
  if (planes.bytes == nullptr || !same_resolution(codes + (p.num_slots - 1) * p.slot_stride)) {
    sum_by_words(p, codes, total);
  } else if (planes.num_planes == 2) {
    sum_by_bytes<2>(p, planes, codes, total);
  } else {
    sum_by_bytes<3>(p, planes, codes, total);
  }
  if (p.cost_f32 != nullptr) {
    PFNAS_UNROLL for (int v = 0; v < 4; ++v) {
      store(p.cost_f32 + path + 16 * v, __builtin_convertvector(total[v], Vec) * scale);
    }
    return;
  }
  std::uint32_t steps[kGroup];
  PFNAS_UNROLL for (int v = 0; v < 4; ++v) {
    *reinterpret_cast<UnalignedWords16*>(steps + 16 * v) = total[v];
  }
  for (int i = 0; i < kGroup; ++i) p.cost_f64[path + i] = static_cast<double>(steps[i]) * p.step / p.unit;
}

#endif

}  // namespace

void path_cost(const Params& p) {
#ifdef __AVX512BW__
  const BytePlanes planes = byte_planes(p);
  const float scale = static_cast<float>(p.step / p.unit);
#endif
  const double work = 4.0 * static_cast<double>(p.num_paths) * p.num_slots;
  parallel_for(ceil_div(p.num_paths, kChunk), work, [&](std::int64_t item) {
    std::int64_t path = item * kChunk;
    const std::int64_t end = min_of(p.num_paths, path + kChunk);
#ifdef __AVX512BW__
    if (p.steps != nullptr && p.path_stride == 1) {
      for (; path + kGroup <= end; path += kGroup) sum_group(p, planes, scale, path);
    }
#endif
    for (; path < end; ++path) write_cost(p, path, sum_of_path(p, path) / p.unit);
  });
}

void code_range(const CodeRangeParams& p) {
  for (int slot = 0; slot < p.num_slots; ++slot) {
    p.low[slot] = 255;
    p.high[slot] = 0;
  }
  if (p.path_stride == 1) {
    for (int slot = 0; slot < p.num_slots; ++slot) {
      const std::uint8_t* codes = p.codes + slot * p.slot_stride;
      std::uint8_t low = 255, high = 0;
      for (std::int64_t path = 0; path < p.num_paths; ++path) {
        low = min_of(low, codes[path]);
        high = max_of(high, codes[path]);
      }
      p.low[slot] = low;
      p.high[slot] = high;
    }
    return;
  }
  for (std::int64_t path = 0; path < p.num_paths; ++path) {
    const std::uint8_t* codes = p.codes + path * p.path_stride;
    for (int slot = 0; slot < p.num_slots; ++slot) {
      const std::uint8_t code = codes[slot * p.slot_stride];
      p.low[slot] = min_of(p.low[slot], code);
      p.high[slot] = max_of(p.high[slot], code);
    }
  }
}

}  // namespace pfnas::PFNAS_TIER

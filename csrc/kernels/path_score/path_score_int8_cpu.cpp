// SPDX-License-Identifier: Apache-2.0
// Scores in 8-bit integers (int8_params.h has the formula), for sifting: what may be among the best is scored
// again in float32.
//
//   path_score_int8 -> per batch of 24 paths: rows | look up, round to 8 bits | dense layer and head
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "kernels/path_score/int8_params.h"
#include "kernels/path_score/rows.h"

namespace pfnas::PFNAS_TIER {
namespace {

constexpr std::int64_t kBatch = 24;      // whole tiles of 6 paths
constexpr std::int64_t kRowStride = 96;  // paths whose rows are found at once
constexpr int kTileRows = 6;
constexpr int kTileColumns = 64;

typedef std::int32_t Ints16 __attribute__((vector_size(64)));
typedef std::int32_t UnalignedInts16 __attribute__((vector_size(64), aligned(1), may_alias));

struct Workspace {
  std::int32_t* rows;    // [num_lookups][kRowStride]
  std::uint8_t* hidden;  // [kBatch][width]
  float* partial;        // [kBatch][16]
};

// Nearest whole number, ties to even, for |x| < 2^22; the same in every tier, whatever the vector width.
PFNAS_INLINE std::int32_t round_of(float x) {
  const float shifted = x + 12582912.0f;
  std::int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  return bits - 0x4B400000;
}

// The budget in 1/32767 of its range.
PFNAS_INLINE std::int32_t budget_steps(const Int8ScoreParams& p, std::int64_t path) {
  if (p.z == nullptr) return 0;
  const float steps = (p.z[path] - p.model.z_middle) * p.model.z_scale;
  return steps >= -32767.0f ? round_of(steps < 32767.0f ? steps : 32767.0f) : -32767;
}

#ifdef PFNAS_NATIVE_512

// `rows`: of the batch's first path.
void look_up(const Int8ScoreParams& p, std::int64_t first, std::int64_t count, const std::int32_t* rows,
             const Workspace& w) {
  const Int8Model& m = p.model;
  constexpr int kVecs = kInt8Columns / 32;
  const __m512i half = _mm512_set1_epi16(64);
  for (int column = 0; column < m.width; column += kInt8Columns) {
    const std::int16_t* table = m.table + column / kInt8Columns * m.num_rows * kInt8Columns;
    __m512i start[kVecs], budget[kVecs];
    PFNAS_UNROLL for (int j = 0; j < kVecs; ++j) {
      start[j] = _mm512_loadu_si512(m.start + column + 32 * j);
      budget[j] = _mm512_loadu_si512(m.budget + column + 32 * j);
    }
    for (std::int64_t path = 0; path < count; ++path) {
      const __m512i z = _mm512_set1_epi16(static_cast<std::int16_t>(budget_steps(p, first + path)));
      __m512i sums[kVecs];
      PFNAS_UNROLL for (int j = 0; j < kVecs; ++j) {
        sums[j] = _mm512_add_epi16(start[j], _mm512_mulhrs_epi16(budget[j], z));
      }
      for (int r = 0; r < m.num_lookups; ++r) {
        const std::int16_t* row = table + rows[r * kRowStride + path];
        PFNAS_UNROLL for (int j = 0; j < kVecs; ++j) {
          sums[j] = _mm512_add_epi16(sums[j], _mm512_loadu_si512(row + 32 * j));
        }
      }
      // Adding before the shift may pass 2^15: saturate, 255 is reached either way.
      PFNAS_UNROLL for (int j = 0; j < kVecs; ++j) {
        sums[j] = _mm512_srai_epi16(_mm512_adds_epi16(sums[j], half), 7);
      }
      std::uint8_t* out = w.hidden + path * m.width + column;
      PFNAS_UNROLL for (int j = 0; j < kVecs; j += 2) {
        _mm512_storeu_si512(out + 32 * j, _mm512_packus_epi16(sums[j], sums[j + 1]));
      }
    }
  }
}

// Inline assembly keeps the sums in registers, where GCC 12 stores every one of them after the intrinsic.
PFNAS_INLINE void add_products(Ints16& sum, Ints16 bytes, Ints16 weights) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "v"(weights));
}

void dense_vnni(const Int8Model& m, std::int64_t row, int column, const Workspace& w) {
  constexpr int kVecs = kTileColumns / 16;
  const std::int8_t* weights = m.weights + static_cast<std::int64_t>(column) * m.width;
  const std::uint8_t* in = w.hidden + row * m.width;
  const std::int64_t width = m.width;
  Ints16 sums[kTileRows][kVecs] = {};
  for (std::int64_t k = 0; k < width; k += 4, weights += 4 * kTileColumns) {
    Ints16 v[kVecs];
    PFNAS_UNROLL for (int j = 0; j < kVecs; ++j) {
      v[j] = *reinterpret_cast<const UnalignedInts16*>(weights + 64 * j);
    }
    PFNAS_UNROLL for (int i = 0; i < kTileRows; ++i) {
      std::int32_t four;
      std::memcpy(&four, in + i * width + k, 4);
      const Ints16 bytes = four - Ints16{};
      PFNAS_UNROLL for (int j = 0; j < kVecs; ++j) add_products(sums[i][j], bytes, v[j]);
    }
  }
  PFNAS_UNROLL for (int i = 0; i < kTileRows; ++i) {
    float* partial = w.partial + (row + i) * 16;
    Vec total = column == 0 ? Vec{} : load(partial);
    PFNAS_UNROLL for (int j = 0; j < kVecs; ++j) {
      const int at = column + 16 * j;
      const Vec y = __builtin_convertvector(sums[i][j], Vec) * load(m.scale + at) + load(m.bias + at);
      total += (y < Vec{} ? Vec{} : y) * load(m.head + at);
    }
    store(partial, total);
  }
}

#else

void look_up(const Int8ScoreParams& p, std::int64_t first, std::int64_t count, const std::int32_t* rows,
             const Workspace& w) {
  const Int8Model& m = p.model;
  for (int column = 0; column < m.width; column += kInt8Columns) {
    const std::int16_t* table = m.table + column / kInt8Columns * m.num_rows * kInt8Columns;
    for (std::int64_t path = 0; path < count; ++path) {
      const std::int32_t z = budget_steps(p, first + path);
      std::int32_t sums[kInt8Columns];
      for (int k = 0; k < kInt8Columns; ++k) {
        sums[k] = m.start[column + k] + ((m.budget[column + k] * z + 0x4000) >> 15);
      }
      for (int r = 0; r < m.num_lookups; ++r) {
        const std::int16_t* row = table + rows[r * kRowStride + path];
        for (int k = 0; k < kInt8Columns; ++k) sums[k] += row[k];
      }
      std::uint8_t* out = w.hidden + path * m.width + column;
      for (int k = 0; k < kInt8Columns; ++k) {
        // Rows and partial sums may have wrapped around 2^16; the whole sum fits.
        const std::int32_t whole = static_cast<std::int16_t>(static_cast<std::uint16_t>(sums[k]));
        const std::int32_t steps = (whole + 64) >> 7;
        const int place = k / 64 * 64 + k % 32 / 8 * 16 + k / 32 % 2 * 8 + k % 8;  // as packus leaves them
        out[place] = static_cast<std::uint8_t>(min_of(max_of(steps, 0), 255));
      }
    }
  }
}

#endif

// The same integers without VNNI.
void dense_plain(const Int8Model& m, std::int64_t row, int column, const Workspace& w) {
  const std::int8_t* weights = m.weights + static_cast<std::int64_t>(column) * m.width;
  for (int i = 0; i < kTileRows; ++i) {
    const std::uint8_t* in = w.hidden + (row + i) * m.width;
    std::int32_t sums[kTileColumns] = {};
    for (int k = 0; k < m.width; k += 4) {
      const std::int8_t* four = weights + k * kTileColumns;
      const std::int32_t a0 = in[k], a1 = in[k + 1], a2 = in[k + 2], a3 = in[k + 3];
      for (int j = 0; j < kTileColumns; ++j) {
        sums[j] += a0 * four[4 * j] + a1 * four[4 * j + 1] + a2 * four[4 * j + 2] + a3 * four[4 * j + 3];
      }
    }
    float* partial = w.partial + (row + i) * 16;
    for (int lane = 0; lane < 16; ++lane) {
      float total = column == 0 ? 0.0f : partial[lane];
      for (int j = lane; j < kTileColumns; j += 16) {
        const float y = static_cast<float>(sums[j]) * m.scale[column + j] + m.bias[column + j];
        total += (y < 0.0f ? 0.0f : y) * m.head[column + j];
      }
      partial[lane] = total;
    }
  }
}

void dense(const Int8ScoreParams& p, std::int64_t count, const Workspace& w) {
  for (int column = 0; column < p.model.out_width; column += kTileColumns) {
    for (std::int64_t row = 0; row < count; row += kTileRows) {
#ifdef PFNAS_NATIVE_512
      if (p.use_vnni) {
        dense_vnni(p.model, row, column, w);
        continue;
      }
#endif
      dense_plain(p.model, row, column, w);
    }
  }
}

void score_batch(const Int8ScoreParams& p, std::int64_t first, std::int64_t count, const std::int32_t* rows,
                 const Workspace& w) {
  look_up(p, first, count, rows, w);
  dense(p, count, w);
  for (std::int64_t path = 0; path < count; ++path) {
    typedef float Quad __attribute__((vector_size(16)));
    Quad quads[4];
    std::memcpy(quads, w.partial + path * 16, sizeof quads);
    const Quad sum = (quads[0] + quads[1]) + (quads[2] + quads[3]);
    float score = (sum[0] + sum[2]) + (sum[1] + sum[3]);
    if (p.model.linear != nullptr) {
      score += p.model.linear_offset + (p.z == nullptr ? 0.0f : p.z[first + path] * p.model.linear_budget);
      for (int r = 0; r < p.model.num_lookups; ++r) {
        score += p.model.linear[rows[r * kRowStride + path] / kInt8Columns];
      }
    }
    p.scores[first + path] = score;
  }
}

}  // namespace

void path_score_int8(const Int8ScoreParams& p) {
  constexpr std::int64_t kItem = 8 * kRowStride;
  const Int8Model& m = p.model;
  const double work = static_cast<double>(p.num_paths) * m.width * (m.num_lookups + m.out_width) / 4;
  parallel_for(ceil_div(p.num_paths, kItem), work, [&](std::int64_t item) {
    const std::int64_t rows_floats = kRowStride * m.num_lookups;
    const std::int64_t hidden_floats = kBatch * m.width / 4;
    float* memory =
        thread_scratch(Scratch::kThread, static_cast<std::size_t>(rows_floats + hidden_floats + kBatch * 16));
    const Workspace w{reinterpret_cast<std::int32_t*>(memory),
                      reinterpret_cast<std::uint8_t*>(memory + rows_floats),
                      memory + rows_floats + hidden_floats};
    const std::int64_t end = min_of(p.num_paths, (item + 1) * kItem);
    for (std::int64_t start = item * kItem; start < end; start += kRowStride) {
      const std::int64_t stop = min_of(end, start + kRowStride);
      find_rows({p.codes, p.slot_stride, p.path_stride}, m.lookups, m.num_lookups, start, stop - start,
                kInt8Columns, w.rows, kRowStride);
      for (std::int64_t first = start; first < stop; first += kBatch) {
        score_batch(p, first, min_of(kBatch, stop - first), w.rows + (first - start), w);
      }
    }
  });
}

}  // namespace pfnas::PFNAS_TIER

// SPDX-License-Identifier: Apache-2.0
// Which rows of the table each path of a batch looks up.
#pragma once

#include "common/simd.h"
#include "kernels/path_score/params.h"

namespace pfnas::PFNAS_TIER {

// The codes of all paths: codes[slot * slot_stride + path * path_stride].
struct CodesView {
  const std::uint8_t* codes;
  std::int64_t slot_stride;
  std::int64_t path_stride;
};

// rows, [num_lookups][row_stride] = row * scale of `count` paths from `first` on. A slot's codes lie together
// in a structure of arrays: the constant stride is what lets the compiler use vectors.
template <bool kTogether>
static void find_rows_of(const CodesView& v, const ScoreLookup* lookups, int num_lookups, std::int64_t first,
                         std::int64_t count, std::int32_t scale, std::int32_t* rows,
                         std::int64_t row_stride) {
  const std::int64_t stride = kTogether ? 1 : v.path_stride;
  for (int r = 0; r < num_lookups; ++r, rows += row_stride) {
    const ScoreLookup look = lookups[r];
    const std::uint8_t* codes = v.codes + first * stride + look.slot * v.slot_stride;
    const std::uint8_t* second = v.codes + first * stride + look.second_slot * v.slot_stride;
    const std::int32_t start = look.first_row * scale, step = look.second_stride * scale;
    for (std::int64_t path = 0; path < count; ++path) {
      rows[path] = start + scale * codes[path * stride] + step * second[path * stride];
    }
  }
}

static inline void find_rows(const CodesView& v, const ScoreLookup* lookups, int num_lookups,
                             std::int64_t first, std::int64_t count, std::int32_t scale, std::int32_t* rows,
                             std::int64_t row_stride) {
  const auto find = v.path_stride == 1 ? find_rows_of<true> : find_rows_of<false>;
  find(v, lookups, num_lookups, first, count, scale, rows, row_stride);
}

}  // namespace pfnas::PFNAS_TIER

// SPDX-License-Identifier: Apache-2.0
// ldmatrix and mma.sync for an ordinary compiler: collectives of a whole warp. Products are exact and summed
// in float, k ascending; a GPU's order and rounding differ and are not proven by this.
#pragma once

#include <cstring>

#include "device_emulator.h"

namespace cuda_emulator {

constexpr int kMatrixRows = 8, kMatrixColumns = 8, kMatrices = 4;

template <bool kTransposed>
void combine_load_matrix(Thread* const (&lanes)[kWarpSize]) {
  std::uint16_t matrices[kMatrices][kMatrixRows][kMatrixColumns];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const void* row = *static_cast<const void* const*>(lanes[lane]->collective.in);
    std::memcpy(matrices[lane / kMatrixRows][lane % kMatrixRows], row, sizeof matrices[0][0]);
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    auto* fragment = static_cast<std::uint32_t*>(lanes[lane]->collective.out);
    const int row = lane / 4, column = lane % 4 * 2;
    for (int i = 0; i < kMatrices; ++i) {
      const std::uint16_t low = kTransposed ? matrices[i][column][row] : matrices[i][row][column];
      const std::uint16_t high = kTransposed ? matrices[i][column + 1][row] : matrices[i][row][column + 1];
      fragment[i] = std::uint32_t{high} << 16 | low;
    }
  }
}

template <bool kTransposed>
void load_matrix_collectively(std::uint32_t (&fragment)[4], const void* row, const void* caller,
                              const std::source_location& place) {
  constexpr int kRowBytes = 16;
  check_aligned(row, kRowBytes, place);
  note_access(row, kRowBytes, false, caller);
  wait_at_collective({combine_load_matrix<kTransposed>, kFullMask, &row, fragment, sizeof row}, place);
}

struct MultiplyTile {
  float* sums;
  const std::uint32_t *a, *b;
};

inline float stored_to_float(__half value) { return __half2float(value); }
inline float stored_to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
float element(std::uint32_t pair, int index) {
  T value;
  value.bits = static_cast<std::uint16_t>(pair >> (16 * index));
  return stored_to_float(value);
}

template <class T>
void combine_multiply_tile(Thread* const (&lanes)[kWarpSize]) {
  constexpr int kM = 16, kN = 8, kK = 16;
  float a[kM][kK], b[kK][kN];
  const auto arguments = [&](int lane) -> const MultiplyTile& {
    return *static_cast<const MultiplyTile*>(lanes[lane]->collective.in);
  };
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const MultiplyTile& tile = arguments(lane);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int j = 0; j < 2; ++j) {
      for (int i = 0; i < 4; ++i) a[group + i % 2 * 8][pair + j + i / 2 * 8] = element<T>(tile.a[i], j);
      for (int i = 0; i < 2; ++i) b[pair + j + i * 8][group] = element<T>(tile.b[i], j);
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      float& sum = arguments(lane).sums[i];
      for (int k = 0; k < kK; ++k) sum += a[group + i / 2 * 8][k] * b[k][pair + i % 2];
    }
  }
}

}  // namespace cuda_emulator

namespace pfnas::cuda {

CUDA_EMULATOR_VECTOR_ACCESS void load_matrix(std::uint32_t (&fragment)[4], const void* row,
                                             EmulatedPlace place = EmulatedPlace::current()) {
  cuda_emulator::load_matrix_collectively<false>(fragment, row, __builtin_return_address(0), place);
}

CUDA_EMULATOR_VECTOR_ACCESS void load_matrix_transposed(std::uint32_t (&fragment)[4], const void* row,
                                                        EmulatedPlace place = EmulatedPlace::current()) {
  cuda_emulator::load_matrix_collectively<true>(fragment, row, __builtin_return_address(0), place);
}

template <class T>
void multiply_tile(float (&sums)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                   EmulatedPlace place = EmulatedPlace::current()) {
  const cuda_emulator::MultiplyTile tile{sums, a, b};
  cuda_emulator::wait_at_collective(
      {cuda_emulator::combine_multiply_tile<T>, cuda_emulator::kFullMask, &tile, nullptr, sizeof tile},
      place);
}

}  // namespace pfnas::cuda

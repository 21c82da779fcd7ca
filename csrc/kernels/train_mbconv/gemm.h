// SPDX-License-Identifier: Apache-2.0
// C = A B in register tiles, B and C in blocks of 16 columns. A is read one element at a time (a broadcast),
// so the same tile serves A and its transpose, in channels_last rows or in blocks: forward, gradient to the
// input (B = the weight as it lies) and gradient to the weight (A = transposed activations).
#pragma once

#include "common/simd.h"
#include "kernels/dynamic_depthwise_conv/filter.h"  // kBlock, kVecsPerBlock
#include "kernels/train_mbconv/tile_ahead.h"

namespace pfnas::PFNAS_TIER {

// Element (i, k) lies at data + i * row + k / 16 * chunk + k % 16 * step.
struct LeftMatrix {
  const float* data;
  std::int64_t row, step, chunk;
};

static inline LeftMatrix rows_of(const float* data, std::int64_t stride) { return {data, stride, 1, kBlock}; }
static inline LeftMatrix transposed_rows_of(const float* data, std::int64_t stride) {
  return {data, 1, stride, kBlock * stride};
}
// [K / 16][rows][16]
static inline LeftMatrix blocks_of(const float* data, std::int64_t rows) {
  return {data, kBlock, 1, rows * kBlock};
}

// Element (k, 16 b + lane) lies at data + b * block + k * 16 + lane.
struct RightMatrix {
  const float* data;
  std::int64_t block;
};

// Element (i, 16 b + lane) lies at data + b * block + i * row + lane; `last` lanes of the last block exist.
struct OutMatrix {
  float* data;
  std::int64_t row, block;
  int last;
};

enum class Start { kZero, kOut };  // of the sums; kOut wants c.last = 16

template <int kRows, int kBlocks, int kRowStep>
static PFNAS_INLINE void multiply_chunk(Vec (&sums)[kRows][kBlocks * kVecsPerBlock], const float* a,
                                        std::int64_t row, std::int64_t step, const float* b,
                                        std::int64_t block, std::int64_t depth) {
  for (std::int64_t k = 0; k < depth; ++k, a += step, b += kBlock) {
    Vec right[kBlocks * kVecsPerBlock];
    PFNAS_UNROLL for (int j = 0; j < kBlocks; ++j) {
      PFNAS_UNROLL for (int v = 0; v < kVecsPerBlock; ++v) {
        right[j * kVecsPerBlock + v] = load(b + j * block + v * kLanes);
      }
    }
    PFNAS_UNROLL for (int i = 0; i < kRows; ++i) {
      const Vec left = broadcast(a[i * (kRowStep > 0 ? kRowStep : row)]);
      PFNAS_UNROLL for (int j = 0; j < kBlocks * kVecsPerBlock; ++j) sums[i][j] += left * right[j];
    }
  }
}

template <int kRows, int kBlocks, int kRowStep, Start kStart>
static inline void multiply_tile(const LeftMatrix& a, std::int64_t i, const RightMatrix& b,
                                 const OutMatrix& c, bool ragged, std::int64_t depth, TileAhead* ahead) {
  if (ahead != nullptr) ahead->fetch(kRows * kBlocks * depth);
  constexpr int kVecs = kBlocks * kVecsPerBlock;
  Vec sums[kRows][kVecs] = {};
  float* out = c.data + i * c.row;
  const int last = ragged && kStart == Start::kZero ? c.last : kBlock;
  if constexpr (kStart == Start::kOut) {
    PFNAS_UNROLL for (int r = 0; r < kRows; ++r) {
      PFNAS_UNROLL for (int j = 0; j < kVecs; ++j) {
        sums[r][j] = load(out + r * c.row + j / kVecsPerBlock * c.block + j % kVecsPerBlock * kLanes);
      }
    }
  }
  const float* left = a.data + i * a.row;
  const float* right = b.data;
  std::int64_t k = 0;
  for (; k + kBlock <= depth; k += kBlock, left += a.chunk, right += kBlock * kBlock) {
    multiply_chunk<kRows, kBlocks, kRowStep>(sums, left, a.row, a.step, right, b.block, kBlock);
  }
  multiply_chunk<kRows, kBlocks, kRowStep>(sums, left, a.row, a.step, right, b.block, depth - k);
  if (last == kBlock) {
    PFNAS_UNROLL for (int r = 0; r < kRows; ++r) {
      PFNAS_UNROLL for (int j = 0; j < kVecs; ++j) {
        store(out + r * c.row + j / kVecsPerBlock * c.block + j % kVecsPerBlock * kLanes, sums[r][j]);
      }
    }
    return;
  }
  // Fewer channels than lanes: through memory, to keep the sums in registers above.
  float spill[kRows * kVecs * kLanes];
  PFNAS_UNROLL for (int r = 0; r < kRows; ++r) {
    PFNAS_UNROLL for (int j = 0; j < kVecs; ++j) store(spill + (r * kVecs + j) * kLanes, sums[r][j]);
  }
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < kBlocks; ++j) {
      const float* from = spill + (r * kBlocks + j) * kBlock;
      float* to = out + r * c.row + j * c.block;
      for (int lane = 0; lane < (j < kBlocks - 1 ? kBlock : last); ++lane) to[lane] = from[lane];
    }
  }
}

// Rows of a tile of so many blocks: sums + right-hand vectors + one broadcast fit the registers.
constexpr int tile_rows(int blocks) {
  return kNumRegisters < 32  ? (kVecsPerBlock == 2 ? 6 : 3)
         : kVecsPerBlock > 1 ? 24 / (blocks * kVecsPerBlock)
                             : (blocks == 3   ? 8
                                : blocks == 2 ? 12
                                              : 16);
}
constexpr int kMaxTileBlocks = kNumRegisters >= 32 && kVecsPerBlock == 1 ? 3 : 1;

template <int kBlocks, int kRowStep, Start kStart>
static inline void multiply_panel(std::int64_t rows, const LeftMatrix& a, const RightMatrix& b,
                                  const OutMatrix& c, bool ragged, std::int64_t depth, TileAhead* ahead) {
  constexpr int kRows = tile_rows(kBlocks);
  std::int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) {
    multiply_tile<kRows, kBlocks, kRowStep, kStart>(a, i, b, c, ragged, depth, ahead);
  }
  if constexpr (kRows > 8) {
    for (; i + 8 <= rows; i += 8) {
      multiply_tile<8, kBlocks, kRowStep, kStart>(a, i, b, c, ragged, depth, ahead);
    }
  }
  if constexpr (kRows > 4) {
    for (; i + 4 <= rows; i += 4) {
      multiply_tile<4, kBlocks, kRowStep, kStart>(a, i, b, c, ragged, depth, ahead);
    }
  }
  if constexpr (kRows > 2) {
    for (; i + 2 <= rows; i += 2) {
      multiply_tile<2, kBlocks, kRowStep, kStart>(a, i, b, c, ragged, depth, ahead);
    }
  }
  for (; i < rows; ++i) multiply_tile<1, kBlocks, kRowStep, kStart>(a, i, b, c, ragged, depth, ahead);
}

// C, [rows][blocks * 16] = A, [rows][depth] x B, [depth][blocks * 16]. kRowStep: a.row where it is known,
// else 0. `ahead`: what is fetched meanwhile, or null.
template <int kRowStep, Start kStart>
void multiply_blocks(std::int64_t rows, std::int64_t blocks, std::int64_t depth, const LeftMatrix& a,
                     RightMatrix b, OutMatrix c, TileAhead* ahead = nullptr) {
  while (blocks > 0) {
    // 4 = 2 + 2: a panel of one block is bound by its loads.
    const std::int64_t take = kMaxTileBlocks < 3 ? 1
                              : blocks == 4      ? 2
                                                 : min_of<std::int64_t>(blocks, kMaxTileBlocks);
    const bool ragged = take == blocks;
    if constexpr (kMaxTileBlocks >= 3) {
      if (take == 3) multiply_panel<3, kRowStep, kStart>(rows, a, b, c, ragged, depth, ahead);
      if (take == 2) multiply_panel<2, kRowStep, kStart>(rows, a, b, c, ragged, depth, ahead);
    }
    if (take == 1) multiply_panel<1, kRowStep, kStart>(rows, a, b, c, ragged, depth, ahead);
    b.data += take * b.block;
    c.data += take * c.block;
    blocks -= take;
  }
}

// A weight, [rows, stride] floats, as the right-hand side of x W^T: [rows / 16][columns][16].
static inline void pack_transposed(const float* weight, std::int64_t rows, std::int64_t columns,
                                   std::int64_t stride, float* out) {
  for (std::int64_t first = 0; first < rows; first += kBlock, out += columns * kBlock) {
    const std::int64_t lanes = min_of<std::int64_t>(kBlock, rows - first);
    const float* from = weight + first * stride;
    for (std::int64_t k = 0; k < columns; ++k) {
      for (std::int64_t lane = 0; lane < lanes; ++lane) out[k * kBlock + lane] = from[lane * stride + k];
      for (std::int64_t lane = lanes; lane < kBlock; ++lane) out[k * kBlock + lane] = 0.0f;
    }
  }
}

// The same weight as the right-hand side of g W: [columns / 16][rows][16].
static inline void pack_straight(const float* weight, std::int64_t rows, std::int64_t columns,
                                 std::int64_t stride, float* out) {
  for (std::int64_t first = 0; first < columns; first += kBlock, out += rows * kBlock) {
    const std::int64_t lanes = min_of<std::int64_t>(kBlock, columns - first);
    for (std::int64_t k = 0; k < rows; ++k) {
      const float* from = weight + k * stride + first;
      for (std::int64_t lane = 0; lane < lanes; ++lane) out[k * kBlock + lane] = from[lane];
      for (std::int64_t lane = lanes; lane < kBlock; ++lane) out[k * kBlock + lane] = 0.0f;
    }
  }
}

}  // namespace pfnas::PFNAS_TIER

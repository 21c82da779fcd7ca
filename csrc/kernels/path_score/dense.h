// SPDX-License-Identifier: Apache-2.0
// Dense layers as register tiles of a few paths by a few panels of 16 columns; the last one feeds the head
// directly and is never stored.
#pragma once

#include "common/simd.h"
#include "kernels/path_score/lookup.h"

namespace pfnas::PFNAS_TIER {

constexpr int kPanelVecs = kScorePanel / kLanes;

struct DenseJob {
  const float* in;  // [kBatch][in_stride]
  std::int64_t in_stride;
  int in_width;
  const float* weights;  // [panels][in_width][16]
  const float* bias;     // [panels * 16]
  float* out;            // [kBatch][out_stride], or null for the last layer
  std::int64_t out_stride;
  const float* head;  // [panels * 16], last layer
  float* partial;     // [kBatch][kLanes], last layer: sums of relu(columns) * head
};

// relu and store a few panels' sums of one path, or add them to the head's.
template <int kVecs>
static PFNAS_INLINE void finish_row(const DenseJob& job, std::int64_t row, int panel,
                                    const Vec (&sums)[kVecs]) {
  if (job.out != nullptr) {
    float* out = job.out + row * job.out_stride + panel * kScorePanel;
    PFNAS_UNROLL for (int j = 0; j < kVecs; ++j) store(out + j * kLanes, relu(sums[j]));
    return;
  }
  float* partial = job.partial + row * kLanes;
  Vec total = panel == 0 ? Vec{} : load(partial);
  PFNAS_UNROLL for (int j = 0; j < kVecs; ++j) {
    total += relu(sums[j]) * load(job.head + panel * kScorePanel + j * kLanes);
  }
  store(partial, total);
}

// Every row starts with the biases of the panels from `panel` on.
template <int kRows, int kVecs>
static PFNAS_INLINE void start_sums(const DenseJob& job, int panel, Vec (&sums)[kRows][kVecs]) {
  PFNAS_UNROLL for (int j = 0; j < kVecs; ++j) {
    const Vec bias = load(job.bias + panel * kScorePanel + j * kLanes);
    PFNAS_UNROLL for (int i = 0; i < kRows; ++i) sums[i][j] = bias;
  }
}

// What input unit k adds to a tile; `weights` of its first panel.
template <int kPanels, int kRows, int kVecs>
static PFNAS_INLINE void add_unit(const float* weights, std::int64_t panel_size, const float* in,
                                  std::int64_t in_stride, int k, Vec (&sums)[kRows][kVecs]) {
  Vec w[kVecs];
  PFNAS_UNROLL for (int q = 0; q < kPanels; ++q) {
    PFNAS_UNROLL for (int v = 0; v < kPanelVecs; ++v) {
      w[q * kPanelVecs + v] = load(weights + q * panel_size + k * kScorePanel + v * kLanes);
    }
  }
  PFNAS_UNROLL for (int i = 0; i < kRows; ++i) {
    const float value = in[i * in_stride + k];
    PFNAS_UNROLL for (int j = 0; j < kVecs; ++j) sums[i][j] += value * w[j];
  }
}

template <int kRows, int kPanels>
static PFNAS_INLINE void dense_tile(const DenseJob& job, std::int64_t row, int panel) {
  const std::int64_t panel_size = static_cast<std::int64_t>(job.in_width) * kScorePanel;
  const float* weights = job.weights + panel * panel_size;
  const float* in = job.in + row * job.in_stride;
  Vec sums[kRows][kPanels * kPanelVecs];
  start_sums(job, panel, sums);
  for (int k = 0; k < job.in_width; ++k) add_unit<kPanels>(weights, panel_size, in, job.in_stride, k, sums);
  PFNAS_UNROLL for (int i = 0; i < kRows; ++i) finish_row(job, row + i, panel, sums[i]);
}

template <int kRows, int kPanels>
static void dense_panels(const DenseJob& job, std::int64_t num_rows, int panel) {
  for (std::int64_t row = 0; row < num_rows; row += kRows) dense_tile<kRows, kPanels>(job, row, panel);
}

// Rows beyond num_rows, up to a whole tile, are computed from whatever is there and never read.
static void dense_layer(const DenseJob& job, std::int64_t num_rows, int num_panels) {
  int panel = 0;
  if constexpr (kNumRegisters == 32 && kLanes == 16) {
    if (num_panels % 5 == 0) {
      for (; panel < num_panels; panel += 5) dense_panels<5, 5>(job, num_rows, panel);
    }
    for (; panel + 4 <= num_panels; panel += 4) dense_panels<6, 4>(job, num_rows, panel);
    for (; panel + 2 <= num_panels; panel += 2) dense_panels<12, 2>(job, num_rows, panel);
  }
  constexpr int kRows = kNumRegisters == 32 ? 12 / kPanelVecs : (kLanes == 8 ? 6 : 3);
  for (; panel < num_panels; ++panel) dense_panels<kRows, 1>(job, num_rows, panel);
}

}  // namespace pfnas::PFNAS_TIER

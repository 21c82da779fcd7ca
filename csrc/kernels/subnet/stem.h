// SPDX-License-Identifier: Apache-2.0
// The first layer: dense 3x3, stride 2, 3 input channels in any layout. Vectors run over output channels; the
// nine input rows of an output row are copied once into a padded buffer, from which values are broadcast.
#pragma once

#include "common/activation.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "kernels/subnet/params.h"

namespace pfnas::PFNAS_TIER {

constexpr int kStemTaps = 27;
constexpr int kStemWidth = kNumRegisters >= 32 ? 14 : 8;

// rows: [9][pitch], (channel, row) by (channel, row); zero where the image ends.
static inline void pack_stem_rows(const SubnetParams& p, std::int64_t image, std::int64_t y, float* rows,
                                  std::int64_t pitch) {
  for (int c = 0; c < 3; ++c) {
    for (int r = 0; r < 3; ++r, rows += pitch) {
      const std::int64_t source = 2 * y + r - 1;
      if (source < 0 || source >= p.height) {
        for (std::int64_t x = 0; x < pitch; ++x) rows[x] = 0.0f;
        continue;
      }
      const float* in = p.images + image * p.image_stride + c * p.channel_stride + source * p.row_stride;
      rows[0] = 0.0f;
      for (std::int64_t x = 0; x < p.width; ++x) rows[1 + x] = in[x * p.column_stride];
      for (std::int64_t x = 1 + p.width; x < pitch; ++x) rows[x] = 0.0f;
    }
  }
}

template <Activation kActivation>
static void stem_row(const SubnetParams& p, const float* rows, std::int64_t pitch, std::int64_t out_width,
                     float* y) {
  const std::int64_t channels = p.stem.out_channels;
  for (std::int64_t o = 0; o < channels; o += kLanes) {
    const Vec scale = load(p.stem.affine.scale + o), shift = load(p.stem.affine.shift + o);
    for (std::int64_t i = 0; i < out_width; i += kStemWidth) {
      Vec sums[kStemWidth] = {};
      const float* weight = p.stem.weight + o;
      for (int row = 0; row < 9; ++row) {
        const float* in = rows + row * pitch + 2 * i;
        PFNAS_UNROLL for (int s = 0; s < 3; ++s, weight += channels) {
          const Vec w = load(weight);
          PFNAS_UNROLL for (int c = 0; c < kStemWidth; ++c) sums[c] += in[2 * c + s] * w;
        }
      }
      const std::int64_t columns = min_of<std::int64_t>(kStemWidth, out_width - i);
      PFNAS_UNROLL for (int c = 0; c < kStemWidth; ++c) {
        if (c < columns) {
          store(y + (i + c) * channels + o, activate<kActivation>(sums[c] * scale + shift));
        }
      }
    }
  }
}

// Images [first, first + count) of the call -> y, [count, Ho, Wo, out_channels].
static inline void run_stem(const SubnetParams& p, std::int64_t first, std::int64_t count, float* y) {
  const std::int64_t out_height = (p.height + 1) / 2, out_width = (p.width + 1) / 2;
  const std::int64_t pitch = 2 * ceil_div(out_width, kStemWidth) * kStemWidth + 2;
  float* rows = thread_scratch(Scratch::kThread, static_cast<std::size_t>(9 * pitch));
  dispatch_activation(p.stem.activation, [&](auto tag) {
    for (std::int64_t image = first; image < first + count; ++image) {
      for (std::int64_t row = 0; row < out_height; ++row) {
        pack_stem_rows(p, image, row, rows, pitch);
        stem_row<decltype(tag)::value>(p, rows, pitch, out_width, y);
        y += out_width * p.stem.out_channels;
      }
    }
  });
}

}  // namespace pfnas::PFNAS_TIER

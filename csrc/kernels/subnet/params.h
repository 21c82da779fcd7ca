// SPDX-License-Identifier: Apache-2.0
// The contract of a prepared subnet: every layer of one path, in the order of execution, as plain structs
// that point into the weights all paths share. float32; padding is kernel_size / 2; out = ceil(in / stride).
//
// Between layers, tensors are channels_last with each pixel padded to whole blocks of 16 floats, so that no
// kernel meets a ragged vector: widths here are padded widths, except where a comment says exact.
#pragma once

#include <cstdint>

#include "kernels/dynamic_pointwise_conv/params.h"
#include "kernels/fused_mbconv/params.h"

namespace pfnas {

constexpr int kMaxLevels = 8;

// Dense 3x3 convolution with stride 2 on images of 3 channels.
struct StemParams {
  std::int64_t out_channels = 0;  // padded
  const float* weight = nullptr;  // [3 * 3 * 3 taps (channel, row, column)][out_channels]
  Affine affine;                  // [out_channels]
  Activation activation = Activation::kNone;
};

// A block of the backbone or a separable convolution of the head. `block` carries weights and widths; sizes
// and tensors are filled in by each call.
struct SubnetBlock {
  FusedMBConvParams block;
  bool has_residual = false;
  int tap = -1;  // level of the neck that reads this block's output, finest first; -1: none
};

struct NeckLevel {
  DynamicPointwiseConvParams lateral;
  Affine predictor_affine;  // [num_outputs]
};

struct SubnetParams {
  std::int64_t batch = 0;
  std::int64_t height = 0;
  std::int64_t width = 0;
  const float* images = nullptr;  // [N, 3, H, W] with these strides, in floats
  std::int64_t image_stride = 0;
  std::int64_t channel_stride = 0;
  std::int64_t row_stride = 0;
  std::int64_t column_stride = 0;

  StemParams stem;
  const SubnetBlock* blocks = nullptr;  // [num_blocks]
  int num_blocks = 0;

  // Detector: num_levels > 0.
  int num_levels = 0;
  NeckLevel levels[kMaxLevels];
  std::int64_t neck_channels = 0;
  int num_convs = 0;
  const SubnetBlock* convs = nullptr;    // [num_convs][num_levels]
  DynamicPointwiseConvParams predictor;  // out_channels is exact: what a location predicts
  std::int64_t num_locations = 0;        // L, over all levels
  float* raw = nullptr;                  // [N, L, out_channels of the predictor]

  // Classifier: num_levels == 0.
  DynamicPointwiseConvParams feature;     // before the pool
  DynamicPointwiseConvParams hidden;      // after it
  DynamicPointwiseConvParams classifier;  // out_channels is exact
  float* logits = nullptr;                // [N, classes]
};

// A batch normalisation that calibration measures: where its parameters are, where its results go.
struct CalibratedNorm {
  const float* gamma = nullptr;  // [channels]
  const float* beta = nullptr;
  float eps = 0;
  std::int64_t channels = 0;  // at most
  float* scale = nullptr;     // what the subnet's layers read; set on the way
  float* shift = nullptr;
  float* mean = nullptr;          // of this batch
  float* unbiased_var = nullptr;  // of this batch
  std::int64_t measured_channels = 0;
  std::int64_t count = 0;  // values per channel; 0: the path does not use this layer
};

// One path on one batch, each layer normalised with the moments of the batch.
struct CalibrationParams {
  SubnetParams net;  // its affines point at the scales of `norms`
  CalibratedNorm* norms = nullptr;
  std::int64_t num_norms = 0;
};

namespace portable {
void subnet(const SubnetParams& p);
void calibrate(const CalibrationParams& p);
}  // namespace portable
namespace avx2 {
void subnet(const SubnetParams& p);
void calibrate(const CalibrationParams& p);
}  // namespace avx2
namespace avx512 {
void subnet(const SubnetParams& p);
void calibrate(const CalibrationParams& p);
}  // namespace avx512

}  // namespace pfnas

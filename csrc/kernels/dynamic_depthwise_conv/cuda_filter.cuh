// SPDX-License-Identifier: Apache-2.0
// The elastic kernel of Once-for-All (arXiv:1908.09791, section 3) on a GPU: F5 = M5 vec(centre of the 7x7
// bank), F3 = M3 vec(centre of F5), and the way back. One warp per channel; a whole net's filters are about
// 13 MFLOP.
#pragma once

#include "cuda/storage.h"
#include "kernels/dynamic_depthwise_conv/cuda_plan.h"

namespace pfnas::cuda {

constexpr int kTaps7 = 49, kTaps5 = 25, kTaps3 = 9;
constexpr int kWarp = 32;
constexpr int kChannelsPerBlock = 8;
constexpr unsigned kAllLanes = 0xffffffffu;

struct FilterParams {
  const void* bank;        // [C_max, K_max^2]
  const void* matrix_5;    // [25, 25] or null: not used
  const void* matrix_3;    // [9, 9] or null: not used
  float* taps;             // [k^2, row]
  const float* grad_taps;  // [k^2, row], backward only
  float* derivation;       // [kDerivationRows, row], backward only
  void* grad_bank;         // [C, K_max^2], backward only
  void* grad_matrix_5;     // [25, 25]
  void* grad_matrix_3;     // [9, 9]
  int channels;
  int row;
  int kernel_size;
  int max_kernel_size;
  bool flip;  // store the taps in reverse: convolving with them is then the gradient to the input
};

// Row of a [outer^2] filter that is tap t of its centred [inner^2] part.
PFNAS_DEVICE int centre_tap(int t, int inner, int outer) {
  const int border = (outer - inner) / 2;
  return (t / inner + border) * outer + t % inner + border;
}

// The tap of the centred [inner^2] part at tap t of the whole, or -1 outside it.
PFNAS_DEVICE int tap_in_centre(int t, int inner, int outer) {
  const int border = (outer - inner) / 2;
  const int r = t / outer - border, s = t % outer - border;
  return r >= 0 && r < inner && s >= 0 && s < inner ? r * inner + s : -1;
}

template <class T>
PFNAS_DEVICE float matrix_row_times(const T* matrix, int row, const float* in, int size) {
  float sum = 0.0f;
  for (int u = 0; u < size; ++u) sum = fmaf(to_float(matrix[row * size + u]), in[u], sum);
  return sum;
}

template <class T>
PFNAS_DEVICE float matrix_column_times(const T* matrix, int column, const float* in, int size) {
  float sum = 0.0f;
  for (int t = 0; t < size; ++t) sum = fmaf(to_float(matrix[t * size + column]), in[t], sum);
  return sum;
}

// What the matrices multiply, for one channel; lanes share it through shared memory.
struct DerivationRows {
  float input_5[kTaps5];
  float input_3[kTaps3];
};

template <class T>
PFNAS_DEVICE void fill_derivation(const FilterParams& p, const T* bank, int lane, DerivationRows& rows) {
  const T* matrix_5 = static_cast<const T*>(p.matrix_5);
  if (matrix_5 != nullptr && lane < kTaps5) rows.input_5[lane] = to_float(bank[centre_tap(lane, 5, 7)]);
  __syncwarp(kAllLanes);
  if (p.matrix_3 != nullptr && lane < kTaps3) {
    rows.input_3[lane] = matrix_5 != nullptr
                             ? matrix_row_times(matrix_5, centre_tap(lane, 3, 5), rows.input_5, kTaps5)
                             : to_float(bank[centre_tap(lane, 3, p.max_kernel_size)]);
  }
  __syncwarp(kAllLanes);
}

template <class T>
__global__ void __launch_bounds__(kThreads) derive_filter(FilterParams p) {
  PFNAS_SHARED(DerivationRows, shared_rows, [kChannelsPerBlock]);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int local = static_cast<int>(threadIdx.x) / kWarp;
  const int channel = static_cast<int>(blockIdx.x) * kChannelsPerBlock + local;
  if (channel >= p.row) return;
  const bool real = channel < p.channels;  // the padding channel of an odd count gets zeros
  const int bank_taps = p.max_kernel_size * p.max_kernel_size;
  const T* bank = static_cast<const T*>(p.bank) + static_cast<std::int64_t>(real ? channel : 0) * bank_taps;
  DerivationRows& rows = shared_rows[local];
  fill_derivation(p, bank, lane, rows);
  const int taps = p.kernel_size * p.kernel_size;
  for (int t = lane; t < taps; t += kWarp) {
    float value;
    if (p.matrix_3 != nullptr) {
      value = matrix_row_times(static_cast<const T*>(p.matrix_3), t, rows.input_3, kTaps3);
    } else if (p.matrix_5 != nullptr) {
      value = matrix_row_times(static_cast<const T*>(p.matrix_5), t, rows.input_5, kTaps5);
    } else {
      value = to_float(bank[t]);
    }
    p.taps[static_cast<std::int64_t>(p.flip ? taps - 1 - t : t) * p.row + channel] = real ? value : 0.0f;
  }
}

// From the gradient of the taps to that of the bank; leaves behind what the matrices' gradients are made of.
template <class T>
__global__ void __launch_bounds__(kThreads) filter_backward(FilterParams p) {
  PFNAS_SHARED(DerivationRows, shared_rows, [kChannelsPerBlock]);
  PFNAS_SHARED(float, shared_grad, [kChannelsPerBlock][kTaps7]);
  PFNAS_SHARED(float, shared_grad_5, [kChannelsPerBlock][kTaps5]);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int local = static_cast<int>(threadIdx.x) / kWarp;
  const int channel = static_cast<int>(blockIdx.x) * kChannelsPerBlock + local;
  if (channel >= p.channels) return;
  const int bank_taps = p.max_kernel_size * p.max_kernel_size;
  const std::int64_t bank_offset = static_cast<std::int64_t>(channel) * bank_taps;
  DerivationRows& rows = shared_rows[local];
  float* grad = shared_grad[local];  // of the filter at hand: [k^2], then what led to it
  float* grad_5 = shared_grad_5[local];
  fill_derivation(p, static_cast<const T*>(p.bank) + bank_offset, lane, rows);
  int size = p.kernel_size;
  for (int t = lane; t < size * size; t += kWarp) {
    grad[t] = p.grad_taps[static_cast<std::int64_t>(t) * p.row + channel];
  }
  __syncwarp(kAllLanes);
  float* derivation = p.derivation + channel;
  if (p.matrix_3 != nullptr) {
    float to_input = 0.0f;
    if (lane < kTaps3) {
      derivation[static_cast<std::int64_t>(kGrad3Row + lane) * p.row] = grad[lane];
      derivation[static_cast<std::int64_t>(kInput3Row + lane) * p.row] = rows.input_3[lane];
      to_input = matrix_column_times(static_cast<const T*>(p.matrix_3), lane, grad, kTaps3);
    }
    __syncwarp(kAllLanes);
    if (lane < kTaps3) grad[lane] = to_input;
    __syncwarp(kAllLanes);
  }
  if (p.matrix_5 != nullptr) {
    if (lane < kTaps5) {
      const int t = tap_in_centre(lane, size, 5);
      grad_5[lane] = t >= 0 ? grad[t] : 0.0f;
      derivation[static_cast<std::int64_t>(kGrad5Row + lane) * p.row] = grad_5[lane];
      derivation[static_cast<std::int64_t>(kInput5Row + lane) * p.row] = rows.input_5[lane];
    }
    __syncwarp(kAllLanes);
    if (lane < kTaps5) {
      grad[lane] = matrix_column_times(static_cast<const T*>(p.matrix_5), lane, grad_5, kTaps5);
    }
    __syncwarp(kAllLanes);
    size = 5;
  }
  T* grad_bank = static_cast<T*>(p.grad_bank) + bank_offset;
  for (int t = lane; t < bank_taps; t += kWarp) {
    const int inner = tap_in_centre(t, size, p.max_kernel_size);
    grad_bank[t] = from_float<T>(inner >= 0 ? grad[inner] : 0.0f);
  }
}

// One warp per entry of the matrices: the sum over channels of (gradient of output) x (input), in a fixed
// order.
template <class T>
__global__ void __launch_bounds__(kThreads) matrix_backward(FilterParams p) {
  constexpr int kEntries5 = kTaps5 * kTaps5, kEntries3 = kTaps3 * kTaps3;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  int entry = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) / kWarp;
  const bool is_5 = entry < kEntries5;
  if (!is_5) entry -= kEntries5;
  void* target = is_5 ? p.grad_matrix_5 : p.grad_matrix_3;
  if (target == nullptr || (!is_5 && entry >= kEntries3)) return;
  const int size = is_5 ? kTaps5 : kTaps3;
  const float* grad =
      p.derivation + static_cast<std::int64_t>((is_5 ? kGrad5Row : kGrad3Row) + entry / size) * p.row;
  const float* in =
      p.derivation + static_cast<std::int64_t>((is_5 ? kInput5Row : kInput3Row) + entry % size) * p.row;
  float sum = 0.0f;
  for (int c = lane; c < p.channels; c += kWarp) sum = fmaf(grad[c], in[c], sum);
  for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  if (lane == 0) static_cast<T*>(target)[entry] = from_float<T>(sum);
}

}  // namespace pfnas::cuda

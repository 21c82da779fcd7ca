// SPDX-License-Identifier: Apache-2.0
// Every CUDA call and launch is checked. For files that nvcc compiles.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace pfnas::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("pfnas_fast: ") + what + " failed: " + cudaGetErrorString(error));
}

// Catches a launch that never started. What goes wrong later shows at the next synchronisation, as with
// torch.
inline void check_launch() { check(cudaGetLastError(), "launching a CUDA kernel"); }

}  // namespace pfnas::cuda

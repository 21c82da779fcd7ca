// SPDX-License-Identifier: Apache-2.0
#include "cuda/runtime.h"

#include "cuda/check.h"

namespace pfnas::cuda {

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    static_cast<void>(
        cudaGetLastError());  // no driver, or a driver without a device: not an error of the caller
    return 0;
  }
  return count;
}

DeviceGuard::DeviceGuard(int device) {
  int current = 0;
  check(cudaGetDevice(&current), "asking for the current device");
  if (current == device) return;
  check(cudaSetDevice(device), "choosing a device");
  previous_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0) static_cast<void>(cudaSetDevice(previous_));
}

}  // namespace pfnas::cuda

// SPDX-License-Identifier: Apache-2.0
#include "cuda/runtime.h"

#include <atomic>

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

int compute_capability(int device) {
  constexpr int kMaxDevices = 64;
  static std::atomic<int> known[kMaxDevices];
  if (device >= 0 && device < kMaxDevices && known[device] != 0) return known[device];
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        "asking for the architecture");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
        "asking for the architecture");
  if (device < kMaxDevices) known[device] = 10 * major + minor;
  return 10 * major + minor;
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

// SPDX-License-Identifier: Apache-2.0
// What the host side needs of CUDA, without a CUDA header: bindings and launchers include this. Implemented
// by runtime.cu on a GPU and by the emulator's twin in tests.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pfnas::cuda {

using Stream = void*;  // a cudaStream_t

enum class Dtype : std::int32_t { kFloat32, kBfloat16, kFloat16 };

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Visible devices; 0 without a driver.
int device_count();

// Of a device: 10 * major + minor, asked for once per device.
int compute_capability(int device);

// Makes a device current for as long as it lives, then the former one again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = -1;
};

}  // namespace pfnas::cuda

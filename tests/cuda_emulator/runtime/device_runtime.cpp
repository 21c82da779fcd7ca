// SPDX-License-Identifier: Apache-2.0
// The emulator's twin of csrc/cuda/runtime.cu: one device, always current.
#include "cuda/runtime.h"

#include "scheduler.h"

namespace pfnas::cuda {

int device_count() { return 1; }

int compute_capability(int) { return cuda_emulator::options().compute_capability; }

DeviceGuard::DeviceGuard(int device) {
  if (device != 0) throw cuda_emulator::Error("the emulator has one device");
}

DeviceGuard::~DeviceGuard() = default;

}  // namespace pfnas::cuda

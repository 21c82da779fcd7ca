// SPDX-License-Identifier: Apache-2.0
// cp.async for an ordinary compiler: the copy happens at the wait, as late as is legal, and the target is NaN
// until then.
#pragma once

#include "device_emulator.h"

namespace cuda_emulator {

void start_copy(void* target, const void* source, int bytes, int zero_bytes);
void close_copy_group();
void finish_copies(int pending_groups);

}  // namespace cuda_emulator

namespace pfnas::cuda {

CUDA_EMULATOR_VECTOR_ACCESS void copy_async_16(void* shared, const void* global, int valid_bytes = 16,
                                               EmulatedPlace place = EmulatedPlace::current()) {
  constexpr int kBytes = 16;
  cuda_emulator::check_aligned(shared, kBytes, place);
  cuda_emulator::check_aligned(global, kBytes, place);
  cuda_emulator::note_access(shared, kBytes, true, __builtin_return_address(0));
  if (valid_bytes > 0) cuda_emulator::note_access(global, valid_bytes, false, __builtin_return_address(0));
  cuda_emulator::start_copy(shared, global, valid_bytes, kBytes - valid_bytes);
}

inline void commit_copies() { cuda_emulator::close_copy_group(); }
inline void wait_copies_until(int pending) { cuda_emulator::finish_copies(pending); }

template <int kPending>
void wait_copies() {
  cuda_emulator::finish_copies(kPending);
}

}  // namespace pfnas::cuda

// SPDX-License-Identifier: Apache-2.0
#include <cstring>

#include "async_copy_emulator.h"
#include "scheduler.h"

namespace cuda_emulator {

void start_copy(void* target, const void* source, int bytes, int zero_bytes) {
  std::memset(target, 0xFF, static_cast<std::size_t>(bytes + zero_bytes));
  Thread& thread = *machine().current;
  thread.copies.push_back({target, source, bytes, zero_bytes, thread.copy_group});
}

void close_copy_group() { ++machine().current->copy_group; }

void finish_copies(int pending_groups) {
  Thread& thread = *machine().current;
  std::vector<PendingCopy> later;
  for (const PendingCopy& copy : thread.copies) {
    if (copy.group >= thread.copy_group - pending_groups) {
      later.push_back(copy);
      continue;
    }
    std::memcpy(copy.target, copy.source, static_cast<std::size_t>(copy.bytes));
    std::memset(static_cast<char*>(copy.target) + copy.bytes, 0, static_cast<std::size_t>(copy.zero_bytes));
  }
  thread.copies = later;
}

}  // namespace cuda_emulator

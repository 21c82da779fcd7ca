// SPDX-License-Identifier: Apache-2.0
#include "common/parallel.h"

#include <pthread.h>

#include <atomic>

namespace pfnas {
namespace {

std::atomic<bool> in_forked_child{false};

}  // namespace

bool workers_available() {
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { in_forked_child.store(true, std::memory_order_relaxed); });
  return registered == 0 && !in_forked_child.load(std::memory_order_relaxed);
}

}  // namespace pfnas

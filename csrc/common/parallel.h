// SPDX-License-Identifier: Apache-2.0
// The one door to threads. Everything that runs in parallel goes through parallel_for, so that
// torch.set_num_threads is obeyed (torch and this module share one OpenMP runtime) and results never depend
// on the number of threads: callers cut their work by shape alone and give each item its own output.
#pragma once

#include <omp.h>

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace pfnas {

// Below this many floating-point operations a second thread costs more (fork + barrier, about 5 us) than it
// saves.
constexpr double kMinFlopsPerThread = 2e5;

// False in a child made by fork(): the workers of libgomp exist in the parent only, and waiting for them
// would hang. Such a child (a data loader's worker, say) runs every loop on its own thread.
bool workers_available();

static inline unsigned float_mode() {
#if defined(__x86_64__)
  return _mm_getcsr();
#else
  return 0;
#endif
}

static inline void set_float_mode([[maybe_unused]] unsigned mode) {
#if defined(__x86_64__)
  _mm_setcsr(mode);
#endif
}

// Threads that parallel_for would use for enough work: 1 inside of one and in a forked child.
static inline int max_threads() {
  return omp_in_parallel() || !workers_available() ? 1 : omp_get_max_threads();
}

// Calls body(i) once for every i in [0, num_items); body must not throw. `flops` is the work of the whole
// loop. Static cyclic schedule: neighbouring items (which share cache lines) run at the same time on
// different cores. Workers take over the caller's rounding and denormal mode, so a result is the same
// whichever thread computes it.
template <class Body>
void parallel_for(std::int64_t num_items, double flops, const Body& body) {
  const double wanted = flops / kMinFlopsPerThread;
  const int limit = max_threads();
  std::int64_t num_threads = num_items < limit ? num_items : limit;
  if (wanted < static_cast<double>(num_threads)) num_threads = static_cast<std::int64_t>(wanted);
  if (num_threads <= 1) {
    for (std::int64_t i = 0; i < num_items; ++i) body(i);
    return;
  }
  const unsigned mode = float_mode();
#pragma omp parallel num_threads(static_cast<int>(num_threads))
  {
    const unsigned own_mode = float_mode();
    set_float_mode(mode);
#pragma omp for schedule(static, 1)
    for (std::int64_t i = 0; i < num_items; ++i) body(i);
    set_float_mode(own_mode);
  }
}

}  // namespace pfnas

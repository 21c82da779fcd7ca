// SPDX-License-Identifier: Apache-2.0
#include "common/isa.h"

#include <atomic>

#include "common/check.h"

namespace pfnas {
namespace {

constexpr int kNotForced = -1;
std::atomic<int> forced_isa{kNotForced};

bool cpu_runs(Isa isa) {
#if defined(__x86_64__)
  // libgcc's detection includes the operating system's XSAVE state, without which the registers are unusable.
  switch (isa) {
    case Isa::kPortable:
      return true;
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("fma");
  }
#endif
  return isa == Isa::kPortable;
}

Isa best_isa() {
  Isa best = Isa::kPortable;
  for (Isa isa : compiled_isas()) {
    if (cpu_runs(isa)) best = isa;
  }
  return best;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return "portable";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
  }
  return "unknown";
}

std::vector<Isa> compiled_isas() {
  std::vector<Isa> isas{Isa::kPortable};
#ifdef PFNAS_HAS_AVX2
  isas.push_back(Isa::kAvx2);
#endif
#ifdef PFNAS_HAS_AVX512
  isas.push_back(Isa::kAvx512);
#endif
  return isas;
}

bool isa_supported(Isa isa) {
  for (Isa compiled : compiled_isas()) {
    if (compiled == isa) return cpu_runs(isa);
  }
  return false;
}

Isa active_isa() {
  static const Isa best = best_isa();
  const int forced = forced_isa.load(std::memory_order_relaxed);
  return forced == kNotForced ? best : static_cast<Isa>(forced);
}

void force_isa(const std::string& name) {
  std::string supported;
  for (Isa isa : compiled_isas()) {
    if (!isa_supported(isa)) continue;
    if (name == isa_name(isa)) {
      forced_isa.store(static_cast<int>(isa), std::memory_order_relaxed);
      return;
    }
    supported += (supported.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  throw InputError(describe("force_cpu_isa", "one of " + supported, "tier", name));
}

void unforce_isa() { forced_isa.store(kNotForced, std::memory_order_relaxed); }

}  // namespace pfnas

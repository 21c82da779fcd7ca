// SPDX-License-Identifier: Apache-2.0
// The whole contract between the binding and the kernels of path_cost: the additive cost of many paths. A
// path is one code per slot, 0 = block absent; the last slot holds 1 + resolution.
#pragma once

#include <cstdint>

namespace pfnas {

constexpr int kCostCodes = 16;  // codes per row of a table of whole numbers: one vector of 16 lanes

struct PathCostParams {
  std::int64_t num_paths = 0;
  int num_slots = 0;  // blocks + 1
  int num_resolutions = 0;
  const std::uint8_t* codes = nullptr;  // codes[slot * slot_stride + path * path_stride]
  std::int64_t slot_stride = 0;
  std::int64_t path_stride = 0;

  // Costs that are whole numbers, divided by their common step, whose largest sum is below 2^32. Else null.
  const std::uint32_t* steps = nullptr;           // [num_resolutions][num_slots - 1][kCostCodes]
  const std::uint32_t* constant_steps = nullptr;  // [num_resolutions]
  double step = 1;

  const double* table = nullptr;     // [num_resolutions][num_slots - 1][num_codes], read where steps is null
  const double* constant = nullptr;  // [num_resolutions], likewise
  int num_codes = 0;
  double unit = 1;        // divides every sum
  bool use_vnni = false;  // 16-lane tier only: the CPU has AVX512-VNNI and VBMI; the same sums either way

  float* cost_f32 = nullptr;   // [num_paths]; one of the two is not null
  double* cost_f64 = nullptr;  // [num_paths]
};

// Smallest and largest code per slot, low and high: [num_slots].
struct CodeRangeParams {
  std::int64_t num_paths = 0;
  int num_slots = 0;
  const std::uint8_t* codes = nullptr;
  std::int64_t slot_stride = 0;
  std::int64_t path_stride = 0;
  std::uint8_t* low = nullptr;
  std::uint8_t* high = nullptr;
};

namespace portable {
void code_range(const CodeRangeParams& p);
void path_cost(const PathCostParams& p);
}  // namespace portable
namespace avx2 {
void code_range(const CodeRangeParams& p);
void path_cost(const PathCostParams& p);
}  // namespace avx2
namespace avx512 {
void code_range(const CodeRangeParams& p);
void path_cost(const PathCostParams& p);
}  // namespace avx512

}  // namespace pfnas

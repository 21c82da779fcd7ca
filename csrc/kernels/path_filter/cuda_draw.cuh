// SPDX-License-Identifier: Apache-2.0
// One path per thread, drawn from the dynamic programming tables: the same random words, the same double
// arithmetic in the same order as path_search/draw_host.cpp, so the same codes and costs, bit for bit. Sums
// and products are separate instructions: a fused one would round differently.
#pragma once

#include "cuda/device.h"
#include "kernels/path_filter/cuda_params.h"
#include "kernels/path_search/philox.h"

namespace pfnas::cuda {

constexpr int kMaxFilterWalks = 400 * 64;  // as on the CPU: windows tried x walks each
constexpr std::uint32_t kDrawPurpose = 0xD2A7;

struct DrawStream {
  std::uint64_t seed, index;
  std::uint32_t block = 0;
  int next = 4;
  std::uint32_t w0 = 0, w1 = 0, w2 = 0, w3 = 0;  // no array: registers cannot be indexed
};

PFNAS_DEVICE std::uint32_t draw_word(DrawStream& stream) {
  if (stream.next == 4) {
    const std::uint32_t counter[4] = {static_cast<std::uint32_t>(stream.index),
                                      static_cast<std::uint32_t>(stream.index >> 32), stream.block,
                                      kDrawPurpose};
    std::uint32_t out[4] = {};
    philox4x32(counter, stream.seed, out);
    stream.w0 = out[0], stream.w1 = out[1], stream.w2 = out[2], stream.w3 = out[3];
    ++stream.block;
    stream.next = 0;
  }
  const int at = stream.next++;
  const std::uint32_t low = at == 0 ? stream.w0 : stream.w1, high = at == 2 ? stream.w2 : stream.w3;
  return at < 2 ? low : high;
}

PFNAS_DEVICE double draw_uniform(DrawStream& stream) {
  const std::uint64_t high = draw_word(stream);
  return __dmul_rn(static_cast<double>((high << 21) ^ (draw_word(stream) >> 11)), 0x1p-53);
}

PFNAS_DEVICE int draw_below(DrawStream& stream, int bound) {
  return static_cast<int>(
      (static_cast<std::uint64_t>(draw_word(stream)) * static_cast<std::uint32_t>(bound)) >> 32);
}

// low + u (high - low), kept below `high`, 0 <= low <= high.
PFNAS_DEVICE double draw_between(double low, double high, double u) {
  const double value = __dadd_rn(low, __dmul_rn(u, __dadd_rn(high, -low)));
  const double below = high > low ? __longlong_as_double(__double_as_longlong(high) - 1) : high;
  return below < value ? below : value;
}

// One resolution's tables. What the parameters hold as one row per block and resolution is found from
// first_row: fewer pointers to keep in registers.
struct WalkView {
  std::int64_t num_buckets, pad, choice_length;
  const double *cumulative, *cumulative_down, *after_choice, *after_stop;
  int resolution, first_row;
};

PFNAS_DEVICE WalkView view_walk(const PathFilterParams& p, int resolution) {
  const std::int64_t* fields = p.walks + resolution * kWalkFields;
  return {fields[0],
          fields[1],
          fields[2],
          p.cumulative + fields[3],
          p.cumulative_down + fields[3],
          p.after_choice + fields[4],
          p.after_stop + fields[5],
          resolution,
          resolution * (p.num_slots - 1)};
}

PFNAS_DEVICE std::int64_t draw_bucket(const WalkView& w, std::int64_t first, std::int64_t end, bool upper,
                                      double u) {
  const double* sums = upper ? w.cumulative_down : w.cumulative;
  const double at = upper ? draw_between(sums[end], sums[first], u) : draw_between(sums[first], sums[end], u);
  // The first place where descending sums are not above `at`, or ascending ones are.
  std::int64_t low = first, high = end + 1;
  while (low < high) {
    const std::int64_t middle = low + (high - low) / 2;
    const bool before = upper ? sums[middle] > at : !(at < sums[middle]);
    if (before) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  const std::int64_t bucket = low - 1;
  return bucket < first ? first : bucket > end - 1 ? end - 1 : bucket;
}

// A code for block b with `left` buckets to spend, 0 = stop here.
PFNAS_DEVICE int draw_choice(const PathFilterParams& p, const WalkView& w, int block, std::int64_t left,
                             double u) {
  const int size = p.slot_sizes[block];
  const double* after = w.after_choice + block * w.choice_length + left + w.pad;
  const std::int64_t* buckets = p.buckets + (w.first_row + block) * p.num_codes;
  const double stop = __dmul_rn(p.stop[w.first_row + block], w.after_stop[block * w.num_buckets + left]);
  const double scale = p.go_on[w.first_row + block];
  double total = stop;
  PFNAS_ROLLED_LOOP
  for (int code = 1; code <= size; ++code) {
    total = __dadd_rn(total, __dmul_rn(scale, after[-buckets[code]]));
  }
  const double at = draw_between(0.0, total, u);
  int choice = 0;
  double sum = stop;
  PFNAS_ROLLED_LOOP
  for (int code = 0; code < size; ++code) {  // the sums once more: they do not fit into registers
    if (code > 0) sum = __dadd_rn(sum, __dmul_rn(scale, after[-buckets[code]]));
    choice += sum <= at ? 1 : 0;
  }
  return choice;
}

// Returns the exact cost in the reported unit.
PFNAS_DEVICE double walk_path(const PathFilterParams& p, const WalkView& w, std::int64_t left,
                              DrawStream& stream, std::uint8_t* codes) {
  const int num_blocks = p.num_slots - 1;
  PFNAS_ROLLED_LOOP
  for (int b = 0; b < num_blocks; ++b) codes[b] = 0;
  for (int stage = 0; stage < p.num_stages; ++stage) {
    const int end = p.stage_start[stage + 1];
    for (int b = p.stage_start[stage]; b < end; ++b) {
      const double u = draw_uniform(stream);
      const int choice = draw_choice(p, w, b, left, u);
      if (choice == 0) break;
      codes[b] = static_cast<std::uint8_t>(choice);
      left -= p.buckets[(w.first_row + b) * p.num_codes + choice];
    }
  }
  double sum = p.constant[w.resolution];
  PFNAS_ROLLED_LOOP
  for (int b = 0; b < num_blocks; ++b) {
    sum = __dadd_rn(sum, p.table[(w.first_row + b) * p.num_codes + codes[b]]);
  }
  return __ddiv_rn(sum, p.unit);
}

struct Drawn {
  double cost;     // NaN: no path was found, and the codes are zero
  unsigned walks;  // made
};

PFNAS_DEVICE Drawn draw_path(const PathFilterParams& p, std::int64_t i, std::uint8_t* codes) {
  DrawStream stream{p.seed, p.first_index + static_cast<std::uint64_t>(i)};
  unsigned walks = 0;
  if (p.num_possible > 0) {
    const std::int64_t* possible = p.possible + draw_below(stream, p.num_possible) * kPossibleFields;
    const WalkView w = view_walk(p, static_cast<int>(possible[0]));
    codes[p.num_slots - 1] = static_cast<std::uint8_t>(1 + possible[0]);
    while (walks < kMaxFilterWalks) {
      const double u = draw_uniform(stream);
      const std::int64_t bucket = draw_bucket(w, possible[1], possible[2], possible[3] != 0, u);
      const double cost = walk_path(p, w, bucket, stream, codes);
      ++walks;
      if (cost >= p.low && cost <= p.high) return {cost, walks};
    }
  }
  PFNAS_ROLLED_LOOP
  for (int slot = 0; slot < p.num_slots; ++slot) codes[slot] = 0;
  return {__longlong_as_double(0x7ff8000000000000ll), walks};
}

}  // namespace pfnas::cuda

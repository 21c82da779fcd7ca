// SPDX-License-Identifier: Apache-2.0
// One path per thread, drawn from the dynamic programming tables: the same random words, the same double
// arithmetic in the same order as path_search/draw_host.cpp, so the same codes and costs, bit for bit. Sums
// and products are separate instructions: a fused one would round differently.
#pragma once

#include <cmath>

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

// One resolution's tables: where they begin in the joined ones. Every index fits into 32 bits, so an address
// is one addition and one multiply-add away from the joined table.
struct WalkView {
  int resolution, first_row, num_buckets, pad, choice_length;
  int cumulative, after_choice, after_stop;
};

PFNAS_DEVICE WalkView view_walk(const PathFilterParams& p, int resolution) {
  const auto field = [&](int i) { return static_cast<int>(p.walks[resolution * kWalkFields + i]); };
  return {resolution, resolution * (p.num_slots - 1), field(0), field(1), field(2), field(3), field(4),
          field(5)};
}

PFNAS_DEVICE int draw_bucket(const PathFilterParams& p, const WalkView& w, int first, int end, bool upper,
                             double u) {
  const double* sums = (upper ? p.cumulative_down : p.cumulative) + w.cumulative;
  const double at = upper ? draw_between(sums[end], sums[first], u) : draw_between(sums[first], sums[end], u);
  // The first place where descending sums are not above `at`, or ascending ones are.
  int low = first, high = end + 1;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    const bool before = upper ? sums[middle] > at : !(at < sums[middle]);
    if (before) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  const int bucket = low - 1;
  return bucket < first ? first : bucket > end - 1 ? end - 1 : bucket;
}

// The codes of a block, 1 .. size. What is left to spend after code c has the weight after[at + steps[c -
// 1]].
struct ChoiceRow {
  int size;
  double scale;
  const double* after;
  const std::int32_t* steps;
  int at;
};

PFNAS_DEVICE double add_choice(const ChoiceRow& row, int step, double sum) {
  return __dadd_rn(sum, __dmul_rn(row.scale, row.after[row.at + step]));
}

// The number of codes whose sums, their own weight included, do not exceed a share u of the total; a code's
// sum is kept in a register until the total is known.
PFNAS_DEVICE int choose_from_registers(const ChoiceRow& row, double stop, double u) {
  double before[kRegisterCodes], total = stop;
  PFNAS_UNROLL_LOOP
  for (int first = 0; first < kRegisterCodes; first += 4) {
    if (first >= row.size) {
      PFNAS_UNROLL_LOOP
      for (int i = 0; i < 4; ++i) before[first + i] = INFINITY;
      continue;
    }
    const int4 four = load_vector<int4>(row.steps + first);
    const int steps[4] = {four.x, four.y, four.z, four.w};
    if (first + 4 <= row.size) {
      PFNAS_UNROLL_LOOP
      for (int i = 0; i < 4; ++i) {
        before[first + i] = total;
        total = add_choice(row, steps[i], total);
      }
    } else {
      PFNAS_UNROLL_LOOP
      for (int i = 0; i < 4; ++i) {
        before[first + i] = total;
        if (first + i < row.size) total = add_choice(row, steps[i], total);
      }
    }
  }
  const double at = draw_between(0.0, total, u);
  int choice = 0;
  PFNAS_UNROLL_LOOP
  for (int i = 0; i < kRegisterCodes; ++i) choice += before[i] <= at ? 1 : 0;
  return choice < row.size ? choice : row.size;  // more where the total is zero, and so is `at`
}

// The same for any number of codes: all sums are made twice.
PFNAS_DEVICE int choose_from_many(const ChoiceRow& row, double stop, double u) {
  double total = stop;
  PFNAS_ROLLED_LOOP
  for (int i = 0; i < row.size; ++i) total = add_choice(row, row.steps[i], total);
  const double at = draw_between(0.0, total, u);
  int choice = 0;
  double sum = stop;
  PFNAS_ROLLED_LOOP
  for (int i = 0; i < row.size; ++i) {
    choice += sum <= at ? 1 : 0;
    sum = add_choice(row, row.steps[i], sum);
  }
  return choice;
}

// A code for block b with `left` buckets to spend, 0 = stop here; takes its buckets from `left`.
PFNAS_DEVICE int draw_choice(const PathFilterParams& p, const WalkView& w, int block, int& left, double u) {
  const int index = w.first_row + block;
  const ChoiceRow row{p.slot_sizes[block], p.go_on[index], p.after_choice, p.steps + index * p.step_row,
                      w.after_choice + block * w.choice_length + w.pad + left};
  const double stop = __dmul_rn(p.stop[index], p.after_stop[w.after_stop + block * w.num_buckets + left]);
  const int choice = p.num_codes <= kRegisterCodes + 1 ? choose_from_registers(row, stop, u)
                                                       : choose_from_many(row, stop, u);
  if (choice > 0) left += row.steps[choice - 1];
  return choice;
}

// Returns the exact cost in the reported unit. A block after a stage's end has code 0.
PFNAS_DEVICE double walk_path(const PathFilterParams& p, const WalkView& w, int left, DrawStream& stream,
                              std::uint8_t* codes) {
  double sum = p.constant[w.resolution];
  bool open = false;
  PFNAS_ROLLED_LOOP
  for (int b = 0; b < p.num_slots - 1; ++b) {
    open = open || (p.first_blocks >> b & 1u) != 0;
    int choice = 0;
    if (open) {
      choice = draw_choice(p, w, b, left, draw_uniform(stream));
      open = choice != 0;
    }
    codes[b] = static_cast<std::uint8_t>(choice);
    sum = __dadd_rn(sum, p.table[(w.first_row + b) * p.num_codes + choice]);
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
      const int bucket = draw_bucket(p, w, static_cast<int>(possible[1]), static_cast<int>(possible[2]),
                                     possible[3] != 0, u);
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

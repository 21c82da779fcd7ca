// SPDX-License-Identifier: Apache-2.0
// Exact draws of paths of a given cost: walk the dynamic programming tables forward, keep the path iff its
// true cost is in the window (buckets only bound it). Every path has its own stream of random numbers.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "common/check.h"
#include "common/parallel.h"
#include "kernels/path_search/params.h"
#include "kernels/path_search/paths.h"
#include "kernels/path_search/philox.h"

namespace pfnas {
namespace {

constexpr int kMaxTargets = 400;  // windows tried for a path whose target may fall in a gap of a small space
constexpr int kMaxWalks = 64;     // walks per window; a fixed window goes on until kMaxTargets * kMaxWalks
constexpr std::uint32_t kPurpose = 0xD2A7;

struct Window {
  double low, high;
};

// low + u (high - low), kept below `high` whatever the rounding, so that what is drawn has mass.
double between(double low, double high, double u) {
  return std::min(low + u * (high - low), std::nextafter(high, low));
}

// First and one-past-last bucket that may hold a path with cost in the window.
struct Buckets {
  std::int64_t first, end;
  Buckets(const WalkTable& w, const Window& window, double unit) {
    const double low = (window.low * unit - w.constant - w.residual_high) / w.step;
    const double high = (window.high * unit - w.constant - w.residual_low) / w.step;
    const auto size = static_cast<double>(w.num_buckets);
    first = static_cast<std::int64_t>(std::clamp(std::floor(low), 0.0, size));
    end = static_cast<std::int64_t>(std::clamp(std::ceil(high) + 1.0, 0.0, size));
  }
};

// Where sums from above lose less to cancellation than sums from below.
bool is_upper(const WalkTable& w, const Buckets& b) {
  return w.cumulative[b.first] > w.cumulative_down[b.first];
}

double mass(const WalkTable& w, const Buckets& b) {
  if (b.end <= b.first) return 0.0;
  return is_upper(w, b) ? w.cumulative_down[b.first] - w.cumulative_down[b.end]
                        : w.cumulative[b.end] - w.cumulative[b.first];
}

std::int64_t draw_bucket(const WalkTable& w, const Buckets& b, double u) {
  const double *first = nullptr, *end = nullptr;
  std::int64_t bucket = 0;
  if (is_upper(w, b)) {
    // Descending: the last bucket whose mass at and above it exceeds the draw.
    const double at = between(w.cumulative_down[b.end], w.cumulative_down[b.first], u);
    first = w.cumulative_down + b.first, end = w.cumulative_down + b.end + 1;
    bucket =
        b.first + (std::partition_point(first, end, [at](double value) { return value > at; }) - first) - 1;
  } else {
    const double at = between(w.cumulative[b.first], w.cumulative[b.end], u);
    first = w.cumulative + b.first, end = w.cumulative + b.end + 1;
    bucket = b.first + (std::upper_bound(first, end, at) - first) - 1;
  }
  return std::clamp(bucket, b.first, b.end - 1);
}

// A code for block b with `left` buckets to spend, 0 = stop here.
int draw_choice(const WalkTable& w, int block, int size, int num_codes, std::int64_t left, double u) {
  const double* after = w.after_choice + block * w.choice_length + left + w.pad;
  const std::int64_t* buckets = w.buckets + static_cast<std::int64_t>(block) * num_codes;
  double sums[kMaxSearchSlots];
  double sum = w.stop[block] * w.after_stop[block * w.num_buckets + left];
  sums[0] = sum;
  const double scale = w.go_on[block];
  for (int code = 1; code <= size; ++code) {
    sum += scale * after[-buckets[code]];
    sums[code] = sum;
  }
  const double at = between(0.0, sum, u);
  int choice = 0;
  for (int code = 0; code < size; ++code) choice += sums[code] <= at;
  return choice;
}

void walk(const DrawParams& p, const WalkTable& w, std::int64_t left, PhiloxStream& random,
          std::uint8_t* codes) {
  std::memset(codes, 0, static_cast<std::size_t>(p.space.num_blocks()));
  for (int stage = 0; stage < p.space.num_stages; ++stage) {
    for (int b = p.space.stage_start[stage]; b < p.space.stage_start[stage + 1]; ++b) {
      const int choice = draw_choice(w, b, p.space.slot_sizes[b], p.cost.num_codes, left, random.uniform());
      if (choice == 0) break;
      codes[b] = static_cast<std::uint8_t>(choice);
      left -= w.buckets[static_cast<std::int64_t>(b) * p.cost.num_codes + choice];
    }
  }
}

Window draw_window(const DrawParams& p, PhiloxStream& random) {
  if (p.window == 0) return {p.low, p.high};
  const double target = std::exp(std::log(p.low) + random.uniform() * (std::log(p.high) - std::log(p.low)));
  return {std::max(target * (1 - p.window / 2), p.low), std::min(target * (1 + p.window / 2), p.high)};
}

// A resolution, uniform among those that may hold a path of the window; -1: none does.
int draw_resolution(const DrawParams& p, const Window& window, PhiloxStream& random) {
  int possible[64], count = 0;
  for (int r = 0; r < p.cost.num_resolutions; ++r) {
    const WalkTable& w = p.walks[r];
    if ((p.resolutions >> r & 1) == 0 || window.high < w.low || window.low > w.high) continue;
    if (mass(w, Buckets(w, window, p.cost.unit)) > 0) possible[count++] = r;
  }
  const int pick = random.below(std::max(count, 1));
  return count == 0 ? -1 : possible[pick];
}

// Draws path `i`; returns the number of walks, negative if no path was found.
std::int64_t draw_path(const DrawParams& p, std::int64_t i, std::uint8_t* codes) {
  PhiloxStream random(p.seed, p.first_index + static_cast<std::uint64_t>(i), kPurpose);
  std::int64_t walks = 0;
  int resolution = -1;
  for (int target = 0; target < kMaxTargets; ++target) {
    const Window window = draw_window(p, random);
    // A fixed window keeps its resolution, else redrawing would favour those of high acceptance.
    if (p.window != 0 || resolution < 0) resolution = draw_resolution(p, window, random);
    if (resolution < 0) {
      if (p.window == 0) break;
      continue;
    }
    const WalkTable& w = p.walks[resolution];
    const Buckets buckets(w, window, p.cost.unit);
    codes[p.space.num_blocks()] = static_cast<std::uint8_t>(1 + resolution);
    for (int attempt = 0; attempt < kMaxWalks; ++attempt) {
      walk(p, w, draw_bucket(w, buckets, random.uniform()), random, codes);
      ++walks;
      const double cost = cost_of(p.space, p.cost, codes);
      if (cost >= window.low && cost <= window.high) {
        if (p.costs != nullptr) p.costs[i] = cost;
        return walks;
      }
    }
  }
  std::memset(codes, 0, static_cast<std::size_t>(p.space.num_slots));
  if (p.costs != nullptr) p.costs[i] = NAN;
  return -walks - 1;
}

}  // namespace

void draw_paths(DrawParams& p) {
  constexpr std::int64_t kChunk = 256;
  PFNAS_CHECK(p.cost.num_resolutions <= 64 && p.space.num_slots <= kMaxSearchSlots);
  std::atomic<std::int64_t> drawn{0}, missing{0};
  const double work = 300.0 * static_cast<double>(p.num_paths) * p.space.num_slots;
  parallel_for((p.num_paths + kChunk - 1) / kChunk, work, [&](std::int64_t item) {
    const std::int64_t end = std::min(p.num_paths, (item + 1) * kChunk);
    std::int64_t walks = 0, lost = 0;
    for (std::int64_t i = item * kChunk; i < end; ++i) {
      const std::int64_t made = draw_path(p, i, p.codes + i * p.space.num_slots);
      walks += made < 0 ? -made - 1 : made;
      lost += made < 0;
    }
    drawn += walks;
    missing += lost;
  });
  p.num_drawn = drawn;
  p.num_missing = missing;
}

}  // namespace pfnas

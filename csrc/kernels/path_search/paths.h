// SPDX-License-Identifier: Apache-2.0
// What drawing, evolving and flooding share: exact costs, scores of a batch, thresholds, and the k best
// distinct paths.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/path_search/params.h"

namespace pfnas {

// In the order of pfnas_fast/space/costs.py (constant, block 0, block 1, ...): the same bits.
inline double cost_of(const GeneSpace& space, const AdditiveTable& cost, const std::uint8_t* codes) {
  const int num_blocks = space.num_blocks();
  const std::int64_t resolution = codes[num_blocks] - 1;
  const double* row = cost.table + resolution * num_blocks * cost.num_codes;
  double sum = cost.constant[resolution];
  for (int b = 0; b < num_blocks; ++b, row += cost.num_codes) sum += row[codes[b]];
  return sum / cost.unit;
}

inline double threshold_at(const Thresholds& t, double log_cost) {
  if (log_cost <= t.knots[0]) return t.values[0];
  if (log_cost >= t.knots[t.num_knots - 1]) return t.values[t.num_knots - 1];
  const auto right = std::upper_bound(t.knots, t.knots + t.num_knots, log_cost) - t.knots;
  const double width = t.knots[right] - t.knots[right - 1];
  const double slope = (t.values[right] - t.values[right - 1]) / width;
  return slope * (log_cost - t.knots[right - 1]) + t.values[right - 1];
}

// Scores of paths whose costs are known; reused between calls.
class BatchScores {
 public:
  void run(const BudgetScorer& scorer, const std::uint8_t* codes, int num_slots, std::int64_t count,
           const double* log_costs) {
    PathScoreParams p;
    p.model = scorer.model;
    prepare(p, scorer, codes, num_slots, count, log_costs);
    if (count > 0) scorer.score(p);
  }

  void run_int8(const Sift& sift, const BudgetScorer& scorer, const std::uint8_t* codes, int num_slots,
                std::int64_t count, const double* log_costs) {
    Int8ScoreParams p;
    p.model = sift.model;
    p.use_vnni = sift.use_vnni;
    prepare(p, scorer, codes, num_slots, count, log_costs);
    if (count > 0) sift.score(p);
  }

  std::vector<float> scores;

 private:
  void prepare(ScoredPaths& p, const BudgetScorer& scorer, const std::uint8_t* codes, int num_slots,
               std::int64_t count, const double* log_costs) {
    scores.resize(static_cast<std::size_t>(count));
    p.num_paths = count;
    p.codes = codes;
    p.path_stride = num_slots;
    p.slot_stride = 1;
    p.scores = scores.data();
    if (!scorer.model.needs_budget()) return;
    z_.resize(static_cast<std::size_t>(count));
    for (std::int64_t i = 0; i < count; ++i) {
      z_[static_cast<std::size_t>(i)] =
          static_cast<float>((log_costs[i] - scorer.log_mean) / scorer.log_scale);
    }
    p.z = z_.data();
  }

  std::vector<float> z_;
};

// The best distinct paths so far, best first; among equal scores the smaller codes come first, so that the
// result depends on the set of paths added and not on their order. NaN never enters.
class BestPaths {
 public:
  BestPaths(std::int64_t size, int num_slots) : size_(size), num_slots_(num_slots) {}

  std::int64_t count() const { return static_cast<std::int64_t>(values_.size()); }
  double value(std::int64_t rank) const { return values_[static_cast<std::size_t>(rank)]; }
  const std::uint8_t* codes(std::int64_t rank) const { return rows_[static_cast<std::size_t>(rank)].data(); }
  // What a path must reach to enter.
  double floor() const { return count() < size_ ? -INFINITY : values_.back(); }

  bool add(const std::uint8_t* codes, double value) {
    if (!(value >= floor()) || std::isnan(value) || size_ == 0) return false;
    auto place = static_cast<std::size_t>(
        std::lower_bound(values_.begin(), values_.end(), value, [](double a, double b) { return a > b; }) -
        values_.begin());
    for (; place < values_.size() && values_[place] == value; ++place) {
      const int order = std::memcmp(codes, rows_[place].data(), static_cast<std::size_t>(num_slots_));
      if (order == 0) return false;
      if (order < 0) break;
    }
    if (static_cast<std::int64_t>(place) >= size_) return false;
    std::vector<std::uint8_t> row;
    if (count() == size_) {
      row = std::move(rows_.back());
      rows_.pop_back();
      values_.pop_back();
    }
    row.assign(codes, codes + num_slots_);
    values_.insert(values_.begin() + static_cast<std::ptrdiff_t>(place), value);
    rows_.insert(rows_.begin() + static_cast<std::ptrdiff_t>(place), std::move(row));
    return true;
  }

 private:
  std::int64_t size_;
  int num_slots_;
  std::vector<double> values_;
  std::vector<std::vector<std::uint8_t>> rows_;
};

}  // namespace pfnas

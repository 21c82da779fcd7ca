// SPDX-License-Identifier: Apache-2.0
// Draws any number of exact samples, scores them and keeps the k best distinct ones that the thresholds
// accept. Memory is that of one wave of chunks, whatever the number of samples.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/check.h"
#include "common/parallel.h"
#include "kernels/path_search/params.h"
#include "kernels/path_search/paths.h"

namespace pfnas {
namespace {

constexpr std::int64_t kChunk = 2048;  // paths per item of work
constexpr std::int64_t kWave = 64;     // items between two merges

class Chunk {
 public:
  std::vector<std::int32_t> chosen;  // paths of the chunk that may be among the best
  std::vector<double> chosen_scores;
  std::int64_t num_drawn = 0, num_missing = 0, num_accepted = 0, num_exact = 0;

  const std::uint8_t* row(std::int32_t path, int num_slots) const {
    return codes_.data() + static_cast<std::int64_t>(path) * num_slots;
  }

  // `floor`: what a path must reach to be among the best.
  void run(const FloodParams& p, std::int64_t first, std::int64_t count, double floor) {
    draw(p, first, count);
    sift(p, floor);
    score_exactly(p);
    num_accepted = num_sure_;
    chosen.clear();
    chosen_scores.clear();
    for (std::size_t i = 0; i < exact_.size(); ++i) {
      const double score = exact_scores_.scores[i];
      const auto path = static_cast<std::size_t>(exact_[i]);
      if (p.thresholds.num_knots > 0 && !(score >= threshold_at(p.thresholds, log_costs_[path]))) continue;
      num_accepted += sure_[path] == 0;
      if (!(score >= floor)) continue;
      chosen.push_back(exact_[i]);
      chosen_scores.push_back(score);
    }
  }

 private:
  void draw(const FloodParams& p, std::int64_t first, std::int64_t count) {
    codes_.resize(static_cast<std::size_t>(count * p.draw.space.num_slots));
    costs_.resize(static_cast<std::size_t>(count));
    log_costs_.resize(costs_.size());
    DrawParams draw = p.draw;
    draw.first_index += static_cast<std::uint64_t>(first);
    draw.num_paths = count;
    draw.codes = codes_.data();
    draw.costs = costs_.data();
    draw_paths(draw);
    num_drawn = draw.num_drawn;
    num_missing = draw.num_missing;
    for (std::size_t i = 0; i < costs_.size(); ++i) log_costs_[i] = std::log(costs_[i]);
  }

  // Which paths need their exact score, and how many are accepted for sure.
  void sift(const FloodParams& p, double floor) {
    exact_.clear();
    num_sure_ = 0;
    sure_.assign(costs_.size(), 0);
    if (p.sift.score != nullptr) {
      quick_scores_.run_int8(p.sift, p.scorer, codes_.data(), p.draw.space.num_slots,
                             static_cast<std::int64_t>(costs_.size()), log_costs_.data());
    }
    for (std::size_t i = 0; i < costs_.size(); ++i) {
      if (std::isnan(costs_[i])) continue;
      bool needed = true;
      if (p.sift.score != nullptr) {
        const double quick = quick_scores_.scores[i];
        const double limit =
            p.thresholds.num_knots > 0 ? threshold_at(p.thresholds, log_costs_[i]) : -INFINITY;
        sure_[i] = quick > limit + p.sift.eps;
        num_sure_ += sure_[i];
        const bool unclear = sure_[i] == 0 && quick >= limit - p.sift.eps;
        needed = unclear || (sure_[i] != 0 && quick >= floor - p.sift.eps);
      }
      if (needed) exact_.push_back(static_cast<std::int32_t>(i));
    }
    num_exact = static_cast<std::int64_t>(exact_.size());
  }

  void score_exactly(const FloodParams& p) {
    const int num_slots = p.draw.space.num_slots;
    exact_codes_.resize(exact_.size() * static_cast<std::size_t>(num_slots));
    exact_log_costs_.resize(exact_.size());
    for (std::size_t i = 0; i < exact_.size(); ++i) {
      std::memcpy(exact_codes_.data() + i * static_cast<std::size_t>(num_slots), row(exact_[i], num_slots),
                  static_cast<std::size_t>(num_slots));
      exact_log_costs_[i] = log_costs_[static_cast<std::size_t>(exact_[i])];
    }
    exact_scores_.run(p.scorer, exact_codes_.data(), num_slots, num_exact, exact_log_costs_.data());
  }

  std::vector<std::uint8_t> codes_, exact_codes_, sure_;
  std::vector<double> costs_, log_costs_, exact_log_costs_;
  std::vector<std::int32_t> exact_;
  BatchScores quick_scores_, exact_scores_;
  std::int64_t num_sure_ = 0;
};

}  // namespace

void flood_paths(FloodParams& p) {
  const int num_slots = p.draw.space.num_slots;
  PFNAS_CHECK(num_slots <= kMaxSearchSlots);
  BestPaths best(p.top_k, num_slots);
  std::vector<Chunk> chunks(kWave);
  p.draw.num_drawn = p.draw.num_missing = p.num_accepted = p.num_exact = 0;
  for (std::int64_t start = 0; start < p.draw.num_paths; start += kWave * kChunk) {
    const std::int64_t num_chunks = std::min(kWave, (p.draw.num_paths - start + kChunk - 1) / kChunk);
    const double floor = best.floor();
    parallel_for(num_chunks, 1e6 * static_cast<double>(num_chunks), [&](std::int64_t item) {
      const std::int64_t first = start + item * kChunk;
      chunks[static_cast<std::size_t>(item)].run(p, first, std::min(kChunk, p.draw.num_paths - first), floor);
    });
    for (std::int64_t item = 0; item < num_chunks; ++item) {
      const Chunk& chunk = chunks[static_cast<std::size_t>(item)];
      p.draw.num_drawn += chunk.num_drawn;
      p.draw.num_missing += chunk.num_missing;
      p.num_accepted += chunk.num_accepted;
      p.num_exact += chunk.num_exact;
      for (std::size_t i = 0; i < chunk.chosen.size(); ++i) {
        best.add(chunk.row(chunk.chosen[i], num_slots), chunk.chosen_scores[i]);
      }
    }
  }
  p.num_found = best.count();
  for (std::int64_t rank = 0; rank < best.count(); ++rank) {
    std::memcpy(p.codes + rank * num_slots, best.codes(rank), static_cast<std::size_t>(num_slots));
    p.scores[rank] = best.value(rank);
    p.costs[rank] = cost_of(p.draw.space, p.draw.cost, best.codes(rank));
  }
}

}  // namespace pfnas

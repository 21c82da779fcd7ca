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

struct Chunk {
  std::vector<std::uint8_t> codes;
  std::vector<double> costs;
  BatchScores scores;
  std::vector<std::int32_t> chosen;  // paths of the chunk that may be among the best
  std::int64_t num_drawn = 0, num_missing = 0, num_accepted = 0;

  void run(const FloodParams& p, std::int64_t first, std::int64_t count, double floor) {
    const int num_slots = p.draw.space.num_slots;
    codes.resize(static_cast<std::size_t>(count * num_slots));
    costs.resize(static_cast<std::size_t>(count));
    DrawParams draw = p.draw;
    draw.first_index += static_cast<std::uint64_t>(first);
    draw.num_paths = count;
    draw.codes = codes.data();
    draw.costs = costs.data();
    draw_paths(draw);
    num_drawn = draw.num_drawn;
    num_missing = draw.num_missing;
    num_accepted = 0;
    chosen.clear();
    log_costs_.resize(costs.size());
    for (std::size_t i = 0; i < costs.size(); ++i) {
      log_costs_[i] = std::isnan(costs[i]) ? 0.0 : std::log(costs[i]);
    }
    scores.run(p.scorer, codes.data(), num_slots, count, log_costs_.data());
    for (std::int64_t i = 0; i < count; ++i) {
      const auto at = static_cast<std::size_t>(i);
      if (std::isnan(costs[at])) continue;
      const double score = scores.scores[at];
      if (p.thresholds.num_knots > 0 && !(score >= threshold_at(p.thresholds, log_costs_[at]))) continue;
      ++num_accepted;
      if (score >= floor) chosen.push_back(static_cast<std::int32_t>(i));
    }
  }

 private:
  std::vector<double> log_costs_;
};

}  // namespace

void flood_paths(FloodParams& p) {
  const int num_slots = p.draw.space.num_slots;
  PFNAS_CHECK(num_slots <= kMaxSearchSlots);
  BestPaths best(p.top_k, num_slots);
  std::vector<Chunk> chunks(kWave);
  p.draw.num_drawn = p.draw.num_missing = p.num_accepted = 0;
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
      for (const std::int32_t i : chunk.chosen) {
        best.add(chunk.codes.data() + static_cast<std::int64_t>(i) * num_slots,
                 static_cast<double>(chunk.scores.scores[static_cast<std::size_t>(i)]));
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

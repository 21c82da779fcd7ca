// SPDX-License-Identifier: Apache-2.0
// Once-for-All's evolution (arXiv:1908.09791, sec. 3.4) in one cost window: the best distinct parents breed
// by mutation and crossing, children are repaired to the window, and the k best paths ever seen are returned.
// Child c of generation g has the random stream (seed, g * population + c).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/check.h"
#include "kernels/path_search/genes.h"
#include "kernels/path_search/params.h"
#include "kernels/path_search/paths.h"
#include "kernels/path_search/philox.h"

namespace pfnas {
namespace {

constexpr std::uint32_t kPurpose = 0xE701;
constexpr double kRejected = -1e9;  // rejected paths rank below all accepted ones, by how little they miss

class Evolution {
 public:
  explicit Evolution(EvolveParams& p)
      : p_(p),
        num_slots_(p.space.num_slots),
        inside_(p.top_k, num_slots_),
        outside_(p.top_k, num_slots_),
        parents_(p.num_parents, num_slots_) {}

  void run() {
    take_initial();
    for (int generation = 0, idle = 0;; ++generation) {
      idle = judge() ? 0 : idle + 1;
      if (generation == p_.iterations || (p_.patience >= 0 && idle >= p_.patience)) break;
      breed(generation);
    }
    write();
  }

 private:
  std::uint8_t* row(std::int64_t i) { return current_.data() + i * num_slots_; }

  void take_initial() {
    current_.assign(p_.initial, p_.initial + p_.num_initial * num_slots_);
    log_costs_.clear();
    for (std::int64_t i = 0; i < p_.num_initial; ++i) {
      log_costs_.push_back(std::log(cost_of(p_.space, p_.cost, row(i))));
    }
  }

  // Scores the current paths and files them; tells whether the best of them changed.
  bool judge() {
    const auto count = static_cast<std::int64_t>(log_costs_.size());
    scores_.run(p_.scorer, current_.data(), num_slots_, count, log_costs_.data());
    const bool judged = p_.thresholds.num_knots > 0;
    if (judged && !p_.own_judge) {
      judge_scores_.run(p_.judge, current_.data(), num_slots_, count, log_costs_.data());
    }
    p_.num_scored += count;
    bool changed = false;
    for (std::int64_t i = 0; i < count; ++i) {
      const auto at = static_cast<std::size_t>(i);
      const double score = scores_.scores[at];
      double margin = 0;
      if (judged) {
        const double judged_as = p_.own_judge ? score : static_cast<double>(judge_scores_.scores[at]);
        margin = judged_as - threshold_at(p_.thresholds, log_costs_[at]);
      }
      const bool accepted = margin >= 0;
      changed |= (accepted ? inside_ : outside_).add(row(i), score);
      parents_.add(row(i), accepted ? score : kRejected + margin);
    }
    return changed;
  }

  void breed(int generation) {
    const auto num_parents = static_cast<int>(parents_.count());
    current_.resize(static_cast<std::size_t>(p_.population) * static_cast<std::size_t>(num_slots_));
    log_costs_.clear();
    std::int64_t kept = 0;
    for (int child = 0; child < p_.population && num_parents > 0; ++child) {
      const std::uint64_t index =
          static_cast<std::uint64_t>(generation) * static_cast<std::uint64_t>(p_.population) +
          static_cast<std::uint64_t>(child);
      PhiloxStream random(p_.seed, index, kPurpose);
      std::uint8_t* codes = row(kept);
      if (child < p_.num_mutants) {
        std::memcpy(codes, parents_.codes(random.below(num_parents)), static_cast<std::size_t>(num_slots_));
        mutate(p_.space, p_.gene_probability, p_.resolution >= 0, random, codes);
      } else {
        const std::uint8_t* mother = parents_.codes(random.below(num_parents));
        cross(p_.space, mother, parents_.codes(random.below(num_parents)), random, codes);
      }
      const double cost =
          repair(p_.space, p_.cost, p_.low, p_.high, p_.repair_attempts, p_.resolution >= 0, random, codes);
      if (!(cost >= p_.low && cost <= p_.high)) continue;
      log_costs_.push_back(std::log(cost));
      ++kept;
    }
  }

  void write() {
    p_.num_found = 0;
    for (const BestPaths* best : {&inside_, &outside_}) {
      for (std::int64_t rank = 0; rank < best->count() && p_.num_found < p_.top_k; ++rank) {
        std::memcpy(p_.codes + p_.num_found * num_slots_, best->codes(rank),
                    static_cast<std::size_t>(num_slots_));
        p_.scores[p_.num_found++] = best->value(rank);
      }
    }
  }

  EvolveParams& p_;
  int num_slots_;
  BestPaths inside_, outside_, parents_;
  std::vector<std::uint8_t> current_;
  std::vector<double> log_costs_;
  BatchScores scores_, judge_scores_;
};

}  // namespace

void evolve_paths(EvolveParams& p) {
  PFNAS_CHECK(p.space.num_slots <= kMaxSearchSlots && p.population >= 1 && p.num_parents >= 1);
  p.num_scored = 0;
  Evolution(p).run();
}

}  // namespace pfnas

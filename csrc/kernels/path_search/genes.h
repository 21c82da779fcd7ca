// SPDX-License-Identifier: Apache-2.0
// Mutation, crossing and repair of single paths; codes stay canonical: one row per subnet.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels/path_search/params.h"
#include "kernels/path_search/paths.h"
#include "kernels/path_search/philox.h"

namespace pfnas {

inline std::uint8_t random_code(const GeneSpace& space, int slot, PhiloxStream& random) {
  return static_cast<std::uint8_t>(1 + random.below(space.slot_sizes[slot]));
}

// Sets one stage's depth: blocks that appear get random genes, the others go.
inline void set_depth(const GeneSpace& space, int stage, int depth, PhiloxStream& random,
                      std::uint8_t* codes) {
  const int first = space.stage_start[stage], end = space.stage_start[stage + 1];
  for (int b = first; b < end; ++b) {
    if (b - first >= depth) {
      codes[b] = 0;
    } else if (codes[b] == 0) {
      codes[b] = random_code(space, b, random);
    }
  }
}

inline int depth_of(const GeneSpace& space, int stage, const std::uint8_t* codes) {
  const std::uint8_t* end = codes + space.stage_start[stage + 1];
  return static_cast<int>(end - codes - space.stage_start[stage] -
                          std::count(codes + space.stage_start[stage], end, 0));
}

// Redraws each gene with some probability: a block's choice, a stage's depth, the resolution.
inline void mutate(const GeneSpace& space, double probability, bool keep_resolution, PhiloxStream& random,
                   std::uint8_t* codes) {
  for (int slot = 0; slot < space.num_slots - (keep_resolution ? 1 : 0); ++slot) {
    if (codes[slot] != 0 && random.chance(probability)) codes[slot] = random_code(space, slot, random);
  }
  for (int stage = 0; stage < space.num_stages; ++stage) {
    if (!random.chance(probability)) continue;
    const int first = space.depth_start[stage], count = space.depth_start[stage + 1] - first;
    set_depth(space, stage, space.depths[first + random.below(count)], random, codes);
  }
}

// Each stage's depth, each block's choice and the resolution from either parent; a block that only one parent
// has keeps that parent's choice.
inline void cross(const GeneSpace& space, const std::uint8_t* mother, const std::uint8_t* father,
                  PhiloxStream& random, std::uint8_t* child) {
  for (int slot = 0; slot < space.num_slots; ++slot) {
    const std::uint8_t code = (random.word() >> 31) != 0 ? mother[slot] : father[slot];
    child[slot] = code != 0 ? code : std::max(mother[slot], father[slot]);
  }
  for (int stage = 0; stage < space.num_stages; ++stage) {
    const std::uint8_t* donor = (random.word() >> 31) != 0 ? mother : father;
    set_depth(space, stage, depth_of(space, stage, donor), random, child);
  }
}

inline double gap_to(double low, double high, double cost) {
  return std::max(std::max(cost - high, low - cost), 0.0);
}

// Random changes of about two genes, kept where they lead towards the window; returns the cost reached.
inline double repair(const GeneSpace& space, const AdditiveTable& cost, double low, double high, int attempts,
                     bool keep_resolution, PhiloxStream& random, std::uint8_t* codes) {
  double now = cost_of(space, cost, codes);
  std::uint8_t proposal[kMaxSearchSlots];
  for (int attempt = 0; attempt < attempts && gap_to(low, high, now) > 0; ++attempt) {
    std::memcpy(proposal, codes, static_cast<std::size_t>(space.num_slots));
    mutate(space, 2.0 / space.num_slots, keep_resolution, random, proposal);
    const double then = cost_of(space, cost, proposal);
    if (gap_to(low, high, then) < gap_to(low, high, now)) {
      std::memcpy(codes, proposal, static_cast<std::size_t>(space.num_slots));
      now = then;
    }
  }
  return now;
}

}  // namespace pfnas

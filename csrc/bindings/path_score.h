// SPDX-License-Identifier: Apache-2.0
// A folded ranker as Python holds it: the kernels' struct, and the tensors it points into, kept alive.
#pragma once

#include <pybind11/pybind11.h>

#include "common/isa.h"
#include "kernels/path_score/int8_params.h"
#include "kernels/path_score/params.h"

namespace pfnas {

struct ScoreModelHolder {
  pybind11::dict tensors;
  PathScoreModel model;
};

// Fills in what both kinds of scoring take; false: there is no path. codes: uint8 [n, num_slots], any
// strides, checked. z: float32 [n], or None where no budget is needed. scores: float32 [n].
bool fill_scored_paths(ScoredPaths& p, const char* op, int num_slots, bool needs_budget,
                       pybind11::handle codes, pybind11::handle z, pybind11::handle scores);

using PathScoreKernel = void (*)(const PathScoreParams&);
PathScoreKernel select_path_score_kernel(Isa isa);

struct Int8ModelHolder {
  pybind11::dict tensors;
  Int8Model model;
};

using Int8ScoreKernel = void (*)(const Int8ScoreParams&);
Int8ScoreKernel select_int8_score_kernel(Isa isa);
bool cpu_has_vnni();

}  // namespace pfnas

// SPDX-License-Identifier: Apache-2.0
// A folded ranker as Python holds it: the kernels' struct, and the tensors it points into, kept alive.
#pragma once

#include <pybind11/pybind11.h>

#include "common/isa.h"
#include "kernels/path_score/params.h"

namespace pfnas {

struct ScoreModelHolder {
  pybind11::dict tensors;
  PathScoreModel model;
};

using PathScoreKernel = void (*)(const PathScoreParams&);
PathScoreKernel select_path_score_kernel(Isa isa);

}  // namespace pfnas

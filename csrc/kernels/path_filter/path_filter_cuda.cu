// SPDX-License-Identifier: Apache-2.0
// Launches the CUDA kernel of path_filter: one pass over any number of paths, scored 32 at a time where their
// hidden layers fit into shared memory, else 16.
#include <algorithm>

#include "kernels/path_filter/cuda_filter_paths.cuh"
#include "kernels/path_filter/cuda_params.h"

namespace pfnas::cuda {

void path_filter(const PathFilterParams& params, Stream stream) {
  const auto blocks = static_cast<unsigned>(divide_up(params.num_paths, params.paths_per_block));
  PathFilterParams p = params;
  const PathScoreModel& m = p.model;
  int widest[2] = {static_cast<int>(m.first_width()), 0};
  for (int layer = 1; layer <= m.num_dense; ++layer) {
    int& width = widest[layer % 2];
    width = std::max(width, PathScoreModel::padded(m.widths[layer]));
  }
  p.even_pitch = widest[0] + kHiddenPad, p.odd_pitch = widest[1] + kHiddenPad;
  const bool fits = 32 * (p.even_pitch + p.odd_pitch) <= kHiddenFloats;
  launch(fits ? filter_paths<32> : filter_paths<16>, blocks, kFilterThreads, stream, p);
}

}  // namespace pfnas::cuda

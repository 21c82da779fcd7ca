// SPDX-License-Identifier: Apache-2.0
// Launches the CUDA kernel of path_filter: one pass over any number of paths.
#include "kernels/path_filter/cuda_filter_paths.cuh"
#include "kernels/path_filter/cuda_params.h"

namespace pfnas::cuda {

void path_filter(const PathFilterParams& params, Stream stream) {
  const auto blocks = static_cast<unsigned>(divide_up(params.num_paths, params.paths_per_block));
  launch(filter_paths, blocks, kFilterThreads, stream, params);
}

}  // namespace pfnas::cuda

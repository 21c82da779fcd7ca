// SPDX-License-Identifier: Apache-2.0
#include "common/fold.h"

#include <cmath>

namespace pfnas {

void fold_batch_norm(const float* gamma, const float* beta, const float* mean, const float* var, float eps,
                     std::int64_t channels, float* scale, float* shift) {
  for (std::int64_t c = 0; c < channels; ++c) {
    scale[c] = gamma[c] / std::sqrt(var[c] + eps);
    shift[c] = beta[c] - mean[c] * scale[c];
  }
}

}  // namespace pfnas

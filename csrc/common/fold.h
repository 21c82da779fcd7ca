// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace pfnas {

// Batch normalisation with fixed statistics as v * scale + shift: scale = gamma / sqrt(var + eps),
// shift = beta - mean * scale. All [channels].
void fold_batch_norm(const float* gamma, const float* beta, const float* mean, const float* var, float eps,
                     std::int64_t channels, float* scale, float* shift);

}  // namespace pfnas

// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "kernels/train_mbconv/params.h"

namespace pfnas {

void clear_unwritten(const TrainMBConvParams& p) {
  for (int i = 0; i < p.num_gradients; ++i) {
    const WrittenPart& part = p.gradients[i];
    for (std::int64_t row = 0; row < part.rows; ++row) {
      float* begin = part.data + row * part.stride;
      std::fill(begin + part.columns, begin + part.stride, 0.0f);
    }
    std::fill(part.data + part.rows * part.stride, part.data + part.size, 0.0f);
  }
}

}  // namespace pfnas

// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace pfnas {

// The numbers are part of the seam with Python (pfnas_fast.ops.dynamic_pointwise_conv).
enum class Activation : int { kNone = 0, kRelu = 1, kHswish = 2 };

}  // namespace pfnas

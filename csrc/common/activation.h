// SPDX-License-Identifier: Apache-2.0
// Activations on a vector of floats; NaN goes through all of them.
#pragma once

#include "common/activation_kind.h"
#include "common/simd.h"

namespace pfnas::PFNAS_TIER {

static PFNAS_INLINE Vec relu(Vec x) { return at_least(x, Vec{}); }

// clamp(x / 6 + 1 / 2, 0, 1) (MobileNetV3, arXiv:1905.02244)
static PFNAS_INLINE Vec hard_sigmoid(Vec x) {
  return at_most(at_least(x * (1.0f / 6.0f) + 0.5f, Vec{}), broadcast(1.0f));
}

template <Activation kActivation>
static PFNAS_INLINE Vec activate(Vec x) {
  if constexpr (kActivation == Activation::kRelu) return relu(x);
  if constexpr (kActivation == Activation::kHswish) return x * hard_sigmoid(x);
  return x;
}

// Calls body with the activation as a compile-time constant: body(ActivationTag<...>{}).
template <Activation kActivation>
struct ActivationTag {
  static constexpr Activation value = kActivation;
};

template <class Body>
static PFNAS_INLINE void dispatch_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::kNone:
      return body(ActivationTag<Activation::kNone>{});
    case Activation::kRelu:
      return body(ActivationTag<Activation::kRelu>{});
    case Activation::kHswish:
      return body(ActivationTag<Activation::kHswish>{});
  }
}

}  // namespace pfnas::PFNAS_TIER

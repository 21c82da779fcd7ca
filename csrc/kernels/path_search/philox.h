// SPDX-License-Identifier: Apache-2.0
// Counter-based random numbers: Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy
// as 1, 2, 3", SC 2011). A stream is a function of (seed, index) alone, so draws do not depend on threads or
// order.
#pragma once

#include <cstdint>

namespace pfnas {

// constexpr: CUDA kernels call it too.
constexpr void philox4x32(const std::uint32_t (&counter)[4], std::uint64_t key, std::uint32_t (&out)[4]) {
  std::uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
  auto k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = 0xD2511F53ull * c0, b = 0xCD9E8D57ull * c2;
    const auto a_high = static_cast<std::uint32_t>(a >> 32), b_high = static_cast<std::uint32_t>(b >> 32);
    c0 = b_high ^ c1 ^ k0;
    c1 = static_cast<std::uint32_t>(b);
    c2 = a_high ^ c3 ^ k1;
    c3 = static_cast<std::uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

// One stream of random numbers; several blocks are made at a time, since their rounds overlap in the CPU.
class PhiloxStream {
 public:
  PhiloxStream(std::uint64_t seed, std::uint64_t index, std::uint32_t purpose)
      : seed_(seed), index_(index), purpose_(purpose) {}

  std::uint32_t word() {
    if (next_ == kWords) refill();
    return words_[next_++];
  }
  // Uniform in [0, 1) with 53 bits.
  double uniform() {
    const std::uint64_t high = word();
    return static_cast<double>((high << 21) ^ (word() >> 11)) * 0x1p-53;
  }
  // Uniform in 0 .. bound - 1; the bias is below bound / 2^32.
  int below(int bound) {
    return static_cast<int>((static_cast<std::uint64_t>(word()) * static_cast<std::uint32_t>(bound)) >> 32);
  }
  bool chance(double probability) { return static_cast<double>(word()) < probability * 0x1p32; }

 private:
  static constexpr int kBlocks = 4, kWords = 4 * kBlocks;

  void refill() {
    for (int i = 0; i < kBlocks; ++i) {
      const std::uint32_t counter[4] = {static_cast<std::uint32_t>(index_),
                                        static_cast<std::uint32_t>(index_ >> 32),
                                        block_ + static_cast<std::uint32_t>(i), purpose_};
      std::uint32_t out[4];
      philox4x32(counter, seed_, out);
      for (int j = 0; j < 4; ++j) words_[4 * i + j] = out[j];
    }
    block_ += kBlocks;
    next_ = 0;
  }

  std::uint64_t seed_, index_;
  std::uint32_t purpose_, block_ = 0;
  int next_ = kWords;
  std::uint32_t words_[kWords];
};

}  // namespace pfnas

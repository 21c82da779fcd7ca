// SPDX-License-Identifier: Apache-2.0
// What translated PTX is written in. Registers hold bits; `as` reads them as the type an instruction asks
// for.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <string>
#include <type_traits>

#include "cuda/async_copy.h"
#include "cuda/device.h"
#include "cuda/tensor_core.h"
#include "ptx_registry.h"
#include "scheduler.h"

#define COUNT_BLOCK(number) ++counters[number]

namespace cuda_emulator::ptx {

template <class T, class U>
inline T as(U bits) {
  if constexpr (std::is_same_v<T, U>) {
    return bits;
  } else if constexpr (sizeof(T) == sizeof(U) && !std::is_same_v<T, bool> && !std::is_same_v<U, bool>) {
    return std::bit_cast<T>(bits);
  } else if constexpr (std::is_integral_v<T> && std::is_integral_v<U>) {
    return static_cast<T>(bits);  // a narrow read of a wide register, or widening by its sign
  } else {
    static_assert(sizeof(T) == sizeof(U), "a float register of another width");
  }
}

template <class T>
inline T as_integer(long long literal) {
  if constexpr (std::is_same_v<T, float>)
    return std::bit_cast<float>(static_cast<std::uint32_t>(literal));
  else if constexpr (std::is_same_v<T, double>)
    return std::bit_cast<double>(static_cast<std::uint64_t>(literal));
  else
    return static_cast<T>(literal);
}

template <class R, class V>
inline void set(R& target, V result) {
  if constexpr (std::is_integral_v<V>)
    target = static_cast<R>(result);
  else
    target = as<R>(result);
}

template <class T, class U>
inline T part(U whole, int index) {
  return static_cast<T>(whole >> (index * 8 * static_cast<int>(sizeof(T))));
}
inline std::uint32_t join(std::uint16_t low, std::uint16_t high) { return std::uint32_t{high} << 16 | low; }
inline std::uint64_t join(std::uint32_t low, std::uint32_t high) { return std::uint64_t{high} << 32 | low; }

// Memory. A block's shared arrays lie in one window; shared addresses are offsets in it.
inline char* shared_window = nullptr;

inline void enter_kernel(const void* key, std::size_t shared_size) {
  constexpr std::size_t kSlack = 128, kWindowAlignment = 128;
  if (shared_size > 0) {
    shared_window = static_cast<char*>(shared_array(key, shared_size + kSlack, kWindowAlignment));
  }
}
inline char* shared_pointer(std::uint64_t offset, std::int64_t more) {
  return shared_window + static_cast<std::int64_t>(offset) + more;
}
inline char* global_pointer(std::uint64_t base, std::int64_t offset) {
  return reinterpret_cast<char*>(base + static_cast<std::uint64_t>(offset));
}
inline std::uint64_t shared_offset(std::uint64_t generic) {
  return generic - reinterpret_cast<std::uint64_t>(shared_window);
}
inline std::uint64_t generic_address(std::uint64_t offset) {
  return offset + reinterpret_cast<std::uint64_t>(shared_window);
}

template <class T, int kCount>
inline std::array<T, kCount> parameter_at(const void* arguments, std::size_t offset) {
  std::array<T, kCount> values;
  std::memcpy(&values, static_cast<const char*>(arguments) + offset, sizeof values);
  return values;
}

inline void require_alignment(const void* pointer, std::size_t size) {
  check_aligned(pointer, size, machine().current->place);
}
template <class T, int kCount>
inline std::array<T, kCount> load(const char* pointer) {
  require_alignment(pointer, sizeof(T) * kCount);
  std::array<T, kCount> values;
  std::memcpy(&values, pointer, sizeof values);
  return values;
}
template <class T, class... Values>
inline void store(char* pointer, Values... values) {
  const T all[] = {values...};
  require_alignment(pointer, sizeof all);
  std::memcpy(pointer, all, sizeof all);
}
inline std::uint32_t atomic_add(char* pointer, std::uint32_t amount) {
  require_alignment(pointer, sizeof amount);
  return atomicAdd(reinterpret_cast<unsigned*>(pointer), amount);
}

// Arithmetic
template <class T>
inline T multiply_high(T a, T b) {
  using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return static_cast<T>(static_cast<Wide>(a) * static_cast<Wide>(b) >> (8 * sizeof(T)));
}
template <class T>
inline T shift_left(T a, std::uint32_t by) {
  return by >= 8 * sizeof(T) ? T{0} : static_cast<T>(a << by);
}
template <class T>
inline T shift_right(T a, std::uint32_t by) {
  if (by >= 8 * sizeof(T)) return std::is_signed_v<T> && a < 0 ? static_cast<T>(-1) : T{0};
  return static_cast<T>(a >> by);
}
inline bool is_unordered(float a, float b) { return std::isunordered(a, b); }
inline bool is_unordered(double a, double b) { return std::isunordered(a, b); }
template <bool kPropagateNan>
inline float float_max(float a, float b) {
  if (kPropagateNan && is_unordered(a, b)) return NAN;
  return std::fmax(a, b);
}
template <bool kPropagateNan>
inline float float_min(float a, float b) {
  if (kPropagateNan && is_unordered(a, b)) return NAN;
  return std::fmin(a, b);
}
template <class T>
inline T ptx_abs(T a) {
  return std::abs(a);
}
inline std::uint32_t ptx_popc(std::uint32_t a) { return static_cast<std::uint32_t>(std::popcount(a)); }
inline std::uint32_t ptx_clz(std::uint32_t a) { return static_cast<std::uint32_t>(std::countl_zero(a)); }
inline float ptx_sqrt(float a) { return std::sqrt(a); }
// Approximate on a GPU; exact here, so nothing about their last bits is proven.
inline float ptx_ex2(float a) { return std::exp2(a); }
inline float ptx_rcp(float a) { return 1.0f / a; }
inline float ptx_rsqrt(float a) { return 1.0f / std::sqrt(a); }

inline std::int32_t truncate(float a) {  // towards zero, into range; NaN becomes 0
  constexpr float kLimit = 2147483648.0f;
  if (std::isnan(a)) return 0;
  if (a >= kLimit) return std::numeric_limits<std::int32_t>::max();
  return a < -kLimit ? std::numeric_limits<std::int32_t>::min() : static_cast<std::int32_t>(a);
}

// Warps
inline std::uint32_t lane() { return static_cast<std::uint32_t>(machine().current->lane); }

struct Shuffled {
  std::uint32_t value;
  bool valid;
};

// PTX packs the segment mask and the clamp into one operand. Of these two kinds every lane has a source.
template <Shuffle kKind>
inline Shuffled shuffle_bits(std::uint32_t value, std::uint32_t argument, std::uint32_t clamp,
                             std::uint32_t mask) {
  const int width = kWarpSize - static_cast<int>(clamp >> 8 & 31);
  const auto place = std::source_location::current();
  return {shuffle<kKind>(mask, value, static_cast<int>(argument), width, place), true};
}
inline Shuffled shuffle_bfly(std::uint32_t v, std::uint32_t a, std::uint32_t c, std::uint32_t m) {
  return shuffle_bits<Shuffle::kXor>(v, a, c, m);
}
inline Shuffled shuffle_idx(std::uint32_t v, std::uint32_t a, std::uint32_t c, std::uint32_t m) {
  return shuffle_bits<Shuffle::kFrom>(v, a, c, m);
}

}  // namespace cuda_emulator::ptx

// SPDX-License-Identifier: Apache-2.0
// Two kinds of error: a caller's mistake (InputError, a ValueError in Python) and a defect of ours
// (RuntimeError).
#pragma once

#include <stdexcept>
#include <string>

namespace pfnas {

class InputError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

class TypeMismatch : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

inline std::string describe(const char* op, const std::string& expected, const char* argument,
                            const std::string& got) {
  return std::string(op) + ": expected " + expected + " for " + argument + ", got " + got;
}

[[noreturn]] inline void internal_error(const char* condition, const char* file, int line) {
  throw std::runtime_error(std::string("pfnas_fast defect: ") + condition + " is false at " + file + ":" +
                           std::to_string(line));
}

}  // namespace pfnas

// Always on: guards what our own Python layer promises to the kernels.
#define PFNAS_CHECK(condition) \
  ((condition) ? static_cast<void>(0) : ::pfnas::internal_error(#condition, __FILE__, __LINE__))

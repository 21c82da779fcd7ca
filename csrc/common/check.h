// SPDX-License-Identifier: Apache-2.0
// Two kinds of error: a caller's mistake (InputError, a ValueError in Python) and a defect of ours
// (RuntimeError).
#pragma once

#include <stdexcept>
#include <string>

namespace pfnas {

struct InputError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

struct TypeMismatch : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

std::string describe(const char* op, const std::string& expected, const char* argument,
                     const std::string& got);

[[noreturn]] void internal_error(const char* condition, const char* file, int line);

}  // namespace pfnas

// Always on: guards what our own Python layer promises to the kernels.
#define PFNAS_CHECK(condition) \
  ((condition) ? static_cast<void>(0) : ::pfnas::internal_error(#condition, __FILE__, __LINE__))

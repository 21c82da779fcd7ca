// SPDX-License-Identifier: Apache-2.0
#include "common/check.h"

#include <stdexcept>

namespace pfnas {

std::string describe(const char* op, const std::string& expected, const char* argument,
                     const std::string& got) {
  return std::string(op) + ": expected " + expected + " for " + argument + ", got " + got;
}

void internal_error(const char* condition, const char* file, int line) {
  throw std::runtime_error(std::string("pfnas_fast defect: ") + condition + " is false at " + file + ":" +
                           std::to_string(line));
}

}  // namespace pfnas

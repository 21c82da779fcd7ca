// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <map>
#include <string>
#include <vector>

namespace cuda_emulator {

// For each return address the lines that led there, innermost first, as "file:line < file:line": inlined
// helpers are followed to the kernel that called them.
std::map<const void*, std::string> source_places(const std::vector<const void*>& addresses);

}  // namespace cuda_emulator

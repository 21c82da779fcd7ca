// SPDX-License-Identifier: Apache-2.0
#include "symbols.h"

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <sstream>

namespace cuda_emulator {
namespace {

std::string run(const std::string& command) {
  std::string output;
  FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return output;
  char chunk[4096];
  for (std::size_t count; (count = fread(chunk, 1, sizeof chunk, pipe)) > 0;) output.append(chunk, count);
  pclose(pipe);
  return output;
}

std::string short_place(const std::string& line) {  // "/a/b/file.h:12 (discriminator 3)" -> "file.h:12"
  const std::string place = line.substr(0, line.find(' '));
  return place.substr(place.rfind('/') + 1);
}

}  // namespace

std::map<const void*, std::string> source_places(const std::vector<const void*>& addresses) {
  std::map<const void*, std::string> places;
  std::map<std::string, std::map<std::uintptr_t, const void*>> by_image;  // image -> offset -> address
  for (const void* address : addresses) {
    places[address] = "unknown";
    Dl_info info{};
    if (dladdr(address, &info) == 0) continue;
    // The call ends before the return address.
    const auto offset =
        reinterpret_cast<std::uintptr_t>(address) - reinterpret_cast<std::uintptr_t>(info.dli_fbase) - 1;
    by_image[info.dli_fname][offset] = address;
  }
  for (const auto& [image, offsets] : by_image) {
    std::string command = "addr2line -i -a -e '" + image + "'";
    char text[32];
    for (const auto& [offset, address] : offsets) {
      std::snprintf(text, sizeof text, " 0x%zx", static_cast<std::size_t>(offset));
      command += text;
    }
    std::istringstream lines(run(command + " 2>/dev/null"));
    std::string* current = nullptr;
    for (std::string line; std::getline(lines, line);) {
      if (line.rfind("0x", 0) == 0) {
        current = &places[offsets.at(std::stoull(line, nullptr, 16))];
        current->clear();
      } else if (current != nullptr) {
        *current += (current->empty() ? "" : " < ") + short_place(line);
      }
    }
  }
  return places;
}

}  // namespace cuda_emulator

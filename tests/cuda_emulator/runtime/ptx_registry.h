// SPDX-License-Identifier: Apache-2.0
// Kernels that were translated from PTX, by mangled name. Where one is registered, a launch runs it instead
// of the kernel's source.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace cuda_emulator {

using PtxKernel = void (*)(const void* arguments);
using ReportCount = void (*)(std::map<std::string, std::uint64_t>& counts);

struct PtxRegistration {
  PtxRegistration(const char* name, PtxKernel kernel, ReportCount report);
};

PtxKernel find_ptx_kernel(const std::string& name);  // null: not translated
bool any_ptx_kernel();

// Launches that ran translated PTX, by mangled name.
std::map<std::string, std::uint64_t>& ptx_launches();
std::map<std::string, std::uint64_t> translated_kernels();

// Thread instructions executed since the last call, by PTX opcode.
std::map<std::string, std::uint64_t> instruction_counts();

}  // namespace cuda_emulator

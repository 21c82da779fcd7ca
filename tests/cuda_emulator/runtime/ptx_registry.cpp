// SPDX-License-Identifier: Apache-2.0
#include "ptx_registry.h"

#include <dlfcn.h>

#include <functional>

#include "scheduler.h"

namespace cuda_emulator {
namespace {

struct Entry {
  PtxKernel kernel;
  ReportCount report;
};

std::map<std::string, Entry>& entries() {
  static std::map<std::string, Entry> instance;
  return instance;
}

}  // namespace

PtxRegistration::PtxRegistration(const char* name, PtxKernel kernel, ReportCount report) {
  entries()[name] = {kernel, report};
}

PtxKernel find_ptx_kernel(const std::string& name) {
  const auto found = entries().find(name);
  return found == entries().end() ? nullptr : found->second.kernel;
}

bool any_ptx_kernel() { return !entries().empty(); }

std::map<std::string, std::uint64_t>& ptx_launches() {
  static std::map<std::string, std::uint64_t> instance;
  return instance;
}

std::map<std::string, std::uint64_t> translated_kernels() { return ptx_launches(); }

std::map<std::string, std::uint64_t> instruction_counts() {
  std::map<std::string, std::uint64_t> counts;
  for (const auto& [name, entry] : entries()) entry.report(counts);
  return counts;
}

void launch_kernel(void* kernel, Index3 grid, Index3 block, const void* arguments, std::size_t arguments_size,
                   const std::function<void()>& source) {
  machine().arguments = arguments;
  machine().arguments_size = arguments_size;
  if (!any_ptx_kernel()) {
    launch(grid, block, 0, source);
    return;
  }
  Dl_info info{};
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr)
    throw Error("launch: the kernel has no symbol");
  const PtxKernel translated = find_ptx_kernel(info.dli_sname);
  if (translated == nullptr) throw Error(std::string("launch: no PTX was translated for ") + info.dli_sname);
  ++ptx_launches()[info.dli_sname];
  launch(grid, block, 0, [&] { translated(arguments); });
}

}  // namespace cuda_emulator

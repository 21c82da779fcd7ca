// SPDX-License-Identifier: Apache-2.0
// Watches every access of a traced build: data races, accesses outside every buffer, coalescing, bank
// conflicts and bytes. Between trace_begin and trace_end; results as JSON.
#pragma once

#include <cstdint>
#include <string>

namespace cuda_emulator {

void trace_begin();
void trace_buffer(const std::string& name, std::uintptr_t address, std::uint64_t size);
std::string trace_end();

}  // namespace cuda_emulator

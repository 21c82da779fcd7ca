// SPDX-License-Identifier: Apache-2.0
// Stands in for tracer.cpp in builds that are not traced.
#include "scheduler.h"
#include "tracer.h"

namespace cuda_emulator {

void trace_begin() { throw Error("this build of the emulator is not traced"); }
void trace_buffer(const std::string&, std::uintptr_t, std::uint64_t) { trace_begin(); }
std::string trace_end() { throw Error("this build of the emulator is not traced"); }

}  // namespace cuda_emulator

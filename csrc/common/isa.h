// SPDX-License-Identifier: Apache-2.0
// Instruction-set tiers: which ones are compiled in, which one this CPU runs, and how a test forces one.
#pragma once

#include <string>
#include <vector>

namespace pfnas {

enum class Isa { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

const char* isa_name(Isa isa);
std::vector<Isa> compiled_isas();  // ascending
bool isa_supported(Isa isa);       // compiled in, and this CPU (and its OS) can run it
Isa active_isa();                  // the forced tier, else the highest supported one

// For tests. Throws InputError for a name that is unknown, not compiled in, or not supported by this CPU.
void force_isa(const std::string& name);
void unforce_isa();

}  // namespace pfnas

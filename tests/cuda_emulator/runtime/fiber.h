// SPDX-License-Identifier: Apache-2.0
// A context switch of ten nanoseconds: saves the callee-saved registers on the old stack, loads them from the
// new.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define CUDA_EMULATOR_ASAN 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define CUDA_EMULATOR_UNTRACED __attribute__((no_sanitize("thread"), no_sanitize("address")))

namespace cuda_emulator {

constexpr std::size_t kStackSize = 128 << 10;
constexpr std::size_t kGuardSize = 4096;

extern "C" void cuda_emulator_switch(void** save_stack_pointer, void* load_stack_pointer);

char* allocate_stack();  // [kGuardSize + kStackSize], the guard is not accessible

// The stack pointer with which cuda_emulator_switch enters `entry`. `colour` moves the hot end of the stack,
// or the fibers' stacks would share a few sets of the L1 cache.
void* prepare_stack(char* stack, void (*entry)(), int colour);

}  // namespace cuda_emulator

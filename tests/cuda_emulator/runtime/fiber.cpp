// SPDX-License-Identifier: Apache-2.0
#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>

#include "scheduler.h"

#if defined(__x86_64__)
// System V ABI: rbx, rbp and r12 to r15 belong to the caller.
asm(R"(
.text
.globl cuda_emulator_switch
.type cuda_emulator_switch, @function
cuda_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_emulator_switch, .-cuda_emulator_switch
)");
constexpr int kSavedRegisters = 6;
#else
#error "the emulator's context switch is written for x86-64 only"
#endif

namespace cuda_emulator {

char* allocate_stack() {
  void* memory = mmap(nullptr, kGuardSize + kStackSize, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw Error("the emulator cannot map another fiber stack");
  mprotect(memory, kGuardSize, PROT_NONE);
  return static_cast<char*>(memory);
}

void* prepare_stack(char* stack, void (*entry)(), int colour) {
  constexpr std::size_t kCacheLine = 64;
  constexpr int kColours = 61;
  char* top = stack + kGuardSize + kStackSize - static_cast<std::size_t>(colour * 5 % kColours) * kCacheLine;
  void** slot = reinterpret_cast<void**>(top);
  *--slot = nullptr;  // return address of `entry`: keeps the stack aligned as after a call
  *--slot = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--slot = nullptr;
  return slot;
}

}  // namespace cuda_emulator

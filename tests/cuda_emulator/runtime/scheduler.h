// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on the CPU: one fiber per CUDA thread, one block at a time, in an order chosen by the
// test.
//
//   launch -> for every block: run_block -> resume a fiber until it waits or ends
//                              | all live threads wait at the block barrier: release them
//                              | all lanes of a mask have arrived at a warp collective: combine, release
//                              | nobody can go on: report the deadlock with its place in the source
//
// There is one worker: kernels may not rely on blocks running side by side, so this loses no case.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

namespace cuda_emulator {

constexpr int kWarpSize = 32;
constexpr std::uint32_t kFullMask = 0xffffffffu;
constexpr std::size_t kSharedCapacity = 512 << 10;
constexpr std::size_t kStaticSharedLimit = 48 << 10;
constexpr std::size_t kRedZone = 128;

struct Index3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr Index3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  std::uint64_t count() const { return std::uint64_t{x} * y * z; }
};

// What a kernel did wrong, or the launch of it; the message names file, line, block and thread.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Order : int { kForward, kReverse, kRandom };

struct Options {
  Order order = Order::kForward;  // of threads and blocks
  std::uint64_t seed = 1;
  int compute_capability = 80;  // that the emulated device reports
};
Options& options();

enum class State : std::uint8_t { kNew, kReady, kAtBlockBarrier, kAtWarpCollective, kDone };

struct Thread;
// Computes every participating lane's result; absent lanes are null.
using Combine = void (*)(Thread* const (&lanes)[kWarpSize]);

struct Collective {
  Combine combine = nullptr;
  std::uint32_t mask = 0;
  const void* in = nullptr;
  void* out = nullptr;
  int size = 0;      // bytes of `in`
  int argument = 0;  // of a shuffle: lane, delta or xor mask
  int width = kWarpSize;
};

// One cp.async: performed as late as the program allows, at the wait.
struct PendingCopy {
  void* target;
  const void* source;
  int bytes;
  int zero_bytes;
  int group;
};

struct Thread {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  State state = State::kNew;
  int linear = 0, lane = 0, warp = 0;
  Index3 index{0, 0, 0};
  std::uint32_t warp_epoch = 0;  // __syncwarp calls passed
  std::source_location place;    // of the last barrier or collective
  Collective collective;
  std::vector<PendingCopy> copies;
  int copy_group = 0;
  void* sanitizer_stack = nullptr;
};

struct SharedArray {
  const void* key;
  std::size_t offset, size;
};

// The running block and the fibers that run it.
struct Machine {
  Index3 grid, block, block_index{0, 0, 0};
  std::vector<Thread> threads;
  Thread* current = nullptr;
  std::uint64_t block_serial = 0;   // blocks started in this process
  std::uint32_t barrier_epoch = 0;  // block barriers passed in this block
  char* shared = nullptr;           // [kSharedCapacity]
  std::size_t shared_used = 0, static_shared = 0, dynamic_shared = 0;
  std::vector<SharedArray> shared_arrays;
  const void* arguments = nullptr;  // of the kernel: readable by all threads
  std::size_t arguments_size = 0;
  const void* host_frame = nullptr;  // of the launch: what its caller's variables lie above
  std::string error;
};
extern Machine machine_state;
inline Machine& machine() { return machine_state; }

struct Statistics {
  std::uint64_t launches = 0, threads = 0;
  std::size_t static_shared = 0;  // bytes, of the last block
};
Statistics& statistics();

void launch(Index3 grid, Index3 block, std::size_t dynamic_shared, const std::function<void()>& kernel);

// Returns the array behind a shared declaration: poisoned with NaN, red zones around it, and no more aligned
// than its type asks for.
void* shared_array(const void* key, std::size_t size, std::size_t alignment, bool dynamic = false);

void wait_at_block_barrier(std::source_location place);
int count_at_block_barrier(bool predicate, std::source_location place);
void wait_at_collective(const Collective& collective, std::source_location place);

std::string where(const std::source_location& place);  // file:line
std::string who(const Thread& thread);                 // block, thread, file:line

// Whether an address lies where a thread's own variables and the emulator's state live: no memory of the GPU.
bool is_private_memory(std::uintptr_t address);

// The tracer's view of progress; empty functions where no tracer is linked.
enum class Progress { kLaunched, kBlockStarted, kBarrierPassed, kBlockFinished };
using ProgressHook = void (*)(Progress);
void set_progress_hook(ProgressHook hook);

}  // namespace cuda_emulator

// SPDX-License-Identifier: Apache-2.0
#include "scheduler.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "fiber.h"

namespace cuda_emulator {
namespace {

// Collectives under way in one warp: masks of concurrent ones are disjoint.
struct PendingCollective {
  Combine combine;
  std::uint32_t mask, arrived;
  int size, first_lane;
};

struct Scheduler {
  void* stack_pointer = nullptr;                        // of the scheduler itself
  std::vector<std::vector<PendingCollective>> pending;  // [warps]
  std::vector<char*> all_stacks, free_stacks;
  const std::function<void()>* kernel = nullptr;
  std::vector<int> turn;  // thread numbers in the order in which they run
  std::size_t next_turn = 0;
  int num_live = 0, num_waiting = 0, num_true = 0, last_num_true = 0;
  std::uint64_t random = 1;
  void* sanitizer_stack = nullptr;
  const void* sanitizer_bottom = nullptr;
  std::size_t sanitizer_size = 0;

  std::uint64_t next_random() {  // xorshift64
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    return random;
  }
};

Scheduler& scheduler() {
  static Scheduler instance;
  return instance;
}

ProgressHook progress_hook = nullptr;

void report(Progress progress) {
  if (progress_hook != nullptr) progress_hook(progress);
}

CUDA_EMULATOR_UNTRACED void leave_fiber(Thread& thread, [[maybe_unused]] bool for_good) {
  Scheduler& s = scheduler();
#ifdef CUDA_EMULATOR_ASAN
  __sanitizer_start_switch_fiber(for_good ? nullptr : &thread.sanitizer_stack, s.sanitizer_bottom,
                                 s.sanitizer_size);
#endif
  cuda_emulator_switch(&thread.stack_pointer, s.stack_pointer);
#ifdef CUDA_EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(thread.sanitizer_stack, &s.sanitizer_bottom, &s.sanitizer_size);
#endif
}

// Where a fiber starts. A thread that ends without ever waiting hands its fiber to the next one that has not
// started: most threads of most kernels then need no switch at all.
CUDA_EMULATOR_UNTRACED void fiber_main() {
  Scheduler& s = scheduler();
  Machine& m = machine();
#ifdef CUDA_EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &s.sanitizer_bottom, &s.sanitizer_size);
#endif
  for (;;) {
    try {
      (*s.kernel)();
    } catch (const std::exception& error) {
      if (m.error.empty()) m.error = error.what();
    }
    Thread& finished = *m.current;
    if (!m.error.empty() || s.next_turn >= s.turn.size()) break;
    Thread& next = m.threads[static_cast<std::size_t>(s.turn[s.next_turn])];
    if (next.state != State::kNew) break;
    ++s.next_turn;
    --s.num_live;
    finished.state = State::kDone;
    next.stack = finished.stack;
    next.state = State::kReady;
    m.current = &next;
  }
  m.current->state = State::kDone;
  leave_fiber(*m.current, true);
  std::abort();  // a finished fiber is never resumed
}

CUDA_EMULATOR_UNTRACED void enter_fiber(Thread& thread) {
  Scheduler& s = scheduler();
  Machine& m = machine();
  if (thread.state == State::kNew) {
    if (s.free_stacks.empty()) {
      s.all_stacks.push_back(allocate_stack());
      s.free_stacks.push_back(s.all_stacks.back());
    }
    thread.stack = s.free_stacks.back();
    s.free_stacks.pop_back();
    thread.stack_pointer = prepare_stack(thread.stack, fiber_main, thread.linear);
  }
  thread.state = State::kReady;
  m.current = &thread;
#ifdef CUDA_EMULATOR_ASAN
  __sanitizer_start_switch_fiber(&s.sanitizer_stack, thread.stack + kGuardSize, kStackSize);
#endif
  cuda_emulator_switch(&s.stack_pointer, thread.stack_pointer);
#ifdef CUDA_EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(s.sanitizer_stack, nullptr, nullptr);
#endif
  if (m.current->state == State::kDone) {  // not always `thread`: a fiber may have gone on with others
    s.free_stacks.push_back(m.current->stack);
    --s.num_live;
  }
}

void start_block() {
  Scheduler& s = scheduler();
  Machine& m = machine();
  const int num_threads = static_cast<int>(m.block.count());
  m.threads.resize(static_cast<std::size_t>(num_threads));
  s.pending.assign(static_cast<std::size_t>((num_threads + kWarpSize - 1) / kWarpSize), {});
  for (int i = 0; i < num_threads; ++i) {
    Thread& t = m.threads[static_cast<std::size_t>(i)];
    const auto linear = static_cast<unsigned>(i);
    t.state = State::kNew;
    t.linear = i, t.lane = i % kWarpSize, t.warp = i / kWarpSize;
    t.index = {linear % m.block.x, linear / m.block.x % m.block.y, linear / (m.block.x * m.block.y)};
    t.warp_epoch = 0, t.copy_group = 0;
    t.copies.clear();
  }
  s.turn.resize(m.threads.size());
  std::iota(s.turn.begin(), s.turn.end(), 0);
  if (options().order == Order::kReverse) std::reverse(s.turn.begin(), s.turn.end());
  s.num_live = num_threads;
  s.num_waiting = s.num_true = 0;
  m.barrier_epoch = 1;
  ++m.block_serial;
  m.shared_arrays.clear();
  m.shared_used = kRedZone, m.static_shared = 0;
#ifdef CUDA_EMULATOR_ASAN
  __asan_poison_memory_region(m.shared, kSharedCapacity);
#endif
  report(Progress::kBlockStarted);
}

bool run_ready_threads() {
  Scheduler& s = scheduler();
  Machine& m = machine();
  if (options().order == Order::kRandom) {
    for (std::size_t i = s.turn.size() - 1; i > 0; --i)
      std::swap(s.turn[i], s.turn[s.next_random() % (i + 1)]);
  }
  bool progressed = false;
  for (std::size_t i = 0; i < s.turn.size(); ++i) {
    Thread& thread = m.threads[static_cast<std::size_t>(s.turn[i])];
    if (thread.state != State::kNew && thread.state != State::kReady) continue;
    s.next_turn = i + 1;
    enter_fiber(thread);
    progressed = true;
    if (!m.error.empty()) break;
  }
  return progressed;
}

void release_block_barrier() {
  Scheduler& s = scheduler();
  Machine& m = machine();
  const Thread* first = nullptr;
  for (Thread& thread : m.threads) {
    if (thread.state != State::kAtBlockBarrier) continue;
    if (first == nullptr) {
      first = &thread;
    } else if (thread.place.line() != first->place.line()) {
      m.error = "divergent block barriers: " + who(*first) + " and " + who(thread);
      return;
    }
    thread.state = State::kReady;
  }
  s.last_num_true = s.num_true;
  s.num_waiting = s.num_true = 0;
  ++m.barrier_epoch;
  report(Progress::kBarrierPassed);
}

std::string describe_deadlock() {
  const Machine& m = machine();
  const Thread* stuck = nullptr;
  for (const Thread& thread : m.threads) {
    if (thread.state == State::kAtWarpCollective) {
      stuck = &thread;
      break;
    }
    if (thread.state == State::kAtBlockBarrier && stuck == nullptr) stuck = &thread;
  }
  if (stuck->state == State::kAtBlockBarrier) {
    return "deadlock: block barrier not reached by all live threads: " + who(*stuck);
  }
  std::uint32_t there = 0;
  for (const Thread& thread : m.threads) {
    if (thread.warp == stuck->warp && thread.state == State::kAtWarpCollective) there |= 1u << thread.lane;
  }
  char text[120];
  std::snprintf(text, sizeof text, "deadlock: warp collective with mask %08x but only lanes %08x there: ",
                stuck->collective.mask, there);
  return text + who(*stuck);
}

void run_block() {
  Scheduler& s = scheduler();
  Machine& m = machine();
  start_block();
  while (s.num_live > 0) {
    bool progressed = run_ready_threads();
    if (!m.error.empty()) return;
    if (s.num_live > 0 && s.num_waiting == s.num_live) {
      release_block_barrier();
      progressed = true;
    }
    if (!m.error.empty()) return;
    if (!progressed) {
      m.error = describe_deadlock();
      return;
    }
  }
  report(Progress::kBlockFinished);
}

void check_launch(Index3 grid, Index3 block, std::size_t dynamic_shared) {
  constexpr unsigned kMaxGridYZ = 65535, kMaxBlockZ = 64;
  constexpr std::uint64_t kMaxThreads = 1024, kMaxGridX = 0x7fffffff;
  constexpr std::size_t kMaxDynamicShared = 227 << 10;
  if (grid.count() == 0 || grid.x > kMaxGridX || grid.y > kMaxGridYZ || grid.z > kMaxGridYZ) {
    throw Error("launch: invalid grid " + std::to_string(grid.x) + "x" + std::to_string(grid.y) + "x" +
                std::to_string(grid.z));
  }
  if (block.count() == 0 || block.count() > kMaxThreads || block.z > kMaxBlockZ) {
    throw Error("launch: invalid block of " + std::to_string(block.count()) + " threads");
  }
  if (dynamic_shared > kMaxDynamicShared) throw Error("launch: too much dynamic shared memory");
}

}  // namespace

Options& options() {
  static Options instance;
  return instance;
}

Machine machine_state;

Statistics& statistics() {
  static Statistics instance;
  return instance;
}

void set_progress_hook(ProgressHook hook) { progress_hook = hook; }

void launch(Index3 grid, Index3 block, std::size_t dynamic_shared, const std::function<void()>& kernel) {
  check_launch(grid, block, dynamic_shared);
  Scheduler& s = scheduler();
  Machine& m = machine();
  if (m.shared == nullptr) {
    m.shared = static_cast<char*>(
        mmap(nullptr, kSharedCapacity, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  }
  m.grid = grid, m.block = block, m.dynamic_shared = dynamic_shared;
  m.host_frame = __builtin_frame_address(0);
  m.error.clear();
  s.kernel = &kernel;
  s.random = (options().seed * 0x9E3779B97F4A7C15ull) | 1;
  s.free_stacks = s.all_stacks;
  report(Progress::kLaunched);
  std::vector<std::uint32_t> blocks(grid.count());
  std::iota(blocks.begin(), blocks.end(), 0u);
  if (options().order == Order::kReverse) std::reverse(blocks.begin(), blocks.end());
  if (options().order == Order::kRandom) {
    for (std::size_t i = blocks.size() - 1; i > 0; --i)
      std::swap(blocks[i], blocks[s.next_random() % (i + 1)]);
  }
  for (const std::uint32_t b : blocks) {
    m.block_index = {b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y)};
    run_block();
    if (!m.error.empty()) break;
  }
  m.current = nullptr;
  ++statistics().launches;
  statistics().threads += grid.count() * block.count();
  statistics().static_shared = m.static_shared;
  if (!m.error.empty()) throw Error(m.error);
}

void* shared_array(const void* key, std::size_t size, std::size_t alignment, bool dynamic) {
  Machine& m = machine();
  for (const SharedArray& array : m.shared_arrays) {
    if (array.key == key) return m.shared + array.offset;
  }
  constexpr std::size_t kSpacing = 128;
  std::size_t offset = (m.shared_used + kSpacing - 1) / kSpacing * kSpacing;
  if (alignment < kSpacing) offset += alignment;  // exactly as aligned as promised, no better
  m.shared_used = offset + size + kRedZone;
  m.shared_arrays.push_back({key, offset, size});
  if (m.shared_used > kSharedCapacity) throw Error("the emulator's shared memory is exhausted");
  if (!dynamic && (m.static_shared += size) > kStaticSharedLimit)
    throw Error("static shared memory above 48 KiB");
#ifdef CUDA_EMULATOR_ASAN
  __asan_unpoison_memory_region(m.shared + offset, size);
#endif
  std::memset(m.shared + offset, 0xFF, size);  // NaN in every floating-point type
  return m.shared + offset;
}

CUDA_EMULATOR_UNTRACED void wait_at_block_barrier(std::source_location place) {
  Thread& thread = *machine().current;
  thread.place = place;
  thread.state = State::kAtBlockBarrier;
  ++scheduler().num_waiting;
  leave_fiber(thread, false);
}

int count_at_block_barrier(bool predicate, std::source_location place) {
  scheduler().num_true += predicate;
  wait_at_block_barrier(place);
  return scheduler().last_num_true;
}

CUDA_EMULATOR_UNTRACED void wait_at_collective(const Collective& collective, std::source_location place) {
  Machine& m = machine();
  Thread& thread = *m.current;
  Thread* warp = &m.threads[static_cast<std::size_t>(thread.warp * kWarpSize)];
  thread.place = place;
  thread.collective = collective;
  if ((collective.mask >> thread.lane & 1) == 0) throw Error("lane not in its own mask: " + who(thread));
  thread.state = State::kAtWarpCollective;
  auto& pending = scheduler().pending[static_cast<std::size_t>(thread.warp)];
  auto found = std::find_if(pending.begin(), pending.end(),
                            [&](const PendingCollective& p) { return (p.mask & collective.mask) != 0; });
  if (found == pending.end()) {
    pending.push_back({collective.combine, collective.mask, 0, collective.size, thread.lane});
    found = pending.end() - 1;
  } else if (found->combine != collective.combine || found->mask != collective.mask ||
             found->size != collective.size) {
    throw Error("mismatched warp collectives: " + who(thread) + " and " + who(warp[found->first_lane]));
  }
  found->arrived |= 1u << thread.lane;
  if (found->arrived != found->mask) {
    leave_fiber(thread, false);
    return;
  }
  Thread* lanes[kWarpSize] = {};
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (collective.mask >> lane & 1) lanes[lane] = warp + lane;
  }
  pending.erase(found);
  collective.combine(lanes);
  for (Thread* lane : lanes) {
    if (lane != nullptr) lane->state = State::kReady;
  }
}

std::string where(const std::source_location& place) {
  const std::string file = place.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(place.line());
}

std::string who(const Thread& thread) {
  const Machine& m = machine();
  char text[160];
  std::snprintf(text, sizeof text, "block (%u,%u,%u) thread (%u,%u,%u) at ", m.block_index.x, m.block_index.y,
                m.block_index.z, thread.index.x, thread.index.y, thread.index.z);
  return text + where(thread.place);
}

bool is_private_memory(std::uintptr_t address) {
  const Machine& m = machine();
  const auto within = [&](const void* first, std::size_t size) {
    const auto begin = reinterpret_cast<std::uintptr_t>(first);
    return address >= begin && address < begin + size;
  };
  constexpr std::size_t kHostFrames = 64 << 10;
  if (within(&m, sizeof m) || within(m.threads.data(), m.threads.size() * sizeof(Thread))) return true;
  if (within(m.current->stack, kGuardSize + kStackSize) || within(m.arguments, m.arguments_size)) return true;
  if (within(m.host_frame, kHostFrames)) return true;
  for (const char* stack : scheduler().all_stacks) {  // a collective reads its neighbours' variables
    if (within(stack, kGuardSize + kStackSize)) return true;
  }
  return false;
}

}  // namespace cuda_emulator

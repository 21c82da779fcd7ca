// SPDX-License-Identifier: Apache-2.0
#include "common/tensor_pool.h"

#include <cstdint>
#include <cstdlib>
#include <limits>
#include <list>
#include <mutex>
#include <new>

#include <pthread.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace pfnas {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

std::size_t quarter_of_memory() {
#if defined(__linux__)
  const long pages = sysconf(_SC_PHYS_PAGES), page_bytes = sysconf(_SC_PAGESIZE);
  if (pages > 0 && page_bytes > 0)
    return static_cast<std::size_t>(pages) / 4 * static_cast<std::size_t>(page_bytes);
#endif
  return std::size_t{1} << 30;
}

#if defined(__linux__)
// Mapped, not taken from the heap: what is given back then leaves the process at once.
std::size_t mapped_bytes(std::size_t num_bytes) {
  constexpr std::size_t kPage = 64 << 10;  // a multiple of every page size in use
  return (num_bytes + kPage - 1) / kPage * kPage;
}

void* allocate(std::size_t num_bytes) {
  const std::size_t wanted = mapped_bytes(num_bytes), mapped = wanted + kHugePage;
  void* begin = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (begin == MAP_FAILED) throw std::bad_alloc();
  const auto address = reinterpret_cast<std::uintptr_t>(begin);
  const std::uintptr_t aligned = (address + kHugePage - 1) / kHugePage * kHugePage;
  if (aligned > address) munmap(begin, aligned - address);
  if (const std::size_t rest = address + mapped - (aligned + wanted); rest > 0) {
    munmap(reinterpret_cast<void*>(aligned + wanted), rest);
  }
  void* data = reinterpret_cast<void*>(aligned);
  // A refusal costs speed only. The part behind the last whole huge page stays small.
  madvise(data, num_bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
  return data;
}

void deallocate(const PoolBlock& block) { munmap(block.data, mapped_bytes(block.num_bytes)); }
#else
void* allocate(std::size_t num_bytes) {
  void* data = std::aligned_alloc(kHugePage, (num_bytes + kHugePage - 1) / kHugePage * kHugePage);
  if (data == nullptr) throw std::bad_alloc();
  return data;
}

void deallocate(const PoolBlock& block) { std::free(block.data); }
#endif

class Pool {
 public:
  PoolBlock take(std::size_t num_bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = waiting_.end();
    for (auto it = waiting_.begin(); it != waiting_.end(); ++it) {
      if (it->num_bytes < num_bytes || it->num_bytes - num_bytes > num_bytes / 4) continue;
      if (best == waiting_.end() || it->num_bytes < best->num_bytes) best = it;
    }
    PoolBlock block{nullptr, num_bytes};
    if (best != waiting_.end()) {
      block = *best;
      use_.waiting_bytes -= block.num_bytes;
      waiting_.erase(best);
      use_.in_use_bytes += block.num_bytes;
    } else {
      use_.in_use_bytes += num_bytes;
      if (use_.in_use_bytes > peak_bytes_) peak_bytes_ = use_.in_use_bytes;
      evict();
      try {
        block.data = allocate(num_bytes);
      } catch (...) {
        use_.in_use_bytes -= num_bytes;
        throw;
      }
    }
    if (use_.in_use_bytes > peak_bytes_) peak_bytes_ = use_.in_use_bytes;
    return block;
  }

  void give_back(const PoolBlock& block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    use_.in_use_bytes -= block.num_bytes;
    use_.waiting_bytes += block.num_bytes;
    waiting_.push_back(block);
    evict();
  }

  PoolUse use() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return use_;
  }

  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (!waiting_.empty()) drop_oldest();
    peak_bytes_ = use_.in_use_bytes;
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

  void poison() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const PoolBlock& block : waiting_) {
      auto* data = static_cast<float*>(block.data);
      for (std::size_t i = 0; i < block.num_bytes / sizeof(float); ++i) {
        data[i] = std::numeric_limits<float>::quiet_NaN();
      }
    }
  }

 private:
  void drop_oldest() {
    const PoolBlock block = waiting_.front();
    waiting_.pop_front();
    use_.waiting_bytes -= block.num_bytes;
    deallocate(block);
  }

  // Sizes that no path asks for any more are the oldest, and go first.
  void evict() {
    static const std::size_t max_waiting_bytes = quarter_of_memory();
    while (!waiting_.empty() && (use_.waiting_bytes > max_waiting_bytes ||
                                 use_.in_use_bytes + use_.waiting_bytes > peak_bytes_ / 4 * 5)) {
      drop_oldest();
    }
  }

  std::mutex mutex_;
  std::list<PoolBlock> waiting_;  // oldest first
  PoolUse use_{};
  std::size_t peak_bytes_ = 0;  // of in_use_bytes, since the last release
};

// Never destroyed: tensors outlive static objects when the interpreter ends.
Pool& pool() {
  static Pool* instance = new Pool;
  // A child made by fork() while another thread holds the lock would wait for ever.
  static const int registered =
      pthread_atfork([] { pool().lock(); }, [] { pool().unlock(); }, [] { pool().unlock(); });
  static_cast<void>(registered);
  return *instance;
}

}  // namespace

PoolBlock take_from_pool(std::size_t num_bytes) { return pool().take(num_bytes); }
void give_back_to_pool(const PoolBlock& block) { pool().give_back(block); }
PoolUse pool_use() { return pool().use(); }
void release_pool() { pool().release(); }
void poison_pool() { pool().poison(); }

}  // namespace pfnas

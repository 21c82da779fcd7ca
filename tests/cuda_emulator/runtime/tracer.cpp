// SPDX-License-Identifier: Apache-2.0
// Kernels of a traced build are compiled with -fsanitize=thread, but linked to the hooks at the end of this
// file instead of libtsan (which knows nothing of barriers and fibers). So every load and store arrives here.
//
//   access -> check_bounds | check_races (shadow per byte) | count_sectors (per buffer and block) |
//   record_request barrier or end of block -> flush_requests: sectors or wavefronts of each warp's requests,
//   per source line
#include "tracer.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <map>
#include <set>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "device_emulator.h"
#include "fiber.h"
#include "scheduler.h"
#include "symbols.h"

namespace cuda_emulator {
namespace {

constexpr std::uint64_t kSectorBytes = 32;
constexpr int kBanks = 32, kBankBytes = 4;

using Site = const void*;  // a return address

// Who touched a byte last, and when.
struct Touch {
  std::uint64_t block = 0;  // serial; 0: nobody
  int thread = 0;
  std::uint32_t barrier_epoch = 0, warp_epoch = 0;
  bool atomic = false;
  bool by_others = false;  // of reads: another thread read it in the same epoch
  Site site = nullptr;
};

struct Shadow {
  Touch write, read;
};

struct Buffer {
  std::string name;
  std::uintptr_t begin = 0, end = 0;
  std::vector<Shadow> bytes;
  std::vector<std::uint64_t> read_by, written_by;         // per sector: serial of the last block
  std::uint64_t read_footprint = 0, write_footprint = 0;  // sectors
  std::uint64_t block_reads = 0, block_writes = 0;        // sum over blocks of their distinct sectors
};

struct SiteKey {
  Site site;
  bool write, shared;
  int size;
  auto operator<=>(const SiteKey&) const = default;
};

struct SiteCounts {
  std::uint64_t requests = 0, lanes = 0;
  std::uint64_t units = 0, ideal_units = 0;  // sectors of global memory, wavefronts of shared memory
};

struct Request {
  std::uint32_t lanes = 0;
  std::array<std::uintptr_t, kWarpSize> address;
};

struct Race {
  Site site, other;
  bool write, other_write;
  std::string buffer;
  auto operator<=>(const Race&) const = default;
};

struct Tracer {
  bool active = false;
  std::vector<Buffer> buffers;
  std::vector<Shadow> shared;  // [kSharedCapacity]
  std::map<SiteKey, int> site_numbers;
  std::vector<std::pair<SiteKey, SiteCounts>> sites;
  std::vector<std::vector<std::uint32_t>> occurrences;          // [thread][site]: times passed in this block
  std::map<std::tuple<int, int, std::uint32_t>, Request> open;  // by warp, site, occurrence
  std::map<Race, std::uint64_t> races;
  std::map<Site, std::uint64_t> out_of_bounds;
  std::uint64_t accesses = 0;
};
Tracer tracer;

bool is_ordered(const Touch& before, const Touch& now) {
  if (before.block == 0 || (before.atomic && now.atomic)) return true;
  if (before.block != now.block) return false;  // blocks of one launch are never ordered
  if (before.thread == now.thread && !before.by_others) return true;
  if (before.barrier_epoch < now.barrier_epoch) return true;
  return before.thread / kWarpSize == now.thread / kWarpSize && before.warp_epoch < now.warp_epoch;
}

void check_races(Shadow& byte, const Touch& now, bool write, bool shared, const std::string& buffer) {
  if (shared) {  // a new block's shared memory is fresh
    if (byte.write.block != now.block) byte.write = {};
    if (byte.read.block != now.block) byte.read = {};
  }
  if (!is_ordered(byte.write, now)) {
    ++tracer.races[{now.site, byte.write.site, write, true, buffer}];
  } else if (write && !is_ordered(byte.read, now)) {
    ++tracer.races[{now.site, byte.read.site, true, false, buffer}];
  }
  if (write) {
    byte.write = now;
    return;
  }
  const bool same_epoch = byte.read.block == now.block && byte.read.barrier_epoch == now.barrier_epoch;
  const bool others = same_epoch && (byte.read.thread != now.thread || byte.read.by_others);
  byte.read = now;
  byte.read.by_others = others;
}

void count_sectors(Buffer& buffer, std::uintptr_t address, int size, bool write, std::uint64_t block) {
  auto& touched_by = write ? buffer.written_by : buffer.read_by;
  const std::uint64_t first = (address - buffer.begin) / kSectorBytes;
  const std::uint64_t last = (address - buffer.begin + static_cast<std::uint64_t>(size) - 1) / kSectorBytes;
  for (std::uint64_t sector = first; sector <= last; ++sector) {
    if (touched_by[sector] == block) continue;
    if (touched_by[sector] == 0) ++(write ? buffer.write_footprint : buffer.read_footprint);
    touched_by[sector] = block;
    ++(write ? buffer.block_writes : buffer.block_reads);
  }
}

void record_request(const SiteKey& key, const Thread& thread, std::uintptr_t address) {
  const auto [found, fresh] = tracer.site_numbers.try_emplace(key, static_cast<int>(tracer.sites.size()));
  if (fresh) tracer.sites.push_back({key, {}});
  const auto site = static_cast<std::size_t>(found->second);
  const auto number = static_cast<std::size_t>(thread.linear);
  if (tracer.occurrences.size() <= number) tracer.occurrences.resize(number + 1);
  auto& passed = tracer.occurrences[number];
  if (passed.size() <= site) passed.resize(site + 1);
  Request& request = tracer.open[{thread.warp, found->second, passed[site]++}];
  request.lanes |= 1u << thread.lane;
  request.address[static_cast<std::size_t>(thread.lane)] = address;
}

void count_global(const Request& request, int size, SiteCounts& counts) {
  std::set<std::uintptr_t> sectors, distinct;
  for (std::size_t lane = 0; lane < kWarpSize; ++lane) {
    if ((request.lanes >> lane & 1) == 0) continue;
    const std::uintptr_t address = request.address[lane];
    sectors.insert(address / kSectorBytes);
    sectors.insert((address + static_cast<std::uintptr_t>(size) - 1) / kSectorBytes);
    distinct.insert(address);
  }
  counts.units += sectors.size();
  counts.ideal_units +=
      (distinct.size() * static_cast<std::uint64_t>(size) + kSectorBytes - 1) / kSectorBytes;
}

// 8- and 16-byte accesses are served half and quarter warps at a time.
void count_shared(const Request& request, int size, SiteCounts& counts) {
  const std::size_t group = size <= 4 ? 32 : size == 8 ? 16 : 8;
  for (std::size_t first = 0; first < kWarpSize; first += group) {
    std::set<std::uintptr_t> words;
    for (std::size_t lane = first; lane < first + group; ++lane) {
      if ((request.lanes >> lane & 1) == 0) continue;
      for (int b = 0; b < size; b += kBankBytes) {
        words.insert((request.address[lane] + static_cast<std::uintptr_t>(b)) / kBankBytes);
      }
    }
    if (words.empty()) continue;
    std::array<std::uint64_t, kBanks> per_bank{};
    for (const std::uintptr_t word : words) ++per_bank[word % kBanks];
    counts.units += *std::max_element(per_bank.begin(), per_bank.end());
    counts.ideal_units += (words.size() + kBanks - 1) / kBanks;
  }
}

void flush_requests() {
  for (const auto& [where, request] : tracer.open) {
    auto& [key, counts] = tracer.sites[static_cast<std::size_t>(std::get<1>(where))];
    ++counts.requests;
    counts.lanes += static_cast<std::uint64_t>(__builtin_popcount(request.lanes));
    key.shared ? count_shared(request, key.size, counts) : count_global(request, key.size, counts);
  }
  tracer.open.clear();
}

void on_progress(Progress progress) {
  if (!tracer.active) return;
  if (progress == Progress::kLaunched) {  // launches on one stream are ordered
    for (Buffer& buffer : tracer.buffers) std::fill(buffer.bytes.begin(), buffer.bytes.end(), Shadow{});
  } else if (progress != Progress::kBlockStarted) {
    flush_requests();
    if (progress == Progress::kBlockFinished) tracer.occurrences.clear();
  }
}

bool in_shared_array(std::uintptr_t offset, int size) {
  for (const SharedArray& array : machine().shared_arrays) {
    if (offset >= array.offset && offset + static_cast<std::size_t>(size) <= array.offset + array.size)
      return true;
  }
  return false;
}

void access(const void* pointer, int size, bool write, bool atomic, Site site) {
  const Machine& m = machine();
  if (!tracer.active || m.current == nullptr || m.current->state != State::kReady) return;
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  const Thread& thread = *m.current;
  const Touch now{m.block_serial, thread.linear, m.barrier_epoch, thread.warp_epoch, atomic, false, site};
  const auto shared_begin = reinterpret_cast<std::uintptr_t>(m.shared);
  const std::uintptr_t offset = address - shared_begin;  // wraps below it
  const bool shared = offset < kSharedCapacity;
  if (shared) {
    if (!in_shared_array(offset, size)) {
      ++tracer.out_of_bounds[site];
      return;
    }
    if (tracer.shared.empty()) tracer.shared.resize(kSharedCapacity);
    for (int b = 0; b < size; ++b) {
      check_races(tracer.shared[offset + static_cast<std::size_t>(b)], now, write, true, "shared memory");
    }
  } else {
    const auto buffer = std::find_if(
        tracer.buffers.begin(), tracer.buffers.end(),
        [&](const Buffer& candidate) { return address >= candidate.begin && address < candidate.end; });
    if (buffer == tracer.buffers.end()) {
      Dl_info image{};
      if (!is_private_memory(address) && dladdr(pointer, &image) == 0) ++tracer.out_of_bounds[site];
      return;
    }
    if (address + static_cast<std::uintptr_t>(size) > buffer->end) {
      ++tracer.out_of_bounds[site];
      return;
    }
    for (int b = 0; b < size; ++b) {
      Shadow& byte = buffer->bytes[address - buffer->begin + static_cast<std::size_t>(b)];
      check_races(byte, now, write, false, buffer->name);
    }
    count_sectors(*buffer, address, size, write, m.block_serial);
  }
  ++tracer.accesses;
  record_request({site, write, shared, size}, thread, address);
}

std::string json_site(const SiteKey& key, const SiteCounts& counts, const std::string& place) {
  char text[512];
  std::snprintf(text, sizeof text,
                R"({"place":"%s","space":"%s","kind":"%s","size":%d,"requests":%llu,"lanes":%llu,)"
                R"("units":%llu,"ideal_units":%llu})",
                place.c_str(), key.shared ? "shared" : "global", key.write ? "store" : "load", key.size,
                static_cast<unsigned long long>(counts.requests),
                static_cast<unsigned long long>(counts.lanes), static_cast<unsigned long long>(counts.units),
                static_cast<unsigned long long>(counts.ideal_units));
  return text;
}

template <class Range, class F>
std::string json_list(const Range& range, F&& format) {
  std::string text;
  for (const auto& element : range) text += (text.empty() ? "" : ",") + format(element);
  return "[" + text + "]";
}

std::string json_buffer(const Buffer& buffer) {
  char text[400];
  std::snprintf(
      text, sizeof text,
      R"({"name":"%s","read_footprint":%llu,"write_footprint":%llu,"block_reads":%llu,"block_writes":%llu})",
      buffer.name.c_str(), static_cast<unsigned long long>(buffer.read_footprint),
      static_cast<unsigned long long>(buffer.write_footprint),
      static_cast<unsigned long long>(buffer.block_reads),
      static_cast<unsigned long long>(buffer.block_writes));
  return text;
}

}  // namespace

void note_access(const void* address, int size, bool write, const void* caller) {
  access(address, size, write, false, caller);
}

void trace_begin() {
  tracer = Tracer{};
  tracer.active = true;
  set_progress_hook(on_progress);
}

void trace_buffer(const std::string& name, std::uintptr_t address, std::uint64_t size) {
  Buffer buffer;
  buffer.name = name;
  buffer.begin = address, buffer.end = address + size;
  buffer.bytes.resize(size);
  buffer.read_by.resize(size / kSectorBytes + 2);
  buffer.written_by.resize(size / kSectorBytes + 2);
  tracer.buffers.push_back(std::move(buffer));
}

std::string trace_end() {
  tracer.active = false;
  std::vector<const void*> addresses;
  for (const auto& [key, counts] : tracer.sites) addresses.push_back(key.site);
  for (const auto& [race, count] : tracer.races) addresses.insert(addresses.end(), {race.site, race.other});
  for (const auto& [site, count] : tracer.out_of_bounds) addresses.push_back(site);
  const auto places = source_places(addresses);
  const auto place = [&](Site site) { return places.at(site); };
  return R"({"accesses":)" + std::to_string(tracer.accesses) + R"(,"sites":)" +
         json_list(tracer.sites,
                   [&](const auto& s) { return json_site(s.first, s.second, place(s.first.site)); }) +
         R"(,"races":)" +
         json_list(tracer.races,
                   [&](const auto& entry) {
                     const Race& race = entry.first;
                     return "\"" + std::string(race.write ? "write" : "read") + " of " + race.buffer +
                            " at " + place(race.site) + " and " + (race.other_write ? "write" : "read") +
                            " at " + place(race.other) + " by another thread\"";
                   }) +
         R"(,"out_of_bounds":)" +
         json_list(tracer.out_of_bounds,
                   [&](const auto& entry) { return "\"" + place(entry.first) + "\""; }) +
         R"(,"buffers":)" + json_list(tracer.buffers, json_buffer) + "}";
}

// What compiled kernels call.
extern "C" {
#define SITE __builtin_return_address(0)
#define ACCESSES(size)                                                               \
  void __tsan_read##size(void* a) { access(a, size, false, false, SITE); }           \
  void __tsan_write##size(void* a) { access(a, size, true, false, SITE); }           \
  void __tsan_unaligned_read##size(void* a) { access(a, size, false, false, SITE); } \
  void __tsan_unaligned_write##size(void* a) { access(a, size, true, false, SITE); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
#undef ACCESSES
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* a, unsigned long size) { access(a, static_cast<int>(size), false, false, SITE); }
void __tsan_write_range(void* a, unsigned long size) { access(a, static_cast<int>(size), true, false, SITE); }
void* __tsan_memcpy(void* target, const void* source, std::size_t size) {
  access(source, static_cast<int>(size), false, false, SITE);
  access(target, static_cast<int>(size), true, false, SITE);
  return std::memcpy(target, source, size);
}
void* __tsan_memset(void* target, int value, std::size_t size) {
  access(target, static_cast<int>(size), true, false, SITE);
  return std::memset(target, value, size);
}
std::uint32_t __tsan_atomic32_fetch_add(volatile std::uint32_t* target, std::uint32_t value, int) {
  access(const_cast<std::uint32_t*>(target), 4, true, true, SITE);
  return __atomic_fetch_add(target, value, __ATOMIC_RELAXED);
}
char __tsan_atomic8_load(const volatile char* source, int) {
  return __atomic_load_n(source, __ATOMIC_ACQUIRE);
}
#undef SITE
}

}  // namespace cuda_emulator

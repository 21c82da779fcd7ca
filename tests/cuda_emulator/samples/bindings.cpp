// SPDX-License-Identifier: Apache-2.0
// The samples take addresses: their callers are tests that own the memory.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "samples.h"

namespace {

float* at(std::uintptr_t address) { return reinterpret_cast<float*>(address); }

}  // namespace

void register_kernels(pybind11::module_& m);

void register_kernels(pybind11::module_& m) {
  using samples::Bug;
  m.def("tile_multiply", [](std::uintptr_t a, std::uintptr_t b, std::uintptr_t c, int n, int bug) {
    samples::tile_multiply({at(a), at(b), at(c), n, static_cast<Bug>(bug)});
  });
  m.def("block_sum",
        [](std::uintptr_t x, std::uintptr_t partial, std::uintptr_t total, int count, int blocks, int bug) {
          samples::block_sum({at(x), at(partial), at(total), count, blocks, static_cast<Bug>(bug)});
        });
  m.def("staged_scale", [](std::uintptr_t x, std::uintptr_t y, int count, int bug) {
    samples::staged_scale({at(x), at(y), count, static_cast<Bug>(bug)});
  });
}

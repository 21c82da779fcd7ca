// SPDX-License-Identifier: Apache-2.0
// The test-only extension module: the bindings of the CUDA ops over emulated kernels, and the emulator's
// controls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "ptx_registry.h"
#include "scheduler.h"
#include "tracer.h"

namespace py = pybind11;

void register_kernels(py::module_& m);  // what a build is about: ops.cpp, or the samples with planted bugs

namespace {

void set_order(const std::string& order, std::uint64_t seed) {
  auto& options = cuda_emulator::options();
  options.seed = seed;
  if (order == "forward") {
    options.order = cuda_emulator::Order::kForward;
  } else if (order == "reverse") {
    options.order = cuda_emulator::Order::kReverse;
  } else if (order == "random") {
    options.order = cuda_emulator::Order::kRandom;
  } else {
    throw py::value_error("order: expected forward, reverse or random, got " + order);
  }
}

py::dict statistics() {
  const auto& s = cuda_emulator::statistics();
  py::dict result;
  result["launches"] = s.launches;
  result["threads"] = s.threads;
  result["static_shared"] = s.static_shared;
  return result;
}

}  // namespace

PYBIND11_MODULE(PFNAS_MODULE_NAME, m) {
  py::register_local_exception<cuda_emulator::Error>(m, "EmulatorError", PyExc_RuntimeError);
  m.def("set_order", &set_order, py::arg("order"), py::arg("seed") = 1);
  m.def("set_compute_capability", [](int value) { cuda_emulator::options().compute_capability = value; });
  m.def("statistics", &statistics);
  m.def("trace_begin", &cuda_emulator::trace_begin);
  m.def("trace_buffer", &cuda_emulator::trace_buffer, py::arg("name"), py::arg("address"), py::arg("size"));
  m.def("trace_end", &cuda_emulator::trace_end);
  m.def("translated_kernels", &cuda_emulator::translated_kernels);
  m.def("instruction_counts", &cuda_emulator::instruction_counts);
  m.attr("cuda_built") = true;
  m.attr("compiler") = "emulator";
  register_kernels(m);
}

// SPDX-License-Identifier: Apache-2.0
// Additive costs of a population; the tables are prepared by pfnas_fast/ops/path_cost.py.
#include <pybind11/pybind11.h>

#include "bindings/array_arg.h"
#include "bindings/ops.h"
#include "common/isa.h"
#include "kernels/path_cost/params.h"

namespace py = pybind11;

namespace pfnas {
namespace {

constexpr const char* kOp = "path_cost";

bool cpu_has_byte_lookups() {
#ifdef PFNAS_HAS_AVX512
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
#else
  return false;
#endif
}

// codes: uint8 [n, num_slots], any strides, checked. steps: uint32 [R, B, 16] with constant_steps [R], or
// table: float64 [R, B, num_codes] with constant [R]. cost: float32 or float64 [n].
void path_cost(py::handle codes, py::handle table, py::handle constant, double step, double unit,
               py::handle cost, bool allow_vnni) {
  const TensorView view = view_tensor(table, kOp, "table");
  PFNAS_CHECK(view.is_cpu() && view.is_contiguous() && view.ndim == 3);
  PathCostParams p;
  p.num_resolutions = static_cast<int>(view.shape[0]);
  p.num_slots = static_cast<int>(view.shape[1]) + 1;
  p.num_codes = static_cast<int>(view.shape[2]);
  if (has_dtype<std::uint32_t>(view)) {
    PFNAS_CHECK(p.num_codes == kCostCodes);
    p.steps = static_cast<const std::uint32_t*>(view.data);
    p.constant_steps = array_arg<std::uint32_t>(constant, kOp, "constant", {p.num_resolutions});
  } else {
    PFNAS_CHECK(has_dtype<double>(view));
    p.table = static_cast<const double*>(view.data);
    p.constant = array_arg<double>(constant, kOp, "constant", {p.num_resolutions});
  }
  p.step = step;
  p.unit = unit;
  p.use_vnni = allow_vnni && cpu_has_byte_lookups();
  const CodesArg paths = codes_arg(codes, kOp, p.num_slots);
  p.codes = paths.data;
  p.num_paths = paths.num_paths;
  p.path_stride = paths.path_stride;
  p.slot_stride = paths.slot_stride;
  if (has_dtype<float>(view_tensor(cost, kOp, "cost"))) {
    p.cost_f32 = array_arg<float>(cost, kOp, "cost", {p.num_paths});
  } else {
    p.cost_f64 = array_arg<double>(cost, kOp, "cost", {p.num_paths});
  }
  if (p.num_paths == 0) return;
  const Isa isa = active_isa();
  const py::gil_scoped_release released;
#ifdef PFNAS_HAS_AVX512
  if (isa == Isa::kAvx512) return avx512::path_cost(p);
#endif
#ifdef PFNAS_HAS_AVX2
  if (isa == Isa::kAvx2) return avx2::path_cost(p);
#endif
  PFNAS_CHECK(isa == Isa::kPortable);
  portable::path_cost(p);
}

// codes: uint8 [n, num_slots], any strides. low, high: uint8 [num_slots].
void code_range(py::handle codes, py::handle low, py::handle high) {
  const TensorView view = view_tensor(codes, kOp, "codes");
  PFNAS_CHECK(view.ndim == 2);
  const CodesArg paths = codes_arg(codes, kOp, static_cast<int>(view.shape[1]));
  CodeRangeParams p;
  p.num_slots = static_cast<int>(view.shape[1]);
  p.codes = paths.data;
  p.num_paths = paths.num_paths;
  p.path_stride = paths.path_stride;
  p.slot_stride = paths.slot_stride;
  p.low = array_arg<std::uint8_t>(low, kOp, "low", {p.num_slots});
  p.high = array_arg<std::uint8_t>(high, kOp, "high", {p.num_slots});
  const Isa isa = active_isa();
  const py::gil_scoped_release released;
#ifdef PFNAS_HAS_AVX512
  if (isa == Isa::kAvx512) return avx512::code_range(p);
#endif
#ifdef PFNAS_HAS_AVX2
  if (isa == Isa::kAvx2) return avx2::code_range(p);
#endif
  PFNAS_CHECK(isa == Isa::kPortable);
  portable::code_range(p);
}

}  // namespace

void register_path_cost(py::module_& m) {
  m.def("path_cost", &path_cost);
  m.def("code_range", &code_range);
}

}  // namespace pfnas

// SPDX-License-Identifier: Apache-2.0
// Scores in 8-bit integers; the tables are quantised by pfnas_fast/ops/path_score_int8.py.
#include <pybind11/pybind11.h>

#include "bindings/array_arg.h"
#include "bindings/ops.h"
#include "bindings/path_score.h"
#include "common/isa.h"

namespace py = pybind11;

namespace pfnas {

Int8ScoreKernel select_int8_score_kernel(Isa isa) {
#ifdef PFNAS_HAS_AVX512
  if (isa == Isa::kAvx512) return avx512::path_score_int8;
#endif
#ifdef PFNAS_HAS_AVX2
  if (isa == Isa::kAvx2) return avx2::path_score_int8;
#endif
  PFNAS_CHECK(isa == Isa::kPortable);
  return portable::path_score_int8;
}

bool cpu_has_vnni() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

namespace {

constexpr const char* kOp = "path_score_int8";

Int8ModelHolder make_model(const py::dict& f) {
  Int8ModelHolder holder;
  holder.tensors = f;
  Int8Model& m = holder.model;
  m.num_slots = f["num_slots"].cast<int>();
  m.num_lookups = f["num_lookups"].cast<int>();
  m.num_rows = f["num_rows"].cast<std::int64_t>();
  m.width = f["width"].cast<int>();
  m.out_width = f["out_width"].cast<int>();
  PFNAS_CHECK(m.num_slots >= 1 && m.num_slots <= kMaxScoreSlots);
  PFNAS_CHECK(m.width % kInt8Columns == 0 && m.out_width % 64 == 0);
  m.lookups = reinterpret_cast<const ScoreLookup*>(
      array_arg<std::int32_t>(f["lookups"], kOp, "lookups", {m.num_lookups, 4}));
  m.table =
      array_arg<std::int16_t>(f["table"], kOp, "table", {m.width / kInt8Columns, m.num_rows, kInt8Columns});
  m.start = array_arg<std::int16_t>(f["start"], kOp, "start", {m.width});
  m.budget = array_arg<std::int16_t>(f["budget"], kOp, "budget", {m.width});
  m.z_middle = f["z_middle"].cast<float>();
  m.z_scale = f["z_scale"].cast<float>();
  m.needs_budget = f["needs_budget"].cast<bool>();
  m.weights = array_arg<std::int8_t>(f["weights"], kOp, "weights", {m.out_width / 64, m.width / 4, 64, 4});
  m.scale = array_arg<float>(f["scale"], kOp, "scale", {m.out_width});
  m.bias = array_arg<float>(f["bias"], kOp, "bias", {m.out_width});
  m.head = array_arg<float>(f["head"], kOp, "head", {m.out_width});
  m.linear = optional_array_arg<float>(f["linear"], kOp, "linear", {m.num_rows});
  m.linear_offset = f["linear_offset"].cast<float>();
  m.linear_budget = f["linear_budget"].cast<float>();
  return holder;
}

void path_score_int8(const Int8ModelHolder& holder, py::handle codes, py::handle z, py::handle scores,
                     bool allow_vnni) {
  Int8ScoreParams p;
  p.model = holder.model;
  p.use_vnni = allow_vnni && cpu_has_vnni();
  if (!fill_scored_paths(p, kOp, p.model.num_slots, p.model.needs_budget, codes, z, scores)) return;
  const Int8ScoreKernel kernel = select_int8_score_kernel(active_isa());
  const py::gil_scoped_release released;
  kernel(p);
}

}  // namespace

void register_path_score_int8(py::module_& m) {
  py::class_<Int8ModelHolder>(m, "Int8Model").def(py::init(&make_model));
  m.def("path_score_int8", &path_score_int8);
  m.def("cpu_has_vnni", &cpu_has_vnni);
}

}  // namespace pfnas

// SPDX-License-Identifier: Apache-2.0
// Scores of many paths; the tables are folded by pfnas_fast/ops/path_score.py.
#include "bindings/path_score.h"

#include <pybind11/pybind11.h>

#include <string>

#include "bindings/array_arg.h"
#include "bindings/ops.h"
#include "common/isa.h"

namespace py = pybind11;

namespace pfnas {

PathScoreKernel select_path_score_kernel(Isa isa) {
#ifdef PFNAS_HAS_AVX512
  if (isa == Isa::kAvx512) return avx512::path_score;
#endif
#ifdef PFNAS_HAS_AVX2
  if (isa == Isa::kAvx2) return avx2::path_score;
#endif
  PFNAS_CHECK(isa == Isa::kPortable);
  return portable::path_score;
}

bool fill_scored_paths(ScoredPaths& p, const char* op, int num_slots, bool needs_budget, py::handle codes,
                       py::handle z, py::handle scores) {
  const CodesArg paths = codes_arg(codes, op, num_slots);
  p.codes = paths.data;
  p.num_paths = paths.num_paths;
  p.path_stride = paths.path_stride;
  p.slot_stride = paths.slot_stride;
  if (p.num_paths == 0) return false;  // empty tensors may have null pointers
  p.z = optional_array_arg<float>(z, op, "z", {p.num_paths});
  PFNAS_CHECK(p.z != nullptr || !needs_budget);
  p.scores = array_arg<float>(scores, op, "scores", {p.num_paths});
  return true;
}

namespace {

constexpr const char* kOp = "path_score";

py::object field(const py::dict& fields, const char* name) {
  return fields.contains(name) ? py::object(fields[name]) : py::object(py::none());
}

void set_networks(PathScoreModel& m, const py::dict& f) {
  const auto widths = f["widths"].cast<py::tuple>();
  m.num_networks = f["num_networks"].cast<int>();
  m.num_dense = static_cast<int>(widths.size()) - 1;
  PFNAS_CHECK(m.num_dense >= 0 && m.num_dense <= kMaxDenseLayers);
  for (int i = 0; i <= m.num_dense; ++i) m.widths[i] = widths[static_cast<std::size_t>(i)].cast<int>();
  for (int i = 0; i < m.num_dense; ++i) {
    const int out = PathScoreModel::padded(m.widths[i + 1]);
    const std::string dense = "dense_" + std::to_string(i), bias = "bias_" + std::to_string(i);
    m.dense[i] = array_arg<float>(f[dense.c_str()], kOp, "dense",
                                  {m.num_networks, out / kScorePanel, m.widths[i], kScorePanel});
    m.bias[i] = array_arg<float>(f[bias.c_str()], kOp, "bias", {m.num_networks, out});
  }
  m.head = array_arg<float>(f["head"], kOp, "head",
                            {m.num_networks, PathScoreModel::padded(m.widths[m.num_dense])});
}

ScoreModelHolder make_model(const py::dict& f) {
  ScoreModelHolder holder;
  holder.tensors = f;
  PathScoreModel& m = holder.model;
  m.num_slots = f["num_slots"].cast<int>();
  m.num_lookups = f["num_lookups"].cast<int>();
  m.num_rows = f["num_rows"].cast<std::int64_t>();
  const std::int64_t rows = m.num_rows;
  // [num_lookups, 4] int32 is an array of ScoreLookup.
  static_assert(sizeof(ScoreLookup) == 4 * sizeof(std::int32_t));
  m.lookups = reinterpret_cast<const ScoreLookup*>(
      array_arg<std::int32_t>(f["lookups"], kOp, "lookups", {m.num_lookups, 4}));
  if (!field(f, "num_networks").is_none()) set_networks(m, f);
  if (!field(f, "num_kernels").is_none()) {
    m.num_kernels = f["num_kernels"].cast<int>();
    m.kernel_width = f["kernel_width"].cast<int>();
    PFNAS_CHECK(m.kernel_width % kScoreColumns == 0);
    m.kernel_head = array_arg<float>(f["kernel_head"], kOp, "kernel_head", {m.num_kernels, m.kernel_width});
  }
  m.num_members = m.num_networks + m.num_kernels;
  m.width = (m.num_networks > 0 ? m.num_networks * m.first_width() : 0) +
            static_cast<std::int64_t>(m.num_kernels) * m.kernel_width;
  m.block = f["block"].cast<int>();
  // A wide block holds whole networks only: no kernels, and networks of whole blocks.
  PFNAS_CHECK(m.block == kScoreColumns ||
              (m.block == 2 * kScoreColumns && m.num_kernels == 0 && m.first_width() % m.block == 0));
  m.table = array_arg<float>(f["table"], kOp, "table", {m.width / m.block, rows, m.block});
  m.offset = array_arg<float>(f["offset"], kOp, "offset", {m.width});
  m.budget = optional_array_arg<float>(field(f, "budget"), kOp, "budget", {m.width});
  m.budget_square = optional_array_arg<float>(field(f, "budget_square"), kOp, "budget_square", {m.width});
  PFNAS_CHECK(m.budget_square == nullptr || m.budget != nullptr);
  if (!field(f, "linear").is_none()) {
    m.linear_width = (m.num_members + 15) / 16 * 16;
    m.linear = array_arg<float>(f["linear"], kOp, "linear", {rows, m.linear_width});
    m.linear_offset = array_arg<float>(f["linear_offset"], kOp, "linear_offset", {m.linear_width});
    m.linear_budget =
        optional_array_arg<float>(field(f, "linear_budget"), kOp, "linear_budget", {m.linear_width});
  }
  m.weights = array_arg<float>(f["weights"], kOp, "weights", {m.num_members});
  if (!field(f, "curve").is_none()) {
    m.curve_size = f["curve_size"].cast<int>();
    m.curve_low = f["curve_low"].cast<float>();
    m.curve_per_unit = f["curve_per_unit"].cast<float>();
    m.curve = array_arg<float>(f["curve"], kOp, "curve", {m.curve_size});
    PFNAS_CHECK(m.curve_size >= 2);
  }
  return holder;
}

// members: float32 [num_members, n] or None.
void path_score(const ScoreModelHolder& holder, py::handle codes, py::handle z, py::handle scores,
                py::handle members) {
  PathScoreParams p;
  p.model = holder.model;
  if (!fill_scored_paths(p, kOp, p.model.num_slots, p.model.needs_budget(), codes, z, scores)) return;
  p.members = optional_array_arg<float>(members, kOp, "members", {p.model.num_members, p.num_paths});
  const PathScoreKernel kernel = select_path_score_kernel(active_isa());
  const py::gil_scoped_release released;
  kernel(p);
}

}  // namespace

void register_path_score(py::module_& m) {
  py::class_<ScoreModelHolder>(m, "PathScoreModel").def(py::init(&make_model));
  m.def("path_score", &path_score);
}

}  // namespace pfnas

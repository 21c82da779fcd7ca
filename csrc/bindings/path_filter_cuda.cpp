// SPDX-License-Identifier: Apache-2.0
// Checks what pfnas_fast/ops/path_filter.py hands over, by name, fills Params, launches on torch's current
// stream.
#include <pybind11/pybind11.h>

#include <initializer_list>
#include <string>

#include "bindings/array_arg.h"
#include "bindings/cuda_arg.h"
#include "bindings/ops.h"
#include "common/check.h"
#include "kernels/path_filter/cuda_params.h"

namespace py = pybind11;

namespace pfnas {
namespace {

using cuda::CallArguments;
using Params = cuda::PathFilterParams;
constexpr const char* kOp = "path_filter";

// Tensors of one call by name, on one device.
class Fields {
 public:
  Fields(const py::dict& fields, const CallArguments& call) : fields_(fields), call_(call) {}

  template <class T>
  T number(const char* name) const {
    return fields_[name].cast<T>();
  }
  // Contiguous, of exactly this shape; null where absent. A size of -1 is any.
  template <class T>
  T* array(const char* name, std::initializer_list<std::int64_t> shape) const {
    if (!fields_.contains(name)) return nullptr;
    const TensorView view = call_.view(fields_[name], name);
    PFNAS_CHECK(view.is_contiguous() && has_dtype<T>(view) && view.ndim == static_cast<int>(shape.size()));
    int d = 0;
    for (const std::int64_t size : shape) {
      PFNAS_CHECK(size < 0 || view.shape[d] == size);
      ++d;
    }
    return static_cast<T*>(view.data);
  }
  template <class T>
  T* needed(const char* name, std::initializer_list<std::int64_t> shape) const {
    T* const data = array<T>(name, shape);
    PFNAS_CHECK(data != nullptr);
    return data;
  }

 private:
  const py::dict& fields_;
  const CallArguments& call_;
};

void set_networks(PathScoreModel& m, const Fields& f, const py::tuple& widths) {
  m.num_networks = f.number<int>("num_networks");
  m.num_dense = static_cast<int>(widths.size()) - 1;
  PFNAS_CHECK(m.num_dense >= 0 && m.num_dense <= kMaxDenseLayers);
  for (int i = 0; i <= m.num_dense; ++i) m.widths[i] = widths[static_cast<std::size_t>(i)].cast<int>();
  PFNAS_CHECK(m.first_width() <= cuda::kFilterHidden);
  for (int i = 0; i < m.num_dense; ++i) {
    const int out = PathScoreModel::padded(m.widths[i + 1]);
    PFNAS_CHECK(out <= cuda::kFilterHidden);
    const std::string dense = "dense_" + std::to_string(i), bias = "bias_" + std::to_string(i);
    m.dense[i] =
        f.needed<float>(dense.c_str(), {m.num_networks, out / kScorePanel, m.widths[i], kScorePanel});
    m.bias[i] = f.needed<float>(bias.c_str(), {m.num_networks, out});
  }
  m.head = f.needed<float>("head", {m.num_networks, PathScoreModel::padded(m.widths[m.num_dense])});
}

void set_model(PathScoreModel& m, const Fields& f, const py::dict& fields) {
  m.num_lookups = f.number<int>("num_lookups");
  PFNAS_CHECK(m.num_lookups <= cuda::kFilterSlots);
  m.num_rows = f.number<std::int64_t>("num_rows");
  m.block = f.number<int>("block");
  m.lookups = reinterpret_cast<const ScoreLookup*>(f.needed<std::int32_t>("lookups", {m.num_lookups, 4}));
  if (fields.contains("num_networks")) set_networks(m, f, fields["widths"].cast<py::tuple>());
  if (fields.contains("num_kernels")) {
    m.num_kernels = f.number<int>("num_kernels");
    m.kernel_width = f.number<int>("kernel_width");
    m.kernel_head = f.needed<float>("kernel_head", {m.num_kernels, m.kernel_width});
  }
  m.num_members = m.num_networks + m.num_kernels;
  m.width = m.num_networks * m.first_width() + static_cast<std::int64_t>(m.num_kernels) * m.kernel_width;
  PFNAS_CHECK((m.block == 64 || m.block == 128) && m.width % m.block == 0 && m.num_members > 0);
  PFNAS_CHECK(m.num_rows * m.width < (std::int64_t{1} << 31));
  m.table = f.needed<float>("score_table", {m.width / m.block, m.num_rows, m.block});
  m.offset = f.needed<float>("offset", {m.width});
  m.budget = f.array<float>("budget", {m.width});
  m.budget_square = f.array<float>("budget_square", {m.width});
  m.weights = f.needed<float>("weights", {m.num_members});
  if (fields.contains("linear")) {
    m.linear_width = PathScoreModel::padded(m.num_members);
    m.linear = f.needed<float>("linear", {m.num_rows, m.linear_width});
    m.linear_offset = f.needed<float>("linear_offset", {m.linear_width});
    m.linear_budget = f.array<float>("linear_budget", {m.linear_width});
  }
  if (fields.contains("curve")) {
    m.curve_size = f.number<int>("curve_size");
    m.curve_low = f.number<float>("curve_low");
    m.curve_per_unit = f.number<float>("curve_per_unit");
    m.curve = f.needed<float>("curve", {m.curve_size});
  }
}

void set_space(Params& p, const Fields& f) {
  p.num_slots = f.number<int>("num_slots");
  p.num_codes = f.number<int>("num_codes");
  const auto resolutions = f.number<int>("num_resolutions");
  const std::int64_t blocks = p.num_slots - 1;
  PFNAS_CHECK(p.num_slots >= 2 && p.num_slots <= cuda::kFilterSlots);
  p.first_blocks = f.number<std::uint32_t>("first_blocks");
  p.slot_sizes = f.needed<std::int32_t>("slot_sizes", {p.num_slots});
  p.table = f.needed<double>("table", {resolutions, blocks, p.num_codes});
  p.constant = f.needed<double>("constant", {resolutions});
  p.unit = f.number<double>("unit");
  p.walks = f.needed<std::int64_t>("walks", {resolutions, cuda::kWalkFields});
  p.cumulative = f.needed<double>("cumulative", {-1});
  p.cumulative_down = f.needed<double>("cumulative_down", {-1});
  p.after_choice = f.needed<double>("after_choice", {-1});
  p.after_stop = f.needed<double>("after_stop", {-1});
  p.step_row = static_cast<int>(cuda::divide_up(p.num_codes - 1, 4) * 4);
  p.steps = f.needed<std::int32_t>("steps", {resolutions, blocks, p.step_row});
  p.stop = f.needed<double>("stop", {resolutions, blocks});
  p.go_on = f.needed<double>("go_on", {resolutions, blocks});
}

// Settings and tensors by name; codes, scores, costs, counts, all_codes and all_scores are written.
void run(const py::dict& fields) {
  const CallArguments call(kOp, fields["offset"], "offset");
  const Fields f(fields, call);
  Params p;
  set_space(p, f);
  set_model(p.model, f, fields);
  p.model.num_slots = p.num_slots;
  p.num_possible = f.number<int>("num_possible");
  p.possible = f.array<std::int64_t>("possible", {p.num_possible, cuda::kPossibleFields});
  p.low = f.number<double>("low");
  p.high = f.number<double>("high");
  p.seed = f.number<std::uint64_t>("seed");
  p.first_index = f.number<std::uint64_t>("first_index");
  p.num_paths = f.number<std::int64_t>("num_paths");
  p.paths_per_block = f.number<std::int64_t>("paths_per_block");
  p.log_mean = f.number<double>("log_mean");
  p.log_scale = f.number<double>("log_scale");
  p.threshold = f.number<float>("threshold");
  p.top_k = f.number<int>("top_k");
  PFNAS_CHECK(p.num_paths > 0 && p.paths_per_block > 0 && p.paths_per_block % cuda::kFilterThreads == 0);
  PFNAS_CHECK(p.top_k >= 1 && p.top_k <= cuda::kFilterBest);
  const std::int64_t blocks = cuda::divide_up(p.num_paths, p.paths_per_block);
  p.codes = f.needed<std::uint8_t>("codes", {blocks, p.top_k, p.num_slots});
  p.scores = f.needed<float>("scores", {blocks, p.top_k});
  p.costs = f.needed<double>("costs", {blocks, p.top_k});
  p.counts = f.needed<std::int64_t>("counts", {blocks, cuda::kCountFields});
  p.all_codes = f.array<std::uint8_t>("all_codes", {p.num_paths, p.num_slots});
  p.all_scores = f.array<float>("all_scores", {p.num_paths});
  const cuda::DeviceGuard guard(call.device());
  const py::gil_scoped_release released;
  cuda::path_filter(p, call.stream());
}

}  // namespace

void register_path_filter_cuda(py::module_& m) {
  m.def("path_filter_cuda", &run);
  m.attr("path_filter_max_slots") = cuda::kFilterSlots;
  m.attr("path_filter_max_hidden") = cuda::kFilterHidden;
  m.attr("path_filter_max_best") = cuda::kFilterBest;
}

}  // namespace pfnas

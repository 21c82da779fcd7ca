// SPDX-License-Identifier: Apache-2.0
// Drawing, evolving and flooding paths; tables and outputs are prepared by pfnas_fast/ops/path_search.py.
#include <pybind11/pybind11.h>

#include <vector>

#include "bindings/array_arg.h"
#include "bindings/ops.h"
#include "bindings/path_score.h"
#include "common/isa.h"
#include "kernels/path_search/params.h"

namespace py = pybind11;

namespace pfnas {
namespace {

constexpr const char* kOp = "path_search";

// A space with one additive cost and, for drawing, its walk tables.
struct SearchSpace {
  py::dict tensors;
  py::list walk_tensors;
  GeneSpace genes;
  AdditiveTable cost;
  std::vector<WalkTable> walks;
};

SearchSpace make_space(const py::dict& f) {
  SearchSpace s;
  s.tensors = f;
  GeneSpace& g = s.genes;
  g.num_stages = f["num_stages"].cast<int>();
  const auto num_depths = f["num_depths"].cast<std::int64_t>();
  s.cost.num_codes = f["num_codes"].cast<int>();
  s.cost.num_resolutions = f["num_resolutions"].cast<int>();
  g.num_slots = f["num_slots"].cast<int>();
  PFNAS_CHECK(g.num_slots >= 2 && g.num_slots <= kMaxSearchSlots);
  g.stage_start = array_arg<std::int32_t>(f["stage_start"], kOp, "stage_start", {g.num_stages + 1});
  g.depth_start = array_arg<std::int32_t>(f["depth_start"], kOp, "depth_start", {g.num_stages + 1});
  g.depths = array_arg<std::int32_t>(f["depths"], kOp, "depths", {num_depths});
  g.slot_sizes = array_arg<std::int32_t>(f["slot_sizes"], kOp, "slot_sizes", {g.num_slots});
  s.cost.table =
      array_arg<double>(f["table"], kOp, "table", {s.cost.num_resolutions, g.num_blocks(), s.cost.num_codes});
  s.cost.constant = array_arg<double>(f["constant"], kOp, "constant", {s.cost.num_resolutions});
  s.cost.unit = f["unit"].cast<double>();
  return s;
}

WalkTable make_walk(const SearchSpace& s, const py::dict& f) {
  const std::int64_t num_blocks = s.genes.num_blocks();
  WalkTable w;
  w.num_buckets = f["num_buckets"].cast<std::int64_t>();
  w.pad = f["pad"].cast<std::int64_t>();
  w.choice_length = f["choice_length"].cast<std::int64_t>();
  PFNAS_CHECK(w.choice_length >= w.num_buckets + w.pad);
  w.step = f["step"].cast<double>();
  w.constant = f["constant"].cast<double>();
  w.residual_low = f["residual_low"].cast<double>();
  w.residual_high = f["residual_high"].cast<double>();
  w.low = f["low"].cast<double>();
  w.high = f["high"].cast<double>();
  w.cumulative = array_arg<double>(f["cumulative"], kOp, "cumulative", {w.num_buckets + 1});
  w.cumulative_down = array_arg<double>(f["cumulative_down"], kOp, "cumulative_down", {w.num_buckets + 1});
  w.after_choice = array_arg<double>(f["after_choice"], kOp, "after_choice", {num_blocks, w.choice_length});
  w.after_stop = array_arg<double>(f["after_stop"], kOp, "after_stop", {num_blocks, w.num_buckets});
  w.buckets = array_arg<std::int64_t>(f["buckets"], kOp, "buckets", {num_blocks, s.cost.num_codes});
  w.stop = array_arg<double>(f["stop"], kOp, "stop", {num_blocks});
  w.go_on = array_arg<double>(f["go_on"], kOp, "go_on", {num_blocks});
  return w;
}

void set_walks(SearchSpace& s, const py::list& walks) {
  PFNAS_CHECK(static_cast<int>(walks.size()) == s.cost.num_resolutions);
  s.walk_tensors = walks;
  s.walks.clear();
  for (const py::handle walk : walks) s.walks.push_back(make_walk(s, walk.cast<py::dict>()));
}

DrawParams draw_params(const SearchSpace& s, std::uint64_t seed, std::uint64_t first_index, double low,
                       double high, double window, std::uint64_t resolutions) {
  PFNAS_CHECK(static_cast<int>(s.walks.size()) == s.cost.num_resolutions);
  DrawParams p;
  p.space = s.genes;
  p.cost = s.cost;
  p.walks = s.walks.data();
  p.seed = seed;
  p.first_index = first_index;
  p.low = low;
  p.high = high;
  p.window = window;
  p.resolutions = resolutions;
  return p;
}

// codes: uint8 [n, num_slots]. Returns (walks made, paths not found).
py::tuple draw(const SearchSpace& s, std::uint64_t seed, std::uint64_t first_index, double low, double high,
               double window, std::uint64_t resolutions, py::handle codes) {
  DrawParams p = draw_params(s, seed, first_index, low, high, window, resolutions);
  const CodesArg paths = codes_arg(codes, kOp, s.genes.num_slots);
  p.num_paths = paths.num_paths;
  p.codes = array_arg<std::uint8_t>(codes, kOp, "codes", {p.num_paths, s.genes.num_slots});
  {
    const py::gil_scoped_release released;
    draw_paths(p);
  }
  return py::make_tuple(p.num_drawn, p.num_missing);
}

BudgetScorer budget_scorer(const ScoreModelHolder& holder, double log_mean, double log_scale) {
  BudgetScorer scorer;
  scorer.model = holder.model;
  scorer.score = select_path_score_kernel(active_isa());
  scorer.log_mean = log_mean;
  scorer.log_scale = log_scale;
  return scorer;
}

void set_scorers(const SearchSpace& s, const py::dict& f, BudgetScorer& scorer, Thresholds& thresholds) {
  scorer = budget_scorer(f["model"].cast<const ScoreModelHolder&>(), f["log_mean"].cast<double>(),
                         f["log_scale"].cast<double>());
  PFNAS_CHECK(scorer.model.num_slots == s.genes.num_slots);
  thresholds.num_knots = f["num_knots"].cast<int>();
  if (thresholds.num_knots > 0) {
    thresholds.knots = array_arg<double>(f["knots"], kOp, "knots", {thresholds.num_knots});
    thresholds.values = array_arg<double>(f["values"], kOp, "values", {thresholds.num_knots});
  }
}

// Settings and tensors by name; codes [top_k, num_slots] and scores [top_k] are written. Returns (found,
// scored).
py::tuple evolve(const SearchSpace& s, const py::dict& f) {
  EvolveParams p;
  p.space = s.genes;
  p.cost = s.cost;
  set_scorers(s, f, p.scorer, p.thresholds);
  p.own_judge = f["judge"].is_none();
  if (!p.own_judge) {
    p.judge = budget_scorer(f["judge"].cast<const ScoreModelHolder&>(), f["judge_log_mean"].cast<double>(),
                            f["judge_log_scale"].cast<double>());
    PFNAS_CHECK(p.judge.model.num_slots == s.genes.num_slots);
  }
  p.seed = f["seed"].cast<std::uint64_t>();
  p.low = f["low"].cast<double>();
  p.high = f["high"].cast<double>();
  p.resolution = f["resolution"].cast<int>();
  p.population = f["population"].cast<int>();
  p.iterations = f["iterations"].cast<int>();
  p.num_parents = f["num_parents"].cast<int>();
  p.num_mutants = f["num_mutants"].cast<int>();
  p.patience = f["patience"].cast<int>();
  p.repair_attempts = f["repair_attempts"].cast<int>();
  p.gene_probability = f["gene_probability"].cast<double>();
  p.top_k = f["top_k"].cast<int>();
  const CodesArg initial = codes_arg(f["initial"], kOp, s.genes.num_slots);
  p.num_initial = initial.num_paths;
  p.initial = array_arg<std::uint8_t>(f["initial"], kOp, "initial", {p.num_initial, s.genes.num_slots});
  p.codes = array_arg<std::uint8_t>(f["codes"], kOp, "codes", {p.top_k, s.genes.num_slots});
  p.scores = array_arg<double>(f["scores"], kOp, "scores", {p.top_k});
  {
    const py::gil_scoped_release released;
    evolve_paths(p);
  }
  return py::make_tuple(p.num_found, p.num_scored);
}

// As evolve, with costs [top_k]. Returns (found, walks made, paths not found, accepted, scored exactly).
py::tuple flood(const SearchSpace& s, const py::dict& f) {
  FloodParams p;
  p.draw =
      draw_params(s, f["seed"].cast<std::uint64_t>(), 0, f["low"].cast<double>(), f["high"].cast<double>(),
                  f["window"].cast<double>(), f["resolutions"].cast<std::uint64_t>());
  p.draw.num_paths = f["num_paths"].cast<std::int64_t>();
  set_scorers(s, f, p.scorer, p.thresholds);
  if (!f["sift"].is_none()) {
    p.sift.model = f["sift"].cast<const Int8ModelHolder&>().model;
    PFNAS_CHECK(p.sift.model.num_slots == s.genes.num_slots);
    p.sift.score = select_int8_score_kernel(active_isa());
    p.sift.use_vnni = cpu_has_vnni();
    p.sift.eps = f["sift_eps"].cast<double>();
  }
  p.top_k = f["top_k"].cast<int>();
  p.codes = array_arg<std::uint8_t>(f["codes"], kOp, "codes", {p.top_k, s.genes.num_slots});
  p.scores = array_arg<double>(f["scores"], kOp, "scores", {p.top_k});
  p.costs = array_arg<double>(f["costs"], kOp, "costs", {p.top_k});
  {
    const py::gil_scoped_release released;
    flood_paths(p);
  }
  return py::make_tuple(p.num_found, p.draw.num_drawn, p.draw.num_missing, p.num_accepted, p.num_exact);
}

}  // namespace

void register_path_search(py::module_& m) {
  py::class_<SearchSpace>(m, "SearchSpace").def(py::init(&make_space)).def("set_walks", &set_walks);
  m.def("draw_paths", &draw);
  m.def("evolve_paths", &evolve);
  m.def("flood_paths", &flood);
}

}  // namespace pfnas

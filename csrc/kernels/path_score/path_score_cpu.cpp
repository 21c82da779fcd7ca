// SPDX-License-Identifier: Apache-2.0
// Scores of many paths by a ranker whose first layer is a sum of table rows (params.h has the formula).
//
//   path_score -> per batch: rows of the table | per network: look up, dense layers, head; overlap.h: at once
//                                              | per kernel: look up, exp, head
//                                              | linear parts, weighted sum of the members, curve
//
// A path's arithmetic does not depend on its neighbours or on its place in the batch.
#include "common/check.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "kernels/path_score/dense.h"
#include "kernels/path_score/lookup.h"
#include "kernels/path_score/overlap.h"
#include "kernels/path_score/params.h"
#include "kernels/path_score/rows.h"

namespace pfnas::PFNAS_TIER {
namespace {

// One thread's working memory.
struct Workspace {
  std::int32_t* rows;  // [num_lookups][kRowStride]
  float* members;      // [num_members][kBatch]
  float* partial;      // [kBatch][kLanes]
  float* hidden[2];    // [kBatch][hidden_stride], layers alternate
  std::int64_t hidden_stride = 0;

  explicit Workspace(const PathScoreModel& m) {
    hidden_stride = m.first_width();
    for (int layer = 1; layer <= m.num_dense; ++layer) {
      hidden_stride = max_of<std::int64_t>(hidden_stride, PathScoreModel::padded(m.widths[layer]));
    }
    // Not a power of two, so that the rows of a tile do not share cache sets.
    hidden_stride += kScorePanel;
    const std::int64_t sizes[] = {kRowStride * m.num_lookups, kBatch * m.num_members, kBatch * kLanes,
                                  kBatch * hidden_stride, kBatch * hidden_stride};
    std::int64_t total = 0;
    for (const std::int64_t size : sizes) total += ceil_div(size, 16) * 16;
    float* memory = thread_scratch(Scratch::kThread, static_cast<std::size_t>(total));
    float* parts[5];
    for (int i = 0; i < 5; ++i) {
      parts[i] = memory;
      memory += ceil_div(sizes[i], 16) * 16;
    }
    rows = reinterpret_cast<std::int32_t*>(parts[0]);
    members = parts[1];
    partial = parts[2];
    hidden[0] = parts[3];
    hidden[1] = parts[4];
  }
};

void dot_head(const float* hidden, std::int64_t stride, int width, const float* head, std::int64_t count,
              float* member) {
  for (std::int64_t path = 0; path < count; ++path) {
    Vec total{};
    for (int i = 0; i < PathScoreModel::padded(width); i += kLanes) {
      total += load(hidden + path * stride + i) * load(head + i);
    }
    float lanes[kLanes];
    store(lanes, total);
    member[path] = sum_lanes(lanes);
  }
}

DenseJob dense_job(const PathScoreModel& m, int index, int layer, const Workspace& w) {
  const bool last = layer + 1 == m.num_dense;
  const int in_width = m.widths[layer], out_width = PathScoreModel::padded(m.widths[layer + 1]);
  DenseJob job{};
  job.in = w.hidden[layer % 2];
  job.in_stride = w.hidden_stride;
  job.in_width = in_width;
  job.weights = m.dense[layer] + static_cast<std::int64_t>(index) * in_width * out_width;
  job.bias = m.bias[layer] + static_cast<std::int64_t>(index) * out_width;
  job.out = last ? nullptr : w.hidden[(layer + 1) % 2];
  job.out_stride = w.hidden_stride;
  job.head = m.head + static_cast<std::int64_t>(index) * PathScoreModel::padded(m.widths[m.num_dense]);
  job.partial = w.partial;
  return job;
}

void network(const PathScoreModel& m, const Batch& batch, int index, Workspace& w) {
  if (can_overlap(m)) {
    const auto run = m.budget == nullptr ? overlapped_network<0> : overlapped_network<1>;
    run(m, batch, index * m.first_width(), dense_job(m, index, 0, w),
        PathScoreModel::padded(m.widths[1]) / kScorePanel, w.hidden[0]);
    return;
  }
  const bool wide = m.block == 2 * kScoreColumns;
  const auto look_up = m.budget == nullptr ? (wide ? lookup_relu<0, kWideVecs> : lookup_relu<0, kNarrowVecs>)
                                           : (wide ? lookup_relu<1, kWideVecs> : lookup_relu<1, kNarrowVecs>);
  look_up(m, batch, index * m.first_width(), m.first_width(), w.hidden[0], w.hidden_stride);
  if (m.num_dense == 0) {
    const float* head = m.head + static_cast<std::int64_t>(index) * PathScoreModel::padded(m.widths[0]);
    dot_head(w.hidden[0], w.hidden_stride, m.widths[0], head, batch.num_paths, w.members + index * kBatch);
    return;
  }
  for (int layer = 0; layer < m.num_dense; ++layer) {
    dense_layer(dense_job(m, index, layer, w), batch.num_paths,
                PathScoreModel::padded(m.widths[layer + 1]) / kScorePanel);
  }
}

float curve_at(const PathScoreModel& m, float z) {
  const float place = (z - m.curve_low) * m.curve_per_unit;
  if (place != place) return place;  // NaN
  const float last = static_cast<float>(m.curve_size - 1);
  if (!(place > 0.0f)) return m.curve[0];
  if (place >= last) return m.curve[m.curve_size - 1];
  const int knot = static_cast<int>(place);
  const float share = place - static_cast<float>(knot);
  return m.curve[knot] + share * (m.curve[knot + 1] - m.curve[knot]);
}

// `rows` of the batch's first path.
void score_batch(const PathScoreParams& p, std::int64_t first, std::int64_t count, const std::int32_t* rows,
                 Workspace& w) {
  const PathScoreModel& m = p.model;
  const Batch batch{count, rows, p.z == nullptr ? nullptr : p.z + first};
  for (int index = 0; index < m.num_networks; ++index) {
    network(m, batch, index, w);
    if (m.num_dense == 0) continue;
    float* member = w.members + index * kBatch;
    for (std::int64_t path = 0; path < count; ++path) member[path] = sum_lanes(w.partial + path * kLanes);
  }
  for (int index = 0; index < m.num_kernels; ++index) {
    const std::int64_t column =
        m.num_networks * m.first_width() + static_cast<std::int64_t>(index) * m.kernel_width;
    const auto look_up =
        m.budget_square != nullptr
            ? lookup_exp<2, kNarrowVecs>
            : (m.budget != nullptr ? lookup_exp<1, kNarrowVecs> : lookup_exp<0, kNarrowVecs>);
    look_up(m, batch, column, m.kernel_width,
            m.kernel_head + static_cast<std::int64_t>(index) * m.kernel_width, w.partial,
            w.members + (m.num_networks + index) * kBatch);
  }
  if (m.linear_width > 0) add_linear(m, batch, w.members, kBatch);
  for (std::int64_t path = 0; path < count; ++path) {
    float sum = m.curve_size > 0 ? curve_at(m, batch.z[path]) : 0.0f;
    for (int member = 0; member < m.num_members; ++member) {
      sum += m.weights[member] * w.members[member * kBatch + path];
    }
    p.scores[first + path] = sum;
  }
  if (p.members == nullptr) return;
  for (int member = 0; member < m.num_members; ++member) {
    for (std::int64_t path = 0; path < count; ++path) {
      p.members[member * p.num_paths + first + path] = w.members[member * kBatch + path];
    }
  }
}

double flops_of_path(const PathScoreModel& m) {
  double flops = static_cast<double>(m.width) * m.num_lookups;
  for (int layer = 0; layer < m.num_dense; ++layer) {
    flops += 2.0 * m.num_networks * m.widths[layer] * m.widths[layer + 1];
  }
  return flops;
}

// Few enough that their hidden layer and the weights share L1, where the weights fit it at all.
std::int64_t batch_size(const PathScoreModel& m) {
  constexpr std::int64_t kL1Floats = 8 * 1024, kSmallBatch = 48;
  if (can_overlap(m)) return kBatch;  // two tiles of the hidden layer, whatever the batch
  const std::int64_t weights = m.num_dense > 0 ? static_cast<std::int64_t>(m.widths[0]) * m.widths[1] : 0;
  return weights <= kL1Floats ? kSmallBatch : kDenseBatch;
}

}  // namespace

void path_score(const PathScoreParams& p) {
  constexpr std::int64_t kItem = 5 * kRowStride;
  const PathScoreModel& m = p.model;
  const std::int64_t batch = batch_size(m), group = kRowStride / batch * batch;
  const double flops = flops_of_path(m) * static_cast<double>(p.num_paths);
  parallel_for(ceil_div(p.num_paths, kItem), flops, [&](std::int64_t item) {
    Workspace w(m);
    const std::int64_t end = min_of(p.num_paths, (item + 1) * kItem);
    for (std::int64_t start = item * kItem; start < end; start += group) {
      const std::int64_t stop = min_of(end, start + group);
      find_rows({p.codes, p.slot_stride, p.path_stride}, m.lookups, m.num_lookups, start, stop - start,
                m.block, w.rows, kRowStride);
      for (std::int64_t first = start; first < stop; first += batch) {
        score_batch(p, first, min_of(batch, stop - first), w.rows + (first - start), w);
      }
    }
  });
}

}  // namespace pfnas::PFNAS_TIER

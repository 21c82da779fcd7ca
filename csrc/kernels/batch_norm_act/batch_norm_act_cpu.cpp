// SPDX-License-Identifier: Apache-2.0
// Batch normalisation by the moments of the batch, and the activation behind it. T = one pass over the
// tensor.
//
//   forward   read x: moments; read x, write y              (3 T)
//   backward  read dy, x: two sums a channel; read dy, x, write dx  (5 T)
//
// Rows are cut into groups by shape alone. Each has moments and sums of its own, in float32 over 256 rows and
// in float64 beyond, folded in a fixed order.
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "kernels/batch_norm_act/params.h"
#include "kernels/train_mbconv/blocks.h"

namespace pfnas::PFNAS_TIER {
namespace {

using Params = BatchNormActParams;

struct Groups {
  std::int64_t rows, count, blocks;

  explicit Groups(const Params& p)
      : rows(p.rows),
        count(min_of<std::int64_t>(32, ceil_div(p.rows, 1024))),
        blocks(ceil_div(p.channels, kBlock)) {}
  std::int64_t begin(std::int64_t group) const { return group * rows / count; }
  std::int64_t size(std::int64_t group) const { return begin(group + 1) - begin(group); }
  std::int64_t floats() const { return count * blocks * kBlock; }
};

int lanes_at(const Params& p, std::int64_t channel) {
  return static_cast<int>(max_of<std::int64_t>(0, min_of<std::int64_t>(kLanes, p.channels - channel)));
}

// Runs body(first row, number of rows) for runs of rows that float32 may sum.
template <class Body>
PFNAS_INLINE void for_runs(const Groups& groups, std::int64_t group, const Body& body) {
  const std::int64_t end = groups.begin(group) + groups.size(group);
  for (std::int64_t r = groups.begin(group); r < end; r += kRowsPerSum) body(r, min_of(kRowsPerSum, end - r));
}

// Sums of `n` rows of one vector of channels around their first row, into [kBlock].
PFNAS_INLINE void sum_run(const float* x, std::int64_t stride, int lanes, std::int64_t n, float* sums,
                          float* squares) {
  const Vec first = load_up_to(x, lanes);
  Vec sum[4] = {}, square[4] = {};
  std::int64_t r = 0;
  for (; r + 4 <= n; r += 4) {
    PFNAS_UNROLL for (int u = 0; u < 4; ++u) {
      const Vec value = load_up_to(x + (r + u) * stride, lanes) - first;
      sum[u] += value;
      square[u] += value * value;
    }
  }
  for (; r < n; ++r) {
    const Vec value = load_up_to(x + r * stride, lanes) - first;
    sum[0] += value;
    square[0] += value * value;
  }
  store(sums, (sum[0] + sum[1]) + (sum[2] + sum[3]));
  store(squares, (square[0] + square[1]) + (square[2] + square[3]));
}

void add_run(const Params& p, std::int64_t block, std::int64_t row, std::int64_t n, std::int64_t count,
             const Moments& into) {
  float first[kBlock] = {}, sums[kBlock] = {}, squares[kBlock] = {};
  const float* x = p.x + row * p.channels + block * kBlock;
  for (int v = 0; v < kVecsPerBlock; ++v) {
    const int lanes = lanes_at(p, block * kBlock + v * kLanes);
    if (lanes == 0) break;
    store(first + v * kLanes, load_up_to(x + v * kLanes, lanes));
    sum_run(x + v * kLanes, p.channels, lanes, n, sums + v * kLanes, squares + v * kLanes);
  }
  double mean[kBlock], deviation[kBlock];
  const double inverse = 1.0 / static_cast<double>(n);
  for (int c = 0; c < kBlock; ++c) {
    const double sum = sums[c];
    mean[c] = first[c] + sum * inverse;
    deviation[c] = squares[c] - sum * sum * inverse;
  }
  join_moments(into, count, mean, deviation, n);
}

void finish_moments(const Params& p, const Groups& groups, const Moments& moments, const Norm& norm) {
  std::int64_t count = groups.size(0);
  const std::int64_t channels = groups.blocks * kBlock;
  for (std::int64_t group = 1; group < groups.count; ++group) {
    for (std::int64_t c = 0; c < channels; c += kBlock) {
      const std::int64_t from = group * channels + c;
      join_moments({moments.mean + c, moments.deviation + c}, count, moments.mean + from,
                   moments.deviation + from, groups.size(group));
    }
    count += groups.size(group);
  }
  for (std::int64_t c = 0; c < p.channels; ++c) {
    const double deviation = moments.deviation[c] < 0 ? 0.0 : moments.deviation[c];
    norm.mean[c] = p.moments[c] = static_cast<float>(moments.mean[c]);
    p.moments[p.channels + c] = static_cast<float>(deviation / static_cast<double>(count - 1));
    norm.invstd[c] = p.moments[2 * p.channels + c] =
        static_cast<float>(1.0 / __builtin_sqrt(deviation / static_cast<double>(count) + p.eps));
  }
  fold_norm(p.gamma, p.beta, p.channels, groups.blocks, norm);
}

template <Activation kActivation>
void normalise_run(const Params& p, const Norm& norm, std::int64_t row, std::int64_t n) {
  for (std::int64_t c = 0; c < p.channels; c += kLanes) {
    const int lanes = lanes_at(p, c);
    const Vec scale = load(norm.scale + c), shift = load(norm.shift + c);
    const float* from = p.x + row * p.channels + c;
    float* to = p.y + row * p.channels + c;
    for (std::int64_t r = 0; r < n; ++r, from += p.channels, to += p.channels) {
      const Vec value = activate<kActivation>(load_up_to(from, lanes) * scale + shift);
      if (lanes == kLanes) {
        store(to, value);
      } else {
        store_lanes(to, value, lanes);
      }
    }
  }
}

// Adds a run to the sums of the gradient before the activation, plain and times the normalised input.
template <Activation kActivation>
void sum_gradients(const Params& p, const Norm& norm, std::int64_t row, std::int64_t n,
                   const GradientSums& sums) {
  for (std::int64_t c = 0; c < p.channels; c += kBlock) {
    Vec plain[kVecsPerBlock] = {}, normalised[kVecsPerBlock] = {};
    for (int v = 0; v < kVecsPerBlock; ++v) {
      const std::int64_t at = c + v * kLanes;
      const int lanes = lanes_at(p, at);
      if (lanes == 0) break;
      const Vec scale = load(norm.scale + at), shift = load(norm.shift + at), mean = load(norm.mean + at);
      Vec sum[2] = {}, product[2] = {};
      const float *x = p.x + row * p.channels + at, *grad = p.grad_y + row * p.channels + at;
      const auto add = [&](std::int64_t r, int u) {
        const Vec value = load_up_to(x + r * p.channels, lanes);
        const Vec slope =
            slope_times<kActivation>(value * scale + shift, load_up_to(grad + r * p.channels, lanes));
        sum[u] += slope;
        product[u] += slope * (value - mean);
      };
      std::int64_t r = 0;
      for (; r + 2 <= n; r += 2) {
        add(r, 0);
        add(r + 1, 1);
      }
      if (r < n) add(r, 0);
      plain[v] = sum[0] + sum[1];
      normalised[v] = (product[0] + product[1]) * load(norm.invstd + at);
    }
    add_lanes(sums.plain + c, plain);
    add_lanes(sums.normalised + c, normalised);
  }
}

template <Activation kActivation>
void write_gradients(const Params& p, const Norm& norm, const NormGradient& gradient, std::int64_t row,
                     std::int64_t n) {
  for (std::int64_t c = 0; c < p.channels; c += kLanes) {
    const int lanes = lanes_at(p, c);
    const Vec scale = load(norm.scale + c), shift = load(norm.shift + c), mean = load(norm.mean + c);
    const Vec slope = load(gradient.slope + c), offset = load(gradient.offset + c);
    const float *x = p.x + row * p.channels + c, *grad = p.grad_y + row * p.channels + c;
    float* to = p.grad_x + row * p.channels + c;
    for (std::int64_t r = 0; r < n; ++r, x += p.channels, grad += p.channels, to += p.channels) {
      const Vec value = load_up_to(x, lanes);
      const Vec before = slope_times<kActivation>(value * scale + shift, load_up_to(grad, lanes));
      const Vec out = before * scale + ((value - mean) * slope + offset);
      if (lanes == kLanes) {
        store(to, out);
      } else {
        store_lanes(to, out, lanes);
      }
    }
  }
}

}  // namespace

void batch_norm_act_forward(const BatchNormActParams& p) {
  const Groups groups(p);
  const std::int64_t channels = groups.blocks * kBlock;
  Carver size;
  take_norm(size, groups.blocks);
  size.take_doubles(2 * groups.floats());
  Carver memory{thread_scratch(Scratch::kCall, static_cast<std::size_t>(size.used))};
  const Norm norm = take_norm(memory, groups.blocks);
  double* sums = memory.take_doubles(2 * groups.floats());
  const Moments moments{sums, sums + groups.floats()};
  const double work = 4.0 * static_cast<double>(p.rows * p.channels);
  parallel_for(groups.count, work, [&](std::int64_t group) {
    const Moments own{moments.mean + group * channels, moments.deviation + group * channels};
    clear(own.mean, channels);
    clear(own.deviation, channels);
    std::int64_t count = 0;
    for_runs(groups, group, [&](std::int64_t row, std::int64_t n) {
      for (std::int64_t block = 0; block < groups.blocks; ++block) {
        add_run(p, block, row, n, count, {own.mean + block * kBlock, own.deviation + block * kBlock});
      }
      count += n;
    });
  });
  finish_moments(p, groups, moments, norm);
  dispatch_activation(p.activation, [&](auto tag) {
    parallel_for(groups.count, work, [&](std::int64_t group) {
      for_runs(groups, group, [&](std::int64_t row, std::int64_t n) {
        normalise_run<decltype(tag)::value>(p, norm, row, n);
      });
    });
  });
}

void batch_norm_act_backward(const BatchNormActParams& p) {
  const Groups groups(p);
  const std::int64_t channels = groups.blocks * kBlock;
  Carver size;
  take_norm(size, groups.blocks);
  take_norm_gradient(size, groups.blocks);
  take_sums(size, groups.floats());
  Carver memory{thread_scratch(Scratch::kCall, static_cast<std::size_t>(size.used))};
  const Norm norm = take_norm(memory, groups.blocks);
  const NormGradient gradient = take_norm_gradient(memory, groups.blocks);
  const GradientSums sums = take_sums(memory, groups.floats());
  for (std::int64_t c = 0; c < p.channels; ++c) {
    norm.mean[c] = p.moments[c];
    norm.invstd[c] = p.moments[2 * p.channels + c];
  }
  fold_norm(p.gamma, p.beta, p.channels, groups.blocks, norm);
  const double work = 8.0 * static_cast<double>(p.rows * p.channels);
  dispatch_activation(p.activation, [&](auto tag) {
    parallel_for(groups.count, work, [&](std::int64_t group) {
      const GradientSums own = sums.at(group * channels);
      clear(own.plain, channels);
      clear(own.normalised, channels);
      for_runs(groups, group, [&](std::int64_t row, std::int64_t n) {
        sum_gradients<decltype(tag)::value>(p, norm, row, n, own);
      });
    });
  });
  for (std::int64_t i = channels; i < groups.floats(); ++i) {
    sums.plain[i % channels] += sums.plain[i];
    sums.normalised[i % channels] += sums.normalised[i];
  }
  fold_norm_gradient(norm, sums, true, groups.blocks, p.rows, gradient);
  store_norm_gradient(sums, p.channels, p.grad_gamma, p.grad_beta);
  if (p.grad_x == nullptr) return;
  dispatch_activation(p.activation, [&](auto tag) {
    parallel_for(groups.count, work, [&](std::int64_t group) {
      for_runs(groups, group, [&](std::int64_t row, std::int64_t n) {
        write_gradients<decltype(tag)::value>(p, norm, gradient, row, n);
      });
    });
  });
}

}  // namespace pfnas::PFNAS_TIER

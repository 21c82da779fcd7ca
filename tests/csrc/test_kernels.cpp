// SPDX-License-Identifier: Apache-2.0
// The kernels called from plain C++, without Python or torch, against loops that follow the definition.
// Compiled for any number of lanes and registers, so that the 16-lane source also runs on a machine whose
// vectors are narrower.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "common/scratch.h"
#include "kernels/dynamic_depthwise_conv/params.h"

using pfnas::DynamicDepthwiseConvParams;

namespace {

struct Problem {
  DynamicDepthwiseConvParams p;
  std::vector<float> bank, x, y, grad_y, grad_x, grad_bank;
};

std::vector<float> random_values(std::int64_t count) {
  static unsigned state = 1;
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) {
    state = state * 1664525u + 1013904223u;
    value = static_cast<float>(state >> 8) / static_cast<float>(1 << 23) - 1.0f;
  }
  return values;
}

Problem make(std::int64_t n, std::int64_t c, std::int64_t h, std::int64_t w, int kernel_size, int stride) {
  Problem problem;
  DynamicDepthwiseConvParams& p = problem.p;
  p.batch = n, p.channels = c, p.height = h, p.width = w;
  p.out_height = (h + stride - 1) / stride, p.out_width = (w + stride - 1) / stride;
  p.kernel_size = p.max_kernel_size = kernel_size, p.stride = stride;
  const std::int64_t x_count = n * h * w * c, y_count = n * p.out_height * p.out_width * c;
  problem.bank = random_values(c * kernel_size * kernel_size);
  problem.x = random_values(x_count), problem.grad_y = random_values(y_count);
  problem.y.assign(static_cast<std::size_t>(y_count), NAN);
  problem.grad_x.assign(static_cast<std::size_t>(x_count), NAN);
  problem.grad_bank.assign(problem.bank.size(), NAN);
  p.bank = problem.bank.data(), p.x = problem.x.data(), p.y = problem.y.data();
  p.grad_y = problem.grad_y.data(), p.grad_x = problem.grad_x.data(), p.grad_bank = problem.grad_bank.data();
  return problem;
}

struct Expected {
  std::vector<double> y, grad_x, grad_bank;
};

Expected by_definition(const Problem& problem) {
  const DynamicDepthwiseConvParams& p = problem.p;
  const int k = p.kernel_size, half = k / 2;
  Expected e{std::vector<double>(problem.y.size()), std::vector<double>(problem.x.size()),
             std::vector<double>(problem.bank.size())};
  for (std::int64_t n = 0; n < p.batch; ++n)
    for (std::int64_t oy = 0; oy < p.out_height; ++oy)
      for (std::int64_t ox = 0; ox < p.out_width; ++ox)
        for (int r = 0; r < k; ++r)
          for (int s = 0; s < k; ++s) {
            const std::int64_t iy = oy * p.stride + r - half, ix = ox * p.stride + s - half;
            if (iy < 0 || iy >= p.height || ix < 0 || ix >= p.width) continue;
            for (std::int64_t c = 0; c < p.channels; ++c) {
              const auto i = static_cast<std::size_t>(((n * p.height + iy) * p.width + ix) * p.channels + c);
              const auto o =
                  static_cast<std::size_t>(((n * p.out_height + oy) * p.out_width + ox) * p.channels + c);
              const auto t = static_cast<std::size_t>((c * k + r) * k + s);
              e.y[o] += static_cast<double>(problem.x[i]) * problem.bank[t];
              e.grad_x[i] += static_cast<double>(problem.grad_y[o]) * problem.bank[t];
              e.grad_bank[t] += static_cast<double>(problem.grad_y[o]) * problem.x[i];
            }
          }
  return e;
}

bool close(const std::vector<float>& actual, const std::vector<double>& expected, const char* what) {
  double scale = 0, error = 0;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    scale = std::fmax(scale, std::fabs(expected[i]));
    const double difference = std::fabs(actual[i] - expected[i]);
    if (!(difference <= error)) error = difference;  // keeps NaN
  }
  if (error <= 3e-6 * scale) return true;
  std::printf("  %s: error %g at scale %g\n", what, error, scale);
  return false;
}

}  // namespace

int main() {
  struct {
    std::int64_t n, c, h, w;
  } const sizes[] = {{1, 1, 1, 1},   {2, 17, 5, 5},   {1, 24, 10, 7},  {3, 40, 14, 14}, {9, 16, 7, 7},
                     {1, 16, 3, 33}, {1, 33, 40, 57}, {2, 48, 11, 20}, {1, 32, 5, 15}};
  int failures = 0;
  for (const auto& size : sizes)
    for (int kernel_size : {3, 5, 7})
      for (int stride : {1, 2}) {
        Problem problem = make(size.n, size.c, size.h, size.w, kernel_size, stride);
        const auto kernel = pfnas::PFNAS_TIER::select_dynamic_depthwise_conv(problem.p);
        if (kernel.lanes != PFNAS_LANES) return std::printf("lanes %d\n", kernel.lanes), 1;
        pfnas::poison_thread_scratch();
        kernel.forward(problem.p);
        pfnas::poison_thread_scratch();
        kernel.backward(problem.p);
        const Expected expected = by_definition(problem);
        const bool good = close(problem.y, expected.y, "y") &&
                          close(problem.grad_x, expected.grad_x, "grad_x") &&
                          close(problem.grad_bank, expected.grad_bank, "grad_bank");
        if (!good) {
          std::printf("%lldx%lldx%lldx%lld k%d s%d tiles %d %d %d\n", static_cast<long long>(size.n),
                      static_cast<long long>(size.c), static_cast<long long>(size.h),
                      static_cast<long long>(size.w), kernel_size, stride, kernel.forward_width,
                      kernel.grad_input_width, kernel.grad_filter_width);
          ++failures;
        }
      }
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}

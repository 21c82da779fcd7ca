// SPDX-License-Identifier: Apache-2.0
// PackedNet: the weights of a whole net in one tensor, and where everything lies in it. Subnet: one path of
// it, a list of layers that point into the PackedNet and into one tensor of folded batch normalisations. Both
// are immutable once made, so any number of threads may run them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/ops.h"
#include "bindings/tensor_arg.h"
#include "common/check.h"
#include "common/fold.h"
#include "common/isa.h"
#include "kernels/subnet/params.h"

namespace py = pybind11;

namespace pfnas {
namespace {

constexpr const char* kOp = "subnet";
constexpr std::int64_t kPixelBlock = 16;  // floats that pixels are padded to

std::int64_t padded(std::int64_t channels) {
  return (channels + kPixelBlock - 1) / kPixelBlock * kPixelBlock;
}

TensorView float_tensor(py::handle object, const char* argument, int ndim) {
  const TensorView view = view_tensor(object, kOp, argument);
  PFNAS_CHECK(view.is_float32() && view.is_cpu() && view.ndim == ndim);
  return view;
}

TensorView dense_tensor(py::handle object, const char* argument, int ndim) {
  const TensorView view = float_tensor(object, argument, ndim);
  PFNAS_CHECK(view.is_contiguous());
  return view;
}

// A flat float tensor that offsets point into; keeps the tensor alive.
struct Flat {
  py::object owner;
  float* data = nullptr;
  std::int64_t size = 0;

  Flat(py::object tensor, const char* argument) : owner(std::move(tensor)) {
    const TensorView view = dense_tensor(owner, argument, 1);
    data = static_cast<float*>(view.data);
    size = view.shape[0];
  }
  float* at(std::int64_t offset) const {
    PFNAS_CHECK(offset >= 0 && offset < size);
    return data + offset;
  }
  const float* optional(std::int64_t offset) const { return offset < 0 ? nullptr : at(offset); }
};

// Offsets of scale and shift in the tensor of folded normalisations; -1: there is none.
using AffineAt = std::pair<std::int64_t, std::int64_t>;

Affine affine_at(const Flat& folded, const AffineAt& at) {
  return {folded.optional(at.first), folded.optional(at.second)};
}

// A batch normalisation at its largest width.
struct Norm {
  const float* gamma;
  const float* beta;
  float eps;
  std::int64_t channels;
  AffineAt folded;
};

// A block at its largest; what a path chooses is left open.
struct BlockSpec {
  FusedMBConvParams base;
  bool has_residual = false;
  std::map<int, const float*> filters;  // by kernel size
  AffineAt expand, depth, project;
};

template <class T>
T get(const py::dict& d, const char* key) {
  return d[key].cast<T>();
}

Activation activation_of(const py::dict& d, const char* key) {
  const int kind = get<int>(d, key);
  PFNAS_CHECK(kind >= 0 && kind <= 2);
  return static_cast<Activation>(kind);
}

BlockSpec block_spec(const Flat& weights, const py::dict& d) {
  BlockSpec spec;
  FusedMBConvParams& p = spec.base;
  p.in_channels = get<std::int64_t>(d, "in_channels");
  p.x_stride = padded(p.in_channels);
  p.used_out_channels = get<std::int64_t>(d, "out_channels");
  p.out_channels = padded(p.used_out_channels);
  p.mid_channels = p.max_mid_channels = get<std::int64_t>(d, "max_mid_channels");
  p.max_reduced_channels = get<std::int64_t>(d, "max_reduced_channels");
  p.max_in_channels = p.in_channels;
  p.stride = get<int>(d, "stride");
  p.expand_activation = activation_of(d, "expand_activation");
  p.depth_activation = activation_of(d, "depth_activation");
  p.out_activation = activation_of(d, "out_activation");
  p.expand_panels = weights.optional(get<std::int64_t>(d, "expand_panels"));
  p.project_panels = weights.at(get<std::int64_t>(d, "project_panels"));
  if (p.max_reduced_channels > 0) {
    p.reduce_panels = weights.at(get<std::int64_t>(d, "reduce_panels"));
    p.reduce_bias = weights.at(get<std::int64_t>(d, "reduce_bias"));
    p.excite_panels = weights.at(get<std::int64_t>(d, "excite_panels"));
    p.excite_bias = weights.at(get<std::int64_t>(d, "excite_bias"));
  }
  spec.has_residual = get<bool>(d, "has_residual");
  for (const auto& [size, offset] : get<std::map<int, std::int64_t>>(d, "filters")) {
    PFNAS_CHECK(size == 3 || size == 5 || size == 7);
    spec.filters[size] = weights.at(offset);
  }
  spec.expand = get<AffineAt>(d, "expand_affine");
  spec.depth = get<AffineAt>(d, "depth_affine");
  spec.project = get<AffineAt>(d, "project_affine");
  return spec;
}

// A 1x1 convolution whose widths do not depend on the path.
struct DenseSpec {
  DynamicPointwiseConvParams base;
  AffineAt folded{-1, -1};
};

DenseSpec dense_spec(const Flat& weights, const py::dict& d) {
  DenseSpec spec;
  DynamicPointwiseConvParams& p = spec.base;
  p.in_channels = p.max_in_channels = get<std::int64_t>(d, "in_channels");
  p.out_channels = get<std::int64_t>(d, "out_channels");
  p.x_stride = padded(p.in_channels);
  p.activation = activation_of(d, "activation");
  p.panels = weights.at(get<std::int64_t>(d, "panels"));
  p.shift = weights.optional(get<std::int64_t>(d, "bias"));
  spec.folded = get<AffineAt>(d, "affine");
  return spec;
}

struct PackedNet {
  Flat weights;
  std::int64_t folded_size;
  std::vector<Norm> norms;
  StemParams stem;
  AffineAt stem_affine;
  std::vector<BlockSpec> blocks;
  std::vector<DenseSpec> laterals;            // by level
  std::vector<std::vector<BlockSpec>> convs;  // [convolution][level]
  std::vector<Affine> predictor_affines;      // by level
  std::vector<DenseSpec> tail;                // detector: predictor; classifier: feature, hidden, classifier

  PackedNet(py::object tensor, const py::dict& d) : weights(std::move(tensor), "weights") {
    folded_size = get<std::int64_t>(d, "folded_size");
    for (const py::handle item : d["norms"]) {
      const auto n = py::reinterpret_borrow<py::dict>(item);
      norms.push_back({weights.at(get<std::int64_t>(n, "gamma")), weights.at(get<std::int64_t>(n, "beta")),
                       get<float>(n, "eps"), get<std::int64_t>(n, "channels"), get<AffineAt>(n, "folded")});
    }
    const auto s = get<py::dict>(d, "stem");
    stem.out_channels = padded(get<std::int64_t>(s, "out_channels"));
    stem.weight = weights.at(get<std::int64_t>(s, "weight"));
    stem.activation = activation_of(s, "activation");
    stem_affine = get<AffineAt>(s, "affine");
    for (const py::handle item : d["blocks"]) {
      blocks.push_back(block_spec(weights, py::reinterpret_borrow<py::dict>(item)));
    }
    for (const py::handle item : d["laterals"]) {
      laterals.push_back(dense_spec(weights, py::reinterpret_borrow<py::dict>(item)));
      laterals.back().base.out_channels = padded(laterals.back().base.out_channels);
    }
    for (const py::handle row : d["convs"]) {
      convs.emplace_back();
      for (const py::handle item : row) {
        convs.back().push_back(block_spec(weights, py::reinterpret_borrow<py::dict>(item)));
      }
      PFNAS_CHECK(convs.back().size() == laterals.size());
    }
    for (const py::handle item : d["predictor_affines"]) {
      const auto at = item.cast<AffineAt>();
      predictor_affines.push_back({weights.at(at.first), weights.at(at.second)});
    }
    for (const py::handle item : d["tail"]) {
      tail.push_back(dense_spec(weights, py::reinterpret_borrow<py::dict>(item)));
    }
    PFNAS_CHECK(laterals.size() <= kMaxLevels && laterals.size() == predictor_affines.size());
    PFNAS_CHECK(tail.size() == (laterals.empty() ? 3 : 1));
  }

  // means, vars: one per entry of `norms`, [at most its channels] each; None where the path skips the layer.
  void fold(const py::list& means, const py::list& vars, py::object out) const {
    const Flat folded(std::move(out), "folded");
    PFNAS_CHECK(folded.size == folded_size && means.size() == norms.size() && vars.size() == norms.size());
    for (std::size_t i = 0; i < norms.size(); ++i) {
      if (means[i].is_none()) continue;
      const Norm& norm = norms[i];
      const TensorView mean = dense_tensor(means[i], "mean", 1), var = dense_tensor(vars[i], "var", 1);
      PFNAS_CHECK(mean.shape[0] <= norm.channels && var.shape[0] == mean.shape[0]);
      fold_batch_norm(norm.gamma, norm.beta, static_cast<const float*>(mean.data),
                      static_cast<const float*>(var.data), norm.eps, mean.shape[0],
                      folded.at(norm.folded.first), folded.at(norm.folded.second));
    }
  }
};

// (block, kernel size, middle channels, reduced channels of squeeze-and-excitation, tapped level or -1)
using Choice = std::tuple<int, int, std::int64_t, std::int64_t, int>;

SubnetBlock make_block(const BlockSpec& spec, const Flat& folded, int kernel_size, std::int64_t mid_channels,
                       std::int64_t reduced_channels, int tap) {
  SubnetBlock step;
  step.block = spec.base;
  FusedMBConvParams& p = step.block;
  const auto filter = spec.filters.find(kernel_size);
  PFNAS_CHECK(filter != spec.filters.end());
  PFNAS_CHECK(mid_channels >= 1 && mid_channels <= p.max_mid_channels);
  PFNAS_CHECK(reduced_channels >= 0 && reduced_channels <= p.max_reduced_channels);
  p.kernel_size = kernel_size;
  p.filter = filter->second;
  p.mid_channels = mid_channels;
  p.reduced_channels = reduced_channels;
  p.expand_affine = affine_at(folded, spec.expand);
  p.depth_affine = affine_at(folded, spec.depth);
  p.project_affine = affine_at(folded, spec.project);
  step.has_residual = spec.has_residual;
  step.tap = tap;
  return step;
}

DynamicPointwiseConvParams make_dense(const DenseSpec& spec, const Flat& folded) {
  DynamicPointwiseConvParams p = spec.base;
  if (spec.folded.first >= 0) {
    p.scale = folded.at(spec.folded.first);
    p.shift = folded.at(spec.folded.second);
  }
  return p;
}

void run_calibration(const CalibrationParams& p) {
  switch (active_isa()) {
#ifdef PFNAS_HAS_AVX512
    case Isa::kAvx512:
      return avx512::calibrate(p);
#endif
#ifdef PFNAS_HAS_AVX2
    case Isa::kAvx2:
      return avx2::calibrate(p);
#endif
    default:
      return portable::calibrate(p);
  }
}

struct Subnet {
  py::object net_owner;
  Flat folded;
  std::vector<SubnetBlock> blocks;
  std::vector<SubnetBlock> convs;
  SubnetParams base;

  Subnet(py::object packed, const std::vector<Choice>& choices, py::object folded_tensor)
      : net_owner(std::move(packed)), folded(std::move(folded_tensor), "folded") {
    const auto& net = net_owner.cast<const PackedNet&>();
    PFNAS_CHECK(folded.size == net.folded_size);
    base.stem = net.stem;
    base.stem.affine = affine_at(folded, net.stem_affine);
    std::size_t num_taps = 0;
    for (const auto& [index, kernel_size, mid, reduced, tap] : choices) {
      PFNAS_CHECK(index >= 0 && static_cast<std::size_t>(index) < net.blocks.size());
      PFNAS_CHECK(tap < static_cast<int>(net.laterals.size()));
      num_taps += tap >= 0;
      blocks.push_back(
          make_block(net.blocks[static_cast<std::size_t>(index)], folded, kernel_size, mid, reduced, tap));
    }
    PFNAS_CHECK(num_taps == net.laterals.size());
    base.num_levels = static_cast<int>(net.laterals.size());
    for (std::size_t level = 0; level < net.laterals.size(); ++level) {
      base.levels[level].lateral = make_dense(net.laterals[level], folded);
      base.levels[level].predictor_affine = net.predictor_affines[level];
      base.neck_channels = net.laterals[level].base.out_channels;
    }
    base.num_convs = static_cast<int>(net.convs.size());
    for (const auto& row : net.convs) {
      for (const BlockSpec& spec : row) {
        convs.push_back(make_block(spec, folded, 3, spec.base.mid_channels, 0, -1));
      }
    }
    if (base.num_levels > 0) {
      base.predictor = make_dense(net.tail[0], folded);
    } else {
      base.feature = make_dense(net.tail[0], folded);
      base.hidden = make_dense(net.tail[1], folded);
      base.classifier = make_dense(net.tail[2], folded);
      base.feature.out_channels = padded(base.feature.out_channels);
      base.hidden.out_channels = padded(base.hidden.out_channels);
    }
    base.blocks = blocks.data();
    base.num_blocks = static_cast<int>(blocks.size());
    base.convs = convs.data();
  }
  Subnet(const Subnet&) = delete;

  // [N, 3, H, W], any strides.
  SubnetParams with_images(const TensorView& x) const {
    PFNAS_CHECK(x.shape[1] == 3 && x.shape[2] >= 1 && x.shape[3] >= 1);
    SubnetParams p = base;
    p.batch = x.shape[0];
    p.height = x.shape[2];
    p.width = x.shape[3];
    p.images = static_cast<const float*>(x.data);
    p.image_stride = x.strides[0];
    p.channel_stride = x.strides[1];
    p.row_stride = x.strides[2];
    p.column_stride = x.strides[3];
    return p;
  }

  // (index of the normalisation, values per channel, channels)
  using Measured = std::tuple<std::int64_t, std::int64_t, std::int64_t>;

  // Moments of one batch, written to `mean` and `var` (unbiased), [folded_size] each, at the places of the
  // folded scales. Overwrites the folded tensor: such a subnet serves one call at a time.
  std::vector<Measured> calibrate(py::handle images, py::object mean, py::object var) const {
    const auto& net = net_owner.cast<const PackedNet&>();
    const Flat means(std::move(mean), "mean"), vars(std::move(var), "var");
    PFNAS_CHECK(means.size == net.folded_size && vars.size == net.folded_size);
    const TensorView x = float_tensor(images, "images", 4);
    PFNAS_CHECK(x.shape[0] >= 1);
    std::vector<CalibratedNorm> norms;
    for (const Norm& norm : net.norms) {
      const std::int64_t at = norm.folded.first;
      norms.push_back({norm.gamma, norm.beta, norm.eps, norm.channels, folded.at(at),
                       folded.at(norm.folded.second), means.at(at), vars.at(at)});
    }
    CalibrationParams p;
    p.net = with_images(x);
    p.norms = norms.data();
    p.num_norms = static_cast<std::int64_t>(norms.size());
    {
      const py::gil_scoped_release released;
      run_calibration(p);
    }
    std::vector<Measured> measured;
    for (std::size_t i = 0; i < norms.size(); ++i) {
      if (norms[i].count == 0) continue;
      measured.emplace_back(static_cast<std::int64_t>(i), norms[i].count, norms[i].measured_channels);
    }
    return measured;
  }

  // images: [N, 3, H, W], any strides; out: logits [N, classes] or raw predictions [N, L, outputs].
  void run(py::handle images, py::handle out) const {
    const TensorView x = float_tensor(images, "images", 4);
    const bool is_detector = base.num_levels > 0;
    const TensorView y = dense_tensor(out, "out", is_detector ? 3 : 2);
    PFNAS_CHECK(y.shape[0] == x.shape[0]);
    SubnetParams p = with_images(x);
    const DynamicPointwiseConvParams& last = is_detector ? p.predictor : p.classifier;
    PFNAS_CHECK(y.shape[is_detector ? 2 : 1] == last.out_channels);
    if (is_detector) {
      p.num_locations = y.shape[1];
      p.raw = static_cast<float*>(y.data);
    } else {
      p.logits = static_cast<float*>(y.data);
    }
    if (p.batch == 0) return;
    const py::gil_scoped_release released;
    switch (active_isa()) {
#ifdef PFNAS_HAS_AVX512
      case Isa::kAvx512:
        return avx512::subnet(p);
#endif
#ifdef PFNAS_HAS_AVX2
      case Isa::kAvx2:
        return avx2::subnet(p);
#endif
      default:
        return portable::subnet(p);
    }
  }
};

// One block by itself. x: [N, H, W, in_channels padded to 16], y: [N, Ho, Wo, out_channels padded to 16].
void run_block(py::object weights, const py::dict& layout, py::object folded, int kernel_size,
               std::int64_t mid_channels, std::int64_t reduced_channels, py::handle x, py::handle y) {
  const BlockSpec spec = block_spec(Flat(std::move(weights), "weights"), layout);
  const SubnetBlock step =
      make_block(spec, Flat(std::move(folded), "folded"), kernel_size, mid_channels, reduced_channels, -1);
  FusedMBConvParams p = step.block;
  const TensorView in = dense_tensor(x, "x", 4), out = dense_tensor(y, "y", 4);
  p.batch = in.shape[0];
  p.height = in.shape[1];
  p.width = in.shape[2];
  p.out_height = (p.height + p.stride - 1) / p.stride;
  p.out_width = (p.width + p.stride - 1) / p.stride;
  PFNAS_CHECK(in.shape[3] == p.x_stride && out.shape[3] == p.out_channels && out.shape[0] == p.batch);
  PFNAS_CHECK(out.shape[1] == p.out_height && out.shape[2] == p.out_width);
  p.x = static_cast<const float*>(in.data);
  p.y = static_cast<float*>(out.data);
  p.y_stride = p.out_channels;
  if (step.has_residual) {
    p.residual = p.x;
    p.residual_stride = p.x_stride;
  }
  const py::gil_scoped_release released;
  switch (active_isa()) {
#ifdef PFNAS_HAS_AVX512
    case Isa::kAvx512:
      return avx512::fused_mbconv(p);
#endif
#ifdef PFNAS_HAS_AVX2
    case Isa::kAvx2:
      return avx2::fused_mbconv(p);
#endif
    default:
      return portable::fused_mbconv(p);
  }
}

}  // namespace

void register_subnet(py::module_& m) {
  py::class_<PackedNet>(m, "PackedNet")
      .def(py::init<py::object, py::dict>(), py::arg("weights"), py::arg("layout"))
      .def("fold", &PackedNet::fold, py::arg("means"), py::arg("vars"), py::arg("out"));
  m.def("fused_mbconv", &run_block, py::arg("weights"), py::arg("layout"), py::arg("folded"),
        py::arg("kernel_size"), py::arg("mid_channels"), py::arg("reduced_channels"), py::arg("x"),
        py::arg("y"));
  py::class_<Subnet>(m, "Subnet")
      .def(py::init<py::object, std::vector<Choice>, py::object>(), py::arg("net"), py::arg("choices"),
           py::arg("folded"))
      .def("run", &Subnet::run, py::arg("images"), py::arg("out"))
      .def("calibrate", &Subnet::calibrate, py::arg("images"), py::arg("mean"), py::arg("var"));
}

}  // namespace pfnas

// SPDX-License-Identifier: Apache-2.0
// The extension module pfnas_fast._C: one register_<op> per op, plus what the package asks about itself.
#include <omp.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <string>

#include "bindings/ops.h"
#include "bindings/tensor_arg.h"
#include "common/check.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/scratch.h"
#ifdef PFNAS_HAS_CUDA
#include "cuda/runtime.h"
#endif

#include <pybind11/stl.h>

namespace py = pybind11;

namespace pfnas {
namespace {

py::list compiled_isa_names() {
  py::list names;
  for (Isa isa : compiled_isas()) names.append(isa_name(isa));
  return names;
}

py::list supported_isa_names() {
  py::list names;
  for (Isa isa : compiled_isas()) {
    if (isa_supported(isa)) names.append(isa_name(isa));
  }
  return names;
}

void set_isa(const std::optional<std::string>& name) {
  if (name) {
    force_isa(*name);
  } else {
    unforce_isa();
  }
}

void register_errors() {
  // A caller's mistake becomes the package's own exception type, so `except pfnas_fast.errors.InputError`
  // catches it.
  py::register_exception_translator([](std::exception_ptr pending) {
    try {
      std::rethrow_exception(pending);
    } catch (const InputError& error) {
      const py::object type = py::module_::import("pfnas_fast.errors").attr("InputError");
      PyErr_SetString(type.ptr(), error.what());
    } catch (const TypeMismatch& error) {
      PyErr_SetString(PyExc_TypeError, error.what());
    }
  });
}

}  // namespace
}  // namespace pfnas

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of pfnas_fast. Use pfnas_fast.ops, not this module.";
  pfnas::register_errors();
  pfnas::workers_available();  // from now on, a forked child runs serially
  m.def("cpu_isa", [] { return std::string(pfnas::isa_name(pfnas::active_isa())); });
  m.def("compiled_isas", &pfnas::compiled_isa_names);
  m.def("supported_isas", &pfnas::supported_isa_names);
  m.def("force_cpu_isa", &pfnas::set_isa, py::arg("tier").none(true));
  m.def("num_threads", [] { return omp_get_max_threads(); });
  m.def("advise_huge_pages", [](py::handle tensor) {
    const pfnas::TensorView view = pfnas::view_tensor(tensor, "advise_huge_pages", "tensor");
    PFNAS_CHECK(view.is_float32() && view.is_cpu() && view.is_contiguous());
    pfnas::advise_huge_pages(view.data, static_cast<std::size_t>(view.numel()) * sizeof(float));
  });
  m.def("scratch_bytes", &pfnas::scratch_bytes);
  m.def("release_scratch", &pfnas::release_scratch);
  m.def("poison_thread_scratch", &pfnas::poison_thread_scratch);
#ifdef PFNAS_HAS_CUDA
  m.attr("cuda_built") = true;
  m.def("cuda_device_count", &pfnas::cuda::device_count);
  pfnas::register_dynamic_depthwise_conv_cuda(m);
  pfnas::register_dynamic_pointwise_conv_cuda(m);
  pfnas::register_path_filter_cuda(m);
#else
  m.attr("cuda_built") = false;
  m.def("cuda_device_count", [] { return 0; });
#endif
  m.attr("compiler") = __VERSION__;
  pfnas::register_batch_norm_act(m);
  pfnas::register_dynamic_depthwise_conv(m);
  pfnas::register_dynamic_pointwise_conv(m);
  pfnas::register_path_cost(m);
  pfnas::register_path_score(m);
  pfnas::register_path_score_int8(m);
  pfnas::register_path_search(m);
  pfnas::register_subnet(m);
  pfnas::register_train_mbconv(m);
  pfnas::register_versions(m);
  pfnas::register_tensor_pool(m);
}

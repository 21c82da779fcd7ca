// SPDX-License-Identifier: Apache-2.0
// Whether any of many tensors has been written to, or replaced. torch counts the in-place writes of each
// tensor; reading 500 of these counters from Python takes longer than preparing a path, and every call needs
// them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <utility>
#include <vector>

#include "bindings/ops.h"

namespace py = pybind11;

namespace pfnas {
namespace {

class VersionSum {
 public:
  // `counter`: the descriptor of the attribute that counts, torch.Tensor._version.
  VersionSum(std::vector<py::object> tensors, py::object counter)
      : tensors_(std::move(tensors)),
        counter_(std::move(counter)),
        read_(Py_TYPE(counter_.ptr())->tp_descr_get) {
    if (read_ == nullptr) throw py::type_error("VersionSum: expected a descriptor for counter");
  }

  long long sum() const {
    long long total = 0;
    for (const py::object& tensor : tensors_) {
      const auto count = py::reinterpret_steal<py::object>(
          read_(counter_.ptr(), tensor.ptr(), reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr()))));
      if (!count) throw py::error_already_set();
      total += PyLong_AsLongLong(count.ptr());
    }
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
    return total;
  }

 private:
  std::vector<py::object> tensors_;
  py::object counter_;
  descrgetfunc read_;
};

// Whether entries of dictionaries still hold the objects that they held: 700 comparisons of a net take 25 us
// in Python, and every call needs them.
class SameEntries {
 public:
  using Entry = std::tuple<py::dict, py::object, py::object>;  // dictionary, key, value

  explicit SameEntries(std::vector<Entry> entries) : entries_(std::move(entries)) {}

  bool all() const {
    for (const auto& [dict, key, value] : entries_) {
      const PyObject* found = PyDict_GetItemWithError(dict.ptr(), key.ptr());
      if (found == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
      if (found != value.ptr()) return false;
    }
    return true;
  }

 private:
  std::vector<Entry> entries_;
};

}  // namespace

void register_versions(py::module_& m) {
  py::class_<VersionSum>(m, "VersionSum")
      .def(py::init<std::vector<py::object>, py::object>())
      .def("sum", &VersionSum::sum);
  py::class_<SameEntries>(m, "SameEntries")
      .def(py::init<std::vector<SameEntries::Entry>>())
      .def("all", &SameEntries::all);
}

}  // namespace pfnas

// The bindings of slap_fast._C, and nothing else.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "pack.h"

namespace py = pybind11;

namespace {

py::list pack(const py::array_t<std::int64_t, py::array::c_style>& lengths,
              std::int64_t max_tokens) {
  if (lengths.ndim() != 1) {
    throw py::value_error("lengths: found " + std::to_string(lengths.ndim()) +
                          " axes, expected 1");
  }
  // A copy, as another thread may write to the array once the GIL is released.
  const std::vector<std::int64_t> copy(lengths.data(), lengths.data() + lengths.size());
  slap_fast::Bins bins;
  {
    py::gil_scoped_release release;
    bins = slap_fast::pack(copy, max_tokens);
  }
  py::list result(bins.offsets.size() - 1);
  for (std::size_t b = 0; b < result.size(); ++b) {
    const std::int64_t begin = bins.offsets[b];
    py::list bin(bins.offsets[b + 1] - begin);
    for (std::size_t i = 0; i < bin.size(); ++i) bin[i] = py::int_(bins.indices[begin + i]);
    result[b] = std::move(bin);
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ implementations of host-side operations; call them through slap_fast.ops.";
  m.def("pack", &pack, py::arg("lengths").noconvert(), py::arg("max_tokens"),
        "First-fit decreasing of int64 lengths [n] into bins of max_tokens: a list of lists of "
        "indices. Raises ValueError for a length below 0 or above max_tokens.");
}

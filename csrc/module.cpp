// The bindings of slap_fast._C, and nothing else.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "mel_patches.h"
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

template <class T>
using Array = py::array_t<T, py::array::c_style>;

void check_shape(const char* name, const py::array& array, const std::vector<py::ssize_t>& shape) {
  const bool equal = std::size_t(array.ndim()) == shape.size() &&
                     std::equal(shape.begin(), shape.end(), array.shape());
  if (!equal) throw py::value_error(std::string(name) + ": found another shape than expected");
}

template <class Sample>
py::tuple mel_patches(const slap_fast::MelPatches& mel, const Array<Sample>& waveform,
                      const Array<std::int64_t>& cu_samples, const Array<std::int32_t>& masks,
                      int num_threads) {
  check_shape("waveform", waveform, {waveform.size()});
  check_shape("cu_samples", cu_samples, {cu_samples.size()});
  check_shape("masks", masks, {masks.size() / 4, 4});
  // Copies, as another thread may write to the arrays once the GIL is released.
  const std::vector<std::int64_t> bounds(cu_samples.data(), cu_samples.data() + cu_samples.size());
  std::vector<slap_fast::MelMask> spans;
  for (const std::int32_t* m = masks.data(); m != masks.data() + masks.size(); m += 4) {
    spans.push_back({m[0], m[1], m[2], m[3]});
  }
  const std::vector<std::int64_t> starts = mel.starts(bounds, waveform.size());
  Array<float> patches({static_cast<py::ssize_t>(starts.back()), py::ssize_t{mel.patch_dim()}});
  Array<std::int32_t> coords({static_cast<py::ssize_t>(starts.back()), py::ssize_t{2}});
  Array<std::int32_t> cu_seqlens(static_cast<py::ssize_t>(starts.size()));
  std::copy(starts.begin(), starts.end(), cu_seqlens.mutable_data());
  std::int64_t max_seqlen = 0;
  for (std::size_t b = 1; b < starts.size(); ++b) {
    max_seqlen = std::max(max_seqlen, starts[b] - starts[b - 1]);
  }
  const Sample* samples = waveform.data();
  float* out = patches.mutable_data();
  std::int32_t* out_coords = coords.mutable_data();
  {
    py::gil_scoped_release release;
    mel.run(samples, bounds, starts, std::move(spans), num_threads, out, out_coords);
  }
  return py::make_tuple(patches, coords, cu_seqlens, max_seqlen);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ implementations of host-side operations; call them through slap_fast.ops.";
  m.def("pack", &pack, py::arg("lengths").noconvert(), py::arg("max_tokens"),
        "First-fit decreasing of int64 lengths [n] into bins of max_tokens: a list of lists of "
        "indices. Raises ValueError for a length below 0 or above max_tokens.");

  m.def("mel_instruction_sets", &slap_fast::mel_instruction_sets,
        "The names of those that MelPatches can use on this machine, best first.");
  constexpr const char* kCall =
      "waveform [num_samples] float32 or int16, cu_samples int64 [B + 1], masks int32 [M, 4] = "
      "(clip, axis, start, stop) -> patches [T, patch_dim], coords [T, 2], cu_seqlens [B + 1], "
      "max_seqlen.";
  py::class_<slap_fast::MelPatches>(
      m, "MelPatches", "slap_fast.ops.mel_patches for one configuration and instruction set.")
      .def(py::init([](bool kaldi, int n_fft, int hop_length, int patch_time, int patch_freq,
                       float floor, float mean, float std, const Array<float>& window,
                       const Array<float>& filterbank, const std::string& instruction_set) {
             const int win_length = static_cast<int>(window.size());
             const int n_mels = static_cast<int>(filterbank.size() / (n_fft / 2 + 1));
             check_shape("window", window, {win_length});
             check_shape("filterbank", filterbank, {n_fft / 2 + 1, n_mels});
             const slap_fast::MelConfig config{kaldi,      n_fft,      win_length, hop_length, n_mels,
                                               patch_time, patch_freq, floor,      mean,       std};
             return std::make_unique<slap_fast::MelPatches>(config, window.data(),
                                                            filterbank.data(), instruction_set);
           }),
           py::kw_only(), py::arg("kaldi"), py::arg("n_fft"), py::arg("hop_length"),
           py::arg("patch_time"), py::arg("patch_freq"), py::arg("floor"), py::arg("mean"),
           py::arg("std"), py::arg("window").noconvert(), py::arg("filterbank").noconvert(),
           py::arg("instruction_set"),
           "window [win_length], filterbank [n_fft / 2 + 1, n_mels]; n_fft a power of two.")
      .def("__call__", &mel_patches<float>, py::arg("waveform").noconvert(),
           py::arg("cu_samples").noconvert(), py::arg("masks").noconvert(), py::arg("num_threads"),
           kCall)
      .def("__call__", &mel_patches<std::int16_t>, py::arg("waveform").noconvert(),
           py::arg("cu_samples").noconvert(), py::arg("masks").noconvert(), py::arg("num_threads"));
}

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "mel_kernel.h"

namespace slap_fast {

// slap_fast.config.MelConfig, with its floor before the logarithm.
struct MelConfig {
  bool kaldi;
  int n_fft, win_length, hop_length, n_mels, patch_time, patch_freq;
  float floor, mean, std;
};

// Frames (axis 0) or mel bins (axis 1) start .. stop - 1 of a clip, set to 0.
struct MelMask {
  std::int32_t clip, axis, start, stop;
};

// "avx512", "avx2", "portable": those that this processor runs, best first.
std::vector<std::string> mel_instruction_sets();

// Waveforms to normalised log-mel patches. The bits of a clip's patches depend on the instruction
// set, and neither on the number of threads nor on the other clips.
class MelPatches {
 public:
  // window [win_length]; filterbank [n_fft / 2 + 1, n_mels], of which zeros at the ends of a filter
  // are skipped. Throws std::invalid_argument where n_fft is no power of two from 4 on.
  MelPatches(const MelConfig& config, const float* window, const float* filterbank,
             const std::string& instruction_set);
  MelPatches(const MelPatches&) = delete;
  MelPatches& operator=(const MelPatches&) = delete;

  // bounds [B + 1], where clips begin: from 0, never falling, the last at most num_samples; else
  // throws std::invalid_argument. Returns where their patches begin [B + 1].
  std::vector<std::int64_t> starts(const std::vector<std::int64_t>& bounds,
                                   std::int64_t num_samples) const;

  // Fills patches [T, patch_time * patch_freq] and coords [T, 2], T = starts.back(). `Sample` is
  // float or std::int16_t. Masks of no clip, or parts of them outside the clip, do nothing.
  template <class Sample>
  void run(const Sample* waveform, const std::vector<std::int64_t>& bounds,
           const std::vector<std::int64_t>& starts, std::vector<MelMask> masks, int num_threads,
           float* patches, std::int32_t* coords) const;

  int patch_dim() const { return tables_.patch_time * tables_.patch_freq; }

 private:
  std::int64_t num_frames(std::int64_t num_samples) const;
  template <class Sample>
  void compute(const Sample* clip, std::int64_t num_samples, std::int64_t first_row,
               std::int64_t end_row, float* scratch, float* patches) const;
  template <class Sample>
  const Sample* fill_span(const Sample* clip, std::int64_t num_samples, std::int64_t frame,
                          int frames, float* span) const;
  void apply(const MelMask& mask, std::int64_t first_row, std::int64_t end_row,
             float* patches) const;

  const MelKernel* kernel_;
  MelTables tables_;
  std::vector<float> window_;
  std::vector<Root> roots_;
  std::vector<int> slots_;
  std::vector<MelTap> taps_;
  std::vector<MelFilter> filters_;
};

}  // namespace slap_fast

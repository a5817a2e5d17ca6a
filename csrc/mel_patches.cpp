#include "mel_patches.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <functional>
#include <memory>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <type_traits>

namespace slap_fast {
namespace {

constexpr std::int64_t kPieceColumns = 64;  // 10 s: enough work for a thread to ask for
constexpr std::size_t kAlignment = 64;      // bytes

std::vector<const MelKernel*> kernels() {
  std::vector<const MelKernel*> found;
#ifdef SLAP_FAST_X86
  if (__builtin_cpu_supports("avx512f")) found.push_back(&kMelAvx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&kMelAvx2);
#endif
  found.push_back(&kMelPortable);
  return found;
}

// Where mel_lanes.h leaves result k of a transform: digits of k, the first pass's highest.
int digit_reversed(int k, int size) {
  int position = 0;
  bool odd = false;
  for (int n = size; n > 1; n /= 2) odd = !odd;
  for (int radix = odd ? 2 : 4; size > 1; radix = 4) {
    size /= radix;
    position += k % radix * size;
    k /= radix;
  }
  return position;
}

float to_float(float sample) { return sample; }
float to_float(std::int16_t sample) { return static_cast<float>(sample) / 32768; }

// Rows first .. end - 1 of the patches of one clip.
struct Piece {
  std::int32_t clip;
  std::int64_t first, end;
};

}  // namespace

std::vector<std::string> mel_instruction_sets() {
  std::vector<std::string> names;
  for (const MelKernel* kernel : kernels()) names.push_back(kernel->name);
  return names;
}

MelPatches::MelPatches(const MelConfig& config, const float* window, const float* filterbank,
                       const std::string& instruction_set)
    : kernel_(nullptr), window_(window, window + config.win_length) {
  for (const MelKernel* kernel : kernels()) {
    if (kernel->name == instruction_set) kernel_ = kernel;
  }
  if (!kernel_) {
    throw std::invalid_argument("instruction_set: found " + instruction_set +
                                ", expected one of mel_instruction_sets()");
  }
  const std::size_t lanes = kernel_->lanes;
  window_.resize((window_.size() + lanes - 1) / lanes * lanes);
  const int n_fft = config.n_fft, half = n_fft / 2, num_mels = config.n_mels;
  if (n_fft < 4 || (n_fft & (n_fft - 1))) {
    throw std::invalid_argument("n_fft: found " + std::to_string(n_fft) +
                                ", expected a power of two");
  }
  for (int j = 0; j < n_fft; ++j) {
    const double angle = -2 * std::acos(-1.0) * j / n_fft;
    roots_.push_back({static_cast<float>(std::cos(angle)), static_cast<float>(std::sin(angle))});
  }
  for (int k = 0; k < half; ++k) slots_.push_back(2 * digit_reversed(k, half));
  slots_.push_back(1);

  std::vector<std::size_t> ends;
  for (int m = 0; m < num_mels; ++m) {
    const auto weight = [&](int bin) { return filterbank[std::size_t(bin) * num_mels + m]; };
    int first = 0, end = half + 1;
    // One bin remains, of weight 0, where a filter has none: it passes NaN on.
    while (first < half && weight(first) == 0) ++first;
    while (end > first + 1 && weight(end - 1) == 0) --end;
    for (int bin = first; bin < end; ++bin) taps_.push_back({slots_[bin], weight(bin) / 4});
    while (taps_.size() % kTaps) taps_.push_back({slots_[first], 0});
    ends.push_back(taps_.size());
  }
  for (int m = 0; m < num_mels; ++m) {
    filters_.push_back({taps_.data() + (m ? ends[m - 1] : 0), taps_.data() + ends[m]});
  }
  tables_ = {config.kaldi,      n_fft,
             config.win_length, config.hop_length,
             num_mels,          config.patch_time,
             config.patch_freq, config.floor,
             config.mean,       1 / config.std,
             window_.data(),    roots_.data(),
             slots_.data(),     filters_.data()};
}

std::int64_t MelPatches::num_frames(std::int64_t num_samples) const {
  if (num_samples == 0) return 0;
  if (!tables_.kaldi) return num_samples / tables_.hop_length + 1;
  const std::int64_t past = std::max<std::int64_t>(0, num_samples - tables_.win_length);
  return past / tables_.hop_length + 1;
}

std::vector<std::int64_t> MelPatches::starts(const std::vector<std::int64_t>& bounds,
                                             std::int64_t num_samples) const {
  if (bounds.empty() || bounds[0] != 0 || !std::is_sorted(bounds.begin(), bounds.end()) ||
      bounds.back() > num_samples) {
    throw std::invalid_argument("cu_samples: expected 0 first, no decrease, and at most " +
                                std::to_string(num_samples) + " last");
  }
  std::vector<std::int64_t> starts{0};
  for (std::size_t b = 1; b < bounds.size(); ++b) {
    const std::int64_t frames = num_frames(bounds[b] - bounds[b - 1]);
    const std::int64_t columns = (frames + tables_.patch_time - 1) / tables_.patch_time;
    starts.push_back(starts.back() + columns * (tables_.n_mels / tables_.patch_freq));
  }
  return starts;
}

// Copies the samples of frames `frame` .. `frame + frames - 1` of a clip to `span`, with the clip's
// borders. Returns where samples will be read next.
template <class Sample>
const Sample* MelPatches::fill_span(const Sample* clip, std::int64_t num_samples,
                                    std::int64_t frame, int frames, float* span) const {
  const MelTables& t = tables_;
  const std::int64_t count = std::int64_t{frames - 1} * t.hop_length + t.win_length;
  // torchaudio: the window sits in the middle of n_fft samples, of which half lie before the frame.
  const std::int64_t first =
      frame * t.hop_length - (t.kaldi ? 0 : t.n_fft / 2 - (t.n_fft - t.win_length) / 2);
  if (first >= 0 && first + count <= num_samples) {
    if constexpr (std::is_same_v<Sample, float>) {
      std::copy_n(clip + first, count, span);
    } else {
      kernel_->from_int16(clip + first, count, span);
    }
    return clip + first + count;
  }
  // Reflection needs more samples than half a transform: silence follows where there are fewer.
  const std::int64_t last = std::max<std::int64_t>(num_samples, t.n_fft / 2 + 1) - 1;
  for (std::int64_t i = 0; i < count; ++i) {
    std::int64_t at = first + i;
    if (!t.kaldi) at = at < 0 ? -at : at > last ? 2 * last - at : at;
    span[i] = at >= 0 && at < num_samples ? to_float(clip[at]) : 0.0f;
  }
  return clip;
}

template <class Sample>
void MelPatches::compute(const Sample* clip, std::int64_t num_samples, std::int64_t first_row,
                         std::int64_t end_row, float* scratch, float* patches) const {
  const std::int64_t num_frames = this->num_frames(num_samples);
  float* span = scratch + std::max(tables_.n_fft, kernel_->lanes) * kernel_->lanes;
  for (std::int64_t row = first_row; row < end_row; row += kernel_->lanes) {
    const int rows = static_cast<int>(std::min<std::int64_t>(kernel_->lanes, end_row - row));
    const std::int64_t left = std::max<std::int64_t>(0, num_frames - row);
    const int frames = static_cast<int>(std::min<std::int64_t>(rows, left));
    const Sample* next = frames ? fill_span(clip, num_samples, row, frames, span) : nullptr;
    kernel_->log_mel(tables_, span, frames, row, rows, next, scratch, patches);
  }
}

void MelPatches::apply(const MelMask& mask, std::int64_t first_row, std::int64_t end_row,
                       float* patches) const {
  const MelTables& t = tables_;
  const bool in_time = mask.axis == 0;
  const std::int64_t begin = in_time ? std::max<std::int64_t>(first_row, mask.start) : first_row;
  const std::int64_t end = in_time ? std::min<std::int64_t>(end_row, mask.stop) : end_row;
  const int low = in_time ? 0 : std::max(0, mask.start);
  const int high = in_time ? t.n_mels : std::min(t.n_mels, mask.stop);
  const int bands = t.n_mels / t.patch_freq;
  for (std::int64_t row = begin; row < end; ++row) {
    for (int band = low / t.patch_freq; band * t.patch_freq < high; ++band) {
      const std::int64_t patch = row / t.patch_time * bands + band;
      float* bins = patches + (patch * t.patch_time + row % t.patch_time) * t.patch_freq;
      const int from = std::max(0, low - band * t.patch_freq);
      const int to = std::min(t.patch_freq, high - band * t.patch_freq);
      if (from < to) std::fill(bins + from, bins + to, 0.0f);
    }
  }
}

template <class Sample>
void MelPatches::run(const Sample* waveform, const std::vector<std::int64_t>& bounds,
                     const std::vector<std::int64_t>& starts, std::vector<MelMask> masks,
                     int num_threads, float* patches, std::int32_t* coords) const {
  const int bands = tables_.n_mels / tables_.patch_freq;
  std::vector<Piece> pieces;
  for (std::size_t clip = 0; clip + 1 < starts.size(); ++clip) {
    const std::int64_t tokens = starts[clip + 1] - starts[clip];
    for (std::int64_t token = 0; token < tokens; ++token) {
      *coords++ = static_cast<std::int32_t>(token / bands);
      *coords++ = static_cast<std::int32_t>(token % bands);
    }
    const std::int64_t rows = tokens / bands * tables_.patch_time;
    const std::int64_t step = kPieceColumns * tables_.patch_time;
    for (std::int64_t row = 0; row < rows; row += step) {
      pieces.push_back({static_cast<std::int32_t>(clip), row, std::min(row + step, rows)});
    }
  }
  const auto by_clip = [](const MelMask& a, const MelMask& b) { return a.clip < b.clip; };
  std::sort(masks.begin(), masks.end(), by_clip);

  std::atomic<std::size_t> next{0};
  const auto work = [&](float* scratch) {
    for (std::size_t i; (i = next++) < pieces.size();) {
      const Piece& piece = pieces[i];
      const std::int64_t begin = bounds[piece.clip], end = bounds[piece.clip + 1];
      float* out = patches + starts[piece.clip] * patch_dim();
      compute(waveform + begin, end - begin, piece.first, piece.end, scratch, out);
      const auto own = std::equal_range(masks.begin(), masks.end(), MelMask{piece.clip, 0, 0, 0},
                                        by_clip);
      for (auto mask = own.first; mask != own.second; ++mask) {
        apply(*mask, piece.first, piece.end, out);
      }
    }
  };

  const std::size_t lanes = kernel_->lanes, n_fft = tables_.n_fft;
  const std::size_t span = (lanes - 1) * tables_.hop_length + tables_.win_length + lanes;
  const std::size_t room = std::max(n_fft, lanes) * lanes + span + kAlignment / sizeof(float);
  const std::size_t workers = std::min<std::size_t>(std::max(1, num_threads), pieces.size());
  std::vector<std::vector<float>> scratch(workers, std::vector<float>(room));
  std::vector<std::thread> threads;
  threads.reserve(workers);
  const auto work_with = [&](std::vector<float>& memory) {
    void* start = memory.data();
    std::size_t bytes = memory.size() * sizeof(float);
    work(static_cast<float*>(std::align(kAlignment, sizeof(float), start, bytes)));
  };
  for (std::size_t i = 1; i < workers; ++i) {
    try {
      threads.emplace_back(work_with, std::ref(scratch[i]));
    } catch (const std::system_error&) {
      break;  // no more threads to be had: those there are do all of it
    }
  }
  if (workers) work_with(scratch[0]);
  for (std::thread& thread : threads) thread.join();
}

template void MelPatches::run(const float*, const std::vector<std::int64_t>&,
                              const std::vector<std::int64_t>&, std::vector<MelMask>, int, float*,
                              std::int32_t*) const;
template void MelPatches::run(const std::int16_t*, const std::vector<std::int64_t>&,
                              const std::vector<std::int64_t>&, std::vector<MelMask>, int, float*,
                              std::int32_t*) const;

}  // namespace slap_fast

#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__GNUC__) && defined(__x86_64__)
#define SLAP_FAST_X86 1  // GCC and clang can compile one file for a newer processor than the rest
#endif

namespace slap_fast {

struct Root {
  float re, im;
};

constexpr int kTaps = 4;

// One bin of a filter: where the transform leaves its power, and its weight for 4 times the power.
struct MelTap {
  int slot;
  float weight;
};

// A multiple of kTaps, the last of weight 0: the loops of neighbours are then as long, and foreseen.
struct MelFilter {
  const MelTap *begin, *end;
};

// What a kernel reads. Plain pointers, as a kernel must use no template of the standard library: the
// linker could keep its copy, in the kernel's instructions, for the whole extension.
struct MelTables {
  bool kaldi;  // remove the mean, then pre-emphasise
  int n_fft, win_length, hop_length, n_mels, patch_time, patch_freq;
  float floor, mean, scale;  // (ln(max(mel, floor)) - mean) * scale
  const float* window;       // [win_length], then zeros up to whole vectors
  const Root* roots;         // [n_fft], exp(-2 pi i j / n_fft)
  const int* slots;          // [n_fft / 2 + 1], where the power of a bin lies after the transform
  const MelFilter* filters;  // [n_mels]
};

// One implementation of the arithmetic, for one instruction set.
struct MelKernel {
  const char* name;
  int lanes;  // frames at a time

  // Writes `rows` <= lanes rows of the patches of a clip, from its row `first_row` on. Row
  // first_row + l is the log-mel of the frame at samples + l * hop_length where l < frames, else
  // silence. Reads `lanes` frames, rounded up to whole vectors, unless frames is 0. Fetches what
  // lies at `next` into the cache. scratch: [max(n_fft, lanes)][lanes], aligned to 64 bytes.
  void (*log_mel)(const MelTables& tables, const float* samples, int frames, std::int64_t first_row,
                  int rows, const void* next, float* scratch, float* patches);

  void (*from_int16)(const std::int16_t* samples, std::int64_t count, float* out);  // / 32768
};

extern const MelKernel kMelPortable;
#ifdef SLAP_FAST_X86
extern const MelKernel kMelAvx2;
extern const MelKernel kMelAvx512;
#endif

}  // namespace slap_fast

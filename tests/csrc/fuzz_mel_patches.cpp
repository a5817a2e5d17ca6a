// For each seed that it reads, calls MelPatches with a random configuration, clips and masks, and
// answers "ok". Built with sanitizers, which end it at the first fault. Inputs and outputs are heap
// blocks of the exact size, so that a step outside them is one, and outputs start as NaN, so that a
// gap shows.

#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "../../csrc/mel_patches.h"

namespace {

using slap_fast::MelConfig;
using slap_fast::MelMask;
using slap_fast::MelPatches;

using Random = std::mt19937_64;

int between(Random& random, int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(random);
}

MelConfig any_config(Random& random) {
  MelConfig config{};
  config.kaldi = between(random, 0, 1);
  config.n_fft = 1 << between(random, 2, 10);
  config.win_length = between(random, 1, config.n_fft);
  config.hop_length = between(random, 1, 700);
  config.patch_time = between(random, 1, 20);
  config.patch_freq = between(random, 1, 20);
  config.n_mels = config.patch_freq * between(random, 1, 5);
  config.floor = 1e-10f;
  config.mean = -4;
  config.std = 4;
  return config;
}

std::vector<std::int64_t> any_bounds(Random& random, int hop_length) {
  std::vector<std::int64_t> bounds{0};
  for (int clips = between(random, 0, 6); clips > 0; --clips) {
    const int most = between(random, 0, 3) ? 2000 : 40 * hop_length;
    bounds.push_back(bounds.back() + (between(random, 0, 4) ? between(random, 0, most) : 0));
  }
  return bounds;
}

template <class Sample>
std::vector<Sample> any_samples(Random& random, std::int64_t count);

template <>
std::vector<std::int16_t> any_samples(Random& random, std::int64_t count) {
  std::vector<std::int16_t> samples(count);
  for (auto& sample : samples) sample = static_cast<std::int16_t>(between(random, -32768, 32767));
  return samples;
}

template <>
std::vector<float> any_samples(Random& random, std::int64_t count) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kHostile[] = {0,     1,         -1,         1e-38f, 1e-45f,
                                3e38f, kInfinity, -kInfinity, NAN,    -NAN};
  const bool hostile = between(random, 0, 1);
  std::vector<float> samples(count);
  for (auto& sample : samples) {
    const bool pick = hostile && between(random, 0, 20) == 0;
    sample = pick ? kHostile[between(random, 0, 9)] : between(random, -1000, 1000) * 1e-3f;
  }
  return samples;
}

std::vector<MelMask> any_masks(Random& random, int clips) {
  std::vector<MelMask> masks(between(random, 0, 8));
  for (MelMask& mask : masks) {
    mask = {between(random, 0, clips), between(random, 0, 1), between(random, 0, 100), 0};
    mask.stop = between(random, 0, 9) ? mask.start + between(random, 0, 50) : 2147483647;
  }
  return masks;
}

template <class Sample>
bool call(Random& random, const MelPatches& mel, const MelConfig& config) {
  const std::vector<std::int64_t> bounds = any_bounds(random, config.hop_length);
  const std::vector<Sample> samples = any_samples<Sample>(random, bounds.back());
  const std::vector<std::int64_t> starts = mel.starts(bounds, bounds.back());
  std::vector<float> patches(starts.back() * mel.patch_dim(), NAN);
  std::vector<std::int32_t> coords(starts.back() * 2, -1);
  const auto masks = any_masks(random, static_cast<int>(bounds.size()));
  mel.run(samples.data(), bounds, starts, masks, between(random, 1, 3), patches.data(),
          coords.data());
  bool whole = true;
  for (const std::int32_t coord : coords) whole = whole && coord >= 0;
  if (std::is_same_v<Sample, std::int16_t>) {
    for (const float value : patches) whole = whole && std::isfinite(value);
  }
  return whole;
}

}  // namespace

int main() {
  for (int seed; std::scanf("%d", &seed) == 1; std::fflush(stdout)) {
    Random random(seed);
    const MelConfig config = any_config(random);
    const std::vector<float> window(config.win_length, 0.5f);
    std::vector<float> filterbank(std::size_t(config.n_fft / 2 + 1) * config.n_mels);
    for (float& weight : filterbank) weight = between(random, 0, 3) ? 0.0f : 0.25f;
    const auto sets = slap_fast::mel_instruction_sets();
    const std::string& set = sets[between(random, 0, static_cast<int>(sets.size()) - 1)];
    const MelPatches mel(config, window.data(), filterbank.data(), set);
    const bool whole = between(random, 0, 1) ? call<float>(random, mel, config)
                                             : call<std::int16_t>(random, mel, config);
    std::puts(whole ? "ok" : "a patch or coordinate was not written");
  }
}

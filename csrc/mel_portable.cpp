#include <cstring>

#include "mel_kernel.h"

namespace slap_fast {
namespace {

constexpr int kLanes = 4;  // what SSE2 and NEON have; compilers turn the loops into them

struct V {
  float v[kLanes];
};

inline V operator+(V a, V b) {
  for (int l = 0; l < kLanes; ++l) a.v[l] += b.v[l];
  return a;
}
inline V operator-(V a, V b) {
  for (int l = 0; l < kLanes; ++l) a.v[l] -= b.v[l];
  return a;
}
inline V operator*(V a, V b) {
  for (int l = 0; l < kLanes; ++l) a.v[l] *= b.v[l];
  return a;
}
inline V divide(V a, V b) {
  for (int l = 0; l < kLanes; ++l) a.v[l] /= b.v[l];
  return a;
}
inline V multiply_add(V a, V b, V c) { return a * b + c; }
inline V multiply_subtract(V a, V b, V c) { return a * b - c; }
inline V broadcast(float x) {
  V out;
  for (int l = 0; l < kLanes; ++l) out.v[l] = x;
  return out;
}
inline V load(const float* p) {
  V out;
  std::memcpy(out.v, p, sizeof out.v);
  return out;
}
inline void store(float* p, V x) { std::memcpy(p, x.v, sizeof x.v); }

inline V at_least(V x, V bound) {
  for (int l = 0; l < kLanes; ++l) x.v[l] = x.v[l] < bound.v[l] ? bound.v[l] : x.v[l];
  return x;
}

inline V split(V x, V& exponent) {
  std::int32_t bits[kLanes];
  std::memcpy(bits, x.v, sizeof bits);
  for (int l = 0; l < kLanes; ++l) {
    const std::int32_t above = bits[l] - 0x3f3504f3;  // sqrt(1/2)
    exponent.v[l] = static_cast<float>(above >> 23);
    bits[l] -= above & ~0x7fffff;
  }
  std::memcpy(x.v, bits, sizeof bits);
  return x;
}

inline V load_int16(const std::int16_t* p) {
  V out;
  for (int l = 0; l < kLanes; ++l) out.v[l] = p[l];
  return out;
}

inline void transpose(V* block) {
  for (int i = 0; i < kLanes; ++i) {
    for (int l = 0; l < i; ++l) {
      const float x = block[i].v[l];
      block[i].v[l] = block[l].v[i];
      block[l].v[i] = x;
    }
  }
}

inline void load_transposed(const float* p, std::ptrdiff_t stride, V* block) {
  for (int l = 0; l < kLanes; ++l) block[l] = load(p + l * stride);
  transpose(block);
}

inline void prefetch(const char*) {}

#include "mel_lanes.h"

}  // namespace

const MelKernel kMelPortable = {"portable", kLanes, &log_mel, &from_int16};

}  // namespace slap_fast

#include "mel_kernel.h"

#ifdef SLAP_FAST_X86
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace slap_fast {
namespace {

constexpr int kLanes = 8;

struct V {
  __m256 v;
};

inline V operator+(V a, V b) { return {_mm256_add_ps(a.v, b.v)}; }
inline V operator-(V a, V b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline V operator*(V a, V b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline V divide(V a, V b) { return {_mm256_div_ps(a.v, b.v)}; }
inline V multiply_add(V a, V b, V c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline V multiply_subtract(V a, V b, V c) { return {_mm256_fmsub_ps(a.v, b.v, c.v)}; }
inline V broadcast(float x) { return {_mm256_set1_ps(x)}; }
inline V load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, V x) { _mm256_storeu_ps(p, x.v); }

inline V at_least(V x, V bound) { return {_mm256_max_ps(bound.v, x.v)}; }  // NaN: the second

inline V split(V x, V& exponent) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i above = _mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f3504f3));  // sqrt(1/2)
  const __m256i e = _mm256_srai_epi32(above, 23);
  exponent = {_mm256_cvtepi32_ps(e)};
  return {_mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(e, 23)))};
}

inline V load_int16(const std::int16_t* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(x))};
}

// Blocks of 4 x 4 within the halves of the vectors, then the halves themselves.
inline void transpose(V* block) {
  __m256 quads[8];
  for (int i = 0; i < 8; i += 4) {
    const __m256 a = _mm256_unpacklo_ps(block[i].v, block[i + 1].v);
    const __m256 b = _mm256_unpackhi_ps(block[i].v, block[i + 1].v);
    const __m256 c = _mm256_unpacklo_ps(block[i + 2].v, block[i + 3].v);
    const __m256 d = _mm256_unpackhi_ps(block[i + 2].v, block[i + 3].v);
    quads[i] = _mm256_shuffle_ps(a, c, 0x44);
    quads[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
    quads[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
    quads[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    block[i] = {_mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20)};
    block[i + 4] = {_mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31)};
  }
}

#include "mel_lanes.h"

}  // namespace

const MelKernel kMelAvx2 = {"avx2", kLanes, &log_mel, &from_int16};

}  // namespace slap_fast

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

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

// 4 x 4 within each half of the vectors.
inline void transpose_halves(const __m256* rows, __m256* out) {
  const __m256 a = _mm256_unpacklo_ps(rows[0], rows[1]);
  const __m256 b = _mm256_unpackhi_ps(rows[0], rows[1]);
  const __m256 c = _mm256_unpacklo_ps(rows[2], rows[3]);
  const __m256 d = _mm256_unpackhi_ps(rows[2], rows[3]);
  out[0] = _mm256_shuffle_ps(a, c, 0x44);
  out[1] = _mm256_shuffle_ps(a, c, 0xee);
  out[2] = _mm256_shuffle_ps(b, d, 0x44);
  out[3] = _mm256_shuffle_ps(b, d, 0xee);
}

inline void transpose(V* block) {
  __m256 rows[8], quads[8];
  for (int i = 0; i < 8; ++i) rows[i] = block[i].v;
  transpose_halves(rows, quads);
  transpose_halves(rows + 4, quads + 4);
  for (int i = 0; i < 4; ++i) {
    block[i] = {_mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20)};
    block[i + 4] = {_mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31)};
  }
}

// Loads put the halves where they belong, which takes less than a transpose of whole vectors.
inline void load_transposed(const float* p, std::ptrdiff_t stride, V* block) {
  for (int i = 0; i < 8; i += 4) {
    __m256 quads[4];
    for (int l = 0; l < 4; ++l) {
      const float* at = p + l * stride + i;
      const __m256 low = _mm256_castps128_ps256(_mm_loadu_ps(at));
      quads[l] = _mm256_insertf128_ps(low, _mm_loadu_ps(at + 4 * stride), 1);
    }
    transpose_halves(quads, quads);
    for (int l = 0; l < 4; ++l) block[i + l] = {quads[l]};
  }
}

inline void prefetch(const char* p) { _mm_prefetch(p, _MM_HINT_T1); }

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

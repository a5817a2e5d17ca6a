#include "mel_kernel.h"

#ifdef SLAP_FAST_X86
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f")
#endif

namespace slap_fast {
namespace {

constexpr int kLanes = 16;

struct V {
  __m512 v;
};

inline V operator+(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
inline V operator-(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline V operator*(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline V divide(V a, V b) { return {_mm512_div_ps(a.v, b.v)}; }
inline V multiply_add(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline V multiply_subtract(V a, V b, V c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }
inline V broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline V load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, V x) { _mm512_storeu_ps(p, x.v); }

inline V at_least(V x, V bound) { return {_mm512_max_ps(bound.v, x.v)}; }  // NaN: the second

inline V split(V x, V& exponent) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i above = _mm512_sub_epi32(bits, _mm512_set1_epi32(0x3f3504f3));  // sqrt(1/2)
  const __m512i e = _mm512_srai_epi32(above, 23);
  exponent = {_mm512_cvtepi32_ps(e)};
  return {_mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(e, 23)))};
}

inline V load_int16(const std::int16_t* p) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(x))};
}

// 4 x 4 within each quarter of the vectors.
inline void transpose_quarters(const __m512* rows, __m512* out) {
  const __m512 a = _mm512_unpacklo_ps(rows[0], rows[1]);
  const __m512 b = _mm512_unpackhi_ps(rows[0], rows[1]);
  const __m512 c = _mm512_unpacklo_ps(rows[2], rows[3]);
  const __m512 d = _mm512_unpackhi_ps(rows[2], rows[3]);
  out[0] = _mm512_shuffle_ps(a, c, 0x44);
  out[1] = _mm512_shuffle_ps(a, c, 0xee);
  out[2] = _mm512_shuffle_ps(b, d, 0x44);
  out[3] = _mm512_shuffle_ps(b, d, 0xee);
}

inline void transpose(V* block) {
  __m512 rows[16], quads[16];
  for (int i = 0; i < 16; ++i) rows[i] = block[i].v;
  for (int i = 0; i < 16; i += 4) transpose_quarters(rows + i, quads + i);
  for (int i = 0; i < 4; ++i) {
    const __m512 a = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0x44);
    const __m512 b = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0xee);
    const __m512 c = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0x44);
    const __m512 d = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0xee);
    block[i] = {_mm512_shuffle_f32x4(a, c, 0x88)};
    block[i + 4] = {_mm512_shuffle_f32x4(a, c, 0xdd)};
    block[i + 8] = {_mm512_shuffle_f32x4(b, d, 0x88)};
    block[i + 12] = {_mm512_shuffle_f32x4(b, d, 0xdd)};
  }
}

// Loads put the quarters where they belong, which takes less than a transpose of whole vectors.
inline void load_transposed(const float* p, std::ptrdiff_t stride, V* block) {
  for (int i = 0; i < 16; i += 4) {
    __m512 quads[4];
    for (int l = 0; l < 4; ++l) {
      const float* at = p + l * stride + i;
      __m512 x = _mm512_castps128_ps512(_mm_loadu_ps(at));
      x = _mm512_insertf32x4(x, _mm_loadu_ps(at + 4 * stride), 1);
      x = _mm512_insertf32x4(x, _mm_loadu_ps(at + 8 * stride), 2);
      quads[l] = _mm512_insertf32x4(x, _mm_loadu_ps(at + 12 * stride), 3);
    }
    transpose_quarters(quads, quads);
    for (int l = 0; l < 4; ++l) block[i + l] = {quads[l]};
  }
}

inline void prefetch(const char* p) { _mm_prefetch(p, _MM_HINT_T1); }

#include "mel_lanes.h"

}  // namespace

const MelKernel kMelAvx512 = {"avx512", kLanes, &log_mel, &from_int16};

}  // namespace slap_fast

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

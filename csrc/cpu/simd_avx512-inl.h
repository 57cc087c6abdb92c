// simd_avx512-inl.h: the vector vocabulary in AVX-512 (F, BW, DQ, VL): 16 floats.
// What each word means is said in simd_portable-inl.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "exp_constants.h"  // kExp, kExpLow, ...
#include "fdpg/types.h"     // BFloat16, Float16
#include "simd_target.h"    // FDPG_BEGIN_TARGET

#define FDPG_BEGIN_SIMD FDPG_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define FDPG_END_SIMD FDPG_END_TARGET

FDPG_BEGIN_SIMD
namespace fdpg::cpu {
namespace {

struct Avx512 {
  using Real = float;
  using Vec = __m512;
  static constexpr int64_t kLanes = 16;

  static FDPG_ALWAYS_INLINE Vec broadcast(float x) { return _mm512_set1_ps(x); }
  static FDPG_ALWAYS_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static FDPG_ALWAYS_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static FDPG_ALWAYS_INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
  static FDPG_ALWAYS_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static FDPG_ALWAYS_INLINE double product(float a, float b) { return double{a} * b; }
  static FDPG_ALWAYS_INLINE Vec max(Vec x, Vec or_else) { return _mm512_max_ps(x, or_else); }
  static FDPG_ALWAYS_INLINE Vec min(Vec x, Vec or_else) { return _mm512_min_ps(x, or_else); }

  static FDPG_ALWAYS_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static FDPG_ALWAYS_INLINE Vec load(const BFloat16* p) {
    return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static FDPG_ALWAYS_INLINE Vec load(const Float16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }

  template <class T>
  static FDPG_ALWAYS_INLINE void load_pair(const T* p, Vec* a, Vec* b) {
    *a = load(p);
    *b = load(p + kLanes);
  }
  // The even ones and the odd ones: an instruction less for each than in order.
  static FDPG_ALWAYS_INLINE void load_pair(const BFloat16* p, Vec* a, Vec* b) {
    const __m512i x = _mm512_loadu_si512(p);
    *a = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    *b = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }

  static FDPG_ALWAYS_INLINE Vec load_first(const float* p, int64_t n) {
    return _mm512_mask_loadu_ps(broadcast(-__builtin_inff()), first(n), p);
  }
  static FDPG_ALWAYS_INLINE Vec load_first(const BFloat16* p, int64_t n) {
    return widen_bf16(
        _mm256_mask_loadu_epi16(_mm256_set1_epi16(static_cast<int16_t>(0xff80)), first(n), p));
  }
  static FDPG_ALWAYS_INLINE Vec load_first(const Float16* p, int64_t n) {
    return _mm512_cvtph_ps(
        _mm256_mask_loadu_epi16(_mm256_set1_epi16(static_cast<int16_t>(0xfc00)), first(n), p));
  }

  static FDPG_ALWAYS_INLINE Vec load_zeros(const float* p, int64_t n) {
    return _mm512_maskz_loadu_ps(first(n), p);
  }
  static FDPG_ALWAYS_INLINE Vec load_zeros(const BFloat16* p, int64_t n) {
    return widen_bf16(_mm256_maskz_loadu_epi16(first(n), p));
  }
  static FDPG_ALWAYS_INLINE Vec load_zeros(const Float16* p, int64_t n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p));
  }

  static FDPG_ALWAYS_INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
  static FDPG_ALWAYS_INLINE void store(BFloat16* p, Vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(x));
  }
  static FDPG_ALWAYS_INLINE void store(Float16* p, Vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_fp16(x));
  }

  static FDPG_ALWAYS_INLINE void store_first(float* p, Vec x, int64_t n) {
    _mm512_mask_storeu_ps(p, first(n), x);
  }
  static FDPG_ALWAYS_INLINE void store_first(BFloat16* p, Vec x, int64_t n) {
    _mm256_mask_storeu_epi16(p, first(n), narrow_bf16(x));
  }
  static FDPG_ALWAYS_INLINE void store_first(Float16* p, Vec x, int64_t n) {
    _mm256_mask_storeu_epi16(p, first(n), narrow_fp16(x));
  }

  static FDPG_ALWAYS_INLINE Vec exp(Vec x) {
    const Vec shifter = broadcast(kShifter);
    const Vec n = _mm512_sub_ps(fma(x, broadcast(kLog2E), shifter), shifter);
    const Vec r = _mm512_fnmadd_ps(n, broadcast(kLn2), x);
    Vec y = fma(broadcast(kExp6), r, broadcast(kExp5));
    y = fma(y, r, broadcast(kExp4));
    y = fma(y, r, broadcast(kExp3));
    y = fma(y, r, broadcast(kExp2));
    y = fma(y, r, broadcast(1.0f));
    y = fma(y, r, broadcast(1.0f));
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, broadcast(kExpLow), _CMP_NLT_UQ), y, n);
  }

  static FDPG_ALWAYS_INLINE Vec power_of_two(Vec shifted) {
    const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_set1_epi32(0x3f800000)));
  }

  static FDPG_ALWAYS_INLINE Vec clamp_low(Vec x) { return max(broadcast(kExpLow), x); }

  static FDPG_ALWAYS_INLINE double sum(Vec x) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
    return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
  }
  static FDPG_ALWAYS_INLINE Vec totals(const Vec (&x)[kLanes]) {
    Vec quarters[4];  // four sums each, of 128 bits of four vectors
    for (int64_t i = 0; i < 4; ++i) {
      const Vec* const four = x + 4 * i;
      const Vec ab =
          add(_mm512_unpacklo_ps(four[0], four[1]), _mm512_unpackhi_ps(four[0], four[1]));
      const Vec cd =
          add(_mm512_unpacklo_ps(four[2], four[3]), _mm512_unpackhi_ps(four[2], four[3]));
      quarters[i] = add(unpack_pairs<0x00>(ab, cd), unpack_pairs<0xff>(ab, cd));
    }
    const Vec low = add(_mm512_shuffle_f32x4(quarters[0], quarters[1], 0x88),
                        _mm512_shuffle_f32x4(quarters[0], quarters[1], 0xdd));
    const Vec high = add(_mm512_shuffle_f32x4(quarters[2], quarters[3], 0x88),
                         _mm512_shuffle_f32x4(quarters[2], quarters[3], 0xdd));
    return add(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
  }
  static FDPG_ALWAYS_INLINE void transpose(Vec (&x)[kLanes]) {
    Vec fours[kLanes];  // 4 i + j: lanes j of vectors 4 i to 4 i + 3, of each 128 bits
    for (int64_t i = 0; i < kLanes; i += 4) {
      const Vec low_a = _mm512_unpacklo_ps(x[i], x[i + 1]);
      const Vec high_a = _mm512_unpackhi_ps(x[i], x[i + 1]);
      const Vec low_b = _mm512_unpacklo_ps(x[i + 2], x[i + 3]);
      const Vec high_b = _mm512_unpackhi_ps(x[i + 2], x[i + 3]);
      fours[i] = unpack_pairs<0x00>(low_a, low_b);
      fours[i + 1] = unpack_pairs<0xff>(low_a, low_b);
      fours[i + 2] = unpack_pairs<0x00>(high_a, high_b);
      fours[i + 3] = unpack_pairs<0xff>(high_a, high_b);
    }
    for (int64_t j = 0; j < 4; ++j) {
      const Vec even_low = _mm512_shuffle_f32x4(fours[j], fours[j + 4], 0x88);
      const Vec odd_low = _mm512_shuffle_f32x4(fours[j], fours[j + 4], 0xdd);
      const Vec even_high = _mm512_shuffle_f32x4(fours[j + 8], fours[j + 12], 0x88);
      const Vec odd_high = _mm512_shuffle_f32x4(fours[j + 8], fours[j + 12], 0xdd);
      x[j] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
      x[j + 4] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
      x[j + 8] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
      x[j + 12] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
    }
  }
  static FDPG_ALWAYS_INLINE float largest(Vec x) { return _mm512_reduce_max_ps(x); }

 private:
  // The low (0x00) or the high (0xff) pair of each 128 bits of a, then of b.
  template <int kWhich>
  static FDPG_ALWAYS_INLINE Vec unpack_pairs(Vec a, Vec b) {
    return _mm512_castpd_ps(_mm512_shuffle_pd(_mm512_castps_pd(a), _mm512_castps_pd(b), kWhich));
  }
  static FDPG_ALWAYS_INLINE __mmask16 first(int64_t n) {
    return static_cast<__mmask16>((1u << n) - 1u);
  }
  static FDPG_ALWAYS_INLINE Vec widen_bf16(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
  }
  static FDPG_ALWAYS_INLINE __m256i narrow_bf16(Vec x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff));
    const __m512i nan = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __m512i rounded = _mm512_mask_mov_epi32(_mm512_add_epi32(bits, half),
                                                  _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), nan);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  }
  static FDPG_ALWAYS_INLINE __m256i narrow_fp16(Vec x) {
    return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
};

}  // namespace
}  // namespace fdpg::cpu
FDPG_END_SIMD

// simd_avx2-inl.h: the vector vocabulary in AVX2 with FMA and F16C: 8 floats.
// What each word means is said in simd_portable-inl.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "exp_constants.h"  // kExp2, kExpLow, ...
#include "fdpg/types.h"     // BFloat16, Float16, load, store
#include "simd_target.h"    // FDPG_BEGIN_TARGET

#define FDPG_BEGIN_SIMD FDPG_BEGIN_TARGET("avx2,fma,f16c")
#define FDPG_END_SIMD FDPG_END_TARGET

FDPG_BEGIN_SIMD
namespace fdpg::cpu {
namespace {

struct Avx2 {
  using Real = float;
  using Vec = __m256;
  static constexpr int64_t kLanes = 8;

  static FDPG_ALWAYS_INLINE Vec broadcast(float x) { return _mm256_set1_ps(x); }
  static FDPG_ALWAYS_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static FDPG_ALWAYS_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static FDPG_ALWAYS_INLINE Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
  static FDPG_ALWAYS_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static FDPG_ALWAYS_INLINE double product(float a, float b) { return double{a} * b; }
  static FDPG_ALWAYS_INLINE Vec max(Vec x, Vec or_else) { return _mm256_max_ps(x, or_else); }
  static FDPG_ALWAYS_INLINE Vec min(Vec x, Vec or_else) { return _mm256_min_ps(x, or_else); }

  static FDPG_ALWAYS_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static FDPG_ALWAYS_INLINE Vec load(const BFloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static FDPG_ALWAYS_INLINE Vec load(const Float16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }

  template <class T>
  static FDPG_ALWAYS_INLINE void load_pair(const T* p, Vec* a, Vec* b) {
    *a = load(p);
    *b = load(p + kLanes);
  }
  // The even ones and the odd ones: an instruction less for each than in order.
  static FDPG_ALWAYS_INLINE void load_pair(const BFloat16* p, Vec* a, Vec* b) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    *a = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
    *b = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
  }

  template <class T>
  static FDPG_ALWAYS_INLINE Vec load_first(const T* p, int64_t n) {
    float lanes[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] = i < n ? fdpg::load(p[i]) : -__builtin_inff();
    return load(lanes);
  }

  template <class T>
  static FDPG_ALWAYS_INLINE Vec load_zeros(const T* p, int64_t n) {
    float lanes[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] = i < n ? fdpg::load(p[i]) : 0.0f;
    return load(lanes);
  }

  static FDPG_ALWAYS_INLINE void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
  static FDPG_ALWAYS_INLINE void store(BFloat16* p, Vec x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff));
    const __m256i nan = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i rounded = _mm256_blendv_epi8(_mm256_add_epi32(bits, half), nan, is_nan);
    const __m256i high = _mm256_srli_epi32(rounded, 16);
    // packus works within each half of the register; the permutation puts the halves together.
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  static FDPG_ALWAYS_INLINE void store(Float16* p, Vec x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  template <class T>
  static FDPG_ALWAYS_INLINE void store_first(T* p, Vec x, int64_t n) {
    T lanes[kLanes];
    store(lanes, x);
    for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
  }

  static FDPG_ALWAYS_INLINE Vec exp(Vec x) {
    x = _mm256_min_ps(broadcast(kExpHigh), x);
    const Vec shifted = fma(x, broadcast(kLog2E), broadcast(kShifter));
    const Vec n = _mm256_sub_ps(shifted, broadcast(kShifter));
    const Vec r = _mm256_fnmadd_ps(n, broadcast(kLn2), x);
    Vec y = fma(broadcast(kExp6), r, broadcast(kExp5));
    y = fma(y, r, broadcast(kExp4));
    y = fma(y, r, broadcast(kExp3));
    y = fma(y, r, broadcast(kExp2));
    y = fma(y, r, broadcast(1.0f));
    y = fma(y, r, broadcast(1.0f));
    const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
    const Vec scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), exponent));
    return _mm256_and_ps(scaled, _mm256_cmp_ps(x, broadcast(kExpLow), _CMP_NLT_UQ));
  }

  static FDPG_ALWAYS_INLINE Vec power_of_two(Vec shifted) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_set1_epi32(0x3f800000)));
  }

  static FDPG_ALWAYS_INLINE Vec clamp_low(Vec x) { return max(broadcast(kExpLow), x); }

  static FDPG_ALWAYS_INLINE double sum(Vec x) {
    const __m256d wide = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(x)),
                                       _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
    const __m128d pair = _mm_add_pd(_mm256_castpd256_pd128(wide), _mm256_extractf128_pd(wide, 1));
    return _mm_cvtsd_f64(_mm_add_sd(pair, _mm_unpackhi_pd(pair, pair)));
  }
  static FDPG_ALWAYS_INLINE Vec totals(const Vec (&x)[kLanes]) {
    Vec halves[2];  // four sums each, of 128 bits of four vectors
    for (int64_t i = 0; i < 2; ++i) {
      const Vec* const four = x + 4 * i;
      halves[i] =
          _mm256_hadd_ps(_mm256_hadd_ps(four[0], four[1]), _mm256_hadd_ps(four[2], four[3]));
    }
    return add(_mm256_permute2f128_ps(halves[0], halves[1], 0x20),
               _mm256_permute2f128_ps(halves[0], halves[1], 0x31));
  }
  static FDPG_ALWAYS_INLINE void transpose(Vec (&x)[kLanes]) {
    Vec fours[kLanes];  // 4 i + j: lanes j of vectors 4 i to 4 i + 3, of each 128 bits
    for (int64_t i = 0; i < kLanes; i += 4) {
      const Vec low_a = _mm256_unpacklo_ps(x[i], x[i + 1]);
      const Vec high_a = _mm256_unpackhi_ps(x[i], x[i + 1]);
      const Vec low_b = _mm256_unpacklo_ps(x[i + 2], x[i + 3]);
      const Vec high_b = _mm256_unpackhi_ps(x[i + 2], x[i + 3]);
      fours[i] = _mm256_shuffle_ps(low_a, low_b, 0x44);
      fours[i + 1] = _mm256_shuffle_ps(low_a, low_b, 0xee);
      fours[i + 2] = _mm256_shuffle_ps(high_a, high_b, 0x44);
      fours[i + 3] = _mm256_shuffle_ps(high_a, high_b, 0xee);
    }
    for (int64_t j = 0; j < 4; ++j) {
      x[j] = _mm256_permute2f128_ps(fours[j], fours[j + 4], 0x20);
      x[j + 4] = _mm256_permute2f128_ps(fours[j], fours[j + 4], 0x31);
    }
  }
  static FDPG_ALWAYS_INLINE float largest(Vec x) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
};

}  // namespace
}  // namespace fdpg::cpu
FDPG_END_SIMD

// simd_avx512bf16-inl.h: AVX-512 and its instructions for products of bf16 (AVX512_BF16), which
// take two steps of the depth at a time and add both products to an fp32 sum. Denormal numbers are
// zeros to them.
//
// What a way to multiply has to say is told by its plain form, Singly in matmul-inl.h.
#pragma once

#include "simd_avx512-inl.h"

#undef FDPG_BEGIN_SIMD
#define FDPG_BEGIN_SIMD \
  FDPG_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512bf16")

FDPG_BEGIN_SIMD
namespace fdpg::cpu {
namespace {

// Of bf16, or of fp32 that is rounded to it when it is packed.
template <class T>
struct InPairs {
  using Simd = Avx512;
  using Stored = T;
  using Vec = __m512;
  using Unit = uint32_t;  // the earlier number of a pair in the low half
  static constexpr int64_t kSteps = 2;
  static constexpr int64_t kGrain = 16;  // a tile of AMX, for what is packed to look alike
  static constexpr bool kAsStored = sizeof(T) == sizeof(BFloat16);

  static FDPG_ALWAYS_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  static FDPG_ALWAYS_INLINE Vec broadcast(Unit x) {
    return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(x)));
  }
  static FDPG_ALWAYS_INLINE Vec load_units(const Unit* p) { return _mm512_loadu_ps(p); }
  static FDPG_ALWAYS_INLINE void store_units(Unit* p, Vec x) { _mm512_storeu_ps(p, x); }

  static FDPG_ALWAYS_INLINE Unit unit(const T* p, int64_t stride, int64_t left) {
    return bits(p[0]) | (left > 1 ? bits(p[stride]) << 16 : 0);
  }
  static FDPG_ALWAYS_INLINE Vec across(const T* p, int64_t stride, int64_t left) {
    const __m512i low = _mm512_cvtepu16_epi32(bits_of_16(p));
    if (left == 1) return _mm512_castsi512_ps(low);
    const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(bits_of_16(p + stride)), 16);
    return _mm512_castsi512_ps(_mm512_or_si512(low, high));
  }
  static FDPG_ALWAYS_INLINE Vec along(const BFloat16* p) { return _mm512_loadu_ps(p); }
  static FDPG_ALWAYS_INLINE Vec along(const float* p) {
    return reinterpret_cast<Vec>(
        _mm512_cvtne2ps_pbh(_mm512_loadu_ps(p + Avx512::kLanes), _mm512_loadu_ps(p)));
  }

 private:
  static FDPG_ALWAYS_INLINE uint32_t bits(BFloat16 x) { return x.bits; }
  static FDPG_ALWAYS_INLINE uint32_t bits(float x) { return fdpg::store<BFloat16>(x).bits; }
  static FDPG_ALWAYS_INLINE __m256i bits_of_16(const BFloat16* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static FDPG_ALWAYS_INLINE __m256i bits_of_16(const float* p) {
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(p)));
  }
};

}  // namespace
}  // namespace fdpg::cpu
FDPG_END_SIMD

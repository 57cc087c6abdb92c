// simd_portable-inl.h: the vector vocabulary in plain C++ (the vector extension of g++ and clang),
// for every CPU and for double. Also the dictionary: the words that each instruction set has.
//
//   Real, Vec, kLanes      the number, the vector, numbers per vector
//   broadcast add mul div fma  (fma may round twice where the CPU has none)
//   product(a, b)          of two numbers, as fma sees it: exact, or rounded where fma is not one
//   max min(x, or_else)    or_else in a lane where either is NaN
//   load store             from and to every storage type that accumulates in Real; unaligned
//   load_pair(p, &a, &b)   2 kLanes numbers, in whatever order is cheapest
//   load_first(p, n)       the first n lanes, 0 < n < kLanes; the rest are -inf and not read
//   load_zeros(p, n)       the same, but the rest are 0
//   store_first(p, x, n)   the first n lanes; the rest are not written
//   exp(x)                 exp_constants.h; above kExpHigh at least exp(kExpHigh); NaN stays NaN
//   power_of_two(x)        2^n where x = n + kShifter, n a small whole number; fp32 only
//   clamp_low(x)           a finite number in place of -inf, whose exp is 0; NaN stays NaN
//   sum(x) largest(x)      across lanes, in a fixed order; the sum in double
//   totals(x)              lane i: the sum of vector i of kLanes vectors, in Real
//   transpose(x)           of kLanes vectors, lane i of vector j and lane j of vector i trade
//   places
#pragma once

#include <cstdint>
#include <cstring>  // memcpy

#include "exp_constants.h"  // kExp2, kExpLow, ...
#include "fdpg/types.h"     // load, store
#include "simd_target.h"    // FDPG_ALWAYS_INLINE

#define FDPG_BEGIN_SIMD
#define FDPG_END_SIMD

FDPG_BEGIN_SIMD
namespace fdpg::cpu {
namespace {

template <class Number>
struct Portable {
  using Real = Number;
  using Vec __attribute__((vector_size(16))) = Real;
  static constexpr int64_t kLanes = 16 / sizeof(Real);

  static FDPG_ALWAYS_INLINE Vec broadcast(Real x) { return Vec{} + x; }
  static FDPG_ALWAYS_INLINE Vec add(Vec a, Vec b) { return a + b; }
  static FDPG_ALWAYS_INLINE Vec mul(Vec a, Vec b) { return a * b; }
  static FDPG_ALWAYS_INLINE Vec div(Vec a, Vec b) { return a / b; }
  static FDPG_ALWAYS_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  static FDPG_ALWAYS_INLINE double product(Real a, Real b) { return a * b; }
  static FDPG_ALWAYS_INLINE Vec max(Vec x, Vec or_else) { return x > or_else ? x : or_else; }
  static FDPG_ALWAYS_INLINE Vec min(Vec x, Vec or_else) { return x < or_else ? x : or_else; }

  template <class T>
  static FDPG_ALWAYS_INLINE Vec load(const T* p) {
    Vec x;
    for (int64_t i = 0; i < kLanes; ++i) x[i] = fdpg::load(p[i]);
    return x;
  }
  template <class T>
  static FDPG_ALWAYS_INLINE void load_pair(const T* p, Vec* a, Vec* b) {
    *a = load(p);
    *b = load(p + kLanes);
  }
  template <class T>
  static FDPG_ALWAYS_INLINE Vec load_first(const T* p, int64_t n) {
    Vec x = broadcast(-static_cast<Real>(__builtin_inff()));
    for (int64_t i = 0; i < n; ++i) x[i] = fdpg::load(p[i]);
    return x;
  }
  template <class T>
  static FDPG_ALWAYS_INLINE Vec load_zeros(const T* p, int64_t n) {
    Vec x = broadcast(0);
    for (int64_t i = 0; i < n; ++i) x[i] = fdpg::load(p[i]);
    return x;
  }
  template <class T>
  static FDPG_ALWAYS_INLINE void store(T* p, Vec x) {
    for (int64_t i = 0; i < kLanes; ++i) p[i] = fdpg::store<T>(x[i]);
  }
  template <class T>
  static FDPG_ALWAYS_INLINE void store_first(T* p, Vec x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) p[i] = fdpg::store<T>(x[i]);
  }

  static FDPG_ALWAYS_INLINE Vec exp(Vec x) {
    if constexpr (sizeof(Real) == sizeof(double)) {
      for (int64_t i = 0; i < kLanes; ++i) x[i] = __builtin_exp(x[i]);
      return x;
    } else {
      using Bits __attribute__((vector_size(16))) = uint32_t;
      x = x > kExpHigh ? broadcast(kExpHigh) : x;
      const Vec shifted = fma(x, broadcast(kLog2E), broadcast(kShifter));
      const Vec n = shifted - kShifter;
      Vec r = x - n * kLn2High;
      r = r - n * kLn2Low;
      Vec y = fma(broadcast(kExp6), r, broadcast(kExp5));
      y = fma(y, r, broadcast(kExp4));
      y = fma(y, r, broadcast(kExp3));
      y = fma(y, r, broadcast(kExp2));
      y = fma(y, r, broadcast(1.0f));
      y = fma(y, r, broadcast(1.0f));
      Bits bits, exponent;
      memcpy(&bits, &y, sizeof(bits));
      memcpy(&exponent, &shifted, sizeof(exponent));
      bits += exponent << 23;
      memcpy(&y, &bits, sizeof(y));
      return x < kExpLow ? Vec{} : y;
    }
  }

  static FDPG_ALWAYS_INLINE Vec power_of_two(Vec shifted) {
    using Bits __attribute__((vector_size(16))) = uint32_t;
    Bits bits;
    memcpy(&bits, &shifted, sizeof(bits));
    bits = (bits << 23) + 0x3f800000u;
    memcpy(&shifted, &bits, sizeof(bits));
    return shifted;
  }

  static FDPG_ALWAYS_INLINE Vec clamp_low(Vec x) {
    // For double, low enough that exp is 0: the smallest number is exp(-745.1).
    constexpr Real kLow = sizeof(Real) == sizeof(double) ? -746 : kExpLow;
    return x < kLow ? broadcast(kLow) : x;
  }

  static FDPG_ALWAYS_INLINE double sum(Vec x) {
    double total = x[0];
    for (int64_t i = 1; i < kLanes; ++i) total += x[i];
    return total;
  }
  static FDPG_ALWAYS_INLINE Vec totals(const Vec (&x)[kLanes]) {
    Vec totals = broadcast(0);
    for (int64_t i = 0; i < kLanes; ++i) {
      for (int64_t j = 0; j < kLanes; ++j) totals[j] += x[j][i];
    }
    return totals;
  }
  static FDPG_ALWAYS_INLINE void transpose(Vec (&x)[kLanes]) {
    for (int64_t i = 0; i < kLanes; ++i) {
      for (int64_t j = 0; j < i; ++j) {
        const Real y = x[i][j];
        x[i][j] = x[j][i];
        x[j][i] = y;
      }
    }
  }
  static FDPG_ALWAYS_INLINE Real largest(Vec x) {
    Real most = x[0];
    for (int64_t i = 1; i < kLanes; ++i) most = x[i] > most ? x[i] : most;
    return most;
  }
};

}  // namespace
}  // namespace fdpg::cpu
FDPG_END_SIMD

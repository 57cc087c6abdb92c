// gelu_tanh-inl.h: GPT-2's GELU (Hendrycks and Gimpel, arXiv 1606.08415), by one exponential.
//
//   (1 + tanh u) / 2 = 1 / (1 + exp(-2u)),  so
//   gelu(x) = max(x, 0) - |x| e / (1 + e),  e = exp(-2|u|)
//
// At negative x it keeps the digits that 1 + tanh u loses; at positive x only the difference is
// rounded. An element's bits do not depend on where it stands.
#pragma once

#include <cstdint>

#include "fdpg/params.h"  // GeluTanhParams
#include "simd_target.h"

FDPG_BEGIN_SIMD
namespace fdpg::cpu {
namespace {

// From here on e is 0 in fp32 (kExpLow), and x may be infinite.
constexpr float kGeluEnd = 10.0f;
constexpr double kTwoRootsOfTwoOverPi = 1.5957691216057308;  // 2 sqrt(2 / pi)

template <class S>
FDPG_ALWAYS_INLINE typename S::Vec gelu_tanh(typename S::Vec x) {
  using Vec = typename S::Vec;
  using Real = typename S::Real;
  constexpr Real kLinear = static_cast<Real>(-kTwoRootsOfTwoOverPi);
  constexpr Real kCubic = static_cast<Real>(-kTwoRootsOfTwoOverPi * 0.044715);
  const Vec minus_one = S::broadcast(-1);
  // NaN goes through.
  const Vec size = S::min(S::broadcast(kGeluEnd), S::max(x, S::mul(x, minus_one)));
  const Vec slope = S::fma(S::broadcast(kCubic), S::mul(size, size), S::broadcast(kLinear));
  const Vec e = S::exp(S::mul(slope, size));
  const Vec below = S::div(S::mul(size, e), S::add(S::broadcast(1), e));
  return S::fma(below, minus_one, S::max(x, S::broadcast(0)));
}

template <class S, class T>
int64_t gelu_tanh(const GeluTanhParams& p, int64_t begin, int64_t end) {
  const T* const x = static_cast<const T*>(p.x);
  T* const out = static_cast<T*>(p.out);
  int64_t i = begin;
  for (; i + S::kLanes <= end; i += S::kLanes) S::store(out + i, gelu_tanh<S>(S::load(x + i)));
  if (i < end) S::store_first(out + i, gelu_tanh<S>(S::load_zeros(x + i, end - i)), end - i);
  return kOk;
}

}  // namespace
}  // namespace fdpg::cpu
FDPG_END_SIMD

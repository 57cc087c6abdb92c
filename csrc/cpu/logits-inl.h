// logits-inl.h: how the kernels read a row of logits. With a softcap (Gemma 2) a logit x counts as
// softcap tanh(x / softcap), then comes the temperature:
//   z = scale u:  u = x,                  scale = inv_temperature
//                 u = tanh(x / softcap),  scale = softcap * inv_temperature
// Kernels are compiled once for each, so a row pays for neither of what it has not. A bound has no
// infinity beyond it: a logit of -inf is -softcap, as in PyTorch, and NaN stays NaN.
#pragma once

#include <cstdint>

#include "exp_constants.h"  // kExp2, kLog2E, ...
#include "fdpg/types.h"     // load

FDPG_BEGIN_SIMD
namespace fdpg::cpu {
namespace {

// tanh x = h / (h + 1),  h = (exp(2x) - 1) / 2 = 2^n q + (2^n - 1) / 2,  q = (exp(2r) - 1) / 2
// with the constants of exp, times powers of two. Below 2.7 ulp on every instruction set; exactly
// -1 and 1 beyond 9.02, and never beyond them. For double, libm's.
template <class S>
FDPG_ALWAYS_INLINE typename S::Vec tanh(typename S::Vec x) {
  using Vec = typename S::Vec;
  if constexpr (sizeof(typename S::Real) == sizeof(double)) {
    double lanes[S::kLanes];
    S::store(lanes, x);
    for (double& lane : lanes) lane = __builtin_tanh(lane);
    return S::load(lanes);
  } else {
    // n stays small; NaN goes through.
    x = S::max(S::broadcast(-kTanhOne), S::min(S::broadcast(kTanhOne), x));
    const Vec shifted = S::fma(x, S::broadcast(2 * kLog2E), S::broadcast(kShifter));
    const Vec n = S::add(shifted, S::broadcast(-kShifter));
    Vec r = S::fma(n, S::broadcast(-kLn2High / 2), x);
    r = S::fma(n, S::broadcast(-kLn2Low / 2), r);
    Vec q = S::fma(S::broadcast(32 * kExp6), r, S::broadcast(16 * kExp5));
    q = S::fma(q, r, S::broadcast(8 * kExp4));
    q = S::fma(q, r, S::broadcast(4 * kExp3));
    q = S::fma(q, r, S::broadcast(2 * kExp2));
    q = S::fma(q, S::mul(r, r), r);
    const Vec power = S::power_of_two(shifted);
    const Vec h = S::fma(power, q, S::fma(power, S::broadcast(0.5f), S::broadcast(-0.5f)));
    return S::div(h, S::add(h, S::broadcast(1)));
  }
}

template <class Vocabulary, bool kCapped, bool kTempered = true>
struct Logits {
  static constexpr bool kScaled = kCapped || kTempered;  // else scale is 1
  using S = Vocabulary;
  using Real = typename S::Real;
  using Vec = typename S::Vec;

  Real inv_softcap, scale;

  template <class Params>
  FDPG_ALWAYS_INLINE explicit Logits(const Params& p)
      : inv_softcap(static_cast<Real>(kCapped ? 1 / p.softcap : 0)),
        scale(static_cast<Real>(kCapped ? p.softcap * p.inv_temperature : p.inv_temperature)) {}

  FDPG_ALWAYS_INLINE Vec capped(Vec x) const {
    if constexpr (!kCapped) return x;
    return tanh<S>(S::mul(x, S::broadcast(inv_softcap)));
  }

  template <class T>
  FDPG_ALWAYS_INLINE Vec load(const T* p) const {
    return capped(S::load(p));
  }
  template <class T>
  FDPG_ALWAYS_INLINE void load_pair(const T* p, Vec* a, Vec* b) const {
    S::load_pair(p, a, b);
    *a = capped(*a);
    *b = capped(*b);
  }
  // The rest are -inf still, and no logits: their exponential is 0.
  template <class T>
  FDPG_ALWAYS_INLINE Vec load_first(const T* p, int64_t n) const {
    const Vec x = capped(S::load_first(p, n));
    if constexpr (!kCapped) return x;
    Real lanes[S::kLanes];
    S::store(lanes, x);
    return S::load_first(lanes, n);
  }

  // u of one logit, the same to the bit as among others.
  FDPG_ALWAYS_INLINE Real capped_one(Real x) const {
    if constexpr (!kCapped) return x;
    Real lanes[S::kLanes];
    S::store(lanes, capped(S::broadcast(x)));
    return lanes[0];
  }
  // u and z of one logit, the latter as fma sees it.
  template <class T>
  FDPG_ALWAYS_INLINE double u(T x) const {
    return capped_one(fdpg::load(x));
  }
  template <class T>
  FDPG_ALWAYS_INLINE double z(T x) const {
    return S::product(capped_one(fdpg::load(x)), scale);
  }

  // From the derivative by softcap u, at u, to that by x.
  FDPG_ALWAYS_INLINE Vec back(Vec gradient, Vec u) const {
    if constexpr (!kCapped) return gradient;
    const Vec minus_u = S::mul(u, S::broadcast(-1));
    return S::mul(gradient, S::fma(minus_u, u, S::broadcast(1)));
  }
  template <class T>
  FDPG_ALWAYS_INLINE double back_one(double gradient, T x) const {
    if constexpr (!kCapped) return gradient;
    const double u = capped_one(fdpg::load(x));
    return gradient * (1 - u * u);
  }
};

// scale (u - anchor), how far z lies from an anchor's.
template <class L>
struct Distance {
  using S = typename L::S;
  using Vec = typename S::Vec;

  Vec minus_anchor, scale;

  FDPG_ALWAYS_INLINE Distance(const L& logits, typename L::Real anchor)
      : minus_anchor(S::broadcast(-anchor)), scale(S::broadcast(logits.scale)) {}

  FDPG_ALWAYS_INLINE Vec operator()(Vec u) const {
    const Vec distance = S::add(u, minus_anchor);
    if constexpr (L::kScaled) return S::mul(distance, scale);
    return distance;
  }
};

// Calls fn(logits) with those that the params ask for, and returns what it returns.
template <class S, class Params, class Fn>
FDPG_ALWAYS_INLINE int64_t with_logits(const Params& p, const Fn& fn) {
  if (p.softcap > 0) return fn(Logits<S, true>(p));
  if (p.inv_temperature != 1) return fn(Logits<S, false>(p));
  return fn(Logits<S, false, false>(p));
}

}  // namespace
}  // namespace fdpg::cpu
FDPG_END_SIMD

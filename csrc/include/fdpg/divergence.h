// divergence.h: every f-divergence, once.
//
//   D_f(pi || p) = E_{x~p} f(t) + f'(inf) pi(p = 0),   t = pi(x) / p(x),   f convex, f(1) = 0
//   grad D_f     = E_{x~pi} f'(t) grad log pi(x)                  (f-DPG, arXiv 2302.08215, Thm 1)
//
// A divergence is a struct, templated on the float type, that knows four things:
//
//   f(log_t, log_s)        exp(log_s) * f(t)      for finite log_t = log pi - log p
//   f_prime(log_t, log_s)  exp(log_s) * f'(t)     for every log_t; its limits at +-inf
//   f_zero()               f(0)     the limit of f as t -> 0
//   f_prime_inf()          f'(inf)  what f' is off the support, where p(x) = 0
//
// The scale log_s belongs to the formula because a large f(t) often meets a small weight: forward
// KL has f' = -p/pi, its weight is (pi/q)(p/pi), and exp(-1000) * exp(1000) is one. So
// f(log_t, -log_t) is f(t)/t, and a term (p/q) f(t) never overflows on the way to a finite value.
// Each f' is visibly non-decreasing in log_t, which is to say that each f is convex.
//
// To add one: a struct, and one line in the list at the foot. Then its formula once more,
// independently, in fdpg_fast/reference.py; a test asks for it.
#pragma once

#include <cmath>
#include <cstdint>

#include "fdpg/types.h"  // FDPG_HOST_DEVICE

namespace fdpg {

// -------------------------------------------------------------------------------------------------
// Functions that stay exact at both ends. No fast-math: minus infinity is a value here.

// log(1 + e^x)
template <class F>
FDPG_HOST_DEVICE inline F softplus(F x) {
  return (x > 0 ? x : F(0)) + std::log1p(std::exp(-std::fabs(x)));
}

// log(e^a + e^b); NaN if either is.
template <class F>
FDPG_HOST_DEVICE inline F log_add_exp(F a, F b) {
  const F hi = a > b ? a : b;
  const F lo = a > b ? b : a;
  if (hi == lo) return hi + F(0.6931471805599453);  // also both -inf, whose difference is NaN
  return hi + std::log1p(std::exp(lo - hi));
}

// e^log_s (e^x - 1), finite whenever the product is; beyond x = 40 the -1 is lost in rounding.
template <class F>
FDPG_HOST_DEVICE inline F scaled_expm1(F x, F log_s) {
  return x > 40 ? std::exp(log_s + x) : std::exp(log_s) * std::expm1(x);
}

// The mixture m = w pi + (1 - w) p that the skewed divergences compare with, over p and under t.
template <class F>
struct Mixture {
  F w, log_w, log_1mw;  // 0 < w < 1

  FDPG_HOST_DEVICE explicit Mixture(F w) : w(w), log_w(std::log(w)), log_1mw(std::log1p(-w)) {}

  // log(m/p) = log(w t + 1 - w)
  FDPG_HOST_DEVICE F log_m(F log_t) const { return log_add_exp(log_w + log_t, log_1mw); }
  // log(pi/m) = log(t / (w t + 1 - w))
  FDPG_HOST_DEVICE F log_t_over_m(F log_t) const { return -log_add_exp(log_w, log_1mw - log_t); }
};

// -------------------------------------------------------------------------------------------------
// The divergences. f and f' as a paper writes them stand at the right.

// Forward KL, KL(p||pi).
template <class F>
struct Kl {
  FDPG_HOST_DEVICE explicit Kl(F) {}
  FDPG_HOST_DEVICE F f(F log_t, F log_s) const { return -log_t * std::exp(log_s); }        // -log t
  FDPG_HOST_DEVICE F f_prime(F log_t, F log_s) const { return -std::exp(log_s - log_t); }  // -1/t
  FDPG_HOST_DEVICE F f_zero() const { return F(INFINITY); }
  FDPG_HOST_DEVICE F f_prime_inf() const { return F(0); }
};

// Reverse KL, KL(pi||p).
template <class F>
struct ReverseKl {
  FDPG_HOST_DEVICE explicit ReverseKl(F) {}
  FDPG_HOST_DEVICE F f(F log_t, F log_s) const {  // t log t
    return log_t * std::exp(log_s + log_t);
  }
  FDPG_HOST_DEVICE F f_prime(F log_t, F log_s) const {  // log t + 1
    return std::exp(log_s) * (log_t + 1);
  }
  FDPG_HOST_DEVICE F f_zero() const { return F(0); }
  FDPG_HOST_DEVICE F f_prime_inf() const { return F(INFINITY); }
};

// Total variation, half the L1 distance.
template <class F>
struct Tv {
  FDPG_HOST_DEVICE explicit Tv(F) {}
  FDPG_HOST_DEVICE F f(F log_t, F log_s) const {  // |t - 1| / 2
    return F(0.5) * std::fabs(scaled_expm1(log_t, log_s));
  }
  FDPG_HOST_DEVICE F f_prime(F log_t, F log_s) const {            // sign(t - 1) / 2
    const F sign = log_t > 0 ? F(1) : log_t < 0 ? F(-1) : log_t;  // 0 stays 0, and NaN NaN
    return F(0.5) * sign * std::exp(log_s);
  }
  FDPG_HOST_DEVICE F f_zero() const { return F(0.5); }
  FDPG_HOST_DEVICE F f_prime_inf() const { return F(0.5); }
};

// Jensen-Shannon as in the f-DPG paper (twice the usual), KL(pi||m) + KL(p||m), m = (pi + p) / 2.
template <class F>
struct Js {
  static constexpr F kLog2 = F(0.6931471805599453);

  FDPG_HOST_DEVICE explicit Js(F) {}
  FDPG_HOST_DEVICE F f(F log_t, F log_s) const {  // t log(2t/(t+1)) + log(2/(t+1))
    return std::exp(log_s + log_t) * (kLog2 - softplus(-log_t)) +
           std::exp(log_s) * (kLog2 - softplus(log_t));
  }
  FDPG_HOST_DEVICE F f_prime(F log_t, F log_s) const {  // log(2t/(t+1))
    return std::exp(log_s) * (kLog2 - softplus(-log_t));
  }
  FDPG_HOST_DEVICE F f_zero() const { return kLog2; }
  FDPG_HOST_DEVICE F f_prime_inf() const { return kLog2; }
};

// Amari's alpha: KL(p||pi) at alpha = 0, KL(pi||p) at alpha = 1, 2 hellinger at 1/2.
template <class F>
struct Alpha {
  F alpha;

  FDPG_HOST_DEVICE explicit Alpha(F alpha) : alpha(alpha) {}

  // (t^a - a t - (1 - a)) / (a (a - 1)): two ways to write it, so that neither a = 0 nor a = 1
  // subtracts two nearly equal numbers.
  FDPG_HOST_DEVICE F f(F log_t, F log_s) const {
    const F t_minus_1 = scaled_expm1(log_t, log_s);
    if (alpha < F(0.5)) return (power(alpha, log_t, log_s) - t_minus_1) / (alpha - 1);
    return (power(alpha - 1, log_t, log_s + log_t) - t_minus_1) / alpha;
  }
  FDPG_HOST_DEVICE F f_prime(F log_t, F log_s) const {  // (t^(a-1) - 1) / (a - 1)
    return power(alpha - 1, log_t, log_s);
  }
  FDPG_HOST_DEVICE F f_zero() const { return alpha > 0 ? 1 / alpha : F(INFINITY); }
  FDPG_HOST_DEVICE F f_prime_inf() const { return alpha < 1 ? 1 / (1 - alpha) : F(INFINITY); }

  // e^log_s (t^k - 1) / k, which is e^log_s log t at k = 0. Increasing in log_t for every k.
  FDPG_HOST_DEVICE static F power(F k, F log_t, F log_s) {
    return k == 0 ? std::exp(log_s) * log_t : scaled_expm1(k * log_t, log_s) / k;
  }
};

// Squared Hellinger distance, sum (sqrt pi - sqrt p)^2.
template <class F>
struct Hellinger {
  FDPG_HOST_DEVICE explicit Hellinger(F) {}
  FDPG_HOST_DEVICE F f(F log_t, F log_s) const {  // (sqrt t - 1)^2
    const F root = scaled_expm1(log_t / 2, log_s / 2);
    return root * root;
  }
  FDPG_HOST_DEVICE F f_prime(F log_t, F log_s) const {  // 1 - 1/sqrt t
    return -scaled_expm1(-log_t / 2, log_s);
  }
  FDPG_HOST_DEVICE F f_zero() const { return F(1); }
  FDPG_HOST_DEVICE F f_prime_inf() const { return F(1); }
};

// Neyman's chi-squared, chi2(p||pi) = sum (p - pi)^2 / pi.
template <class F>
struct Chi2 {
  FDPG_HOST_DEVICE explicit Chi2(F) {}
  FDPG_HOST_DEVICE F f(F log_t, F log_s) const {  // (t - 1)^2 / t
    const F root = scaled_expm1(log_t, (log_s - log_t) / 2);
    return root * root;
  }
  FDPG_HOST_DEVICE F f_prime(F log_t, F log_s) const {  // 1 - 1/t^2
    return -scaled_expm1(-2 * log_t, log_s);
  }
  FDPG_HOST_DEVICE F f_zero() const { return F(INFINITY); }
  FDPG_HOST_DEVICE F f_prime_inf() const { return F(1); }
};

// Pearson's chi-squared, chi2(pi||p) = sum (pi - p)^2 / p.
template <class F>
struct ReverseChi2 {
  FDPG_HOST_DEVICE explicit ReverseChi2(F) {}
  FDPG_HOST_DEVICE F f(F log_t, F log_s) const {  // (t - 1)^2
    const F root = scaled_expm1(log_t, log_s / 2);
    return root * root;
  }
  FDPG_HOST_DEVICE F f_prime(F log_t, F log_s) const {  // 2 (t - 1)
    return 2 * scaled_expm1(log_t, log_s);
  }
  FDPG_HOST_DEVICE F f_zero() const { return F(1); }
  FDPG_HOST_DEVICE F f_prime_inf() const { return F(INFINITY); }
};

// Jeffreys, KL(p||pi) + KL(pi||p).
template <class F>
struct Jeffreys {
  FDPG_HOST_DEVICE explicit Jeffreys(F) {}
  FDPG_HOST_DEVICE F f(F log_t, F log_s) const {  // (t - 1) log t
    return log_t * scaled_expm1(log_t, log_s);
  }
  FDPG_HOST_DEVICE F f_prime(F log_t, F log_s) const {  // log t + 1 - 1/t
    return std::exp(log_s) * log_t - scaled_expm1(-log_t, log_s);
  }
  FDPG_HOST_DEVICE F f_zero() const { return F(INFINITY); }
  FDPG_HOST_DEVICE F f_prime_inf() const { return F(INFINITY); }
};

// Generalised Jensen-Shannon, w KL(pi||m) + (1-w) KL(p||m) with m = w pi + (1-w) p.
// w = 1/2 is half of `js`.
template <class F>
struct JsW {
  Mixture<F> mix;

  FDPG_HOST_DEVICE explicit JsW(F w) : mix(w) {}
  FDPG_HOST_DEVICE F f(F log_t, F log_s) const {  // w t log(t/m) - (1-w) log m
    return mix.w * std::exp(log_s + log_t) * mix.log_t_over_m(log_t) -
           (1 - mix.w) * std::exp(log_s) * mix.log_m(log_t);
  }
  FDPG_HOST_DEVICE F f_prime(F log_t, F log_s) const {  // w log(t/m)
    return mix.w * std::exp(log_s) * mix.log_t_over_m(log_t);
  }
  FDPG_HOST_DEVICE F f_zero() const { return -(1 - mix.w) * mix.log_1mw; }
  FDPG_HOST_DEVICE F f_prime_inf() const { return -mix.w * mix.log_w; }
};

// Skewed forward KL, KL(p||m) with m = w pi + (1-w) p: forward KL with a bounded reward.
template <class F>
struct SkewKl {
  Mixture<F> mix;

  FDPG_HOST_DEVICE explicit SkewKl(F w) : mix(w) {}
  FDPG_HOST_DEVICE F f(F log_t, F log_s) const {  // -log m
    return -std::exp(log_s) * mix.log_m(log_t);
  }
  FDPG_HOST_DEVICE F f_prime(F log_t, F log_s) const {  // -w/m
    return -mix.w * std::exp(log_s - mix.log_m(log_t));
  }
  FDPG_HOST_DEVICE F f_zero() const { return -mix.log_1mw; }
  FDPG_HOST_DEVICE F f_prime_inf() const { return F(0); }
};

// Skewed reverse KL, KL(pi||m) with m = w pi + (1-w) p: reverse KL that allows p(x) = 0.
template <class F>
struct SkewReverseKl {
  Mixture<F> mix;

  FDPG_HOST_DEVICE explicit SkewReverseKl(F w) : mix(w) {}
  FDPG_HOST_DEVICE F f(F log_t, F log_s) const {  // t log(t/m)
    return std::exp(log_s + log_t) * mix.log_t_over_m(log_t);
  }
  FDPG_HOST_DEVICE F f_prime(F log_t, F log_s) const {  // log(t/m) + (1-w)/m
    return std::exp(log_s) * mix.log_t_over_m(log_t) +
           std::exp(log_s + mix.log_1mw - mix.log_m(log_t));
  }
  FDPG_HOST_DEVICE F f_zero() const { return F(0); }
  FDPG_HOST_DEVICE F f_prime_inf() const { return -mix.log_w; }
};

// -------------------------------------------------------------------------------------------------
// THE list: name, struct, takes a parameter, its default, and the open interval it must lie in;
// one line of meaning. The order gives the ids.

#define FDPG_DIVERGENCES(X)                                                                     \
  X(kl, Kl, false, 0, 0, 0, "KL(p||pi), forward KL: covers the target; unbounded rewards")      \
  X(reverse_kl, ReverseKl, false, 0, 0, 0,                                                      \
    "KL(pi||p), reverse KL, RL with a KL penalty: seeks modes; the target may not be zero")     \
  X(tv, Tv, false, 0, 0, 0, "total variation: bounded rewards; needs an accurate Z")            \
  X(js, Js, false, 0, 0, 0,                                                                     \
    "Jensen-Shannon as in the f-DPG paper (twice the usual): a balance, and a good default")    \
  X(alpha, Alpha, true, 0.5, -INFINITY, INFINITY,                                               \
    "Amari's alpha: from kl (0) to reverse_kl (1); from 1 up the target may not be zero")       \
  X(hellinger, Hellinger, false, 0, 0, 0, "squared Hellinger distance, half of alpha(0.5)")     \
  X(chi2, Chi2, false, 0, 0, 0,                                                                 \
    "chi2(p||pi), Neyman, sum (p-pi)^2/pi: the largest rewards of all")                         \
  X(reverse_chi2, ReverseChi2, false, 0, 0, 0,                                                  \
    "chi2(pi||p), Pearson, sum (pi-p)^2/p: the target may not be zero")                         \
  X(jeffreys, Jeffreys, false, 0, 0, 0, "KL(p||pi) + KL(pi||p): the target may not be zero")    \
  X(js_w, JsW, true, 0.5, 0, 1,                                                                 \
    "w KL(pi||m) + (1-w) KL(p||m), m = w pi + (1-w) p: js_w(0.5) is half of js")                \
  X(skew_kl, SkewKl, true, 0.1, 0, 1, "KL(p||w pi + (1-w) p): forward KL with bounded rewards") \
  X(skew_reverse_kl, SkewReverseKl, true, 0.9, 0, 1,                                            \
    "KL(pi||w pi + (1-w) p): reverse KL that allows a target of zero")

enum class DivergenceId : int32_t {
#define FDPG_DIVERGENCE_ID(name, ...) name,
  FDPG_DIVERGENCES(FDPG_DIVERGENCE_ID)
#undef FDPG_DIVERGENCE_ID
      count
};
inline constexpr int32_t kDivergences = static_cast<int32_t>(DivergenceId::count);

struct DivergenceInfo {
  const char* name;
  bool takes_param;
  double default_param;
  double low, high;  // low < param < high, where there is one
  const char* meaning;
};

inline constexpr DivergenceInfo kDivergenceInfo[kDivergences] = {
#define FDPG_DIVERGENCE_INFO(name, type, takes_param, fallback, low, high, meaning) \
  {#name, takes_param, fallback, low, high, meaning},
    FDPG_DIVERGENCES(FDPG_DIVERGENCE_INFO)
#undef FDPG_DIVERGENCE_INFO
};

// Is (id, param) something visit_divergence can make sense of?
inline bool valid_divergence(int32_t id, double param) {
  if (id < 0 || id >= kDivergences) return false;
  const DivergenceInfo& info = kDivergenceInfo[id];
  return !info.takes_param || (info.low < param && param < info.high);
}

// Calls fn(divergence) with the struct of `id`; false if there is none. The switch is here so that
// it is in no loop:
//   visit_divergence<double>(p.divergence, p.divergence_param, [&](auto divergence) { ... });
FDPG_ANY_CALLABLE
template <class F, class Fn>
FDPG_HOST_DEVICE inline bool visit_divergence(int32_t id, F param, Fn&& fn) {
  switch (static_cast<DivergenceId>(id)) {
#define FDPG_VISIT(name, Type, ...) \
  case DivergenceId::name:          \
    fn(Type<F>(param));             \
    return true;
    FDPG_DIVERGENCES(FDPG_VISIT)
#undef FDPG_VISIT
    default:
      return false;
  }
}

}  // namespace fdpg

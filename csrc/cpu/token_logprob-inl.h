// token_logprob-inl.h: log p(target), log-sum-exp and entropy of each row of logits; and back.
//
// Fused: max, exp, sum, log, gather, and the entropy if asked for; no [N, V] log-softmax is made.
// Forward, per row: V logits are read once, and 28 bytes of target and results; 13 vector
// instructions per kLanes logits (a sixteenth more in bf16), one more for a temperature and 2 for
// the entropy. On AVX-512 that is 0.12 ns per logit and core, about what reading an fp32 logit from
// memory takes. Backward, per row: V logits read, V written (in place, a cache line is written
// where it was read). Masked rows, and rows without a gradient, are written as zeros and not read.
// Results are computed in double and rounded once.
#pragma once

#include <cstdint>

#include "fdpg/types.h"  // load, store
#include "softmax_row-inl.h"

FDPG_BEGIN_SIMD
namespace fdpg::cpu {
namespace {

// S: vector vocabulary; L: Logits<S, ...>; T: storage type of the logits.
template <class T, class L>
int64_t token_logprob_of(const L& logits, const TokenLogprobParams& p, int64_t begin, int64_t end) {
  using Real = typename L::Real;
  Real* const logp = static_cast<Real*>(p.logp);
  Real* const lse = static_cast<Real*>(p.lse);
  Real* const entropy = static_cast<Real*>(p.entropy);
  int64_t bad_row = kOk;
  for (int64_t i = begin; i < end; ++i) {
    double row_logp = 0, row_lse = 0, row_entropy = 0;
    const int64_t target = p.target[i];
    if (p.mask && !p.mask[i]) {
      // zeros
    } else if (target < 0 || target >= p.vocab) {
      row_logp = row_lse = row_entropy = __builtin_nan("");
      if (bad_row == kOk) bad_row = i;
    } else {
      const T* const x = static_cast<const T*>(p.logits) + i * p.row_stride;
      const SoftmaxRow<Real> row =
          entropy ? softmax_row<true>(x, p.vocab, logits) : softmax_row<false>(x, p.vocab, logits);
      row_lse = row.lse();
      row_logp = row.logp(logits.u(x[target]));
      row_entropy = row.entropy();
    }
    logp[i] = static_cast<Real>(row_logp);
    lse[i] = static_cast<Real>(row_lse);
    p.lse_exact[i] = row_lse;
    if (entropy) entropy[i] = static_cast<Real>(row_entropy);
  }
  return bad_row;
}

template <class S, class T>
int64_t token_logprob(const TokenLogprobParams& p, int64_t begin, int64_t end) {
  return with_logits<S>(
      p, [&](const auto& logits) { return token_logprob_of<T>(logits, p, begin, end); });
}

// The softmax part of a row's gradient:  out_j = exp(d_j) (constant + slope d_j), times 1 - u^2
// with a softcap;  d: Distance from the anchor.
template <class L, bool kEntropy>
struct SoftmaxGradient {
  using S = typename L::S;
  using Real = typename S::Real;
  using Vec = typename S::Vec;
  L logits;
  Distance<L> distance;
  Vec constant, slope;

  SoftmaxGradient(const L& logits, Real anchor, Real constant, Real slope)
      : logits(logits),
        distance(logits, anchor),
        constant(S::broadcast(constant)),
        slope(S::broadcast(slope)) {}

  FDPG_ALWAYS_INLINE Vec of(Vec u) const {
    const Vec d = distance(u);
    const Vec factor = kEntropy ? S::fma(S::clamp_low(d), slope, constant) : constant;
    return logits.back(S::mul(S::exp(d), factor), u);
  }

  template <class T, class U>
  void row(const T* x, U* out, int64_t vocab) const {
    int64_t j = 0;
    for (; j + kUnroll * S::kLanes <= vocab; j += kUnroll * S::kLanes) {
      for (int64_t k = 0; k < kUnroll; ++k) {
        prefetch<S>(x + j, k);
        prefetch<S>(out + j, k);
        S::store(out + j + k * S::kLanes, of(logits.load(x + j + k * S::kLanes)));
      }
    }
    for (; j + S::kLanes <= vocab; j += S::kLanes) S::store(out + j, of(logits.load(x + j)));
    if (j < vocab) S::store_first(out + j, of(logits.load_first(x + j, vocab - j)), vocab - j);
  }
};

template <class T>
void fill_row(T* out, int64_t vocab, accumulate_t<T> value) {
  const T stored = store<T>(value);
  for (int64_t j = 0; j < vocab; ++j) out[j] = stored;
}

template <class T, class L>
int64_t token_logprob_backward_of(const L& logits, const TokenLogprobBackwardParams& p,
                                  int64_t begin, int64_t end) {
  using Real = typename L::Real;
  const Real* const all_entropy = static_cast<const Real*>(p.entropy);
  const Real* const grad_logp = static_cast<const Real*>(p.grad_logp);
  const Real* const grad_lse = static_cast<const Real*>(p.grad_lse);
  const Real* const grad_entropy = static_cast<const Real*>(p.grad_entropy);
  const Real inv_temperature = static_cast<Real>(p.inv_temperature);
  int64_t bad_row = kOk;
  for (int64_t i = begin; i < end; ++i) {
    const T* const x = static_cast<const T*>(p.logits) + i * p.row_stride;
    T* const out = static_cast<T*>(p.grad_logits) + i * p.grad_row_stride;
    const double g_logp = grad_logp ? grad_logp[i] : 0;
    const double g_lse = grad_lse ? grad_lse[i] : 0;
    const double g_entropy = grad_entropy ? grad_entropy[i] : 0;
    const int64_t target = p.target[i];
    if ((p.mask && !p.mask[i]) || (g_logp == 0 && g_lse == 0 && g_entropy == 0)) {
      fill_row(out, p.vocab, 0);
      continue;
    }
    if (target < 0 || target >= p.vocab) {
      fill_row(out, p.vocab, __builtin_nan(""));
      if (bad_row == kOk) bad_row = i;
      continue;
    }
    // softmax_j = exp(d_j + log_weight). Rounded to fp32 alone a log-sum-exp of 50 would make every
    // probability wrong by up to 2e-6, in the same direction.
    const Real anchor = static_cast<Real>(p.lse_exact[i] / logits.scale);
    const double log_weight = static_cast<double>(anchor) * logits.scale - p.lse_exact[i];
    const double weight = __builtin_exp(log_weight) * inv_temperature;
    const double shift = log_weight + (grad_entropy ? all_entropy[i] : 0);
    const double constant = weight * (g_lse - g_logp - g_entropy * shift);
    const double slope = -weight * g_entropy;
    const T logit = x[target];  // before it is overwritten
    const double d = (logits.u(logit) - anchor) * logits.scale;
    if (g_entropy != 0) {
      SoftmaxGradient<L, true>(logits, anchor, constant, slope).row(x, out, p.vocab);
    } else {
      SoftmaxGradient<L, false>(logits, anchor, constant, slope).row(x, out, p.vocab);
    }
    const double p_target = __builtin_exp(d + log_weight);
    // 1 - p by expm1: a target that is all but certain has a gradient that is all but zero.
    double at_target = -g_logp * __builtin_expm1(d + log_weight) + g_lse * p_target;
    if (p_target > 0) at_target -= g_entropy * p_target * (d + shift);
    out[target] = store<T>(static_cast<Real>(logits.back_one(at_target * inv_temperature, logit)));
  }
  return bad_row;
}

template <class S, class T>
int64_t token_logprob_backward(const TokenLogprobBackwardParams& p, int64_t begin, int64_t end) {
  return with_logits<S>(
      p, [&](const auto& logits) { return token_logprob_backward_of<T>(logits, p, begin, end); });
}

// p - 1 at the target and p elsewhere, times 1 - u^2 with a softcap; and -coefficient *
// inv_temperature for the row. The row is summed, then waits in the L2 cache to be read again; it
// needs no hint. T: type of the logits, U: of the numerators.
template <class T, class U, class L>
int64_t token_logprob_numerators_of(const L& logits, const TokenLogprobNumeratorsParams& p,
                                    int64_t begin, int64_t end) {
  using Real = typename L::Real;
  const Real* const coefficient = static_cast<const Real*>(p.coefficient);
  Real* const logp = static_cast<Real*>(p.logp);
  Real* const lse = static_cast<Real*>(p.lse);
  Real* const row_scale = static_cast<Real*>(p.row_scale);
  const Real inv_temperature = static_cast<Real>(p.inv_temperature);
  int64_t bad_row = kOk;
  for (int64_t i = begin; i < end; ++i) {
    const T* const x = static_cast<const T*>(p.logits) + i * p.row_stride;
    U* const out = static_cast<U*>(p.numerators) + i * p.numerator_row_stride;
    const int64_t target = p.target[i];
    double row_logp = 0, row_lse = 0;
    row_scale[i] = 0;
    if (p.mask && !p.mask[i]) {
      fill_row(out, p.vocab, 0);
    } else if (target < 0 || target >= p.vocab) {
      row_logp = row_lse = row_scale[i] = __builtin_nan("");
      fill_row(out, p.vocab, __builtin_nan(""));
      if (bad_row == kOk) bad_row = i;
    } else {
      const SoftmaxRow<Real> row = softmax_row<false>(x, p.vocab, logits);
      const T logit = x[target];  // before it is overwritten
      row_lse = row.lse();
      row_logp = row.logp(logits.u(logit));
      if (coefficient[i] == 0) {
        fill_row(out, p.vocab, 0);
      } else {
        row_scale[i] = -coefficient[i] * inv_temperature;
        const Real weight = static_cast<Real>(1 / row.sums.sum);
        SoftmaxGradient<L, false>(logits, row.anchor, weight, 0).row(x, out, p.vocab);
        // 1 - p by expm1: a target that is all but certain has a gradient that is all but zero.
        const double at_target = logits.back_one(__builtin_expm1(row_logp), logit);
        out[target] = store<U>(static_cast<Real>(at_target));
      }
    }
    logp[i] = static_cast<Real>(row_logp);
    lse[i] = static_cast<Real>(row_lse);
  }
  return bad_row;
}

template <class S, class T>
int64_t token_logprob_numerators(const TokenLogprobNumeratorsParams& p, int64_t begin,
                                 int64_t end) {
  int64_t bad_row = kOk;
  visit_dtype(p.numerator_dtype, [&](auto storage) {
    using U = decltype(storage);
    if constexpr (sizeof(accumulate_t<U>) == sizeof(typename S::Real)) {
      bad_row = with_logits<S>(p, [&](const auto& logits) {
        return token_logprob_numerators_of<T, U>(logits, p, begin, end);
      });
    }
  });
  return bad_row;
}

}  // namespace
}  // namespace fdpg::cpu
FDPG_END_SIMD

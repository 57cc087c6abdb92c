// softmax_row-inl.h: the walk that token_logprob and sample_logprob share: one read of a row of
// logits, in blocks, to the sum of its exponentials.
//
// Instead of a running maximum per element there is an anchor per row: a logit of the row that all
// later ones exceed by kHeadroom at most. Exponentials are taken relative to it, and a block whose
// sum is no larger than exp(kHeadroom) cannot hold a logit that breaks the rule: so the maximum of
// a block is looked for only when its sum is suspicious, and the block summed again only when it
// did break the rule (about once per row of 50257). Where no token stands out, every block is
// suspicious: a tenth more time. The result is exact whatever the anchor; it keeps exponentials in
// range. The distance from it is taken before the temperature, where it is exact near the anchor:
// so neither large logits nor a temperature near 0 cost anything.
//
// A block is summed in fp32, in 4 * kLanes partial sums of at most a few dozen terms, then in
// double; the blocks of a row are added in double. So the sum is good to about 1e-7 relative
// however long the row. It depends on the row alone, not on its neighbours or on who asks:
// token_logprob and sample_logprob report the same log-sum-exp, bit for bit.
//
// Online softmax: Milakov and Gimelshein, arXiv 1805.02867.
#pragma once

#include <cstdint>

#include "fdpg/types.h"  // load
#include "logits-inl.h"

FDPG_BEGIN_SIMD
namespace fdpg::cpu {
namespace {

constexpr int64_t kUnroll = 4;
constexpr int64_t kBlock = 1024;
constexpr int64_t kMaxBlocks = 512;

// Logits per block: kBlock, or as many times kBlock as it takes to have no more than kMaxBlocks.
inline int64_t block_size(int64_t vocab) {
  return (vocab + kMaxBlocks * kBlock - 1) / (kMaxBlocks * kBlock) * kBlock;
}

// How far z may rise above the anchor's. Small, because the distance is rounded to fp32 and its
// error is an error of the exponential; the tokens that matter lie near the maximum.
constexpr double kHeadroom = 3;
constexpr double kExpHeadroom = 20.0;  // below exp(3)

// What logits come to relative to an anchor, with d = scale (u - anchor) (u: logits-inl.h):
// sum exp d,  sum d exp d.
struct Sums {
  double sum = 0;
  double weighted = 0;
};

template <class Real>
struct SoftmaxRow {
  Real anchor;  // a u; -inf: every logit is, and none is capped
  Real scale;
  Sums sums;

  double lse() const { return static_cast<double>(anchor) * scale + __builtin_log(sums.sum); }
  // log p of a token: from the anchor, since at large |z| z - lse would cancel. Not above 0, though
  // the sum is rounded.
  double logp(double u) const {
    const double value = (u - anchor) * scale - __builtin_log(sums.sum);
    return value > 0 ? 0 : value;
  }
  // H = lse - sum p z = log sum exp d - sum p d, which does not cancel either.
  double entropy() const { return __builtin_log(sums.sum) - sums.weighted / sums.sum; }
};

// Asks for what lies a page beyond vector k of x, once per cache line, to the second level: the
// first has too few places for what is on its way. Hardware does not prefetch across pages, nor far
// enough ahead for a loop that does arithmetic as well: on [256, 50257] and two cores of a Xeon
// this took the forward from 2.5 to 1.5 ms (fp32, from memory), and the backward in place from 6.4
// to 2.0 ms (bf16). At the end of a row it asks for the next one's beginning.
template <class S, class T>
FDPG_ALWAYS_INLINE void prefetch(const T* x, int64_t k) {
  const int64_t offset = k * S::kLanes;
  if (offset * static_cast<int64_t>(sizeof(T)) % 64 == 0) {
    __builtin_prefetch(x + offset + 4096 / sizeof(T), 0, 2);
  }
}

// Largest of x[0..n), -inf for none; NaN is passed over.
template <class S, class T>
typename S::Real largest(const T* x, int64_t n) {
  using Vec = typename S::Vec;
  Vec most[kUnroll];
  for (Vec& m : most) m = S::broadcast(-static_cast<typename S::Real>(__builtin_inff()));
  int64_t i = 0;
  for (; i + kUnroll * S::kLanes <= n; i += kUnroll * S::kLanes) {
    for (int64_t k = 0; k < kUnroll; ++k) most[k] = S::max(S::load(x + i + k * S::kLanes), most[k]);
  }
  for (; i + S::kLanes <= n; i += S::kLanes) most[0] = S::max(S::load(x + i), most[0]);
  if (i < n) most[1] = S::max(S::load_first(x + i, n - i), most[1]);
  return S::largest(S::max(S::max(most[0], most[1]), S::max(most[2], most[3])));
}

template <class T>
bool any_nan(const T* x, int64_t n) {
  bool found = false;
  for (int64_t i = 0; i < n; ++i) found |= load(x[i]) != load(x[i]);
  return found;
}

template <class S, bool kEntropy>
struct BlockAccumulator {
  using Vec = typename S::Vec;
  Vec sum, weighted;

  // Written out: g++ compiles an implicit constructor for the CPU outside the pragma.
  FDPG_ALWAYS_INLINE BlockAccumulator() : sum(S::broadcast(0)), weighted(S::broadcast(0)) {}

  FDPG_ALWAYS_INLINE void push(Vec d) {
    const Vec e = S::exp(d);
    sum = S::add(sum, e);
    if constexpr (kEntropy) weighted = S::fma(e, S::clamp_low(d), weighted);
  }
};

// Sums over x[0..n) relative to `anchor`.
template <bool kEntropy, class L, class T>
Sums sum_block(const T* x, int64_t n, const L& logits, typename L::Real anchor) {
  using S = typename L::S;
  using Vec = typename S::Vec;
  const Distance<L> distance(logits, anchor);
  BlockAccumulator<S, kEntropy> part[kUnroll];
  int64_t i = 0;
  for (; i + kUnroll * S::kLanes <= n; i += kUnroll * S::kLanes) {
    for (int64_t k = 0; k < kUnroll; k += 2) {
      prefetch<S>(x + i, k);
      prefetch<S>(x + i, k + 1);
      Vec even, odd;
      logits.load_pair(x + i + k * S::kLanes, &even, &odd);
      part[k].push(distance(even));
      part[k + 1].push(distance(odd));
    }
  }
  for (; i + S::kLanes <= n; i += S::kLanes) part[0].push(distance(logits.load(x + i)));
  if (i < n) part[1].push(distance(logits.load_first(x + i, n - i)));
  Sums sums;
  sums.sum = S::sum(S::add(S::add(part[0].sum, part[1].sum), S::add(part[2].sum, part[3].sum)));
  if constexpr (kEntropy) {
    sums.weighted = S::sum(S::add(S::add(part[0].weighted, part[1].weighted),
                                  S::add(part[2].weighted, part[3].weighted)));
  }
  return sums;
}

// Walks a row x[0..vocab) in blocks. If `block_sums` is not null, it receives the sum of every
// block, relative to the row's final anchor.
template <bool kEntropy, class L, class T>
SoftmaxRow<typename L::Real> softmax_row(const T* x, int64_t vocab, const L& logits,
                                         double* block_sums = nullptr) {
  using S = typename L::S;
  using Real = typename S::Real;
  constexpr Real kMinusInf = -static_cast<Real>(__builtin_inff());
  const int64_t block = block_size(vocab);
  SoftmaxRow<Real> row = {kMinusInf, logits.scale, {}};
  Sums& total = row.sums;
  Real& anchor = row.anchor;
  for (int64_t begin = 0; begin < vocab; begin += block) {
    const int64_t n = vocab - begin < block ? vocab - begin : block;
    Sums sums;
    if (anchor == kMinusInf) anchor = logits.capped_one(largest<S>(x + begin, n));
    if (anchor == kMinusInf) {  // nothing but -inf so far, or NaN, which is nobody's largest
      if (any_nan(x + begin, n)) sums.sum = __builtin_nan("");
    } else {
      sums = sum_block<kEntropy>(x + begin, n, logits, anchor);
      if (!(sums.sum <= kExpHeadroom)) {  // NaN is suspicious too, and stays
        const Real most = logits.capped_one(largest<S>(x + begin, n));
        const double rise = (static_cast<double>(most) - anchor) * row.scale;
        if (rise > kHeadroom) {
          anchor = most;
          sums = sum_block<kEntropy>(x + begin, n, logits, anchor);
          const double factor = __builtin_exp(-rise);
          if (factor > 0) total.weighted = (total.weighted - total.sum * rise) * factor;
          if (factor == 0) total.weighted = total.sum * factor;  // not 0 times infinity; NaN stays
          total.sum *= factor;
          if (block_sums) {
            for (int64_t b = 0; b < begin / block; ++b) block_sums[b] *= factor;
          }
        }
      }
    }
    total.sum += sums.sum;
    total.weighted += sums.weighted;
    if (block_sums) block_sums[begin / block] = sums.sum;
  }
  return row;
}

}  // namespace
}  // namespace fdpg::cpu
FDPG_END_SIMD

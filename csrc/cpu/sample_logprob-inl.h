// sample_logprob-inl.h: a token drawn from softmax(z) of each row (z: logits-inl.h), with its
// log-prob, by inverting the cumulative distribution with one uniform.
//
// Fused: softmax, cumulative sum, search, gather, log, and the entropy if asked for: the row is
// read once, V logits, as in token_logprob, and one block of it again.
//
// The search descends: blocks of the row, parts of that block, tokens of that part. At each level
// the uniform is scaled to the sum of that level's own parts, a part is chosen, and what is left of
// the uniform, again uniform in (0, 1), goes down. So a token's probability is a product of three
// ratios, each good to about 1e-7 relative, be it 0.9 or 1e-9; no running sum over the row ever
// decides, whose rounding would swallow a rare token behind a likely one. A part of sum zero is
// never chosen.
//
// Tokens are bitwise reproducible on one instruction set, whatever the batch. Between instruction
// sets sums differ in the last bit, so a uniform that falls within about 1e-7 of the border of two
// tokens may be theirs or ours; the law is the same.
//
// Inverse transform sampling over a hierarchy: L. Devroye, Non-Uniform Random Variate Generation
// (1986), III.2.
#pragma once

#include <cstdint>

#include "fdpg/random.h"  // random_uniform
#include "fdpg/types.h"   // load
#include "softmax_row-inl.h"

FDPG_BEGIN_SIMD
namespace fdpg::cpu {
namespace {

constexpr int64_t kMaxParts = 16;
constexpr int64_t kLeaf = 64;  // logits

// Chooses one of parts[0..n) with probability proportional to it; some part is positive. On return
// `uniform` is what is left of it, uniform in the chosen part.
int64_t choose(const double* parts, int64_t n, double* uniform) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += parts[i];
  const double goal = *uniform * total;
  double below = 0, left = 0;
  int64_t chosen = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (parts[i] > 0) {
      chosen = i;
      left = goal - below;
      below += parts[i];
      if (below > goal) break;  // always, but for the rounding of goal at the very end
    }
  }
  *uniform = left / parts[chosen];
  return chosen;
}

// exp d of x[0..n), n <= kLeaf, as doubles; d: Distance from the anchor.
template <class L, class T>
void exp_leaf(const T* x, int64_t n, const L& logits, typename L::Real anchor, double* out) {
  using S = typename L::S;
  using Vec = typename S::Vec;
  const Distance<L> distance(logits, anchor);
  typename S::Real e[kLeaf];
  for (int64_t j = 0; j < n; j += S::kLanes) {
    const Vec u = n - j < S::kLanes ? logits.load_first(x + j, n - j) : logits.load(x + j);
    S::store(e + j, S::exp(distance(u)));
  }
  for (int64_t j = 0; j < n; ++j) out[j] = e[j];
}

// One of x[0..n) with probability proportional to exp z; some of them is positive.
template <class L, class T>
int64_t descend(const T* x, int64_t n, const L& logits, typename L::Real anchor, double uniform) {
  int64_t first = 0;
  while (n > kLeaf) {
    const int64_t part = (n + kMaxParts * kLeaf - 1) / (kMaxParts * kLeaf) * kLeaf;
    const int64_t parts = (n + part - 1) / part;
    double sums[kMaxParts] = {};
    for (int64_t k = 0; k < parts; ++k) {
      const int64_t size = k + 1 < parts ? part : n - k * part;
      sums[k] = sum_block<false>(x + first + k * part, size, logits, anchor).sum;
    }
    const int64_t chosen = choose(sums, parts, &uniform);
    first += chosen * part;
    n = chosen + 1 < parts ? part : n - chosen * part;
  }
  double e[kLeaf];
  exp_leaf(x + first, n, logits, anchor, e);
  return first + choose(e, n, &uniform);
}

template <class T, class L>
int64_t sample_logprob_of(const L& logits, const SampleLogprobParams& p, int64_t begin,
                          int64_t end) {
  using Real = typename L::Real;
  Real* const logp = static_cast<Real*>(p.logp);
  Real* const lse = static_cast<Real*>(p.lse);
  Real* const entropy = static_cast<Real*>(p.entropy);
  const int64_t block = block_size(p.vocab);
  for (int64_t i = begin; i < end; ++i) {
    const T* const x = static_cast<const T*>(p.logits) + i * p.row_stride;
    double block_sums[kMaxBlocks];  // 4 KiB
    const SoftmaxRow<Real> row = entropy ? softmax_row<true>(x, p.vocab, logits, block_sums)
                                         : softmax_row<false>(x, p.vocab, logits, block_sums);
    if (!(row.sums.sum > 0)) {  // NaN or +inf somewhere, or -inf everywhere
      p.token[i] = 0;
      logp[i] = lse[i] = static_cast<Real>(__builtin_nan(""));
      if (entropy) entropy[i] = lse[i];
      continue;
    }
    double uniform = random_uniform(p.seed[0], p.sample_id[i], p.position[i]);
    const int64_t first = choose(block_sums, (p.vocab + block - 1) / block, &uniform) * block;
    const int64_t n = p.vocab - first < block ? p.vocab - first : block;
    const int64_t token = first + descend(x + first, n, logits, row.anchor, uniform);
    p.token[i] = token;
    logp[i] = static_cast<Real>(row.logp(logits.u(x[token])));
    lse[i] = static_cast<Real>(row.lse());
    if (entropy) entropy[i] = static_cast<Real>(row.entropy());
  }
  return kOk;
}

template <class S, class T>
int64_t sample_logprob(const SampleLogprobParams& p, int64_t begin, int64_t end) {
  return with_logits<S>(
      p, [&](const auto& logits) { return sample_logprob_of<T>(logits, p, begin, end); });
}

}  // namespace
}  // namespace fdpg::cpu
FDPG_END_SIMD

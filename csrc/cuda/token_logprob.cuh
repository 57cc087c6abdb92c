// token_logprob.cuh: log p(target), log-sum-exp and entropy of each row of logits, and the
// gradient.
//
// Forward. Fused: softcap, temperature, max, sum of exponentials, entropy, gather. Never written:
// anything of size V. A block folds one part of a row (row_parts.cuh), all its 16-byte copies in
// flight at once; where a row has several parts they meet in a second kernel of one thread per row.
//   bytes per row:  V * sizeof(T) read, 8 + 4 for the target and its logit, 16 (20) written;
//                   per part 8 (12) written and read again: 0.1 % at 32 KiB
//   floor:          N V sizeof(T) / bandwidth: [8192, 128256] in bf16 is 2.10 GB, 0.70 ms at 3 TB/s
//
// Backward. One read and one write of each logit, nothing carried between elements; in place or
// not.
//   bytes per row:  2 V sizeof(T); V sizeof(T) for a row without gradient, which is not read
//   floor:          [8192, 128256] in bf16: 4.20 GB, 1.40 ms at 3 TB/s
//
// Staging a whole row on chip is how quack's cross entropy reaches the memory's speed.
#pragma once

#include "device.cuh"
//
#include "fdpg/params.h"
#include "row_parts.cuh"

namespace fdpg::cuda {
namespace {

// Row results from what the whole row comes to.
template <class T, bool kEntropy, class L, class A = accumulate_t<T>>
__device__ void finish_row(const TokenLogprobParams& p, int64_t row, const Seen<A, kEntropy>& seen,
                           const L& logits) {
  const int64_t target = p.target[row];
  A logp = static_cast<A>(NAN), entropy = logp;
  double lse = logp;
  if (target >= 0 && target < p.vocab) {
    const T* x = static_cast<const T*>(p.logits) + row * p.row_stride;
    // Relative to the maximum: two large numbers would cancel in z - lse.
    logp = logits.distance(logits.u(x[target]), seen.top) - std::log(seen.sum);
    lse = seen.lse(logits.scale);
    if constexpr (kEntropy) entropy = seen.entropy(logits.scale);
  }
  static_cast<A*>(p.logp)[row] = logp;
  static_cast<A*>(p.lse)[row] = static_cast<A>(lse);
  p.lse_exact[row] = lse;
  if (p.entropy != nullptr) static_cast<A*>(p.entropy)[row] = entropy;
}

template <class A>
__device__ void zero_row(const TokenLogprobParams& p, int64_t row) {
  static_cast<A*>(p.logp)[row] = 0;
  static_cast<A*>(p.lse)[row] = 0;
  p.lse_exact[row] = 0;
  if (p.entropy != nullptr) static_cast<A*>(p.entropy)[row] = 0;
}

// Block b folds part b % parts of row b / parts. A row of one part is finished here; else its parts
// go to `partial` (N, parts).
template <class T, bool kEntropy, bool kCapped>
__global__ void __launch_bounds__(kFoldThreads)
    token_logprob_parts(TokenLogprobParams p, int part, int parts,
                        Seen<accumulate_t<T>, kEntropy>* partial) {
  FDPG_DYNAMIC_SHARED(T, stage);
  const int64_t row = blockIdx.x / parts;
  if (masked(p, row)) {  // not read
    if (parts == 1 && threadIdx.x == 0) zero_row<accumulate_t<T>>(p, row);
    return;
  }
  const T* x = static_cast<const T*>(p.logits) + row * p.row_stride;
  const Logits<accumulate_t<T>, kCapped> logits(p);
  const auto seen = fold_part<kEntropy>(x, p.vocab, blockIdx.x % parts, part, logits, stage);
  if (threadIdx.x != 0) return;
  if (parts == 1) {
    finish_row<T>(p, row, seen, logits);
  } else {
    partial[blockIdx.x] = seen;
  }
}

// One thread per row, the row's parts in order.
template <class T, bool kEntropy, bool kCapped>
__global__ void token_logprob_rows(TokenLogprobParams p, int parts,
                                   const Seen<accumulate_t<T>, kEntropy>* partial) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= p.rows) return;
  if (masked(p, row)) return zero_row<accumulate_t<T>>(p, row);
  const Logits<accumulate_t<T>, kCapped> logits(p);
  finish_row<T>(p, row, merge_parts(partial + row * parts, parts, logits), logits);
}

// -------------------------------------------------------------------------------------------------

// The gradient of one row as a function of its logits:
//   d_j = c ((g_lse - g_logp) p_j - g_entropy p_j (log p_j + H)) + c g_logp [j = target]
// times 1 - u^2 with a softcap.
template <class L, class A>
struct RowGradient {
  L logits;
  A anchor;  // a u, z there is about the log-sum-exp; the rest is in the numbers below
  A all, entropy_slope, entropy, at_target;

  // `extra`: `at_target` there, else 0.
  __device__ __forceinline__ A operator()(A u, A extra) const {
    const A near_p = logits.power_from(u, anchor);
    A slope = all;
    if (entropy_slope != 0) slope -= entropy_slope * (logits.distance(u, anchor) + entropy);
    // 0 * inf where a logit is -inf; NaN stays NaN
    return logits.back((near_p == 0 ? A{0} : near_p * slope) + extra, u);
  }
};

template <class A>
__device__ __forceinline__ A or_zero(const void* values, int64_t row) {
  return values == nullptr ? A{0} : static_cast<const A*>(values)[row];
}

constexpr int kBackwardThreads = 256;
constexpr int kBackwardVectors = 4;  // in flight per thread

template <class T>
constexpr int kBackwardPart = kBackwardThreads * kBackwardVectors * kPerVector<T>;

// Block b writes part b % parts of row b / parts.
template <class T, bool kCapped>
__global__ void __launch_bounds__(kBackwardThreads)
    token_logprob_backward_parts(TokenLogprobBackwardParams p, int parts) {
  using A = accumulate_t<T>;
  const int64_t row = blockIdx.x / parts;
  const PartOfRow here(blockIdx.x % parts, kBackwardPart<T>, p.vocab);
  const int64_t begin = here.begin;
  const int n = here.size;
  // Not __restrict__: `to` may be `from`. A thread writes an element only after it has read it, and
  // nobody else reads it.
  const T* from = static_cast<const T*>(p.logits) + row * p.row_stride + begin;
  T* to = static_cast<T*>(p.grad_logits) + row * p.grad_row_stride + begin;
  const int t = threadIdx.x;

  const bool dead = masked(p, row);
  const A g_logp = dead ? A{0} : or_zero<A>(p.grad_logp, row);
  const A g_lse = dead ? A{0} : or_zero<A>(p.grad_lse, row);
  const A g_entropy = dead ? A{0} : or_zero<A>(p.grad_entropy, row);
  const bool zero = g_logp == 0 && g_lse == 0 && g_entropy == 0;

  using L = Logits<A, kCapped>;
  const L logits(p);
  RowGradient<L, A> gradient{logits, 0, 0, 0, 0, 0};
  int target = -1;  // its place in this part, or anything outside [0, n)
  if (!zero) {
    const A c = static_cast<A>(p.inv_temperature);
    // p = e^distance e^rest: the rounding of a log-sum-exp of 50 to fp32 alone would make every
    // probability wrong by up to 2e-6, in the same direction.
    const double lse = p.lse_exact[row];
    gradient.anchor = static_cast<A>(lse / logits.scale);
    const A rest = static_cast<A>(static_cast<double>(gradient.anchor) * logits.scale - lse);
    const A weight = c * std::exp(rest);
    gradient.all = weight * (g_lse - g_logp);
    gradient.entropy_slope = weight * g_entropy;
    gradient.entropy = or_zero<A>(p.entropy, row) + rest;
    gradient.at_target = c * g_logp;
    const int64_t offset = p.target[row] - begin;
    if (offset >= 0 && offset < n) target = static_cast<int>(offset);
  }
  auto one = [&](int i) {
    if (zero) {
      to[i] = narrow<T>(A{0});
    } else {
      to[i] = narrow<T>(gradient(logits.u(from[i]), i == target ? gradient.at_target : A{0}));
    }
  };

  const Stretch s(to, n);
  if (!zero && misalignment(from) != misalignment(to)) {  // two matrices of unlike strides
    for (int i = t; i < n; i += kBackwardThreads) one(i);
    return;
  }
  Vector<T> vectors[kBackwardVectors] = {};
  auto place = [&](int k) { return s.head + (t + k * kBackwardThreads) * kPerVector<T>; };
  auto exists = [&](int k) { return t + k * kBackwardThreads < s.vectors; };
  if (!zero) {
#pragma unroll
    for (int k = 0; k < kBackwardVectors; ++k) {
      if (exists(k)) vectors[k] = Vector<T>::read(from + place(k));
    }
#pragma unroll
    for (int k = 0; k < kBackwardVectors; ++k) {
      const Vector<T> x = vectors[k];
#pragma unroll
      for (int e = 0; e < kPerVector<T>; ++e) {
        vectors[k].element[e] = narrow<T>(gradient(logits.u(x.element[e]), 0));
      }
      const int here = target - place(k);
      if (here < 0 || here >= kPerVector<T>) continue;  // one vector of the row has the target
#pragma unroll
      for (int e = 0; e < kPerVector<T>; ++e) {  // unrolled: registers have no addresses
        if (e != here) continue;
        vectors[k].element[e] = narrow<T>(gradient(logits.u(x.element[e]), gradient.at_target));
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kBackwardVectors; ++k) {
    if (exists(k)) vectors[k].write(to + place(k));
  }
  if (t < s.head) one(t);
  if (t < s.tail) one(n - s.tail + t);
}

}  // namespace
}  // namespace fdpg::cuda

// linear_numerators-inl.h: a language-model head and token_logprob_numerators in one: exponentials
// are taken of sums that are in registers still, so logits are neither written nor read.
//
// Three walks: the offset of each row, to which exponentials are relative; the product, a sink of
// which takes exponentials, and their sum per row and tile; and each row's results. An offset need
// only be near: it is the hint, or the logit of the target, which lies above the log-sum-exp by the
// log-prob. Its distance d from the log-sum-exp costs a log-prob the rounding of a number of size
// d, which is not more than its own. A row whose sum says that the offset was not near, or that is
// not finite, is computed again, alone, by way of its logits.
//
// Sums of a tile are fp32 in as many partial sums as a vector has, those of a row double, in order.
#pragma once

#include <cstdint>

#include "fdpg/cpu.h"    // kMatmulTileColumns
#include "fdpg/types.h"  // load, store
#include "kernels.h"     // Workspace
#include "matmul-inl.h"
#include "token_logprob-inl.h"

FDPG_BEGIN_SIMD
namespace fdpg::cpu {
namespace {

// Sums between these are of exponentials in the range of fp32 whose rounding errors do not matter.
constexpr double kLeastSum = 1e-26, kMostSum = 1e26;

inline int64_t tiles_of(int64_t columns) {
  return (columns + kMatmulTileColumns - 1) / kMatmulTileColumns;
}

// Takes the exponentials of sums. L: Logits<S, ...>; T: type of the numerators.
template <class L, class T>
class Exponentials {
  using S = typename L::S;
  using Real = typename S::Real;
  using Vec = typename S::Vec;

 public:
  // Numerators of 16 bits, or none, have no room for a part of the sum.
  static constexpr bool kInBlocks = false;

  explicit Exponentials(const LinearNumeratorsParams& p)
      : p_(p), logits_(p), tiles_(tiles_of(p.product.columns)) {}

  FDPG_ALWAYS_INLINE void take(const Place<S>& place, const Vec (&sums)[kVectors<S>]) const {
    T* const out = p_.product.out ? static_cast<T*>(p_.product.out) +
                                        place.row * p_.product.out_stride + place.column
                                  : nullptr;
    const Vec scale = S::broadcast(logits_.scale);
    const Vec minus_offset = S::broadcast(-static_cast<const Real*>(p_.offset)[place.row]);
    const int64_t target = p_.target[place.row] - place.column;
    Vec total = S::broadcast(0);
    for (int64_t v = 0; v < kVectors<S>; ++v) {
      const int64_t at = v * S::kLanes, left = place.columns - at;
      if (left <= 0) break;
      const Vec x = finished(p_.product, place, at, sums[v]);
      const Vec u = logits_.capped(x);
      Vec e = S::exp(S::fma(u, scale, minus_offset));
      if (left < S::kLanes) e = first_of(e, left);
      total = S::add(total, e);
      if (target >= at && target < at + S::kLanes) {
        Real lanes[S::kLanes];
        S::store(lanes, x);
        static_cast<Real*>(p_.target_logit)[place.row] = lanes[target - at];
      }
      if (!out) continue;
      e = logits_.back(e, u);
      if (left >= S::kLanes) {
        S::store(out + at, e);
      } else {
        S::store_first(out + at, e, left);
      }
    }
    // Panels of a tile come in order, and from one thread.
    double& part = p_.parts[place.row * tiles_ + place.column / kMatmulTileColumns];
    const double sum = S::sum(total);
    part = place.column % kMatmulTileColumns == 0 ? sum : part + sum;
  }

 private:
  static Vec first_of(Vec x, int64_t count) {
    Real lanes[S::kLanes];
    S::store(lanes, x);
    return S::load_zeros(lanes, count);
  }

  const LinearNumeratorsParams& p_;
  L logits_;
  int64_t tiles_;
};

template <class M, class L>
struct LinearNumerators {
  using S = typename M::Simd;
  using T = typename M::Stored;
  using Real = typename S::Real;

  static int64_t offsets(const LinearNumeratorsParams& p, int64_t begin, int64_t end) {
    const MatmulParams& product = p.product;
    const L logits(p);
    int64_t bad_row = kOk;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t target = p.target[i];
      if (target < 0 || target >= product.columns) {
        if (bad_row == kOk) bad_row = i;
        continue;
      }
      if (p.lse_hint) {
        static_cast<Real*>(p.offset)[i] = static_cast<const Real*>(p.lse_hint)[i];
        continue;
      }
      const T* const a = static_cast<const T*>(product.a) + i * product.a_stride[0];
      const T* const b = static_cast<const T*>(product.b) + target * product.b_stride[1];
      double x = product.bias ? static_cast<const Real*>(product.bias)[target] : 0;
      for (int64_t k = 0; k < product.depth; ++k) {
        x += static_cast<double>(load(a[k * product.a_stride[1]])) *
             load(b[k * product.b_stride[0]]);
      }
      static_cast<Real*>(p.offset)[i] =
          static_cast<Real>(logits.z(static_cast<Real>(product.alpha * x)));
    }
    return bad_row;
  }

  static void tiles(const LinearNumeratorsParams& p, int64_t begin, int64_t end,
                    Workspace& workspace) {
    matmul_into<M>(Exponentials<L, T>(p), p.product, begin, end, workspace);
  }

  static void rows(const LinearNumeratorsParams& p, int64_t begin, int64_t end) {
    const int64_t parts = tiles_of(p.product.columns);
    const Real* const coefficient = static_cast<const Real*>(p.coefficient);
    const L logits(p);
    for (int64_t i = begin; i < end; ++i) {
      SoftmaxRow<Real> row = {static_cast<const Real*>(p.offset)[i], 1, {}};  // of z, not of u
      for (int64_t t = 0; t < parts; ++t) row.sums.sum += p.parts[i * parts + t];
      if (!(row.sums.sum >= kLeastSum && row.sums.sum <= kMostSum)) {
        by_way_of_logits(p, i);
        continue;
      }
      const Real logit = static_cast<const Real*>(p.target_logit)[i];
      const double logp = row.logp(logits.z(logit));
      static_cast<Real*>(p.logp)[i] = static_cast<Real>(logp);
      static_cast<Real*>(p.lse)[i] = static_cast<Real>(row.lse());
      if (!p.product.out) continue;
      static_cast<Real*>(p.row_scale)[i] =
          static_cast<Real>(-coefficient[i] * p.inv_temperature / row.sums.sum);
      // 1 - p by expm1: a target that is all but certain has a gradient that is all but zero.
      const double at_target = row.sums.sum * __builtin_expm1(logp);
      static_cast<T*>(p.product.out)[i * p.product.out_stride + p.target[i]] =
          store<T>(static_cast<Real>(logits.back_one(at_target, logit)));
    }
  }

 private:
  static void by_way_of_logits(const LinearNumeratorsParams& p, int64_t i) {
    Workspace row, panels;
    const int64_t vocab = p.product.columns;
    MatmulParams one = p.product;
    one.a = static_cast<const T*>(one.a) + i * one.a_stride[0];
    one.out = row.allocate(vocab * static_cast<int64_t>(sizeof(Real)));
    one.rows = 1;
    one.rounds_out = false;
    matmul<M>(one, 0, tiles_of(vocab), panels);
    if (!p.product.out) {
      TokenLogprobParams q{};
      q.logits = one.out;
      q.vocab = vocab;
      q.target = p.target + i;
      q.logp = static_cast<Real*>(p.logp) + i;
      q.lse = static_cast<Real*>(p.lse) + i;
      double unused;
      q.lse_exact = &unused;
      token_logprob_of<Real>(L(p), q, 0, 1);
      return;
    }
    TokenLogprobNumeratorsParams q{};
    q.logits = one.out;
    q.numerators = static_cast<T*>(p.product.out) + i * p.product.out_stride;
    q.vocab = vocab;
    q.target = p.target + i;
    q.coefficient = static_cast<const Real*>(p.coefficient) + i;
    q.inv_temperature = p.inv_temperature;
    q.logp = static_cast<Real*>(p.logp) + i;
    q.lse = static_cast<Real*>(p.lse) + i;
    q.row_scale = static_cast<Real*>(p.row_scale) + i;
    token_logprob_numerators_of<Real, T>(L(p), q, 0, 1);
  }
};

template <class M>
int64_t linear_numerators(const LinearNumeratorsParams& p, LinearWalk walk, int64_t begin,
                          int64_t end, Workspace& workspace) {
  const auto run = [&](auto of) {
    using Of = decltype(of);
    if (walk == LinearWalk::kOffsets) return Of::offsets(p, begin, end);
    if (walk == LinearWalk::kTiles) Of::tiles(p, begin, end, workspace);
    if (walk == LinearWalk::kRows) Of::rows(p, begin, end);
    return kOk;
  };
  using S = typename M::Simd;
  // Not with_logits: here one fma takes the temperature and the offset together.
  return p.softcap > 0 ? run(LinearNumerators<M, Logits<S, true>>{})
                       : run(LinearNumerators<M, Logits<S, false>>{});
}

}  // namespace
}  // namespace fdpg::cpu
FDPG_END_SIMD

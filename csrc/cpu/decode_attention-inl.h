// decode_attention-inl.h: one new token of each sequence attends to the live keys of its cache.
//
// Fused: scores, softcap, bias, softmax, sinks and the sum of values; no mask and no (B, H, T)
// scores are made, and keys outside a sequence's span are not read. Per (sequence, key head): (D +
// E) (end - begin) numbers of the cache, once for up to kGroup queries that share them, be they
// heads of one sequence or sequences that read one row of the cache (samples of a prompt); keys go
// through in blocks that stay in the first-level cache, with a running maximum (online softmax:
// Milakov and Gimelshein, arXiv 1805.02867). torch's attention over a static cache reads all T
// keys, and for one query per row spends its time on tiling: on a model of 16 heads of 8 it was
// half of a decoding step.
//
// A sequence's result depends on nothing but its own query, live keys and bias.
#pragma once

#include <cstdint>

#include "fdpg/types.h"  // load, store
#include "logits-inl.h"  // tanh
#include "simd_target.h"

FDPG_BEGIN_SIMD
namespace fdpg::cpu {
namespace {

constexpr int64_t kGroup = 8;             // queries at a time
constexpr int64_t kKeys = 128;            // of a block
constexpr int64_t kPrefetchBytes = 8192;  // of the keys, and of the values, of an item
constexpr int64_t kPrefetchAhead = 4;     // items
constexpr int64_t kChains = 4;            // sums side by side, to hide the latency of fma

// Queries that attend to the same keys: how many, and the steps from one to the next.
struct Group {
  int64_t count, query, out, head;
};

// Up to kGroup queries over the keys of one (sequence, key head).
template <class S, class T>
class DecodeAttention {
  using Real = typename S::Real;
  using Vec = typename S::Vec;

 public:
  // `query`: of the first, which is of query head `head`, and `end` of all.
  FDPG_ALWAYS_INLINE DecodeAttention(const DecodeAttentionParams& p, const T* query, int64_t head,
                                     int64_t end, const Group& group)
      : p_(p), group_(group.count), out_step_(group.out) {
    const Vec scale = S::broadcast(static_cast<Real>(p.scale));
    for (int64_t g = 0; g < group_; ++g) {
      const T* const row = query + g * group.query;
      // The last vector of a row may be partly past its end: zeros.
      for (int64_t d = 0; d < p.size; d += S::kLanes) {
        S::store(query_[g] + d, S::mul(load_at(row, d, p.size), scale));
      }
      for (int64_t e = 0; e < p.value_size; e += S::kLanes) S::store(out_[g] + e, S::broadcast(0));
      const int64_t h = head + g * group.head;
      // A sink is a term of the normaliser with no value. The largest score starts as the least
      // number, of which minus infinity may be subtracted: keys with that score weigh nothing.
      constexpr Real kNone = -static_cast<Real>(__builtin_inff());
      constexpr Real kLeast = sizeof(Real) == 8 ? static_cast<Real>(-__DBL_MAX__) : -__FLT_MAX__;
      const Real sink = p.sinks ? static_cast<const Real*>(p.sinks)[h] : kNone;
      most_[g] = sink < kLeast ? kLeast : sink;
      sum_[g] = sink == kNone ? 0 : 1;
      bias_[g] =
          p.bias ? static_cast<const Real*>(p.bias) + h * p.bias_stride + p.tokens - end : nullptr;
    }
  }

  // Keys t to t + n, of this sequence and key head.
  void block(const T* keys, const T* values, int64_t t, int64_t n) {
    for (int64_t j = 0; j < n; j += S::kLanes) {
      const T* const first = keys + j * p_.key_stride[2];
      const int64_t count = n - j < S::kLanes ? n - j : S::kLanes;
      if (p_.size <= S::kLanes / 2) {
        short_dots<S::kLanes / 2>(first, count, j);
      } else if (p_.size <= S::kLanes) {
        short_dots<S::kLanes>(first, count, j);
      } else {
        for (int64_t g = 0; g < group_; ++g) {
          S::store(weight_[g] + j, dots(query_[g], first, count));
        }
      }
    }
    for (int64_t g = 0; g < group_; ++g) {
      to_weights(g, t, n);
      int64_t e = 0;
      for (; e + S::kLanes <= p_.value_size; e += S::kLanes) add_values<true>(g, values, n, e);
      if (e < p_.value_size) add_values<false>(g, values, n, e);
    }
  }

  // To the result of each, `out` of the first.
  void finish(T* out) const {
    for (int64_t g = 0; g < group_; ++g) {
      const Vec scale = S::broadcast(static_cast<Real>(1 / sum_[g]));
      T* const row = out + g * out_step_;
      for (int64_t e = 0; e < p_.value_size; e += S::kLanes) {
        const Vec x = S::mul(S::load(out_[g] + e), scale);
        if (e + S::kLanes <= p_.value_size) {
          S::store(row + e, x);
        } else {
          S::store_first(row + e, x, p_.value_size - e);
        }
      }
    }
  }

 private:
  FDPG_ALWAYS_INLINE Vec load_at(const T* row, int64_t i, int64_t size) const {
    return i + S::kLanes <= size ? S::load(row + i) : S::load_zeros(row + i, size - i);
  }

  // Query times key, to be summed across lanes.
  static FDPG_ALWAYS_INLINE Vec products(const Real* query, const T* key, int64_t size) {
    Vec sum = S::broadcast(0);
    int64_t d = 0;
    for (; d + S::kLanes <= size; d += S::kLanes) {
      sum = S::fma(S::load(query + d), S::load(key + d), sum);
    }
    if (d == size) return sum;
    return S::fma(S::load(query + d), S::load_zeros(key + d, size - d), sum);
  }

  // Of the query with `count` keys, one to a lane: kLanes sums across lanes are cheaper together.
  FDPG_ALWAYS_INLINE Vec dots(const Real* query, const T* keys, int64_t count) const {
    const int64_t size = p_.size, stride = p_.key_stride[2];
    Vec sums[S::kLanes];
    for (int64_t j = 0; j < count; ++j) sums[j] = products(query, keys + j * stride, size);
    for (int64_t j = count; j < S::kLanes; ++j) sums[j] = S::broadcast(0);
    return S::totals(sums);
  }

  // The same of all queries, to weight_[g] + j, where a key is no longer than a vector: with a key
  // to a lane, a product per number of the query is all it takes. kSize: at least p_.size.
  template <int64_t kSize>
  FDPG_ALWAYS_INLINE void short_dots(const T* keys, int64_t count, int64_t j) {
    Vec x[S::kLanes];
    for (int64_t i = 0; i < S::kLanes; ++i) {  // past the end the last one, of no use
      x[i] = load_at(keys + (i < count ? i : count - 1) * p_.key_stride[2], 0, p_.size);
    }
    S::transpose(x);
    for (int64_t g = 0; g < group_; ++g) {
      Vec even = S::broadcast(0), odd = even;
      for (int64_t d = 0; d < kSize; d += 2) {
        even = S::fma(S::broadcast(query_[g][d]), x[d], even);
        odd = S::fma(S::broadcast(query_[g][d + 1]), x[d + 1], odd);
      }
      S::store(weight_[g] + j, S::add(even, odd));
    }
  }

  static FDPG_ALWAYS_INLINE Vec largest_of(const Real* x, int64_t n) {
    Vec most = S::broadcast(-static_cast<Real>(__builtin_inff()));
    int64_t j = 0;
    for (; j + S::kLanes <= n; j += S::kLanes) most = S::max(S::load(x + j), most);
    return j < n ? S::max(S::load_first(x + j, n - j), most) : most;
  }

  static FDPG_ALWAYS_INLINE Vec capped(Vec score, Vec cap) {
    return S::mul(cap, tanh<S>(S::div(score, cap)));
  }

  // Scores of a block to exponentials relative to the largest score so far.
  FDPG_ALWAYS_INLINE void to_weights(int64_t g, int64_t t, int64_t n) {
    Real* const w = weight_[g];
    if (p_.softcap > 0) {
      const Vec cap = S::broadcast(static_cast<Real>(p_.softcap));
      int64_t j = 0;
      for (; j + S::kLanes <= n; j += S::kLanes) S::store(w + j, capped(S::load(w + j), cap));
      if (j < n) S::store_first(w + j, capped(S::load_first(w + j, n - j), cap), n - j);
    }
    if (p_.bias) {
      const Real* const bias = bias_[g] + t;
      for (int64_t j = 0; j < n; ++j) w[j] += bias[j];
    }
    // A NaN is no maximum, but its exponential is NaN and stays.
    const Real most = S::largest(S::max(largest_of(w, n), S::broadcast(most_[g])));
    if (most != most_[g]) {
      if (sum_[g] != 0) {
        const Real shrink = static_cast<Real>(__builtin_exp(most_[g] - most));
        for (int64_t e = 0; e < p_.value_size; ++e) out_[g][e] *= shrink;
        sum_[g] *= shrink;
      }
      most_[g] = most;
    }
    const Vec minus_most = S::broadcast(-most);
    Vec sum = S::broadcast(0);
    int64_t j = 0;
    for (; j + S::kLanes <= n; j += S::kLanes) {
      const Vec x = S::exp(S::add(S::load(w + j), minus_most));
      S::store(w + j, x);
      sum = S::add(sum, x);
    }
    if (j < n) {  // exp(-inf) = 0 in the lanes past the end
      const Vec x = S::exp(S::add(S::load_first(w + j, n - j), minus_most));
      S::store_first(w + j, x, n - j);
      sum = S::add(sum, x);
    }
    sum_[g] += S::sum(sum);
  }

  // out[e .. e + kLanes) += sum_j weight_j values[j][e ..]; without kWhole, the row ends inside.
  template <bool kWhole>
  FDPG_ALWAYS_INLINE void add_values(int64_t g, const T* values, int64_t n, int64_t e) {
    const Real* const w = weight_[g];
    const int64_t stride = p_.value_stride[2], left = p_.value_size - e;
    const auto row = [&](int64_t j) {
      const T* const v = values + j * stride + e;
      return kWhole ? S::load(v) : S::load_zeros(v, left);
    };
    Vec chain[kChains];
    for (Vec& sum : chain) sum = S::broadcast(0);
    chain[0] = S::load(out_[g] + e);
    int64_t j = 0;
    for (; j + kChains <= n; j += kChains) {
      for (int64_t k = 0; k < kChains; ++k) {
        chain[k] = S::fma(S::broadcast(w[j + k]), row(j + k), chain[k]);
      }
    }
    for (; j < n; ++j) chain[0] = S::fma(S::broadcast(w[j]), row(j), chain[0]);
    S::store(out_[g] + e, S::add(S::add(chain[0], chain[1]), S::add(chain[2], chain[3])));
  }

  const DecodeAttentionParams& p_;
  const int64_t group_, out_step_;
  const Real* bias_[kGroup];  // by key
  Real query_[kGroup][kMaxHeadSize];
  Real out_[kGroup][kMaxHeadSize];
  Real weight_[kGroup][kKeys];
  Real most_[kGroup];
  double sum_[kGroup];
};

// What is attended to at once: the keys and values of one (sequence, key head).
template <class T>
struct Item {
  int64_t sequence, head, row, first, last;
  bool bad;  // such places there are not: row, first and last are for nothing else
  const T* keys;
  const T* values;

  FDPG_ALWAYS_INLINE Item(const DecodeAttentionParams& p, int64_t i)
      : sequence(p.rows ? i % p.sequences : i / p.key_heads),
        head(p.rows ? i / p.sequences : i % p.key_heads),
        row(p.rows ? p.rows[sequence] : sequence),
        first(p.begin ? p.begin[sequence] : 0),
        last(p.end[sequence]),
        bad(first < 0 || first > last || last > p.tokens || row < 0 || row >= p.cache_rows),
        keys(bad ? nullptr
                 : static_cast<const T*>(p.keys) + row * p.key_stride[0] + head * p.key_stride[1]),
        values(bad ? nullptr
                   : static_cast<const T*>(p.values) + row * p.value_stride[0] +
                         head * p.value_stride[1]) {}

  FDPG_ALWAYS_INLINE bool reads_the_same(const Item& other) const {
    return row == other.row && head == other.head && first == other.first && last == other.last;
  }
};

template <int kLocality, class T>
FDPG_ALWAYS_INLINE void prefetch_rows(const T* rows, int64_t first, int64_t last, int64_t stride) {
  const char* const from = reinterpret_cast<const char*>(rows + first * stride);
  const int64_t bytes = (last - first) * stride * static_cast<int64_t>(sizeof(T));
  for (int64_t at = 0; at < bytes && at < kPrefetchBytes; at += 64) {
    __builtin_prefetch(from + at, 0, kLocality);
  }
}

// Asks for what a later item will read: the rows of short caches lie too far apart for the hardware
// to see them coming.
template <int kLocality, class T>
FDPG_ALWAYS_INLINE void prefetch(const DecodeAttentionParams& p, const Item<T>& item) {
  if (item.bad) return;
  prefetch_rows<kLocality>(item.keys, item.first, item.last, p.key_stride[2]);
  prefetch_rows<kLocality>(item.values, item.first, item.last, p.value_stride[2]);
}

template <class S, class T>
int64_t decode_attention(const DecodeAttentionParams& p, int64_t begin, int64_t end) {
  using Real = typename S::Real;
  const int64_t groups = p.heads / p.key_heads;
  int64_t bad_row = kOk;
  for (int64_t i = begin, next; i < end; i = next) {
    const Item<T> item(p, i);
    next = i + 1;
    if (p.rows && groups == 1) {
      while (next < end && next - i < kGroup && Item<T>(p, next).reads_the_same(item)) ++next;
    }
    // From memory to the second level some items ahead, as more is on its way there at a time than
    // the first has room to wait for, and from there one ahead.
    const int64_t ahead = next - 1 + kPrefetchAhead;
    if (ahead < end) prefetch<2>(p, Item<T>(p, ahead));
    if (next < end) prefetch<3>(p, Item<T>(p, next));
    const int64_t b = item.sequence, h = item.head;
    T* const out = static_cast<T*>(p.out) + (b * p.heads + h * groups) * p.value_size;
    if (item.bad || item.first == item.last) {
      const Real fill = item.bad ? static_cast<Real>(__builtin_nan("")) : 0;
      for (int64_t e = 0; e < groups * p.value_size; ++e) out[e] = store<T>(fill);
      if (item.bad && (bad_row == kOk || b < bad_row)) bad_row = b;
      next = i + 1;
      continue;
    }
    const T* const query = static_cast<const T*>(p.query) + b * p.query_stride[0];
    for (int64_t g = 0; g < groups; g += kGroup) {
      const int64_t head = h * groups + g;
      const Group of_heads{groups - g < kGroup ? groups - g : kGroup, p.query_stride[1],
                           p.value_size, 1};
      const Group of_sequences{next - i, p.query_stride[0], p.heads * p.value_size, 0};
      DecodeAttention<S, T> attention(p, query + head * p.query_stride[1], head, item.last,
                                      next - i > 1 ? of_sequences : of_heads);
      for (int64_t t = item.first; t < item.last; t += kKeys) {
        attention.block(item.keys + t * p.key_stride[2], item.values + t * p.value_stride[2], t,
                        item.last - t < kKeys ? item.last - t : kKeys);
      }
      attention.finish(out + g * p.value_size);
    }
  }
  return bad_row;
}

}  // namespace
}  // namespace fdpg::cpu
FDPG_END_SIMD

// row_parts.cuh: the walk that the ops on rows of logits share. A row is cut into parts of at most
// 32 KiB, a block stages one part in shared memory and folds it into (top, sum) or (top, sum,
// weighted sum). (sample_logprob.cuh takes from it how a warp folds, and cuts its rows finer.)
//
// How a row is cut and which thread adds which elements is a function of V alone: not of N, nor of
// the row's address. So a row gives the same bits in any batch, and few rows still fill the
// machine. The detour through shared memory is what makes this possible with 16-byte loads, since
// the rows of an odd vocabulary (50257) start at every alignment.
#pragma once

#include "device.cuh"
//
#include "fdpg/types.h"
#include "instructions.cuh"
#include "logits.cuh"
#include "reduce.cuh"
#include "vec.cuh"

namespace fdpg::cuda {

// How a row of `vocab` elements of `element_bytes` is cut: a function of these two alone.
struct Cut {
  static constexpr int kPartBytes = 32 << 10;
  static constexpr int kMaxThreads = 256;

  int64_t part;   // elements of a part; the last one may be shorter
  int64_t parts;  // of a row
  int threads;    // of a block

  Cut(int64_t vocab, int64_t element_bytes, int most_threads = kMaxThreads) {
    const int64_t limit = kPartBytes / element_bytes;
    part = round_up(divide_up(vocab, divide_up(vocab, limit)), 128);
    parts = divide_up(vocab, part);
    // A thread for every 16 elements of a small vocabulary: the others would only wait at barriers.
    threads = static_cast<int>(round_up(divide_up(part, 16), kWarp));
    if (threads > most_threads) threads = most_threads;
  }

  // Dynamic shared memory for so many elements, wherever they start.
  template <class T>
  static std::size_t stage_bytes(int64_t elements) {
    return elements * sizeof(T) + kVectorBytes;
  }
};

// Threads of a block that folds and does no more. What a thread does before and after costs as much
// as folding 40 logits, so few threads have many logits each.
inline constexpr int kFoldThreads = 128;

// Calls fn(cut, T{}) with the storage type of the logits, and returns what it returns.
template <class Fn>
cudaError_t with_cut(Dtype dtype, int64_t vocab, Fn&& fn) {
  cudaError_t status = cudaErrorInvalidValue;  // no vocabulary, or a dtype that there is not
  if (vocab <= 0) return status;
  visit_dtype(dtype, [&](auto tag) { status = fn(Cut(vocab, sizeof(tag), kFoldThreads), tag); });
  return status;
}

namespace {

// Whether the mask leaves a row out.
template <class Params>
__device__ __forceinline__ bool masked(const Params& p, int64_t row) {
  return p.mask != nullptr && !p.mask[row];
}

// Where part `index` of a row of `vocab` elements lies.
struct PartOfRow {
  int64_t begin;
  int size;

  __device__ PartOfRow(int64_t index, int part, int64_t vocab)
      : begin(index * part),
        size(static_cast<int>(min(static_cast<int64_t>(part), vocab - begin))) {}
};

// Logits of a thread that are loaded before the first is used; the running sum is rescaled once for
// them all.
inline constexpr int kGroup = 16;
inline constexpr int kWarpGroup = kWarp * kGroup;  // side by side in the row

template <class A, bool kEntropy>
struct SeenWeighted {};
template <class A>
struct SeenWeighted<A, true> {
  A weighted = 0;  // of (u - top) e^(scale (u - top))
};

// Some logits, seen relative to the largest. In u, not in z (logits.cuh): the maximum is exact, and
// so all but is the distance from it. `sum` is NaN if one is NaN or +inf. The one-pass pair of
// Milakov and Gimelshein, "Online normalizer calculation for softmax" (arXiv 1805.02867).
template <class A, bool kEntropy>
struct Seen : SeenWeighted<A, kEntropy> {
  static constexpr A kNothing = -static_cast<A>(INFINITY);

  A top = kNothing;
  A sum = 0;  // of e^(scale (u - top))

  // u - top; where there is nothing but -inf, each of them is -inf from here too, not NaN.
  struct Distance {
    A origin;
    __device__ explicit Distance(A top) : origin(top == kNothing ? A{0} : top) {}
    __device__ A operator()(A u) const { return u - origin; }
  };
  // So that 0 times it is 0. NaN is lost: it has already made a NaN of the weight.
  __device__ static A finite(A distance) { return larger_number(distance, static_cast<A>(-1e30)); }

  // `rate`: Logits::rate. `to` is no smaller than `top`.
  __device__ void move(A to, A rate) {
    const A distance = Distance(to)(top), factor = power(distance * rate);
    if constexpr (kEntropy) {
      this->weighted = std::fma(sum, finite(distance), this->weighted) * factor;
    }
    sum *= factor;
    top = to;
  }

  __device__ void add(const A (&u)[kGroup], A rate) {
    A largest[kGroup], weights[kGroup], products[kGroup];
#pragma unroll
    for (int k = 0; k < kGroup; ++k) largest[k] = u[k];
    move(larger_number(top, tree(largest, [](A a, A b) { return larger_number(a, b); })), rate);
    const Distance distance(top);
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const A d = distance(u[k]);
      weights[k] = power(d * rate);
      if constexpr (kEntropy) products[k] = weights[k] * finite(d);
    }
    const auto plus = [](A a, A b) { return a + b; };
    if constexpr (kEntropy) this->weighted += tree(products, plus);
    sum += tree(weights, plus);
  }

  // All lanes get what the warp has seen.
  __device__ void meet(A rate) {
    move(warp_max(top), rate);
    sum = warp_sum(sum);
    if constexpr (kEntropy) this->weighted = warp_sum(this->weighted);
  }

  __device__ void merge(Seen later, A rate) {
    const A higher = larger_number(top, later.top);
    move(higher, rate);
    later.move(higher, rate);
    sum += later.sum;
    if constexpr (kEntropy) this->weighted += later.weighted;
  }

  // log sum e^z, and -sum p log p, of what has been seen; `scale`: Logits::scale.
  __device__ double lse(A scale) const {
    return std::fma(static_cast<double>(top), static_cast<double>(scale),
                    std::log(static_cast<double>(sum)));
  }
  __device__ A entropy(A scale) const {
    return std::log(sum) - scale * this->weighted / sum;  // lse - sum p z would cancel
  }

 private:
  // Neighbours first; the values are lost.
  template <class Op>
  __device__ static A tree(A (&values)[kGroup], const Op& op) {
#pragma unroll
    for (int reach = 1; reach < kGroup; reach *= 2) {
#pragma unroll
      for (int k = 0; k < kGroup; k += 2 * reach) values[k] = op(values[k], values[k + reach]);
    }
    return values[0];
  }
};

// Which logits of a kWarpGroup a lane takes, from its first one on: pairs where two make a word,
// else single ones, the lanes' side by side.
template <class T>
inline constexpr int kPack = sizeof(T) == 2 ? 2 : 1;
template <class T>
__host__ __device__ constexpr int place(int k) {
  return k / kPack<T> * kPack<T> * kWarp + k % kPack<T>;
}

// `words`: whether `mine` is aligned to a word, so that one load brings two; the same for all
// lanes.
template <class T, class A>
__device__ __forceinline__ void load_group(const T* mine, bool words, A (&x)[kGroup]) {
  if constexpr (kPack<T> == 2) {
    if (words) {
#pragma unroll
      for (int k = 0; k < kGroup; k += 2) {
        widen_both<T>(*reinterpret_cast<const uint32_t*>(mine + place<T>(k)), &x[k], &x[k + 1]);
      }
      return;
    }
  }
#pragma unroll
  for (int k = 0; k < kGroup; ++k) x[k] = widen(mine[place<T>(k)]);
}

// This lane's logits, in u, of a kWarpGroup that begins at `elements` and of which `left` elements
// are there; nothing takes the place of the others. `words`: whether `elements` is aligned to one.
template <class T, class L, class A>
__device__ __forceinline__ void read_group(const T* elements, int left, bool words, const L& logits,
                                           A (&u)[kGroup]) {
  const int first = threadIdx.x % kWarp * kPack<T>;
  const T* mine = elements + first;
  if (left >= kWarpGroup) {
    load_group(mine, words, u);
#pragma unroll
    for (int k = 0; k < kGroup; ++k) u[k] = logits.capped(u[k]);
  } else {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      u[k] = first + place<T>(k) < left ? logits.u(mine[place<T>(k)]) : -static_cast<A>(INFINITY);
    }
  }
}

template <class T>
__device__ __forceinline__ bool on_word(const T* elements) {
  return reinterpret_cast<uintptr_t>(elements) % sizeof(uint32_t) == 0;
}

// What a warp has seen of n elements in shared memory: its kWarpGroups are those that begin at
// `begin`, begin + step, ... All lanes get it. Seven to eight instructions a logit (sm_90), where
// an H200 has time for 15 while it loads one in bf16.
template <bool kEntropy, class T, class L, class A = accumulate_t<T>>
__device__ Seen<A, kEntropy> fold(const T* elements, int n, int begin, int step, const L& logits) {
  const A rate = logits.rate();
  const bool words = on_word(elements);
  Seen<A, kEntropy> seen;
#pragma unroll 1  // more would only be more code
  for (; begin < n; begin += step) {
    A u[kGroup];
    read_group(elements + begin, n - begin, words, logits, u);
    seen.add(u, rate);
  }
  seen.meet(rate);
  return seen;
}

// What the block makes of part `index` of a row; thread 0 gets it. `stage`: Cut::stage_bytes. Ends
// with a barrier.
template <bool kEntropy, class T, class L, class A = accumulate_t<T>>
__device__ Seen<A, kEntropy> fold_part(const T* row, int64_t vocab, int64_t index, int part,
                                       const L& logits, T* stage) {
  using S = Seen<A, kEntropy>;
  alignas(16) __shared__ unsigned char storage[kWarp * sizeof(S)];  // bytes: S has a constructor
  S* all = reinterpret_cast<S*>(storage);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const PartOfRow here(index, part, vocab);
  const T* elements = stage_in_shared(stage, row + here.begin, here.size);
  S seen = fold<kEntropy>(elements, here.size, warp * kWarpGroup, warps * kWarpGroup, logits);
  if (lane == 0) all[warp] = seen;
  __syncthreads();
  if (warp == 0) {
    seen = lane < warps ? all[lane] : S{};
    seen.meet(logits.rate());
  }
  __syncthreads();  // `storage` and `stage` may be written again
  return seen;
}

// The whole row from its parts, in order.
template <class S, class L>
__device__ S merge_parts(const S* partial, int parts, const L& logits) {
  S seen = partial[0];
  for (int k = 1; k < parts; ++k) seen.merge(partial[k], logits.rate());
  return seen;
}

}  // namespace
}  // namespace fdpg::cuda

// row_parts.cuh: the walk that the ops on rows of logits share: a row is cut into parts of at most
// 32 KiB, a block stages one part in shared memory and folds it into (max, sum) or (max, sum,
// weighted sum).
//
// How a row is cut and which thread adds which elements is a function of V alone: not of N, nor of
// the row's address. So a row gives the same bits in any batch, and few rows still fill the
// machine. The detour through shared memory is what makes this possible with 16-byte loads, since
// the rows of an odd vocabulary (50257) start at every alignment.
#pragma once

#include "device.cuh"
//
#include "fdpg/online_logsumexp.h"
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

  Cut(int64_t vocab, int64_t element_bytes) {
    const int64_t limit = kPartBytes / element_bytes;
    part = round_up(divide_up(vocab, divide_up(vocab, limit)), 128);
    parts = divide_up(vocab, part);
    // A thread for every 16 elements of a small vocabulary: the others would only wait at barriers.
    threads = static_cast<int>(round_up(divide_up(part, 16), kWarp));
    if (threads > kMaxThreads) threads = kMaxThreads;
  }

  // Dynamic shared memory for one part, wherever it starts.
  template <class T>
  std::size_t stage_bytes() const {
    return part * sizeof(T) + kVectorBytes;
  }
};

// Calls fn(cut, T{}) with the storage type of the logits, and returns what it returns.
template <class Fn>
cudaError_t with_cut(Dtype dtype, int64_t vocab, Fn&& fn) {
  cudaError_t status = cudaErrorInvalidValue;  // no vocabulary, or a dtype that there is not
  if (vocab <= 0) return status;
  visit_dtype(dtype, [&](auto tag) { status = fn(Cut(vocab, sizeof(tag)), tag); });
  return status;
}

namespace {

// Whether the mask leaves a row out.
template <class Params>
__device__ __forceinline__ bool masked(const Params& p, int64_t row) {
  return p.mask != nullptr && !p.mask[row];
}

template <class A, bool kEntropy>
struct StateOf {
  using type = OnlineLogSumExp<A>;
};
template <class A>
struct StateOf<A, true> {
  using type = OnlineEntropy<A>;
};
template <class A, bool kEntropy>
using state_t = typename StateOf<A, kEntropy>::type;

// Where part `index` of a row of `vocab` elements lies.
struct PartOfRow {
  int64_t begin;
  int size;

  __device__ PartOfRow(int64_t index, int part, int64_t vocab)
      : begin(index * part),
        size(static_cast<int>(min(static_cast<int64_t>(part), vocab - begin))) {}
};

// What a thread has seen of its elements: those at `threads` apart, eight at a time, so that the
// running sum is rescaled once per eight.
template <bool kEntropy, class T, class L, class A = accumulate_t<T>>
__device__ state_t<A, kEntropy> fold(const T* elements, int n, const L& logits) {
  constexpr int kGroup = 8;
  constexpr A kNothing = -static_cast<A>(INFINITY);
  const int threads = blockDim.x;
  A max = kNothing, sum = 0, weighted = 0;
  for (int first = threadIdx.x; first < n; first += kGroup * threads) {
    A u[kGroup], top = kNothing;
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const int i = first + k * threads;
      u[k] = i < n ? logits.u(elements[i]) : kNothing;
      top = larger_number(top, u[k]);
    }
    top = larger_number(max, top * logits.scale);
    if (top == kNothing) {
      // All -inf so far, but NaN has no maximum and must be kept.
#pragma unroll
      for (int k = 0; k < kGroup; ++k) sum += u[k] == kNothing ? A{0} : u[k];
      continue;
    }
    const A shift = max - top;  // -inf for the first group, whose `sum` is 0
    const A scale = exponential(shift);
    if constexpr (kEntropy) weighted = max == kNothing ? A{0} : (weighted + sum * shift) * scale;
    sum *= scale;
    max = top;
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      // One rounding, of a number that is small where it matters.
      const A distance = logits.relative(u[k], max);
      const A weight = exponential(distance);
      sum += weight;
      if constexpr (kEntropy) weighted += weight > 0 ? weight * distance : A{0};
    }
  }
  if constexpr (kEntropy) {
    return {max, sum, weighted};
  } else {
    return {max, sum};
  }
}

// What the block makes of part `index` of a row; thread 0 gets it. `stage`: Cut::stage_bytes.
template <bool kEntropy, class T, class L, class A = accumulate_t<T>>
__device__ state_t<A, kEntropy> fold_part(const T* row, int64_t vocab, int64_t index, int part,
                                          const L& logits, T* stage) {
  const PartOfRow here(index, part, vocab);
  const T* elements = stage_in_shared(stage, row + here.begin, here.size);
  return block_merge(fold<kEntropy>(elements, here.size, logits));
}

// The whole row from its parts, in order.
template <class State>
__device__ State merge_parts(const State* partial, int parts) {
  State state = partial[0];
  for (int k = 1; k < parts; ++k) state.merge(partial[k]);
  return state;
}

}  // namespace
}  // namespace fdpg::cuda

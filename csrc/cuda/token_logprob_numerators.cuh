// token_logprob_numerators.cuh: log p(target) and log-sum-exp of each row of logits, and what the
// gradient is made of: softmax numerators, p - 1 or e - sum e at the target, times 1 - u^2 with a
// softcap (logits.cuh), and a scale per row.
//
// Fused: softcap, temperature, exponentials, their sum, gather, the target's term, and the rounding
// to 16 bits. T is the type of the logits, U of the numerators. Exponentials need an offset near
// the row's log-sum-exp, which is known when the row has been read. So there are two ways:
//
// With a hint of it, exponentials relative to the hint are written as the row streams by, and the
// row's scale makes up for what the hint was off. One thread per row then adds the parts up and
// writes the target's term over its exponential. A row whose hint is of no use (kReach) is marked,
// and done again from its logits by a block of its own.
//   bytes per row:  V (sizeof(T) + sizeof(U)), 20 read and 12 + sizeof(U) written; per part 4
//                   written and read again; V sizeof(T) twice and V sizeof(U) more if done again
//   floor:          [8192, 128256] from fp32 to bf16: 6.30 GB, 2.10 ms at 3 TB/s
//
// Without a hint, or in place, where the logits could not be read again, the parts of the row are
// folded to (top, sum), merged by one thread per row, and read again for p = exp(z - top) / sum:
// relative to the maximum, since a log-sum-exp of 50 in fp32 is off by up to 2e-6, and so would
// every p be. Logits that the L2 cache has no room for are not folded all first: the last of a
// row's blocks to be done with its part writes the whole row, which has only just been read.
//   bytes per row:  V (sizeof(T) + sizeof(U)), and V sizeof(T) from the L2 cache; per part 8
//                   written and read again
//   floor:          the same: 6.30 GB, 2.10 ms at 3 TB/s
//
// Either way V sizeof(U) for a masked row. In place means one matrix: one dtype, one stride.
//
// How a row is cut, and who adds what, is a function of V and the dtypes alone (row_parts.cuh).
// Logits and numerators differ in width and in alignment, so both go through shared memory: each
// has vectors of 16 bytes on its own side, and any thread may make any element in between.
#pragma once

#include "device.cuh"
//
#include "fdpg/params.h"
#include "row_parts.cuh"

namespace fdpg::cuda {
namespace {

// A hint is of use where exponentials relative to it add up to something in [1 / kReach, kReach]:
// 2.7 nats either way. fp16 sets the limit. A sum of 1 / kReach costs its smallest numerators four
// bits, a sum of kReach costs as many of what the row's scale multiplies; far beyond, fp16 and then
// fp32 overflow. A sum that is NaN is outside.
constexpr int kReach = 16;

template <class T>
struct Sum {
  T value;
  __device__ void merge(const Sum& later) { value += later.value; }
};

// One part of a row, its place in both matrices, and room for it in shared memory.
template <class T, class U>
struct Part : PartOfRow {
  const T* from;  // its logits
  U* to;          // its numerators
  T* stage;       // in shared memory: Cut::stage_bytes<T>
  U* made;        // in shared memory, as misaligned as `to`: Cut::stage_bytes<U>

  __device__ Part(const TokenLogprobNumeratorsParams& p, int64_t row, int64_t index, int part,
                  T* shared)
      : PartOfRow(index, part, p.vocab),
        from(static_cast<const T*>(p.logits) + row * p.row_stride + begin),
        to(static_cast<U*>(p.numerators) + row * p.numerator_row_stride + begin),
        stage(shared),
        made(reinterpret_cast<U*>(shared + part + kPerVector<T>) + misalignment(to)) {}

  __device__ void make_all(T value) const {
    for (int i = threadIdx.x; i < size; i += blockDim.x) made[i] = narrow<U>(value);
  }

  // Makes weight exp(z - the anchor's) of each logit, and returns what this thread's come to, not
  // rounded to U, nor with the slope of a softcap. The logits may be overwritten after this.
  template <class L>
  __device__ T make_exponentials(const L& logits, T anchor, T weight) const {
    const T* elements = stage_in_shared(stage, from, size);
    T sum = 0;
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
      const T u = logits.u(elements[i]), e = weight * logits.power_from(u, anchor);
      made[i] = narrow<U>(logits.back(e, u));
      sum += e;
    }
    return sum;
  }

  // A logit that make_exponentials has read, for the thread that made its exponential.
  __device__ T staged(int64_t i) const { return stage[misalignment(from) + i]; }

  // What the block has made.
  __device__ void write() const {
    __syncthreads();
    write_from_shared(to, made, size);
  }
};

template <class T>
__device__ __forceinline__ T coefficient_of(const TokenLogprobNumeratorsParams& p, int64_t row) {
  return static_cast<const T*>(p.coefficient)[row];
}

__device__ __forceinline__ bool has_target(const TokenLogprobNumeratorsParams& p, int64_t row) {
  return p.target[row] >= 0 && p.target[row] < p.vocab;
}

// For a row without an answer (NaN), or without a question (0).
template <class T>
__device__ void set_results(const TokenLogprobNumeratorsParams& p, int64_t row, T value) {
  static_cast<T*>(p.logp)[row] = value;
  static_cast<T*>(p.lse)[row] = value;
  static_cast<T*>(p.row_scale)[row] = value;
}

// Row results from sum = sum exp(z - the anchor's). `total` is what the row's numerators add up to
// before it is taken from the target's.
template <class T, class L>
__device__ void finish_row(const TokenLogprobNumeratorsParams& p, int64_t row, const L& logits,
                           T anchor, T sum, T total) {
  const T* x = static_cast<const T*>(p.logits) + row * p.row_stride;
  const T inv_temperature = static_cast<T>(p.inv_temperature);
  const T coefficient = coefficient_of<T>(p, row), log_sum = std::log(sum);
  // Relative to the anchor: two large numbers would cancel in z - lse.
  const T logp = logits.distance(logits.u(x[p.target[row]]), anchor) - log_sum;
  static_cast<T*>(p.logp)[row] = logp > 0 ? T{0} : logp;  // the sum is rounded
  static_cast<T*>(p.lse)[row] = std::fma(anchor, logits.scale, log_sum);
  static_cast<T*>(p.row_scale)[row] =
      coefficient == 0 ? T{0} : -coefficient * inv_temperature / total;
}

// The numerator of the target, whose logit is x, of a row with results: e - total = total (p - 1).
// By expm1: a target that is all but certain has a gradient that is all but zero.
template <class U, class T, class L>
__device__ __forceinline__ U at_target(const TokenLogprobNumeratorsParams& p, int64_t row,
                                       const L& logits, T x, T total) {
  const T p_minus_1 = std::expm1(static_cast<const T*>(p.logp)[row]);
  return narrow<U>(logits.back(total * p_minus_1, logits.u(x)));
}

// -------------------------------------------------------------------------------------------------
// Without a hint

// Block b folds part b % parts of row b / parts.
template <class T, bool kCapped>
__global__ void __launch_bounds__(Cut::kMaxThreads)
    numerators_fold_parts(TokenLogprobNumeratorsParams p, int part, int parts,
                          Seen<T, false>* partial) {
  FDPG_DYNAMIC_SHARED(T, shared);
  const int64_t row = blockIdx.x / parts;
  if (masked(p, row)) return;  // not read
  const T* x = static_cast<const T*>(p.logits) + row * p.row_stride;
  const auto seen =
      fold_part<false>(x, p.vocab, blockIdx.x % parts, part, Logits<T, kCapped>(p), shared);
  if (threadIdx.x == 0) partial[blockIdx.x] = seen;
}

// By one thread: a row's results from its parts, in order; their whole takes the place of the
// first. The target's logit is read here, before it may be overwritten.
template <class T, class L>
__device__ void finish_folded(const TokenLogprobNumeratorsParams& p, int64_t row, const L& logits,
                              int parts, Seen<T, false>* partial) {
  if (masked(p, row)) return set_results(p, row, T{0});
  if (!has_target(p, row)) return set_results(p, row, static_cast<T>(NAN));
  const Seen<T, false> seen = merge_parts(partial, parts, logits);
  finish_row(p, row, logits, seen.top, seen.sum, T{1});
  *partial = seen;
}

// One thread per row.
template <class T, bool kCapped>
__global__ void numerators_fold_rows(TokenLogprobNumeratorsParams p, int parts,
                                     Seen<T, false>* partial) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= p.rows) return;
  finish_folded(p, row, Logits<T, kCapped>(p), parts, partial + row * parts);
}

// Writes softmax - [target] of one part of a row that has its results. `seen`: of the row; looked
// at only where it was made.
template <class T, class U, class L>
__device__ void write_softmax(const TokenLogprobNumeratorsParams& p, int64_t row,
                              const Part<T, U>& here, const L& logits, const Seen<T, false>& seen) {
  if (masked(p, row)) {
    here.make_all(0);
  } else if (!has_target(p, row)) {
    here.make_all(static_cast<T>(NAN));
  } else if (coefficient_of<T>(p, row) == 0) {
    here.make_all(0);
  } else {
    here.make_exponentials(logits, seen.top, 1 / seen.sum);
    const int64_t target = p.target[row] - here.begin;
    // By the thread that made the exponential which this replaces: no barrier in between.
    if (target >= 0 && target < here.size && target % blockDim.x == threadIdx.x) {
      here.made[target] = at_target<U>(p, row, logits, here.staged(target), T{1});
    }
  }
  here.write();
}

// Block b writes part b % parts of row b / parts.
template <class T, class U, bool kCapped>
__global__ void __launch_bounds__(Cut::kMaxThreads)
    numerators_write_parts(TokenLogprobNumeratorsParams p, int part, int parts,
                           const Seen<T, false>* partial) {
  FDPG_DYNAMIC_SHARED(T, shared);
  const int64_t row = blockIdx.x / parts;
  const Part<T, U> here(p, row, blockIdx.x % parts, part, shared);
  write_softmax(p, row, here, Logits<T, kCapped>(p), partial[row * parts]);
}

__global__ void numerators_nobody_arrived(int64_t rows, unsigned* arrived) {
  after_previous();
  let_next_begin();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row < rows) arrived[row] = 0;
}

// Blocks that a multiprocessor of an H100 has room for by shared memory, and by registers if the
// compiler is told to: fp64 would have to spill.
template <class T>
constexpr int kRoom = sizeof(T) == 4 ? 6 : 2;

// All of it in one launch: block b folds part b % parts of row b / parts, and the row's last to
// have done so writes all of its parts. `arrived` (N,): how many of a row's blocks have; from 0.
template <class T, class U, bool kCapped>
__global__ void __launch_bounds__(Cut::kMaxThreads, kRoom<T>)
    numerators_fold_and_write(TokenLogprobNumeratorsParams p, int part, int parts,
                              Seen<T, false>* partial, unsigned* arrived) {
  FDPG_DYNAMIC_SHARED(T, shared);
  const int64_t row = blockIdx.x / parts;
  const Logits<T, kCapped> logits(p);
  partial += row * parts;
  after_previous();
  const int index = static_cast<int>(blockIdx.x % parts);
  Seen<T, false> seen;
  if (!masked(p, row)) {
    const T* x = static_cast<const T*>(p.logits) + row * p.row_stride;
    seen = fold_part<false>(x, p.vocab, index, part, logits, shared);
  }
  if (threadIdx.x == 0) partial[index] = seen;
  if (!last_to_arrive(arrived + row, parts)) return;
  if (threadIdx.x == 0) finish_folded(p, row, logits, parts, partial);
  __syncthreads();  // all may read what the row has come to
  seen = *partial;
  for (int k = 0; k < parts; ++k) {
    write_softmax(p, row, Part<T, U>(p, row, k, part, shared), logits, seen);
    __syncthreads();  // shared memory may be written again
  }
}

// -------------------------------------------------------------------------------------------------
// With a hint

// The hint as an anchor, in u.
template <class L, class T = decltype(L::scale)>
__device__ __forceinline__ T hint_of(const TokenLogprobNumeratorsParams& p, int64_t row,
                                     const L& logits) {
  return static_cast<const T*>(p.lse_hint)[row] / logits.scale;
}

// Block b writes part b % parts of row b / parts, all but the target's numerator.
template <class T, class U, bool kCapped>
__global__ void __launch_bounds__(Cut::kMaxThreads)
    numerators_hint_parts(TokenLogprobNumeratorsParams p, int part, int parts, T* partial) {
  FDPG_DYNAMIC_SHARED(T, shared);
  const int64_t row = blockIdx.x / parts;
  const Part<T, U> here(p, row, blockIdx.x % parts, part, shared);
  if (masked(p, row)) {  // not read
    here.make_all(0);
  } else {
    const Logits<T, kCapped> logits(p);
    const T mine = here.make_exponentials(logits, hint_of(p, row, logits), 1);
    const Sum<T> sum = block_merge(Sum<T>{mine});
    if (threadIdx.x == 0) partial[blockIdx.x] = sum.value;
    if (coefficient_of<T>(p, row) == 0) here.make_all(0);
  }
  here.write();
}

// One thread per row, the row's parts in order. Rows to be done again are marked by lse = NaN,
// which no other row has: a sum within reach is that of a finite hint.
template <class T, class U, bool kCapped>
__global__ void numerators_hint_rows(TokenLogprobNumeratorsParams p, int parts, const T* partial) {
  constexpr T kMost = kReach, kLeast = 1 / kMost;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= p.rows) return;
  if (masked(p, row)) return set_results(p, row, T{0});
  T sum = 0;
  for (int k = 0; k < parts; ++k) sum += partial[row * parts + k];
  const bool within_reach = sum >= kLeast && sum <= kMost;  // not if NaN
  if (!within_reach || !has_target(p, row)) return set_results(p, row, static_cast<T>(NAN));
  const Logits<T, kCapped> logits(p);
  finish_row(p, row, logits, hint_of(p, row, logits), sum, sum);
  if (coefficient_of<T>(p, row) == 0) return;
  U* numerators = static_cast<U*>(p.numerators) + row * p.numerator_row_stride;
  const T* x = static_cast<const T*>(p.logits) + row * p.row_stride;
  const int64_t target = p.target[row];
  numerators[target] = at_target<U>(p, row, logits, x[target], sum);
}

// A block per row, for the rows that are marked; the others it leaves at once.
template <class T, class U, bool kCapped>
__global__ void __launch_bounds__(Cut::kMaxThreads)
    numerators_again(TokenLogprobNumeratorsParams p, int part, int parts) {
  FDPG_DYNAMIC_SHARED(T, shared);
  __shared__ T row_top, row_sum;
  const int64_t row = blockIdx.x;
  if (!std::isnan(static_cast<const T*>(p.lse)[row])) return;
  Seen<T, false> seen;
  const Logits<T, kCapped> logits(p);
  if (has_target(p, row)) {
    const T* x = static_cast<const T*>(p.logits) + row * p.row_stride;
    for (int k = 0; k < parts; ++k) {  // into thread 0's; the others' mean nothing
      seen.merge(fold_part<false>(x, p.vocab, k, part, logits, shared), logits.rate());
    }
    if (threadIdx.x == 0) {
      finish_row(p, row, logits, seen.top, seen.sum, T{1});
      row_top = seen.top;
      row_sum = seen.sum;
    }
    __syncthreads();  // all may read these, and the row's results
    seen.top = row_top;
    seen.sum = row_sum;
  }
  for (int k = 0; k < parts; ++k) {
    write_softmax(p, row, Part<T, U>(p, row, k, part, shared), logits, seen);
    __syncthreads();  // shared memory may be written again
  }
}

}  // namespace
}  // namespace fdpg::cuda

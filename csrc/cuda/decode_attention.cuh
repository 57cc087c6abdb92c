// decode_attention.cuh: one new token of each sequence attends to the live keys of its cache.
//
// Fused: scores, softcap, softmax, sinks and the sum of values; no mask and no (B, H, T) scores are
// made, and keys outside a sequence's span are not read. A block takes one key head of one sequence
// and up to kHeads of the query heads that share it. A team of neighbouring lanes takes one key at
// a time, kPer of its numbers to a lane, and keeps a softmax of its own keys (online: Milakov and
// Gimelshein, arXiv 1805.02867); the teams' are merged at the end, in a fixed order.
//   bytes:  (D + E) (end - begin) * sizeof(T) per sequence and key head, once per kHeads query
//           heads (again from the second-level cache); queries and results are small beside it
//   floor:  1024 sequences, 12 heads of 64, 36 live keys, bf16: 113 MB, 38 us at 3 TB/s, a launch
//
// The blocks of one launch must fill the device: with few sequences of very many keys they do not,
// as no sequence's keys are spread over blocks. The work is that of a batched sampler.
//
// A sequence's result depends on nothing but its own query and live keys: not on T, nor on
// alignment.
#pragma once

#include "device.cuh"
//
#include "fdpg/params.h"
#include "instructions.cuh"
#include "vec.cuh"

namespace fdpg::cuda {
namespace {

constexpr int kDecodeThreads = 128;
constexpr int kDecodeWarps = kDecodeThreads / kWarp;

// Elements [first, first + kPer) of a row of `size`; zeros past its end. `whole`: every row begins
// on 16 bytes.
template <int kPer, class T>
__device__ __forceinline__ void read_some(const T* row, int first, int size, bool whole,
                                          accumulate_t<T> (&out)[kPer]) {
  if (whole && first + kPer <= size) {
#pragma unroll
    for (int i = 0; i < kPer; i += kPerVector<T>) {
      const auto v = Vector<T>::read(row + first + i);
#pragma unroll
      for (int k = 0; k < kPerVector<T>; ++k) out[i + k] = widen(v.element[k]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kPer; ++i) out[i] = first + i < size ? widen(row[first + i]) : 0;
}

// What some keys say of one query: the largest score, the sum of exp(score - largest), and that sum
// with values. Without keys, or with none above minus infinity, `most` is minus infinity and the
// sums are 0, or NaN if a score was.
template <class A, int kPer>
struct Attended {
  A most = -static_cast<A>(INFINITY), sum = 0;
  A out[kPer] = {};

  // By what sums relative to `from` become relative to `to`, the larger.
  __device__ __forceinline__ static A rescale(A from, A to) {
    return from == -static_cast<A>(INFINITY) ? A{1} : exponential(from - to);
  }

  __device__ __forceinline__ void push(A score, const A (&value)[kPer]) {
    const A larger = larger_number(most, score);
    const A shrink = rescale(most, larger);
    const A weight = score == -static_cast<A>(INFINITY) ? A{0} : exponential(score - larger);
    sum = sum * shrink + weight;
#pragma unroll
    for (int i = 0; i < kPer; ++i) out[i] = out[i] * shrink + weight * value[i];
    most = larger;
  }

  // With that of the lane `distance` away; both get the same bits.
  __device__ __forceinline__ void merge_with_lane(int distance) {
    const A theirs = __shfl_xor_sync(0xffffffffu, most, distance);
    const A larger = larger_number(most, theirs);
    const A shrink = rescale(most, larger);
    sum *= shrink;
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      out[i] *= shrink;
      out[i] += __shfl_xor_sync(0xffffffffu, out[i], distance);
    }
    most = larger;
  }
};

// A warp's result for one head, in shared memory: most, sum, and values by element.
template <class A>
struct WarpResult {
  A* at;
  __device__ __forceinline__ A& most() const { return at[0]; }
  __device__ __forceinline__ A& sum() const { return at[1]; }
  __device__ __forceinline__ A& out(int e) const { return at[2 + e]; }
};

// Block (b Hk + h) parts + part: heads [part kHeads, ...) of those that share key head h. `lanes`:
// of a team, a power of two with lanes kPer >= max(D, E).
template <class T, int kPer, int kHeads, bool kCapped>
__global__ void __launch_bounds__(kDecodeThreads)
    decode_attention_heads(DecodeAttentionParams p, int lanes, int parts, bool whole) {
  using A = accumulate_t<T>;
  FDPG_DYNAMIC_SHARED(A, shared);
  const int64_t pair = blockIdx.x / parts;
  const int64_t b = pair / p.key_heads, h = pair % p.key_heads;
  const int groups = static_cast<int>(p.heads / p.key_heads);
  const int begin_head = static_cast<int>(blockIdx.x % parts) * kHeads;
  const int64_t head = h * groups + begin_head;  // the first of
  const int heads = min(kHeads, groups - begin_head);
  const int size = static_cast<int>(p.size), value_size = static_cast<int>(p.value_size);
  T* const out = static_cast<T*>(p.out) + (b * p.heads + head) * value_size;
  const int64_t first = p.begin ? p.begin[b] : 0, last = p.end[b];
  const bool bad = first < 0 || first > last || last > p.tokens;
  if (bad || first == last) {
    const T fill = narrow<T>(bad ? static_cast<A>(NAN) : A{0});
    for (int i = threadIdx.x; i < heads * value_size; i += kDecodeThreads) out[i] = fill;
    return;
  }

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int teams = kWarp / lanes, team = lane / lanes;
  const int mine = lane % lanes * kPer;  // this lane's first element of a row
  const T* const query =
      static_cast<const T*>(p.query) + b * p.query_stride[0] + head * p.query_stride[1];
  const T* const keys = static_cast<const T*>(p.keys) + b * p.key_stride[0] + h * p.key_stride[1];
  const T* const values =
      static_cast<const T*>(p.values) + b * p.value_stride[0] + h * p.value_stride[1];

  A q[kHeads][kPer];
  Attended<A, kPer> attended[kHeads];
#pragma unroll
  for (int g = 0; g < kHeads; ++g) {
    // A head that is not there reads no further than those that are.
    read_some(query + min(g, heads - 1) * p.query_stride[1], mine, size, false, q[g]);
#pragma unroll
    for (int i = 0; i < kPer; ++i) q[g][i] *= static_cast<A>(p.scale);
  }

  // All lanes of a warp go round equally often: they shuffle.
  for (int64_t t = first + warp * teams; t < last; t += kDecodeWarps * teams) {
    const bool live = t + team < last;
    A key[kPer] = {}, value[kPer] = {};
    if (live) {
      read_some(keys + (t + team) * p.key_stride[2], mine, size, whole, key);
      read_some(values + (t + team) * p.value_stride[2], mine, value_size, whole, value);
    }
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
      A score = 0;
#pragma unroll
      for (int i = 0; i < kPer; ++i) score += q[g][i] * key[i];
      for (int distance = lanes / 2; distance > 0; distance /= 2) {
        score += __shfl_xor_sync(0xffffffffu, score, distance);
      }
      if (kCapped) score = static_cast<A>(p.softcap) * std::tanh(score / static_cast<A>(p.softcap));
      attended[g].push(live ? score : -static_cast<A>(INFINITY), value);
    }
  }

  const int row = 2 + lanes * kPer;
  const auto result = [&](int w, int g) { return WarpResult<A>{shared + (w * kHeads + g) * row}; };
#pragma unroll
  for (int g = 0; g < kHeads; ++g) {
    for (int distance = lanes; distance < kWarp; distance *= 2) {
      attended[g].merge_with_lane(distance);
    }
    if (team != 0) continue;
    const WarpResult<A> r = result(warp, g);
    if (lane == 0) {
      r.most() = attended[g].most;
      r.sum() = attended[g].sum;
    }
#pragma unroll
    for (int i = 0; i < kPer; ++i) r.out(mine + i) = attended[g].out[i];
  }
  __syncthreads();

  for (int i = threadIdx.x; i < heads * value_size; i += kDecodeThreads) {
    const int g = i / value_size, e = i % value_size;
    const A sink = p.sinks ? static_cast<const A*>(p.sinks)[head + g] : -static_cast<A>(INFINITY);
    A most = sink;
    for (int w = 0; w < kDecodeWarps; ++w) most = larger_number(most, result(w, g).most());
    A sum = sink == -static_cast<A>(INFINITY) ? A{0} : exponential(sink - most), total = 0;
    for (int w = 0; w < kDecodeWarps; ++w) {
      const A shrink = Attended<A, 1>::rescale(result(w, g).most(), most);
      sum += shrink * result(w, g).sum();
      total += shrink * result(w, g).out(e);
    }
    out[i] = narrow<T>(total / sum);
  }
}

}  // namespace
}  // namespace fdpg::cuda

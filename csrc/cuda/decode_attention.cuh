// decode_attention.cuh: one new token of each sequence attends to the live keys of its cache.
//
// Fused: scores, softcap, bias, softmax, sinks and the sum of values; no mask and no (B, H, T)
// scores are made, and keys outside a sequence's span are not read. A block takes one key head of
// one sequence and up to kHeads of the query heads that share it. A team of neighbouring lanes
// takes one key at a time, kPer of its numbers to a lane, and keeps a softmax of its own keys
// (online: Milakov and Gimelshein, arXiv 1805.02867); the teams' are merged at the end, in a fixed
// order. In a round a team takes kKeys keys and one largest score for them all; those of its next
// round are on their way by then.
//   bytes:  (D + E) (end - begin) * sizeof(T) per sequence and key head, once per kHeads query
//           heads (again from the second-level cache, as for sequences that read the same row);
//           queries and results are small beside it
//   floor:  1024 sequences, 12 heads of 64, 48 live keys, bf16: 151 MB, 36 us at 4.2 TB/s, a launch
//
// The blocks of one launch must fill the device: with few sequences of very many keys they do not,
// as no sequence's keys are spread over blocks. The work is that of a batched sampler.
//
// A sequence's result depends on nothing but its own query and live keys: not on T, nor on
// alignment.
#pragma once

#include <limits>
#include <type_traits>

#include "device.cuh"
//
#include "fdpg/params.h"
#include "instructions.cuh"
#include "vec.cuh"

namespace fdpg::cuda {
namespace {

// The numbers stored in sixteen bytes.
template <class T>
__device__ __forceinline__ void widen_all(const uint4& raw, accumulate_t<T>* out) {
  if constexpr (std::is_same_v<T, BFloat16>) {  // an upper half is a number once the lower is clear
    const uint32_t words[] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      out[2 * k] = float_of(words[k] << 16);
      out[2 * k + 1] = float_of(words[k] & 0xffff0000u);
    }
  } else {
    T element[kPerVector<T>];
    memcpy(element, &raw, kVectorBytes);
#pragma unroll
    for (int k = 0; k < kPerVector<T>; ++k) out[k] = widen(element[k]);
  }
}

// kPer elements of a row as stored, in words: as 16-bit numbers each would take a register.
template <class T, int kPer>
struct Share {
  static constexpr int kVectors = kPer / kPerVector<T>;
  uint4 raw[kVectors] = {};

  // Of `row` on, as many as are `there`, which may be none or more; zeros otherwise. kWhole: all or
  // none are, and rows begin on 16 bytes.
  template <bool kWhole>
  __device__ __forceinline__ void read(const T* row, int there) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const T* const from = row + v * kPerVector<T>;
      if constexpr (kWhole) {
        if (there > 0) raw[v] = *reinterpret_cast<const uint4*>(from);
      } else {
        T element[kPerVector<T>] = {};
#pragma unroll
        for (int k = 0; k < kPerVector<T>; ++k) {
          if (v * kPerVector<T> + k < there) element[k] = from[k];
        }
        memcpy(&raw[v], element, kVectorBytes);
      }
    }
  }

  __device__ __forceinline__ void widened(accumulate_t<T> (&out)[kPer]) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) widen_all<T>(raw[v], out + v * kPerVector<T>);
  }
};

// What some keys say of one query: the largest score, the sum of exp(score - largest), and that sum
// with values. `most` starts as the least number, of which minus infinity may be subtracted: keys
// with that score weigh nothing. Without others the sums are 0, or NaN if a score was.
template <class A, int kPer>
struct Attended {
  A most = std::numeric_limits<A>::lowest(), sum = 0;
  A out[kPer] = {};

  // Lets the sums be relative to `to`, which is no less than `most`.
  __device__ __forceinline__ void raise(A to) {
    const A shrink = exponential(most - to);
    sum *= shrink;
#pragma unroll
    for (int i = 0; i < kPer; ++i) out[i] *= shrink;
    most = to;
  }

  template <int kKeys>
  __device__ __forceinline__ A most_with(const A (&score)[kKeys]) const {
    A larger = most;
#pragma unroll
    for (int k = 0; k < kKeys; ++k) larger = larger_number(larger, score[k]);
    return larger;
  }

  // Counts keys in, once `most` is most_with() them; scores become the weights of values.
  template <int kKeys>
  __device__ __forceinline__ void weigh(A (&score)[kKeys]) {
#pragma unroll
    for (int k = 0; k < kKeys; ++k) sum += score[k] = exponential(score[k] - most);
  }

  // With that of the lane `distance` away; both get the same bits.
  __device__ __forceinline__ void merge_with_lane(int distance) {
    raise(larger_number(most, __shfl_xor_sync(0xffffffffu, most, distance)));
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
#pragma unroll
    for (int i = 0; i < kPer; ++i) out[i] += __shfl_xor_sync(0xffffffffu, out[i], distance);
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

// How a launch is divided. Block (b Hk + h) parts + part: heads [part kHeads, ...) of the `groups`
// that share key head h.
struct DecodePlan {
  unsigned key_heads, parts;
  int groups;
  int log_lanes;  // a team has 2^log_lanes lanes, enough for max(D, E) at kPer to a lane
};

// How many blocks' registers a multiprocessor shall hold: enough warps to hide how long memory
// takes, and room for all of a round's loads before the first is used.
template <class T, int kPer, int kWarps>
constexpr int kBlocksPerSm = kPer > 8 || sizeof(T) == 8 ? 1
                             : kWarps == 1              ? 24
                                                        : 4;

// kAdjusted: with a softcap or a bias. kWhole: D and E are multiples of kPer, and every row begins
// on 16 bytes.
template <class T, int kPer, int kHeads, int kWarps, bool kAdjusted, bool kWhole>
__global__ void __launch_bounds__(kWarps* kWarp, kBlocksPerSm<T, kPer, kWarps>)
    decode_attention_heads(DecodeAttentionParams p, DecodePlan plan) {
  using A = accumulate_t<T>;
  // Of a lane's keys and values, 64 bytes each are on their way, or 32 if queries take the room.
  constexpr int kBytes = kHeads == 1 ? 64 : 32, kBytesPerKey = kPer * static_cast<int>(sizeof(T));
  constexpr int kKeys = kBytes > kBytesPerKey ? kBytes / kBytesPerKey : 1;
  FDPG_DYNAMIC_SHARED(A, shared);
  const unsigned pair = blockIdx.x / plan.parts;
  const int64_t b = pair / plan.key_heads, h = pair % plan.key_heads;
  const int begin_head = static_cast<int>(blockIdx.x % plan.parts) * kHeads;
  const int64_t head = h * plan.groups + begin_head;  // the first of
  const int heads = min(kHeads, plan.groups - begin_head);
  const int size = static_cast<int>(p.size), value_size = static_cast<int>(p.value_size);
  T* const out = static_cast<T*>(p.out) + (b * p.heads + head) * value_size;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int lanes = 1 << plan.log_lanes, teams = kWarp >> plan.log_lanes;
  const int team = lane >> plan.log_lanes;
  const int mine = (lane & (lanes - 1)) * kPer;  // this lane's first element of a row

  const T* const query =
      static_cast<const T*>(p.query) + b * p.query_stride[0] + head * p.query_stride[1] + mine;
  Share<T, kPer> raw_query[kHeads];
#pragma unroll
  for (int g = 0; g < kHeads; ++g) {
    raw_query[g].template read<kWhole>(query + g * p.query_stride[1], g < heads ? size - mine : 0);
  }

  const int64_t first = p.begin ? p.begin[b] : 0, last = p.end[b], cached = p.rows ? p.rows[b] : b;
  const bool bad =
      first < 0 || first > last || last > p.tokens || cached < 0 || cached >= p.cache_rows;
  if (bad || first == last) {
    const T fill = narrow<T>(bad ? static_cast<A>(NAN) : A{0});
    for (int i = threadIdx.x; i < heads * value_size; i += kWarps * kWarp) out[i] = fill;
    return;
  }

  A q[kHeads][kPer];
  Attended<A, kPer> attended[kHeads];
#pragma unroll
  for (int g = 0; g < kHeads; ++g) {
    raw_query[g].widened(q[g]);
#pragma unroll
    for (int i = 0; i < kPer; ++i) q[g][i] *= static_cast<A>(p.scale);
  }

  // Key t of the live ones goes to team t of all teams of all warps, and round again. All lanes of
  // a warp go round equally often: they shuffle.
  const int64_t begin = first + warp * teams + team;
  const T* key_row = static_cast<const T*>(p.keys) + cached * p.key_stride[0] +
                     h * p.key_stride[1] + begin * p.key_stride[2] + mine;
  const T* value_row = static_cast<const T*>(p.values) + cached * p.value_stride[0] +
                       h * p.value_stride[1] + begin * p.value_stride[2] + mine;
  const int step = kWarps * teams;                         // from a key of a team to its next
  const int left = static_cast<int>(last - first) - team;  // this team's keys: t < left
  const auto read_round = [&](Share<T, kPer>(&share)[kKeys], const T*& row, int64_t stride, int t,
                              int there) {
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      share[k] = {};
      share[k].template read<kWhole>(row, t + k * step < left ? there : 0);
      row += step * stride;
    }
  };
  // Of this team's keys, as `t` counts them.
  const A* const bias = kAdjusted && p.bias ? static_cast<const A*>(p.bias) + head * p.bias_stride +
                                                  (p.tokens - last + first + team)
                                            : nullptr;
  Share<T, kPer> key[kKeys], value[kKeys];
  int t = warp * teams;
  read_round(key, key_row, p.key_stride[2], t, size - mine);
  read_round(value, value_row, p.value_stride[2], t, value_size - mine);
  for (; t < left + team; t += kKeys * step) {
    A score[kHeads][kKeys] = {};
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      A wide[kPer];
      key[k].widened(wide);
#pragma unroll
      for (int g = 0; g < kHeads; ++g) {
#pragma unroll
        for (int i = 0; i < kPer; ++i) score[g][k] += q[g][i] * wide[i];
      }
    }
    read_round(key, key_row, p.key_stride[2], t + kKeys * step, size - mine);  // the next
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      if (distance >= lanes) continue;
#pragma unroll
      for (int g = 0; g < kHeads; ++g) {
#pragma unroll
        for (int k = 0; k < kKeys; ++k) {
          score[g][k] += __shfl_xor_sync(0xffffffffu, score[g][k], distance);
        }
      }
    }
    A larger[kHeads];
    bool raised = false;  // seldom, once a few keys were seen
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
#pragma unroll
      for (int k = 0; k < kKeys; ++k) {
        if (kAdjusted && p.softcap > 0) {
          const A cap = static_cast<A>(p.softcap);
          score[g][k] = cap * std::tanh(score[g][k] / cap);
        }
        if (kAdjusted && p.bias && g < heads && t + k * step < left) {
          score[g][k] += bias[g * p.bias_stride + t + k * step];
        }
        if (t + k * step >= left) score[g][k] = -static_cast<A>(INFINITY);
      }
      larger[g] = attended[g].most_with(score[g]);
      raised = raised || larger[g] > attended[g].most;
    }
    if (raised) {
#pragma unroll
      for (int g = 0; g < kHeads; ++g) attended[g].raise(larger[g]);
    }
#pragma unroll
    for (int g = 0; g < kHeads; ++g) attended[g].weigh(score[g]);
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      A wide[kPer];
      value[k].widened(wide);
#pragma unroll
      for (int g = 0; g < kHeads; ++g) {
#pragma unroll
        for (int i = 0; i < kPer; ++i) attended[g].out[i] += score[g][k] * wide[i];
      }
    }
    read_round(value, value_row, p.value_stride[2], t + kKeys * step, value_size - mine);
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

  for (int g = warp; g < heads; g += kWarps) {
    const A sink = p.sinks ? static_cast<const A*>(p.sinks)[head + g] : -static_cast<A>(INFINITY);
    A most = larger_number(result(0, g).most(), sink), shrink[kWarps];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) most = larger_number(most, result(w, g).most());
    A sum = exponential(sink - most);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      shrink[w] = exponential(result(w, g).most() - most);
      sum += shrink[w] * result(w, g).sum();
    }
    const A inverse = 1 / sum;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) shrink[w] *= inverse;
#pragma unroll 1
    for (int e = lane; e < value_size; e += kWarp) {
      A total = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += shrink[w] * result(w, g).out(e);
      out[g * value_size + e] = narrow<T>(total);
    }
  }
}

}  // namespace
}  // namespace fdpg::cuda

// sample_logprob.cuh: a token drawn from softmax(z) of each row (z: logits.cuh), with its log-prob,
// by inverting the cumulative distribution with one uniform.
//
// Fused: softmax, cumulative sum, search, gather, log, and the entropy if asked for. The first
// kernel folds each row span by span; the second, a warp per row, chooses a span, reads it again
// and descends to a token of it. It is there before the first has ended, and the first before what
// makes the logits has.
//   bytes per row:  V * sizeof(T) read, and a span of 512 again; 3 * 8 read for the key,
//                   8 + 4 + 4 written; per span 8 (with entropy 12) written and read again
//   floor:          1.016 V sizeof(T) / bandwidth in bf16, [256, 50257] is 26 MB, 9 us at 3 TB/s,
//                   a launch, and what a row waits for once the last of its logits are there
//
// The law and the key are the CPU's (cpu/sample_logprob-inl.h): at each level the uniform is scaled
// to the sum of that level's own parts, and what is left of it goes down, so a token's probability
// is a product of three ratios, each good to about 1e-7 relative (1e-6 where a run's is e^-15),
// however rare the token. The sums are added in another order, so a uniform within about 1e-7 of
// the border between two tokens may be theirs or ours; else the tokens are the same.
#pragma once

#include "device.cuh"
//
#include "fdpg/params.h"
#include "fdpg/random.h"
#include "row_parts.cuh"

namespace fdpg::cuda {
namespace {

// The sum of each lane and the lanes below it.
__device__ __forceinline__ double warp_running_sum(double mine) {
  const int lane = threadIdx.x % kWarp;
  for (int reach = 1; reach < kWarp; reach *= 2) {
    const double below = __shfl_up_sync(0xffffffffu, mine, reach);
    if (lane >= reach) mine += below;
  }
  return mine;
}

// What a warp has chosen of items that the lanes have runs of, with probability proportional to
// their weights, each lane's summing up to `mine`.
struct Chosen {
  int lane;
  double total;  // of all lanes
  double goal;   // how far into that lane's weights the uniform points
};

// All lanes call it with the same uniform in [0, 1) and get the same, which means nothing unless
// the total is positive.
__device__ __forceinline__ Chosen warp_choose(double mine, double uniform) {
  const double upto = warp_running_sum(mine);
  const double total = __shfl_sync(0xffffffffu, upto, kWarp - 1), goal = uniform * total;
  const unsigned possible = __ballot_sync(0xffffffffu, mine > 0);
  const unsigned beyond = __ballot_sync(0xffffffffu, mine > 0 && upto > goal);
  // The first beyond the goal; the last possible one if rounding has put the goal at the end.
  const int last = kWarp - 1 - __clz(static_cast<int>(possible));
  const int chosen = beyond ? __ffs(static_cast<int>(beyond)) - 1 : max(0, last);
  const double its = __shfl_sync(0xffffffffu, mine, chosen);
  const double below = __shfl_sync(0xffffffffu, upto, chosen) - its;
  return {chosen, total, fmin(fmax(goal - below, 0.0), its)};
}

// One lane's part of it: the first of its n weights that brings their sum beyond the goal, else the
// last positive one.
struct Choice {
  int item = -1;
  double before = 0, weight = 0;  // of the items before it, and its own

  __device__ __forceinline__ void consider(int i, double w, double goal) {
    const bool found = item >= 0 && before + weight > goal;
    if (found || !(w > 0)) return;
    before += weight;
    item = i;
    weight = w;
  }
};

// Neighbours in a row whose sum is known.
inline constexpr int kSpan = kWarpGroup;

// Spans side by side that a warp takes, 8 KiB of them: all on their way before the first is folded,
// and each folded when it is there, whatever other warps do.
template <class T>
inline constexpr int kRunSpans = (8 << 10) / (kSpan * static_cast<int>(sizeof(T)));
template <class T>
inline constexpr int kRun = kRunSpans<T> * kSpan;
template <class T>
inline constexpr int kRunRoom = kRun<T> + kPerVector<T>;  // in shared memory, wherever it starts

// Of a block that folds spans. Its warps do not meet, so a block is small: a multiprocessor of an
// H100 has room for 13 of two warps, and for only 6 of four, by its shared memory. [256, 50257] in
// bf16 is 1664 blocks, all of them there at once, or 832, of which 40 would begin late.
constexpr int kSpanThreads = 64;

// Begins to copy n elements at `from` to shared memory, of which each kSpan is a group of copies.
// Returns where element 0 is, which is as misaligned as `from`.
template <class T>
__device__ __forceinline__ const T* begin_run(T* stage, const T* from, int n) {
  constexpr int kVectors = kSpan / kPerVector<T>;  // of a group; those of a span are in its group
  T* to = stage + misalignment(from);
  const Stretch s(from, n);
  const int lane = threadIdx.x % kWarp, tail = s.head + s.vectors * kPerVector<T>;
#pragma unroll
  for (int group = 0; group < kRunSpans<T>; ++group) {
#pragma unroll
    for (int v = group * kVectors; v < (group + 1) * kVectors; v += kWarp) {
      const int i = s.head + (v + lane) * kPerVector<T>;
      if (v + lane < s.vectors) __pipeline_memcpy_async(to + i, from + i, kVectorBytes);
    }
    __pipeline_commit();
  }
  if (lane < s.head) to[lane] = from[lane];
  if (lane < s.tail) to[tail + lane] = from[tail + lane];
  return to;
}

// Warp w takes run w % runs of row w / runs. Each span goes to `partial` (N, spans).
template <class T, bool kEntropy, bool kCapped>
__global__ void __launch_bounds__(kSpanThreads)
    sample_logprob_spans(SampleLogprobParams p, int runs, int spans,
                         Seen<accumulate_t<T>, kEntropy>* partial) {
  using A = accumulate_t<T>;
  constexpr int kSpans = kRunSpans<T>;
  FDPG_DYNAMIC_SHARED(T, stage);
  after_previous();
  let_next_begin();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t job = blockIdx.x * int64_t{kSpanThreads / kWarp} + warp, row = job / runs;
  if (row >= p.rows) return;
  const int64_t begin = job % runs * kRun<T>;
  const int size = static_cast<int>(min(int64_t{kRun<T>}, p.vocab - begin));
  const T* x = static_cast<const T*>(p.logits) + row * p.row_stride + begin;
  const T* elements = begin_run(stage + warp * kRunRoom<T>, x, size);

  const Logits<A, kCapped> logits(p);
  const A rate = logits.rate();
  const bool words = on_word(elements);
  using S = Seen<A, kEntropy>;
  S seen[kSpans];
  A top = S::kNothing;
#pragma unroll
  for (int k = 0; k < kSpans; ++k) {
    __pipeline_wait_prior(kSpans - 1 - k);
    __syncwarp();
    A u[kGroup];
    read_group(elements + k * kSpan, size - k * kSpan, words, logits, u);
    seen[k].add(u, rate);
    top = larger_number(top, seen[k].top);
  }
  top = warp_max(top);
  S mine;  // lane k has span k
#pragma unroll
  for (int k = 0; k < kSpans; ++k) {
    seen[k].move(top, rate);
    const A sum = warp_sum(seen[k].sum);
    if (lane == k) mine.sum = sum;
    if constexpr (kEntropy) {
      const A weighted = warp_sum(seen[k].weighted);
      if (lane == k) mine.weighted = weighted;
    }
  }
  mine.top = top;
  if (lane < kSpans && lane * kSpan < size) {
    partial[row * spans + begin / kSpan + lane] = mine;
  }
}

// Block b, one warp: row b.
template <class T, bool kEntropy, bool kCapped>
__global__ void __launch_bounds__(kWarp)
    sample_logprob_rows(SampleLogprobParams p, int spans,
                        const Seen<accumulate_t<T>, kEntropy>* partial) {
  using A = accumulate_t<T>;
  const int64_t row = blockIdx.x;
  const int lane = threadIdx.x;
  const Logits<A, kCapped> logits(p);
  A* logp = static_cast<A*>(p.logp) + row;
  A* lse = static_cast<A*>(p.lse) + row;
  double uniform = random_uniform(p.seed[0], p.sample_id[row], p.position[row]);
  partial += row * spans;
  after_previous();
  let_next_begin();

  // A lane has a run of the row's spans, and reads them again from its cache.
  constexpr int kAtOnce = 8;
  const int each = (spans + kWarp - 1) / kWarp, begin = min(spans, lane * each);
  const int end = min(spans, begin + each);
  A top = -static_cast<A>(INFINITY);
  for (int k = begin; k < end; k += kAtOnce) {
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (k + j < end) top = larger_number(top, partial[k + j].top);
    }
  }
  top = warp_max(top);
  auto weight_of_span = [&](int k) -> double {
    return partial[k].sum * logits.power_from(partial[k].top, top);
  };
  double mine = 0;
  for (int k = begin; k < end; k += kAtOnce) {
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) mine += k + j < end ? weight_of_span(k + j) : 0;
  }
  const Chosen run = warp_choose(mine, uniform);
  if (!(run.total > 0)) {  // NaN: NaN or +inf somewhere, or -inf everywhere
    if (lane == 0) {
      p.token[row] = 0;
      *logp = *lse = static_cast<A>(NAN);
      if constexpr (kEntropy) static_cast<A*>(p.entropy)[row] = *lse;
    }
    return;
  }
  if constexpr (kEntropy) {
    double weighted = 0;
    for (int k = begin; k < end; ++k) {
      Seen<A, true> seen = partial[k];
      seen.move(top, logits.rate());
      weighted += seen.weighted;
    }
    weighted = warp_sum(weighted);
    if (lane == 0) {
      const double entropy = std::log(run.total) - logits.scale * weighted / run.total;
      static_cast<A*>(p.entropy)[row] = static_cast<A>(entropy);
    }
  }
  Choice span;
  if (lane == run.lane) {
#pragma unroll 4
    for (int k = begin; k < end; ++k) span.consider(k, weight_of_span(k), run.goal);
  }
  const int chosen = __shfl_sync(0xffffffffu, span.item, run.lane);
  // What is left of the uniform, again one in [0, 1).
  uniform = fmin(fmax((run.goal - span.before) / span.weight, 0.0), 1.0);
  uniform = __shfl_sync(0xffffffffu, uniform, run.lane);
  const A anchor = partial[chosen].top, log_sum = std::log(static_cast<A>(run.total));

  constexpr int kEach = kSpan / kWarp;
  const int64_t first = static_cast<int64_t>(chosen) * kSpan + lane * kEach;
  const T* x = static_cast<const T*>(p.logits) + row * p.row_stride + first;
  A u[kEach];
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    u[k] = first + k < p.vocab ? logits.u(x[k]) : -static_cast<A>(INFINITY);
  }
  A weights[kEach];
  mine = 0;
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    weights[k] = first + k < p.vocab ? logits.power_from(u[k], anchor) : A{0};
    mine += weights[k];
  }
  const Chosen neighbours = warp_choose(mine, uniform);
  if (lane != neighbours.lane) return;
  Choice token;
  A drawn = 0;
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    token.consider(k, weights[k], neighbours.goal);
    if (token.item == k) drawn = u[k];
  }
  p.token[row] = first + token.item;
  *logp = logits.distance(drawn, top) - log_sum;
  *lse = std::fma(top, logits.scale, log_sum);
}

}  // namespace
}  // namespace fdpg::cuda

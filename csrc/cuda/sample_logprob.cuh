// sample_logprob.cuh: a token drawn from softmax(z) of each row (z: logits.cuh), with its log-prob,
// by inverting the cumulative distribution with one uniform.
//
// Fused: softmax, cumulative sum, search, gather and log. The first kernel folds the parts of each
// row (row_parts.cuh), a span of a part by each warp; the second, a block per row, chooses a span,
// reads it again, and descends to a run of it and to a token of that run.
//   bytes per row:  V * sizeof(T) read, and one span (8 KiB at most) again; 3 * 8 read for the key,
//                   8 + 4 + 4 written; per span 8 written and read again
//   floor:          (V sizeof(T) + 8 KiB) / bandwidth: [256, 50257] in fp32 is 54 MB, 18 us at
//                   3 TB/s, and two launches
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

// A warp chooses one of the items 0 ... n - 1 with probability proportional to weight(i), some of
// them positive. `uniform` becomes what is left of it, again uniform in [0, 1). All lanes call it
// with the same arguments and get the same answer.
template <class Weight>
__device__ int warp_choose(int n, const Weight& weight, double* uniform) {
  const int lane = threadIdx.x % kWarp;
  int first = 0;
  while (n > 1) {
    const int each = static_cast<int>(divide_up(n, kWarp));  // a lane has a run of items
    const int begin = min(n, lane * each), end = min(n, begin + each);
    double mine = 0;
#pragma unroll 4  // more would only be more code, which is run once
    for (int i = begin; i < end; ++i) mine += weight(first + i);
    const double upto = warp_running_sum(mine);
    const double goal = *uniform * __shfl_sync(0xffffffffu, upto, kWarp - 1);
    const unsigned possible = __ballot_sync(0xffffffffu, mine > 0);
    const unsigned beyond = __ballot_sync(0xffffffffu, mine > 0 && upto > goal);
    // The first beyond the goal; the last possible one if rounding has put the goal at the end.
    const int chosen = beyond ? __ffs(static_cast<int>(beyond)) - 1
                              : kWarp - 1 - __clz(static_cast<int>(possible));
    const double weight_of_chosen = __shfl_sync(0xffffffffu, mine, chosen);
    const double below = __shfl_sync(0xffffffffu, upto, chosen) - weight_of_chosen;
    *uniform = fmin(fmax((goal - below) / weight_of_chosen, 0.0), 1.0);
    first += chosen * each;
    n = min(each, n - chosen * each);
  }
  return first;
}

// Block b folds part b % parts of row b / parts, each warp a span of it, which goes to `partial`
// (N, parts, warps): the row's spans in order.
template <class T, bool kCapped>
__global__ void __launch_bounds__(kFoldThreads)
    sample_logprob_spans(SampleLogprobParams p, int part, int parts, int span,
                         OnlineLogSumExp<accumulate_t<T>>* partial) {
  FDPG_DYNAMIC_SHARED(T, stage);
  const int64_t row = blockIdx.x / parts;
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const PartOfRow here(blockIdx.x % parts, part, p.vocab);
  const T* x = static_cast<const T*>(p.logits) + row * p.row_stride;
  const Logits<accumulate_t<T>, kCapped> logits(p);
  const T* elements = stage_in_shared(stage, x + here.begin, here.size);
  const int begin = warp * span, size = min(span, here.size - begin);  // none if not positive
  const auto seen = fold<false>(elements + begin, size, 0, kWarpGroup, logits);
  if (threadIdx.x % kWarp == 0) {
    partial[static_cast<int64_t>(blockIdx.x) * warps + warp] = seen.state(logits);
  }
}

// A block per row. `warps`: of the blocks that made `partial`.
template <class T, bool kCapped>
__global__ void __launch_bounds__(kFoldThreads)
    sample_logprob_rows(SampleLogprobParams p, int part, int parts, int span, int warps,
                        const OnlineLogSumExp<accumulate_t<T>>* partial) {
  using A = accumulate_t<T>;
  FDPG_DYNAMIC_SHARED(T, stage);
  __shared__ double runs[kFoldThreads];  // the sum of each thread's run of the chosen span
  const int64_t row = blockIdx.x;
  const int t = threadIdx.x, threads = blockDim.x, spans = parts * warps;
  const T* x = static_cast<const T*>(p.logits) + row * p.row_stride;
  const Logits<A, kCapped> logits(p);
  A* logp = static_cast<A*>(p.logp) + row;
  A* lse = static_cast<A*>(p.lse) + row;
  partial += row * spans;

  // Each warp finds the row's sum and chooses a span: the same, without a barrier.
  double uniform = random_uniform(p.seed[0], p.sample_id[row], p.position[row]);
  A max = -static_cast<A>(INFINITY), sum = 0;
#pragma unroll 1
  for (int k = t % kWarp; k < spans; k += kWarp) max = larger_number(max, partial[k].max);
  max = warp_max(max);
  auto weight_of_span = [&](int k) { return partial[k].sum * exponential(partial[k].max - max); };
#pragma unroll 1
  for (int k = t % kWarp; k < spans; k += kWarp) sum += weight_of_span(k);
  sum = warp_sum(sum);
  if (!(sum > 0)) {  // NaN: NaN or +inf somewhere, or -inf everywhere
    if (t == 0) {
      p.token[row] = 0;
      *logp = *lse = static_cast<A>(NAN);
    }
    return;
  }
  const int chosen = warp_choose(spans, weight_of_span, &uniform);
  const A offset = partial[chosen].max;

  const PartOfRow here(chosen / warps, part, p.vocab);
  const int begin = chosen % warps * span, size = min(span, here.size - begin);
  const T* elements = stage_in_shared(stage, x + here.begin + begin, size);
  auto weight = [&](int i) -> double {
    return exponential(logits.relative(logits.u(elements[i]), offset));
  };
  // Odd: as many threads apart as there are banks would be elements in one bank.
  const int run = (size + threads - 1) / threads | 1;
  double mine = 0;
#pragma unroll 4
  for (int i = t * run; i < min(size, (t + 1) * run); ++i) mine += weight(i);
  runs[t] = mine;
  __syncthreads();
  if (t >= kWarp) return;

  const int r = warp_choose(threads, [&](int i) { return runs[i]; }, &uniform);
  const int most = min(run, size - r * run);
  const int token =
      r * run + warp_choose(most, [&](int i) { return weight(r * run + i); }, &uniform);
  if (t != 0) return;
  p.token[row] = here.begin + begin + token;
  *logp = logits.relative(logits.u(elements[token]), max) - std::log(sum);
  *lse = max + std::log(sum);
}

}  // namespace
}  // namespace fdpg::cuda

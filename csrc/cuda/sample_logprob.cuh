// sample_logprob.cuh: a token drawn from softmax(z) of each row (z: logits.cuh), with its log-prob,
// by inverting the cumulative distribution with one uniform.
//
// Fused: softmax, cumulative sum, search, gather and log. The first kernel folds the parts of each
// row (row_parts.cuh); the second, a block per row, chooses a part, reads it again, and descends to
// a run of it and to a token of that run.
//   bytes per row:  V * sizeof(T) read, and one part (32 KiB at most) again; 3 * 8 read for the
//                   key, 8 + 4 + 4 written; per part 8 written and read again
//   floor:          (V sizeof(T) + 32 KiB) / bandwidth: [256, 50257] in fp32 is 60 MB, 20 us at
//                   3 TB/s, and two launches
//
// The law and the key are the CPU's (cpu/sample_logprob-inl.h): at each level the uniform is scaled
// to the sum of that level's own parts, and what is left of it goes down, so a token's probability
// is a product of three ratios, each good to about 1e-7 relative, however rare the token. The sums
// are added in another order, so a uniform within about 1e-7 of the border between two tokens may
// be theirs or ours; else the tokens are the same.
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

// Block b folds part b % parts of row b / parts.
template <class T, bool kCapped>
__global__ void __launch_bounds__(Cut::kMaxThreads)
    sample_logprob_parts(SampleLogprobParams p, int part, int parts,
                         OnlineLogSumExp<accumulate_t<T>>* partial) {
  FDPG_DYNAMIC_SHARED(T, stage);
  const int64_t row = blockIdx.x / parts;
  const T* x = static_cast<const T*>(p.logits) + row * p.row_stride;
  const Logits<accumulate_t<T>, kCapped> logits(p);
  const auto state = fold_part<false>(x, p.vocab, blockIdx.x % parts, part, logits, stage);
  if (threadIdx.x == 0) partial[blockIdx.x] = state;
}

// A block per row.
template <class T, bool kCapped>
__global__ void __launch_bounds__(Cut::kMaxThreads)
    sample_logprob_rows(SampleLogprobParams p, int part, int parts,
                        const OnlineLogSumExp<accumulate_t<T>>* partial) {
  using A = accumulate_t<T>;
  FDPG_DYNAMIC_SHARED(T, stage);
  __shared__ double runs[Cut::kMaxThreads];  // the sum of each thread's run of the chosen part
  __shared__ int chosen_part;
  __shared__ double left;  // of the uniform
  const int64_t row = blockIdx.x;
  const int t = threadIdx.x, threads = blockDim.x;
  const T* x = static_cast<const T*>(p.logits) + row * p.row_stride;
  const Logits<A, kCapped> logits(p);
  A* logp = static_cast<A*>(p.logp) + row;
  A* lse = static_cast<A*>(p.lse) + row;
  partial += row * parts;

  const OnlineLogSumExp<A> state = merge_parts(partial, parts);  // the same in every thread
  if (!(state.sum > 0) || !(state.max < INFINITY)) {  // NaN or +inf somewhere, or -inf everywhere
    if (t == 0) {
      p.token[row] = 0;
      *logp = *lse = static_cast<A>(NAN);
    }
    return;
  }

  if (t < kWarp) {
    double uniform = random_uniform(p.seed[0], p.sample_id[row], p.position[row]);
    auto weight_of_part = [&](int k) -> double {
      if (!(partial[k].sum > 0)) return 0;
      return partial[k].sum * std::exp(static_cast<double>(partial[k].max) - state.max);
    };
    const int k = warp_choose(parts, weight_of_part, &uniform);
    if (t == 0) {
      chosen_part = k;
      left = uniform;
    }
  }
  __syncthreads();

  const PartOfRow here(chosen_part, part, p.vocab);
  const T* elements = stage_in_shared(stage, x + here.begin, here.size);
  auto weight = [&](int i) -> double {
    return exponential(logits.relative(logits.u(elements[i]), partial[chosen_part].max));
  };
  const int run = static_cast<int>(divide_up(here.size, threads));
  double sum = 0;
  for (int i = t * run; i < min(here.size, (t + 1) * run); ++i) sum += weight(i);
  runs[t] = sum;
  __syncthreads();
  if (t >= kWarp) return;

  double uniform = left;
  const int r = warp_choose(threads, [&](int i) { return runs[i]; }, &uniform);
  const int size = min(run, here.size - r * run);
  const int token =
      r * run + warp_choose(size, [&](int i) { return weight(r * run + i); }, &uniform);
  if (t != 0) return;
  p.token[row] = here.begin + token;
  *logp = logits.relative(logits.u(elements[token]), state.max) - std::log(state.sum);
  *lse = state.value();
}

}  // namespace
}  // namespace fdpg::cuda

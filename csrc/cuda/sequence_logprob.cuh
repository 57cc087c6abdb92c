// sequence_logprob.cuh: the sum of a sequence's values up to its length, in the order t = 0, 1,
// ..., in fp64: the CPU's bits.
//
// A warp takes 32 sequences, and tiles of 32 tokens of them: it reads a tile along the rows, 32
// neighbours at a time, and each lane adds up its own sequence's row of it.
//   bytes:  what the lengths cover of B T * 4 read, 8 B read and written
//   floor:  [4096, 512] in fp32 is 8.4 MB, 3 us at 3 TB/s, and a launch
#pragma once

#include "device.cuh"
//
#include "fdpg/params.h"

namespace fdpg::cuda {
namespace {

constexpr int kSequenceThreads = 128;

template <class T>
__global__ void __launch_bounds__(kSequenceThreads) sum_sequences(SequenceLogprobParams p) {
  constexpr int kWarps = kSequenceThreads / kWarp;
  __shared__ T tiles[kWarps][kWarp][kWarp + 1];  // + 1: neither rows nor columns share a bank
  T(&tile)[kWarp][kWarp + 1] = tiles[threadIdx.x / kWarp];
  const int lane = threadIdx.x % kWarp;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kSequenceThreads +
                        threadIdx.x / kWarp * kWarp;  // of the warp's sequences
  const int64_t mine = first + lane;
  const int64_t length = mine < p.sequences ? p.lengths[mine] : 0;
  const bool bad = length < 0 || length > p.tokens;

  double sum = 0;
  for (int64_t begin = 0;; begin += kWarp) {
    if (!__any_sync(0xffffffffu, !bad && begin < length)) break;
    T column[kWarp];  // all on their way before the first is waited for
#pragma unroll
    for (int s = 0; s < kWarp; ++s) {
      // Of sequence s, no more than its length is read.
      const int64_t end = __shfl_sync(0xffffffffu, bad ? int64_t{0} : length, s);
      const T* row = static_cast<const T*>(p.values) + (first + s) * p.row_stride;
      column[s] = begin + lane < end ? row[begin + lane] : T{0};
    }
#pragma unroll
    for (int s = 0; s < kWarp; ++s) tile[s][lane] = column[s];
    __syncwarp();
    const int64_t left = bad ? 0 : length - begin;
    for (int t = 0; t < min(left, static_cast<int64_t>(kWarp)); ++t) {
      sum += static_cast<double>(tile[lane][t]);
    }
    __syncwarp();  // the tile may be written again
  }
  if (mine < p.sequences) p.out[mine] = bad ? static_cast<double>(NAN) : sum;
}

}  // namespace
}  // namespace fdpg::cuda

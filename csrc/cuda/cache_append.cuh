// cache_append.cuh: rows of new keys and values, copied to where each sequence of a cache stands;
// a thread copies one unit of each. A sequence whose position is out of range is left as it is.
//   bytes:  what is appended, read and written: 1024 sequences, 12 heads of 64, bf16, keys and
//           values: 6.3 MB, 2 us at 3 TB/s, and a launch
#pragma once

#include "device.cuh"
//
#include "fdpg/params.h"

namespace fdpg::cuda {
namespace {

constexpr int kAppendThreads = 256;

// Unit: sixteen bytes where all rows begin and end on such, else one.
template <class Unit>
__global__ void __launch_bounds__(kAppendThreads) append_units(CacheAppendParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kAppendThreads + threadIdx.x;
  for (const CacheAppendParams::Part& part : p.parts) {
    const int64_t units = part.row_bytes / static_cast<int64_t>(sizeof(Unit));
    if (i >= p.sequences * p.heads * p.queries * units) continue;
    const int64_t q = i / units % p.queries, h = i / units / p.queries % p.heads;
    const int64_t b = i / units / p.queries / p.heads;
    const int64_t position = p.position[b];
    if (position < 0 || position > p.tokens - p.queries) continue;
    const char* from = static_cast<const char*>(part.states) + b * part.state_stride[0] +
                       h * part.state_stride[1] + q * part.state_stride[2];
    char* to = static_cast<char*>(part.cache) + b * part.cache_stride[0] +
               h * part.cache_stride[1] + (position + q) * part.cache_stride[2];
    reinterpret_cast<Unit*>(to)[i % units] = reinterpret_cast<const Unit*>(from)[i % units];
  }
}

}  // namespace
}  // namespace fdpg::cuda

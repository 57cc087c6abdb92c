// cache_append.cu: the launch of cache_append.cuh.
#include "cache_append.cuh"
#include "fdpg/cuda.h"

namespace fdpg::cuda {
namespace {

bool on_vectors(const CacheAppendParams::Part& part) {
  uintptr_t bits = reinterpret_cast<uintptr_t>(part.cache) |
                   reinterpret_cast<uintptr_t>(part.states) |
                   static_cast<uintptr_t>(part.row_bytes);
  for (int i = 0; i < 3; ++i) {
    bits |= static_cast<uintptr_t>(part.cache_stride[i] | part.state_stride[i]);
  }
  return bits % kVectorBytes == 0;
}

template <class Unit>
cudaError_t launch_units(const CacheAppendParams& p, Stream stream) {
  const int64_t bytes =
      p.parts[0].row_bytes > p.parts[1].row_bytes ? p.parts[0].row_bytes : p.parts[1].row_bytes;
  const int64_t units = p.sequences * p.heads * p.queries * (bytes / sizeof(Unit));
  return launch(append_units<Unit>, divide_up(units, kAppendThreads), kAppendThreads, 0, stream, p);
}

}  // namespace

Status cache_append(const CacheAppendParams& p, Stream stream) {
  return on_vectors(p.parts[0]) && on_vectors(p.parts[1]) ? launch_units<uint4>(p, stream)
                                                          : launch_units<char>(p, stream);
}

}  // namespace fdpg::cuda

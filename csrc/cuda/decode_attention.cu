// decode_attention.cu: the launch of decode_attention.cuh.
#include "decode_attention.cuh"
#include "fdpg/cuda.h"

namespace fdpg::cuda {
namespace {

bool on_vectors(const void* data, const int64_t* strides, std::size_t element) {
  bool whole = reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0;
  for (int i = 0; i < 3; ++i) whole = whole && strides[i] * element % kVectorBytes == 0;
  return whole;
}

template <class T, int kPer, int kHeads, bool kCapped>
cudaError_t launch_heads(const DecodeAttentionParams& p, Stream stream) {
  int lanes = 1;
  while (lanes * kPer < p.size || lanes * kPer < p.value_size) lanes *= 2;
  const int64_t parts = divide_up(p.heads / p.key_heads, kHeads);
  const std::size_t shared = kDecodeWarps * kHeads * (2 + lanes * kPer) * sizeof(accumulate_t<T>);
  const bool whole = on_vectors(p.keys, p.key_stride, sizeof(T)) &&
                     on_vectors(p.values, p.value_stride, sizeof(T));
  return launch(decode_attention_heads<T, kPer, kHeads, kCapped>, p.sequences * p.key_heads * parts,
                kDecodeThreads, shared, stream, p, lanes, static_cast<int>(parts), whole);
}

template <class T, bool kCapped>
cudaError_t launch_for(const DecodeAttentionParams& p, Stream stream) {
  // A warp at most to a key. Four heads of the largest would not fit into shared memory.
  if (p.size > 8 * kWarp || p.value_size > 8 * kWarp) {
    return launch_heads<T, kMaxHeadSize / kWarp, 1, kCapped>(p, stream);
  }
  if (p.heads == p.key_heads) return launch_heads<T, 8, 1, kCapped>(p, stream);
  return launch_heads<T, 8, 4, kCapped>(p, stream);
}

}  // namespace

Status decode_attention(const DecodeAttentionParams& p, Stream stream) {
  cudaError_t status = cudaErrorInvalidValue;
  visit_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    status = p.softcap > 0 ? launch_for<T, true>(p, stream) : launch_for<T, false>(p, stream);
  });
  return status;
}

}  // namespace fdpg::cuda

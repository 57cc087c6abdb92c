// decode_attention.cu: the launch of decode_attention.cuh.
#include <limits>

#include "decode_attention.cuh"
#include "fdpg/cuda.h"

namespace fdpg::cuda {
namespace {

bool on_vectors(const void* data, const int64_t* strides, int count, std::size_t element) {
  bool whole = reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0;
  for (int i = 0; i < count; ++i) whole = whole && strides[i] * element % kVectorBytes == 0;
  return whole;
}

template <class T, int kPer, int kHeads, int kWarps, bool kAdjusted>
cudaError_t launch_heads(const DecodeAttentionParams& p, Stream stream) {
  DecodePlan plan{};
  plan.key_heads = static_cast<unsigned>(p.key_heads);
  plan.groups = static_cast<int>(p.heads / p.key_heads);
  plan.parts = static_cast<unsigned>(divide_up(plan.groups, kHeads));
  const auto lanes = [&] { return 1 << plan.log_lanes; };
  while (lanes() * kPer < p.size || lanes() * kPer < p.value_size) ++plan.log_lanes;
  const std::size_t shared = kWarps * kHeads * (2 + lanes() * kPer) * sizeof(accumulate_t<T>);
  const bool whole = p.size % kPer == 0 && p.value_size % kPer == 0 &&
                     on_vectors(p.query, p.query_stride, 2, sizeof(T)) &&
                     on_vectors(p.keys, p.key_stride, 3, sizeof(T)) &&
                     on_vectors(p.values, p.value_stride, 3, sizeof(T));
  return launch(whole ? decode_attention_heads<T, kPer, kHeads, kWarps, kAdjusted, true>
                      : decode_attention_heads<T, kPer, kHeads, kWarps, kAdjusted, false>,
                p.sequences * p.key_heads * plan.parts, kWarps * kWarp, shared, stream, p, plan);
}

template <class T, bool kAdjusted>
cudaError_t launch_for(const DecodeAttentionParams& p, Stream stream) {
  // A warp at most to a key. Four heads of the largest would not fit into shared memory.
  if (p.size > 8 * kWarp || p.value_size > 8 * kWarp) {
    return launch_heads<T, kMaxHeadSize / kWarp, 1, 4, kAdjusted>(p, stream);
  }
  // What a warp costs beside its keys is most of what a short cache costs, so few warps to a head.
  if (p.heads == p.key_heads) return launch_heads<T, 8, 1, 1, kAdjusted>(p, stream);
  return launch_heads<T, 8, 4, 4, kAdjusted>(p, stream);
}

}  // namespace

Status decode_attention(const DecodeAttentionParams& p, Stream stream) {
  // Keys are counted in 32 bits, to the end of a round.
  if (p.tokens > std::numeric_limits<int>::max() / 2) return cudaErrorInvalidValue;
  cudaError_t status = cudaErrorInvalidValue;
  visit_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    const bool adjusted = p.softcap > 0 || p.bias != nullptr;
    status = adjusted ? launch_for<T, true>(p, stream) : launch_for<T, false>(p, stream);
  });
  return status;
}

}  // namespace fdpg::cuda

// token_logprob.cu: how many blocks, how much shared memory, which kernel. token_logprob.cuh has
// the kernels and the counts.
#include "fdpg/cuda.h"
#include "token_logprob.cuh"

namespace fdpg::cuda {
namespace {

template <class T, bool kEntropy, bool kCapped>
cudaError_t run_forward(const TokenLogprobParams& p, const Cut& cut, void* workspace,
                        cudaStream_t stream) {
  constexpr int kRowThreads = 128;
  auto* partial = static_cast<Seen<accumulate_t<T>, kEntropy>*>(workspace);
  const cudaError_t status =
      launch(token_logprob_parts<T, kEntropy, kCapped>, p.rows * cut.parts, cut.threads,
             cut.stage_bytes<T>(cut.part), stream, p, cut.part, cut.parts, partial);
  if (status != cudaSuccess || cut.parts == 1) return status;
  return launch(token_logprob_rows<T, kEntropy, kCapped>, divide_up(p.rows, kRowThreads),
                kRowThreads, 0, stream, p, cut.parts, partial);
}

}  // namespace

std::size_t token_logprob_workspace(const TokenLogprobParams& p) {
  std::size_t bytes = 0;
  with_cut(p.dtype, p.vocab, [&](const Cut& cut, auto tag) {
    using A = accumulate_t<decltype(tag)>;
    const std::size_t seen = p.entropy ? sizeof(Seen<A, true>) : sizeof(Seen<A, false>);
    if (cut.parts > 1) bytes = p.rows * cut.parts * seen;
    return cudaSuccess;
  });
  return bytes;
}

Status token_logprob(const TokenLogprobParams& p, void* workspace, Stream stream) {
  return with_cut(p.dtype, p.vocab, [&](const Cut& cut, auto tag) {
    using T = decltype(tag);
    return with_softcap(p.softcap, [&](auto capped) {
      constexpr bool kCapped = decltype(capped)::value;
      return p.entropy ? run_forward<T, true, kCapped>(p, cut, workspace, stream)
                       : run_forward<T, false, kCapped>(p, cut, workspace, stream);
    });
  });
}

Status token_logprob_backward(const TokenLogprobBackwardParams& p, Stream stream) {
  cudaError_t status = cudaErrorInvalidValue;
  visit_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    const int64_t parts = divide_up(p.vocab, kBackwardPart<T>);
    status = with_softcap(p.softcap, [&](auto capped) {
      return launch(token_logprob_backward_parts<T, decltype(capped)::value>, p.rows * parts,
                    kBackwardThreads, 0, stream, p, parts);
    });
  });
  return status;
}

}  // namespace fdpg::cuda

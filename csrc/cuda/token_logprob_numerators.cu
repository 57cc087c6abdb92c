// token_logprob_numerators.cu: which way, how many blocks, how much shared memory.
// token_logprob_numerators.cuh has the kernels and the counts.
#include "fdpg/cuda.h"
#include "token_logprob_numerators.cuh"

namespace fdpg::cuda {
namespace {

constexpr int kRowThreads = 128;

// Calls fn(cut, T{}, U{}) with the types of logits and numerators, which share a part's 32 KiB, and
// returns what it returns.
template <class Fn>
cudaError_t with_types(const TokenLogprobNumeratorsParams& p, Fn&& fn) {
  cudaError_t status = cudaErrorInvalidValue;  // no vocabulary, or a pair that there is not
  if (p.vocab <= 0) return status;
  visit_dtype(p.dtype, [&](auto logit) {
    visit_dtype(p.numerator_dtype, [&](auto numerator) {
      using T = decltype(logit);
      using U = decltype(numerator);
      if constexpr (std::is_same_v<T, accumulate_t<U>>) {
        status = fn(Cut(p.vocab, sizeof(T) + sizeof(U)), T{}, U{});
      }
    });
  });
  return status;
}

// In place, a row that has been written could not be done again.
bool uses_hint(const TokenLogprobNumeratorsParams& p) {
  return p.lse_hint != nullptr && p.numerators != p.logits;
}

template <class T, class U, bool kCapped>
cudaError_t run_with_hint(const TokenLogprobNumeratorsParams& p, const Cut& cut, void* workspace,
                          cudaStream_t stream) {
  const std::size_t shared = cut.stage_bytes<T>(cut.part) + cut.stage_bytes<U>(cut.part);
  T* partial = static_cast<T*>(workspace);
  cudaError_t status = launch(numerators_hint_parts<T, U, kCapped>, p.rows * cut.parts, cut.threads,
                              shared, stream, p, cut.part, cut.parts, partial);
  if (status != cudaSuccess) return status;
  status = launch(numerators_hint_rows<T, U, kCapped>, divide_up(p.rows, kRowThreads), kRowThreads,
                  0, stream, p, cut.parts, partial);
  if (status != cudaSuccess) return status;
  return launch(numerators_again<T, U, kCapped>, p.rows, cut.threads, shared, stream, p, cut.part,
                cut.parts);
}

template <class T, class U, bool kCapped>
cudaError_t run_without_hint(const TokenLogprobNumeratorsParams& p, const Cut& cut, void* workspace,
                             cudaStream_t stream, bool row_by_row) {
  const std::size_t shared = cut.stage_bytes<T>(cut.part) + cut.stage_bytes<U>(cut.part);
  auto* partial = static_cast<Seen<T, false>*>(workspace);
  cudaError_t status;
  if (row_by_row) {
    unsigned* arrived = reinterpret_cast<unsigned*>(partial + p.rows * cut.parts);
    status = launch<Begin::kEarly>(numerators_nobody_arrived, divide_up(p.rows, kRowThreads),
                                   kRowThreads, 0, stream, p.rows, arrived);
    if (status != cudaSuccess) return status;
    return launch<Begin::kEarly>(numerators_fold_and_write<T, U, kCapped>, p.rows * cut.parts,
                                 cut.threads, shared, stream, p, cut.part, cut.parts, partial,
                                 arrived);
  }
  status = launch(numerators_fold_parts<T, kCapped>, p.rows * cut.parts, cut.threads,
                  cut.stage_bytes<T>(cut.part), stream, p, cut.part, cut.parts, partial);
  if (status != cudaSuccess) return status;
  status = launch(numerators_fold_rows<T, kCapped>, divide_up(p.rows, kRowThreads), kRowThreads, 0,
                  stream, p, cut.parts, partial);
  if (status != cudaSuccess) return status;
  return launch(numerators_write_parts<T, U, kCapped>, p.rows * cut.parts, cut.threads, shared,
                stream, p, cut.part, cut.parts, partial);
}

// `row_by_row`: whether, without a hint, a row is written as soon as it has been folded.
cudaError_t run(const TokenLogprobNumeratorsParams& p, void* workspace, cudaStream_t stream,
                bool row_by_row) {
  return with_types(p, [&](const Cut& cut, auto logit, auto numerator) {
    using T = decltype(logit);
    using U = decltype(numerator);
    return with_softcap(p.softcap, [&](auto capped) {
      constexpr bool kCapped = decltype(capped)::value;
      return uses_hint(p) ? run_with_hint<T, U, kCapped>(p, cut, workspace, stream)
                          : run_without_hint<T, U, kCapped>(p, cut, workspace, stream, row_by_row);
    });
  });
}

}  // namespace

std::size_t token_logprob_numerators_workspace(const TokenLogprobNumeratorsParams& p) {
  std::size_t bytes = 0;
  with_types(p, [&](const Cut& cut, auto logit, auto) {
    using T = decltype(logit);
    const std::size_t per_part = uses_hint(p) ? sizeof(T) : sizeof(Seen<T, false>);
    bytes = p.rows * (cut.parts * per_part + (uses_hint(p) ? 0 : sizeof(unsigned)));
    return cudaSuccess;
  });
  return bytes;
}

// Logits that the cache holds may as well be folded all first: then few rows fill the machine
// twice.
Status token_logprob_numerators(const TokenLogprobNumeratorsParams& p, void* workspace,
                                Stream stream) {
  int64_t element = 0;
  visit_dtype(p.dtype, [&](auto tag) { element = sizeof(tag); });
  return run(p, workspace, stream, p.rows * p.vocab * element > cache_bytes());
}

}  // namespace fdpg::cuda

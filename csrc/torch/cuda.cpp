// cuda.cpp: the ops on CUDA. calls.h checks, allocates and fills the params; here the device of the
// arguments becomes the current one, its current stream takes the kernels, and a failed launch
// becomes a message. Nothing waits for the device, so nothing here looks at values: what the CPU
// refuses as out of range is NaN in the results (fdpg/cuda.h).
#include "fdpg/cuda.h"

#include <cuda_runtime_api.h>                       // cudaGetErrorString
#include <torch/csrc/inductor/aoti_torch/c/shim.h>  // streams, where USE_CUDA is defined
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstddef>
#include <cstdint>
#include <tuple>

#include "calls.h"

namespace fdpg::binding {
namespace {

// Where an op runs: on the device of `lead` while this lives, on that device's current stream. Made
// after the arguments are checked: the dispatcher comes here if any of them is on a CUDA device.
class Place {
 public:
  explicit Place(const Tensor& lead) : guard_(lead.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(lead.get_device_index(), &stream));
    stream_ = static_cast<cuda::Stream>(stream);
  }
  cuda::Stream stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cuda::Stream stream_ = nullptr;
};

// Bytes that a kernel may write before it reads them. Freed when this goes: torch's allocator hands
// them out again only to work that follows on the same stream.
class Workspace {
 public:
  Workspace(const Tensor& lead, std::size_t bytes)
      : tensor_(torch::stable::new_empty(lead, {static_cast<int64_t>(bytes)}, ScalarType::Byte)) {}
  void* data() const { return tensor_.data_ptr(); }

 private:
  Tensor tensor_;
};

void check(const char* op, cuda::Status status) {
  if (status == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // or the next kernel of torch's would raise it once more
  fail(op, ": the kernel could not be launched: ",
       cudaGetErrorString(static_cast<cudaError_t>(status)));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> token_logprob(const Tensor& logits, const Tensor& target,
                                                         double inv_temperature,
                                                         const OptionalTensor& mask, bool entropy,
                                                         double softcap) {
  const TokenLogprob call(logits, target, inv_temperature, mask, entropy, softcap);
  const Place place(logits);
  const Workspace workspace(logits, cuda::token_logprob_workspace(call.params));
  check("token_logprob", cuda::token_logprob(call.params, workspace.data(), place.stream()));
  return {call.logp, call.lse, call.entropy, call.lse_exact};
}

Tensor token_logprob_backward(const Tensor& logits, const Tensor& target, const Tensor& lse_exact,
                              const OptionalTensor& entropy, const OptionalTensor& grad_logp,
                              const OptionalTensor& grad_lse, const OptionalTensor& grad_entropy,
                              double inv_temperature, const OptionalTensor& mask, double softcap) {
  const TokenLogprobBackward call(/*in_place=*/false, logits, target, lse_exact, entropy, grad_logp,
                                  grad_lse, grad_entropy, inv_temperature, mask, softcap);
  const Place place(logits);
  check("token_logprob_backward", cuda::token_logprob_backward(call.params, place.stream()));
  return call.grad_logits;
}

void token_logprob_backward_(const Tensor& logits, const Tensor& target, const Tensor& lse_exact,
                             const OptionalTensor& entropy, const OptionalTensor& grad_logp,
                             const OptionalTensor& grad_lse, const OptionalTensor& grad_entropy,
                             double inv_temperature, const OptionalTensor& mask, double softcap) {
  const TokenLogprobBackward call(/*in_place=*/true, logits, target, lse_exact, entropy, grad_logp,
                                  grad_lse, grad_entropy, inv_temperature, mask, softcap);
  const Place place(logits);
  check("token_logprob_backward_", cuda::token_logprob_backward(call.params, place.stream()));
}

std::tuple<Tensor, Tensor, Tensor> token_logprob_numerators_(
    const Tensor& logits, const OptionalTensor& numerators, const Tensor& target,
    const Tensor& coefficient, const OptionalTensor& lse_hint, double inv_temperature,
    const OptionalTensor& mask, double softcap) {
  const TokenLogprobNumerators call(logits, numerators, target, coefficient, lse_hint,
                                    inv_temperature, mask, softcap);
  const Place place(logits);
  const Workspace workspace(logits, cuda::token_logprob_numerators_workspace(call.params));
  check("token_logprob_numerators_",
        cuda::token_logprob_numerators(call.params, workspace.data(), place.stream()));
  return {call.logp, call.lse, call.row_scale};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sample_logprob(const Tensor& logits, const Tensor& seed,
                                                          const Tensor& sample_id,
                                                          const Tensor& position,
                                                          double inv_temperature, double softcap,
                                                          bool entropy) {
  const SampleLogprob call(logits, seed, sample_id, position, inv_temperature, softcap, entropy);
  const Place place(logits);
  const Workspace workspace(logits, cuda::sample_logprob_workspace(call.params));
  check("sample_logprob", cuda::sample_logprob(call.params, workspace.data(), place.stream()));
  return {call.token, call.logp, call.lse, call.entropy};
}

void cache_append_(const Tensor& keys, const Tensor& values, const Tensor& new_keys,
                   const Tensor& new_values, const Tensor& position) {
  const CacheAppend call(keys, values, new_keys, new_values, position);
  const Place place(keys);
  check("cache_append_", cuda::cache_append(call.params, place.stream()));
}

Tensor decode_attention(const Tensor& query, const Tensor& keys, const Tensor& values,
                        const Tensor& end, const OptionalTensor& begin, const OptionalTensor& rows,
                        const OptionalTensor& bias, const OptionalTensor& sinks, double scale,
                        double softcap) {
  const DecodeAttention call(query, keys, values, end, begin, rows, bias, sinks, scale, softcap);
  const Place place(query);
  check("decode_attention", cuda::decode_attention(call.params, place.stream()));
  return call.out;
}

Tensor sequence_logprob(const Tensor& values, const Tensor& lengths) {
  const SequenceLogprob call(values, lengths);
  const Place place(values);
  check("sequence_logprob", cuda::sequence_logprob(call.params, place.stream()));
  return call.out;
}

void log_partition_(const Tensor& state, const Tensor& log_weight, const Tensor& prompt) {
  const LogPartition call(state, log_weight, prompt);
  const Place place(state);
  check("log_partition_", cuda::log_partition(call.params, place.stream()));
}

std::tuple<Tensor, Tensor> fdiv_weights(const Tensor& log_pi, const Tensor& log_q,
                                        const Tensor& log_score, const Tensor& log_z,
                                        const Tensor& prompt, int64_t divergence,
                                        double divergence_param, int64_t baseline,
                                        double baseline_param, const OptionalTensor& baseline_state,
                                        double ratio_clip, double reward_clip) {
  const FdivWeights call(log_pi, log_q, log_score, log_z, prompt, divergence, divergence_param,
                         baseline, baseline_param, baseline_state, ratio_clip, reward_clip);
  const Place place(log_pi);
  const Workspace workspace(log_pi, cuda::fdiv_weights_workspace(call.params));
  check("fdiv_weights", cuda::fdiv_weights(call.params, workspace.data(), place.stream()));
  return {call.weights, call.statistics};
}

Tensor fdiv_terms(const Tensor& log_pi, const Tensor& log_q, const Tensor& log_score,
                  const Tensor& log_z, const Tensor& prompt, int64_t divergence,
                  double divergence_param) {
  const FdivTerms call(log_pi, log_q, log_score, log_z, prompt, divergence, divergence_param);
  const Place place(log_pi);
  check("fdiv_terms", cuda::fdiv_terms(call.params, place.stream()));
  return call.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fdpg, CUDA, m) {
  m.impl("token_logprob", TORCH_BOX(&token_logprob));
  m.impl("token_logprob_backward", TORCH_BOX(&token_logprob_backward));
  m.impl("token_logprob_backward_", TORCH_BOX(&token_logprob_backward_));
  m.impl("token_logprob_numerators_", TORCH_BOX(&token_logprob_numerators_));
  m.impl("sample_logprob", TORCH_BOX(&sample_logprob));
  m.impl("cache_append_", TORCH_BOX(&cache_append_));
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
  m.impl("sequence_logprob", TORCH_BOX(&sequence_logprob));
  m.impl("log_partition_", TORCH_BOX(&log_partition_));
  m.impl("fdiv_weights", TORCH_BOX(&fdiv_weights));
  m.impl("fdiv_terms", TORCH_BOX(&fdiv_terms));
}

}  // namespace fdpg::binding

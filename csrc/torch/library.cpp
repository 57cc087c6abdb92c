// library.cpp: what the ops are called and what they take. One schema per op; `(a!)` marks what is
// written. The devices' folders register the functions (cpu.cpp, cuda.cpp), fdpg_fast/ops/ the fake
// kernels, gradients and documentation.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fdpg, m) {
  m.def(
      "token_logprob(Tensor logits, Tensor target, float inv_temperature=1., Tensor? mask=None, "
      "bool entropy=False, float softcap=0.) "
      "-> (Tensor logp, Tensor lse, Tensor entropy, Tensor lse_exact)");
  m.def(
      "token_logprob_backward(Tensor logits, Tensor target, Tensor lse_exact, Tensor? entropy, "
      "Tensor? grad_logp, Tensor? grad_lse, Tensor? grad_entropy, float inv_temperature, "
      "Tensor? mask, float softcap=0.) -> Tensor");
  m.def(
      "token_logprob_backward_(Tensor(a!) logits, Tensor target, Tensor lse_exact, "
      "Tensor? entropy, Tensor? grad_logp, Tensor? grad_lse, Tensor? grad_entropy, "
      "float inv_temperature, Tensor? mask, float softcap=0.) -> ()");
  m.def(
      "token_logprob_numerators_(Tensor(a!) logits, Tensor(b!)? numerators, Tensor target, "
      "Tensor coefficient, Tensor? lse_hint, float inv_temperature, Tensor? mask, "
      "float softcap=0.) "
      "-> (Tensor logp, Tensor lse, Tensor row_scale)");
  m.def(
      "sample_logprob(Tensor logits, Tensor seed, Tensor sample_id, Tensor position, "
      "float inv_temperature=1., float softcap=0., bool entropy=False) "
      "-> (Tensor token, Tensor logp, Tensor lse, Tensor entropy)");
  m.def(
      "cache_append_(Tensor(a!) keys, Tensor(b!) values, Tensor new_keys, Tensor new_values, "
      "Tensor position) -> ()");
  m.def(
      "decode_attention(Tensor query, Tensor keys, Tensor values, Tensor end, Tensor? begin=None, "
      "Tensor? rows=None, Tensor? bias=None, Tensor? sinks=None, float scale=1., "
      "float softcap=0.) -> Tensor");
  m.def("gelu_tanh(Tensor x) -> Tensor");
  m.def(
      "matmul_(Tensor(a!) out, Tensor a, Tensor b, Tensor? bias=None, float alpha=1., "
      "bool accumulate=False, bool may_round=False) -> ()");
  m.def("matmul_pack_(Tensor(a!) out, Tensor b) -> ()");
  m.def(
      "linear_numerators_(Tensor(a!)? numerators, Tensor hidden, Tensor weight, Tensor? bias, "
      "Tensor target, Tensor? coefficient, Tensor? lse_hint, float scale, float inv_temperature, "
      "float softcap, bool may_round) -> (Tensor logp, Tensor lse, Tensor row_scale)");
  m.def("sequence_logprob(Tensor values, Tensor lengths) -> Tensor");
  m.def("log_partition_(Tensor(a!) state, Tensor log_weight, Tensor prompt) -> ()");
  m.def(
      "fdiv_weights(Tensor log_pi, Tensor log_q, Tensor log_score, Tensor log_z, Tensor prompt, "
      "int divergence, float divergence_param, int baseline, float baseline_param, "
      "Tensor(a!)? baseline_state, float ratio_clip, float reward_clip) "
      "-> (Tensor weights, Tensor statistics)");
  m.def(
      "fdiv_terms(Tensor log_pi, Tensor log_q, Tensor log_score, Tensor log_z, Tensor prompt, "
      "int divergence, float divergence_param) -> Tensor");
}

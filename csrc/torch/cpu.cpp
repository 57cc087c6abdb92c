// cpu.cpp: the ops on the CPU. calls.h checks, allocates and fills the params; here the rows are
// shared out among torch's threads, and a row that a kernel rejected becomes a message.
#include "fdpg/cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <tuple>

#include "calls.h"

namespace fdpg::binding {
namespace {

// Below this many elements a thread costs more than it brings.
constexpr int64_t kElementsPerThread = 16384;

// Runs kernel(begin, end) over [0, rows) in parallel; returns kOk or the first bad row. The other
// threads finish their ranges: nothing is thrown across them.
template <class Kernel>
int64_t over_rows(int64_t rows, int64_t elements_per_row, const Kernel& kernel) {
  constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  std::atomic<int64_t> first_bad{kNone};
  const int64_t grain =
      std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, elements_per_row));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    const int64_t bad = kernel(begin, end);
    if (bad == kOk) return;
    int64_t seen = first_bad.load();
    while (bad < seen && !first_bad.compare_exchange_weak(seen, bad)) {
    }
  });
  const int64_t bad = first_bad.load();
  return bad == kNone ? kOk : bad;
}

[[noreturn]] void bad_target(const char* op, int64_t got, int64_t vocab, int64_t row) {
  fail(op, ": `target` must be in [0, ", vocab, "), got ", got, " at row ", row);
}

// `prompt` sends sample `row` to an estimate that does not exist, or out of order.
[[noreturn]] void bad_prompt(const char* op, const int64_t* prompt, int64_t prompts, int64_t row) {
  if (prompt[row] < 0 || prompt[row] >= prompts) {
    fail(op, ": `prompt` must be in [0, ", prompts, "), got ", prompt[row], " at sample ", row);
  }
  fail(op, ": `prompt` must not decrease (samples are grouped by prompt), got ", prompt[row],
       " at sample ", row, " after ", row > 0 ? prompt[row - 1] : 0);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> token_logprob(const Tensor& logits, const Tensor& target,
                                                         double inv_temperature,
                                                         const OptionalTensor& mask, bool entropy,
                                                         double softcap) {
  const TokenLogprob call(logits, target, inv_temperature, mask, entropy, softcap);
  const TokenLogprobParams& p = call.params;
  const int64_t bad = over_rows(p.rows, p.vocab, [&](int64_t begin, int64_t end) {
    return cpu::token_logprob(p, begin, end);
  });
  if (bad != kOk) bad_target("token_logprob", p.target[bad], p.vocab, bad);
  return {call.logp, call.lse, call.entropy, call.lse_exact};
}

void run(const TokenLogprobBackward& call) {
  const TokenLogprobBackwardParams& p = call.params;
  const int64_t bad = over_rows(p.rows, p.vocab, [&](int64_t begin, int64_t end) {
    return cpu::token_logprob_backward(p, begin, end);
  });
  if (bad != kOk) bad_target(call.args.op(), p.target[bad], p.vocab, bad);
}

Tensor token_logprob_backward(const Tensor& logits, const Tensor& target, const Tensor& lse_exact,
                              const OptionalTensor& entropy, const OptionalTensor& grad_logp,
                              const OptionalTensor& grad_lse, const OptionalTensor& grad_entropy,
                              double inv_temperature, const OptionalTensor& mask, double softcap) {
  const TokenLogprobBackward call(/*in_place=*/false, logits, target, lse_exact, entropy, grad_logp,
                                  grad_lse, grad_entropy, inv_temperature, mask, softcap);
  run(call);
  return call.grad_logits;
}

void token_logprob_backward_(const Tensor& logits, const Tensor& target, const Tensor& lse_exact,
                             const OptionalTensor& entropy, const OptionalTensor& grad_logp,
                             const OptionalTensor& grad_lse, const OptionalTensor& grad_entropy,
                             double inv_temperature, const OptionalTensor& mask, double softcap) {
  run(TokenLogprobBackward(/*in_place=*/true, logits, target, lse_exact, entropy, grad_logp,
                           grad_lse, grad_entropy, inv_temperature, mask, softcap));
}

std::tuple<Tensor, Tensor, Tensor> token_logprob_numerators_(
    const Tensor& logits, const OptionalTensor& numerators, const Tensor& target,
    const Tensor& coefficient, const OptionalTensor& lse_hint, double inv_temperature,
    const OptionalTensor& mask, double softcap) {
  const TokenLogprobNumerators call(logits, numerators, target, coefficient, lse_hint,
                                    inv_temperature, mask, softcap);
  const TokenLogprobNumeratorsParams& p = call.params;
  const int64_t bad = over_rows(p.rows, p.vocab, [&](int64_t begin, int64_t end) {
    return cpu::token_logprob_numerators(p, begin, end);
  });
  if (bad != kOk) bad_target("token_logprob_numerators_", p.target[bad], p.vocab, bad);
  return {call.logp, call.lse, call.row_scale};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sample_logprob(const Tensor& logits, const Tensor& seed,
                                                          const Tensor& sample_id,
                                                          const Tensor& position,
                                                          double inv_temperature, double softcap,
                                                          bool entropy) {
  const SampleLogprob call(logits, seed, sample_id, position, inv_temperature, softcap, entropy);
  const SampleLogprobParams& p = call.params;
  over_rows(p.rows, p.vocab, [&](int64_t begin, int64_t end) {
    return cpu::sample_logprob(p, begin, end);  // of a row that nothing can be drawn from, NaN
  });
  return {call.token, call.logp, call.lse, call.entropy};
}

void cache_append_(const Tensor& keys, const Tensor& values, const Tensor& new_keys,
                   const Tensor& new_values, const Tensor& position) {
  const CacheAppend call(keys, values, new_keys, new_values, position);
  const CacheAppendParams& p = call.params;
  const int64_t elements = p.heads * p.queries * (keys.size(3) + values.size(3));
  const int64_t bad = over_rows(p.sequences, elements, [&](int64_t begin, int64_t end) {
    return cpu::cache_append(p, begin, end);
  });
  if (bad != kOk) {
    fail("cache_append_: `position` must be in [0, ", p.tokens - p.queries, "], got ",
         p.position[bad], " at sequence ", bad);
  }
}

Tensor decode_attention(const Tensor& query, const Tensor& keys, const Tensor& values,
                        const Tensor& end, const OptionalTensor& begin, const OptionalTensor& rows,
                        const OptionalTensor& bias, const OptionalTensor& sinks, double scale,
                        double softcap) {
  const DecodeAttention call(query, keys, values, end, begin, rows, bias, sinks, scale, softcap);
  const DecodeAttentionParams& p = call.params;
  // Half of the cache is live, on average.
  const int64_t work = p.heads / p.key_heads * p.tokens * (p.size + p.value_size) / 2;
  const int64_t bad = over_rows(p.sequences * p.key_heads, work, [&](int64_t from, int64_t to) {
    return cpu::decode_attention(p, from, to);
  });
  if (bad != kOk) {
    if (p.rows && (p.rows[bad] < 0 || p.rows[bad] >= p.cache_rows)) {
      fail("decode_attention: `rows` must be in [0, ", p.cache_rows, "), got ", p.rows[bad],
           " at sequence ", bad);
    }
    fail("decode_attention: `begin` and `end` must be 0 <= begin <= end <= ", p.tokens, ", got [",
         p.begin ? p.begin[bad] : 0, ", ", p.end[bad], ") at sequence ", bad);
  }
  return call.out;
}

Tensor gelu_tanh(const Tensor& x) {
  const GeluTanh call(x);
  const GeluTanhParams& p = call.params;
  over_rows(p.count, 1, [&](int64_t begin, int64_t end) { return cpu::gelu_tanh(p, begin, end); });
  return call.out;
}

// Shares out the tiles of a product among threads.
template <class Kernel>
void over_tiles(const MatmulParams& p, const Kernel& kernel) {
  const auto tiles = [](int64_t size, int64_t of) { return (size + of - 1) / of; };
  const int64_t rows = std::min(p.rows, cpu::kMatmulTileRows);
  const int64_t columns = std::min(p.columns, cpu::kMatmulTileColumns);
  // 32 multiplications take as long as other kernels need for an element.
  over_rows(tiles(p.rows, cpu::kMatmulTileRows) * tiles(p.columns, cpu::kMatmulTileColumns),
            rows * columns * p.depth / 32, kernel);
}

void require_packed_products(const char* op) {
  if (!cpu::has_packed_products()) {
    fail(op, ": `b` must not be packed, got a CPU without products of bf16");
  }
}

void matmul_(const Tensor& out, const Tensor& a, const Tensor& b, const OptionalTensor& bias,
             double alpha, bool accumulate, bool may_round) {
  const Matmul call(out, a, b, bias, alpha, accumulate, may_round);
  const MatmulParams& p = call.params;
  if (p.packed) require_packed_products("matmul_");
  over_tiles(p, [&](int64_t begin, int64_t end) { return cpu::matmul(p, begin, end); });
}

void matmul_pack_(const Tensor& out, const Tensor& b) {
  const MatmulPack call(out, b);
  require_packed_products("matmul_pack_");
  const MatmulPackParams& p = call.params;
  over_rows(out.size(0), p.depth * cpu::kMatmulTileColumns,
            [&](int64_t begin, int64_t end) { return cpu::matmul_pack(p, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor> linear_numerators_(
    const OptionalTensor& numerators, const Tensor& hidden, const Tensor& weight,
    const OptionalTensor& bias, const Tensor& target, const OptionalTensor& coefficient,
    const OptionalTensor& lse_hint, double scale, double inv_temperature, double softcap,
    bool may_round) {
  const LinearNumerators call(numerators, hidden, weight, bias, target, coefficient, lse_hint,
                              scale, inv_temperature, softcap, may_round);
  const LinearNumeratorsParams& p = call.params;
  const auto walk = [&](LinearWalk which) {
    return [&p, which](int64_t begin, int64_t end) {
      return cpu::linear_numerators(p, which, begin, end);
    };
  };
  const int64_t rows = p.product.rows, vocab = p.product.columns;
  const int64_t bad = over_rows(rows, p.product.depth, walk(LinearWalk::kOffsets));
  if (bad != kOk) bad_target("linear_numerators_", p.target[bad], vocab, bad);
  over_tiles(p.product, walk(LinearWalk::kTiles));
  over_rows(rows, vocab / cpu::kMatmulTileColumns, walk(LinearWalk::kRows));
  return {call.logp, call.lse, call.row_scale};
}

Tensor sequence_logprob(const Tensor& values, const Tensor& lengths) {
  const SequenceLogprob call(values, lengths);
  const SequenceLogprobParams& p = call.params;
  const int64_t bad = over_rows(p.sequences, p.tokens, [&](int64_t begin, int64_t end) {
    return cpu::sequence_logprob(p, begin, end);
  });
  if (bad != kOk) {
    fail("sequence_logprob: `lengths` must be in [0, ", p.tokens, "], got ", p.lengths[bad],
         " at sequence ", bad);
  }
  return call.out;
}

void log_partition_(const Tensor& state, const Tensor& log_weight, const Tensor& prompt) {
  const LogPartition call(state, log_weight, prompt);
  const LogPartitionParams& p = call.params;
  const int64_t bad = cpu::log_partition(p);
  if (bad != kOk) bad_prompt("log_partition_", p.prompt, p.prompts, bad);
}

std::tuple<Tensor, Tensor> fdiv_weights(const Tensor& log_pi, const Tensor& log_q,
                                        const Tensor& log_score, const Tensor& log_z,
                                        const Tensor& prompt, int64_t divergence,
                                        double divergence_param, int64_t baseline,
                                        double baseline_param, const OptionalTensor& baseline_state,
                                        double ratio_clip, double reward_clip) {
  const FdivWeights call(log_pi, log_q, log_score, log_z, prompt, divergence, divergence_param,
                         baseline, baseline_param, baseline_state, ratio_clip, reward_clip);
  const FdivWeightsParams& p = call.params;
  const int64_t bad = cpu::fdiv_weights(p);
  if (bad != kOk) bad_prompt("fdiv_weights", p.prompt, p.prompts, bad);
  return {call.weights, call.statistics};
}

Tensor fdiv_terms(const Tensor& log_pi, const Tensor& log_q, const Tensor& log_score,
                  const Tensor& log_z, const Tensor& prompt, int64_t divergence,
                  double divergence_param) {
  const FdivTerms call(log_pi, log_q, log_score, log_z, prompt, divergence, divergence_param);
  const FdivTermsParams& p = call.params;
  const int64_t bad = over_rows(
      p.sequences, 64, [&](int64_t begin, int64_t end) { return cpu::fdiv_terms(p, begin, end); });
  if (bad != kOk) bad_prompt("fdiv_terms", p.prompt, p.prompts, bad);
  return call.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fdpg, CPU, m) {
  m.impl("token_logprob", TORCH_BOX(&token_logprob));
  m.impl("token_logprob_backward", TORCH_BOX(&token_logprob_backward));
  m.impl("token_logprob_backward_", TORCH_BOX(&token_logprob_backward_));
  m.impl("token_logprob_numerators_", TORCH_BOX(&token_logprob_numerators_));
  m.impl("sample_logprob", TORCH_BOX(&sample_logprob));
  m.impl("cache_append_", TORCH_BOX(&cache_append_));
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
  m.impl("gelu_tanh", TORCH_BOX(&gelu_tanh));
  m.impl("matmul_", TORCH_BOX(&matmul_));
  m.impl("matmul_pack_", TORCH_BOX(&matmul_pack_));
  m.impl("linear_numerators_", TORCH_BOX(&linear_numerators_));
  m.impl("sequence_logprob", TORCH_BOX(&sequence_logprob));
  m.impl("log_partition_", TORCH_BOX(&log_partition_));
  m.impl("fdiv_weights", TORCH_BOX(&fdiv_weights));
  m.impl("fdiv_terms", TORCH_BOX(&fdiv_terms));
}

}  // namespace fdpg::binding

// calls.h: the part of a binding that is the same on every device: check the arguments, allocate
// the results, fill the params. cpu.cpp and cuda.cpp run the kernel and hand the results back.
//
// Each op has one struct: `params` is ready for the kernel, the tensors are the results. Keep the
// struct until the kernel has run or was enqueued: it owns copies that the params point into.
#pragma once

#include <optional>

#include "check.h"
#include "fdpg/baseline.h"
#include "fdpg/divergence.h"
#include "fdpg/params.h"
#include "fdpg/statistics.h"

namespace fdpg::binding {

using OptionalTensor = std::optional<Tensor>;

inline void check_at_least(const char* op, const char* name, double value, double low) {
  if (!(value >= low)) fail(op, ": `", name, "` must be at least ", low, ", got ", value);
}

struct TokenLogprob {
  Arguments args;
  TokenLogprobParams params{};
  Tensor logp, lse, entropy, lse_exact;

  TokenLogprob(const Tensor& logits, const Tensor& target, double inv_temperature,
               const OptionalTensor& mask, bool want_entropy, double softcap)
      : args("token_logprob", "logits", logits) {
    const Matrix z = args.logits("logits", logits);
    const ScalarType type = result_type(z.type);
    logp = torch::stable::new_empty(logits, {z.rows}, type);
    lse = torch::stable::new_empty(logits, {z.rows}, type);
    entropy = torch::stable::new_empty(logits, {want_entropy ? z.rows : 0}, type);
    lse_exact = torch::stable::new_empty(logits, {z.rows}, ScalarType::Double);

    params.logits = z.data;
    params.dtype = dtype_of(z.type);
    params.rows = z.rows;
    params.vocab = z.columns;
    params.row_stride = z.row_stride;
    params.target = args.vector<int64_t>("target", target, z.rows);
    params.mask = args.optional_vector<bool>("mask", mask, z.rows);
    params.inv_temperature = args.factor_of_logits("inv_temperature", inv_temperature, z.type);
    params.softcap = args.softcap(softcap, z.type);
    params.logp = logp.data_ptr();
    params.lse = lse.data_ptr();
    params.entropy = want_entropy ? entropy.data_ptr() : nullptr;
    params.lse_exact = static_cast<double*>(lse_exact.data_ptr());
  }
};

struct TokenLogprobBackward {
  Arguments args;
  TokenLogprobBackwardParams params{};
  Tensor grad_logits;

  // `in_place`: the gradient overwrites the logits; else it gets a tensor of its own.
  TokenLogprobBackward(bool in_place, const Tensor& logits, const Tensor& target,
                       const Tensor& lse_exact, const OptionalTensor& entropy,
                       const OptionalTensor& grad_logp, const OptionalTensor& grad_lse,
                       const OptionalTensor& grad_entropy, double inv_temperature,
                       const OptionalTensor& mask, double softcap)
      : args(in_place ? "token_logprob_backward_" : "token_logprob_backward", "logits", logits) {
    const Matrix z = args.logits("logits", logits);
    const ScalarType type = result_type(z.type);
    grad_logits = in_place ? logits : torch::stable::new_empty(logits, {z.rows, z.columns});

    params.logits = z.data;
    params.grad_logits = grad_logits.data_ptr();
    params.dtype = dtype_of(z.type);
    params.rows = z.rows;
    params.vocab = z.columns;
    params.row_stride = z.row_stride;
    params.grad_row_stride = in_place ? z.row_stride : z.columns;
    params.target = args.vector<int64_t>("target", target, z.rows);
    params.mask = args.optional_vector<bool>("mask", mask, z.rows);
    params.inv_temperature = args.factor_of_logits("inv_temperature", inv_temperature, z.type);
    params.softcap = args.softcap(softcap, z.type);
    params.lse_exact = args.vector<double>("lse_exact", lse_exact, z.rows);
    params.grad_logp = args.optional_vector("grad_logp", grad_logp, z.rows, type);
    params.grad_lse = args.optional_vector("grad_lse", grad_lse, z.rows, type);
    params.grad_entropy = args.optional_vector("grad_entropy", grad_entropy, z.rows, type);
    params.entropy =
        grad_entropy ? args.optional_vector("entropy", entropy, z.rows, type) : nullptr;
    if (grad_entropy && !entropy) {
      fail(args.op(), ": `entropy` must be given with `grad_entropy`, got None");
    }
  }
};

struct TokenLogprobNumerators {
  Arguments args;
  TokenLogprobNumeratorsParams params{};
  Tensor logp, lse, row_scale;

  // Without `numerators`, they overwrite the logits.
  TokenLogprobNumerators(const Tensor& logits, const OptionalTensor& numerators,
                         const Tensor& target, const Tensor& coefficient,
                         const OptionalTensor& lse_hint, double inv_temperature,
                         const OptionalTensor& mask, double softcap)
      : args("token_logprob_numerators_", "logits", logits) {
    const Matrix z = args.logits("logits", logits);
    args.one_of("logits", z.type, {ScalarType::Float, ScalarType::Double});
    const Matrix e = numerators ? args.logits("numerators", *numerators) : z;
    if (z.type == ScalarType::Double) {
      args.one_of("numerators", e.type, {ScalarType::Double});
    } else {
      args.one_of("numerators", e.type,
                  {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
    }
    if (numerators) {
      args.shape("numerators", *numerators, {z.rows, z.columns});
      if (e.data == z.data && z.rows > 0) {
        fail(
            "token_logprob_numerators_: `numerators` must not begin where `logits` do, got the "
            "same memory. Leave them out to overwrite the logits");
      }
    }
    logp = torch::stable::new_empty(logits, {z.rows}, z.type);
    lse = torch::stable::new_empty(logits, {z.rows}, z.type);
    row_scale = torch::stable::new_empty(logits, {z.rows}, z.type);

    params.logits = z.data;
    params.numerators = e.data;
    params.dtype = dtype_of(z.type);
    params.numerator_dtype = dtype_of(e.type);
    params.rows = z.rows;
    params.vocab = z.columns;
    params.row_stride = z.row_stride;
    params.numerator_row_stride = e.row_stride;
    params.target = args.vector<int64_t>("target", target, z.rows);
    params.mask = args.optional_vector<bool>("mask", mask, z.rows);
    params.coefficient = args.vector("coefficient", coefficient, z.rows, z.type);
    params.lse_hint = args.optional_vector("lse_hint", lse_hint, z.rows, z.type);
    params.inv_temperature = args.factor_of_logits("inv_temperature", inv_temperature, z.type);
    params.softcap = args.softcap(softcap, z.type);
    params.logp = logp.data_ptr();
    params.lse = lse.data_ptr();
    params.row_scale = row_scale.data_ptr();
  }
};

struct SampleLogprob {
  Arguments args;
  SampleLogprobParams params{};
  Tensor token, logp, lse, entropy;

  SampleLogprob(const Tensor& logits, const Tensor& seed, const Tensor& sample_id,
                const Tensor& position, double inv_temperature, double softcap, bool want_entropy)
      : args("sample_logprob", "logits", logits) {
    const Matrix z = args.logits("logits", logits);
    const ScalarType type = result_type(z.type);
    token = torch::stable::new_empty(logits, {z.rows}, ScalarType::Long);
    logp = torch::stable::new_empty(logits, {z.rows}, type);
    lse = torch::stable::new_empty(logits, {z.rows}, type);
    entropy = torch::stable::new_empty(logits, {want_entropy ? z.rows : 0}, type);

    params.logits = z.data;
    params.dtype = dtype_of(z.type);
    params.rows = z.rows;
    params.vocab = z.columns;
    params.row_stride = z.row_stride;
    params.inv_temperature = args.factor_of_logits("inv_temperature", inv_temperature, z.type);
    params.softcap = args.softcap(softcap, z.type);
    params.seed = args.vector<int64_t>("seed", seed, 1);
    params.sample_id = args.vector<int64_t>("sample_id", sample_id, z.rows);
    params.position = args.vector<int64_t>("position", position, z.rows);
    params.token = static_cast<int64_t*>(token.data_ptr());
    params.logp = logp.data_ptr();
    params.lse = lse.data_ptr();
    params.entropy = want_entropy ? entropy.data_ptr() : nullptr;
  }
};

struct CacheAppend {
  Arguments args;
  CacheAppendParams params{};

  CacheAppend(const Tensor& keys, const Tensor& values, const Tensor& new_keys,
              const Tensor& new_values, const Tensor& position)
      : args("cache_append_", "keys", keys) {
    args.dimensions("keys", keys, 4);
    args.dimensions("values", values, 4);
    args.dimensions("new_keys", new_keys, 4);
    params.sequences = keys.size(0);
    params.heads = keys.size(1);
    params.tokens = keys.size(2);
    params.queries = new_keys.size(2);
    params.position = args.vector<int64_t>("position", position, params.sequences);
    params.parts[0] = part("keys", keys, "new_keys", new_keys);
    params.parts[1] = part("values", values, "new_values", new_values);
  }

 private:
  CacheAppendParams::Part part(const char* name, const Tensor& cache, const char* new_name,
                               const Tensor& states) const {
    const ScalarType type = cache.scalar_type();
    args.shape(name, cache, {params.sequences, params.heads, params.tokens, cache.size(3)});
    args.shape(new_name, states, {params.sequences, params.heads, params.queries, cache.size(3)});
    CacheAppendParams::Part part{};
    part.cache = const_cast<void*>(args.unit_stride(name, cache, type));
    part.states = args.unit_stride(new_name, states, type);
    const int64_t bytes = cache.element_size();
    part.row_bytes = cache.size(3) * bytes;
    for (int i = 0; i < 3; ++i) part.cache_stride[i] = cache.stride(i) * bytes;
    for (int i = 0; i < 3; ++i) part.state_stride[i] = states.stride(i) * bytes;
    return part;
  }
};

struct DecodeAttention {
  Arguments args;
  DecodeAttentionParams params{};
  Tensor out;

  DecodeAttention(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& end,
                  const OptionalTensor& begin, const OptionalTensor& rows,
                  const OptionalTensor& bias, const OptionalTensor& sinks, double scale,
                  double softcap)
      : args("decode_attention", "query", query) {
    args.dimensions("query", query, 3);
    args.dimensions("keys", keys, 4);
    args.dimensions("values", values, 4);
    const ScalarType type = query.scalar_type();
    const int64_t sequences = query.size(0), heads = query.size(1), size = query.size(2);
    const int64_t key_heads = keys.size(1), tokens = keys.size(2), value_size = values.size(3);
    args.one_of("query", type,
                {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double});
    const int64_t cache_rows = rows.has_value() ? keys.size(0) : sequences;
    args.shape("keys", keys, {cache_rows, key_heads, tokens, size});
    args.shape("values", values, {cache_rows, key_heads, tokens, value_size});
    if (key_heads == 0 || heads % key_heads != 0) {
      fail("decode_attention: `keys` must have a number of heads that divides the ", heads,
           " of `query`, got ", key_heads);
    }
    if (size > kMaxHeadSize || value_size > kMaxHeadSize) {
      fail("decode_attention: `", size > value_size ? "keys" : "values",
           "` must have heads of a size of at most ", int64_t{kMaxHeadSize}, ", got ",
           size > value_size ? size : value_size,
           ". Use torch's scaled_dot_product_attention for larger ones");
    }
    check_at_least("decode_attention", "softcap", softcap, 0.0);
    params.query = args.unit_stride("query", query, type);
    params.keys = args.unit_stride("keys", keys, type);
    params.values = args.unit_stride("values", values, type);
    for (int i = 0; i < 2; ++i) params.query_stride[i] = query.stride(i);
    for (int i = 0; i < 3; ++i) params.key_stride[i] = keys.stride(i);
    for (int i = 0; i < 3; ++i) params.value_stride[i] = values.stride(i);
    out = torch::stable::new_empty(query, {sequences, heads, value_size});

    params.out = out.data_ptr();
    params.dtype = dtype_of(type);
    params.sequences = sequences;
    params.cache_rows = cache_rows;
    params.heads = heads;
    params.key_heads = key_heads;
    params.tokens = tokens;
    params.size = size;
    params.value_size = value_size;
    params.end = args.vector<int64_t>("end", end, sequences);
    params.begin = args.optional_vector<int64_t>("begin", begin, sequences);
    params.rows = args.optional_vector<int64_t>("rows", rows, sequences);
    if (bias.has_value()) {
      args.shape("bias", *bias, {heads, tokens});
      params.bias = args.unit_stride("bias", *bias, result_type(type));
      params.bias_stride = bias->stride(0);
    }
    params.sinks = args.optional_vector("sinks", sinks, heads, result_type(type));
    params.scale = scale;
    params.softcap = softcap;
  }
};

struct GeluTanh {
  Arguments args;
  GeluTanhParams params{};
  Tensor out;

  explicit GeluTanh(const Tensor& x) : args("gelu_tanh", "x", x) {
    args.one_of("x", x.scalar_type(),
                {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double});
    out = torch::stable::new_empty(x, x.sizes());
    x_ = torch::stable::contiguous(x);

    params.x = x_.data_ptr();
    params.out = out.data_ptr();
    params.dtype = dtype_of(x.scalar_type());
    params.count = x.numel();
  }

 private:
  Tensor x_;
};

struct MatmulPack {
  Arguments args;
  MatmulPackParams params{};

  MatmulPack(const Tensor& out, const Tensor& b) : args("matmul_pack_", "b", b) {
    args.dimensions("b", b, 2);
    params.b = static_cast<const float*>(args.factor("b", b, ScalarType::Float, params.b_stride));
    params.depth = b.size(0);
    params.columns = b.size(1);
    params.out = args.packed("out", out, params.depth, params.columns);
  }
};

struct Matmul {
  Arguments args;
  MatmulParams params{};

  Matmul(const Tensor& out, const Tensor& a, const Tensor& b, const OptionalTensor& bias,
         double alpha, bool accumulate, bool may_round)
      : args("matmul_", "a", a) {
    const ScalarType type = a.scalar_type();
    args.one_of("a", type,
                {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double});
    args.dimensions("a", a, 2);
    args.dimensions("out", out, 2);
    const int64_t rows = a.size(0), depth = a.size(1);
    const bool packed = b.dim() == 4;
    if (!packed) args.dimensions("b", b, 2);
    const int64_t columns = packed ? out.size(1) : b.size(1);
    args.shape("out", out, {rows, columns});
    args.same_device("out", out);
    params.a = args.factor("a", a, type, params.a_stride);
    if (packed) {
      args.one_of("a", type, {ScalarType::BFloat16});
      params.b = args.packed("b", b, depth, columns);
    } else {
      args.shape("b", b, {depth, columns});
      params.b = args.factor("b", b, type, params.b_stride);
    }
    params.packed = packed;
    const ScalarType out_type = out.scalar_type();
    if (out_type != type) args.one_of("out", out_type, {result_type(type)});
    const int64_t row_stride = rows > 1 ? out.stride(0) : columns;
    if ((columns > 1 && out.stride(1) != 1) || row_stride < columns) {
      fail(
          "matmul_: `out` is written in place: its rows must be contiguous and not overlap, got "
          "strides ",
          list_of(out.strides()), " for shape ", list_of(out.sizes()),
          ". Give a new tensor, or columns of one");
    }
    params.out = out.data_ptr();
    params.rounds_out = out_type != result_type(type);
    params.dtype = dtype_of(type);
    params.rows = rows;
    params.depth = depth;
    params.columns = columns;
    params.out_stride = row_stride;
    params.bias = args.optional_vector("bias", bias, columns, result_type(type));
    params.alpha = alpha;
    params.accumulate = accumulate;
    params.may_round = may_round;
  }
};

struct LinearNumerators {
  Arguments args;
  LinearNumeratorsParams params{};
  Tensor logp, lse, row_scale;

  // Without `numerators` there is no row scale either.
  LinearNumerators(const OptionalTensor& numerators, const Tensor& hidden, const Tensor& weight,
                   const OptionalTensor& bias, const Tensor& target,
                   const OptionalTensor& coefficient, const OptionalTensor& lse_hint, double scale,
                   double inv_temperature, double softcap, bool may_round)
      : args("linear_numerators_", "hidden", hidden) {
    const ScalarType type = hidden.scalar_type(), sum_type = result_type(type);
    // fp16 numerators would leave its range.
    args.one_of("hidden", type, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Double});
    args.dimensions("hidden", hidden, 2);
    args.dimensions("weight", weight, 2);
    const int64_t rows = hidden.size(0), depth = hidden.size(1), vocab = weight.size(0);
    args.shape("weight", weight, {vocab, depth});
    if (vocab == 0) fail("linear_numerators_: `weight` has an empty vocabulary");
    MatmulParams& product = params.product;
    product.a = args.factor("hidden", hidden, type, product.a_stride);
    int64_t strides[2];
    product.b = args.factor("weight", weight, type, strides);
    product.b_stride[0] = strides[1];
    product.b_stride[1] = strides[0];
    product.dtype = dtype_of(type);
    product.rows = rows;
    product.depth = depth;
    product.columns = vocab;
    product.bias = args.optional_vector("bias", bias, vocab, sum_type);
    product.alpha = scale;
    product.may_round = may_round;
    if (numerators) {
      const Matrix e = args.logits("numerators", *numerators);
      args.one_of("numerators", e.type, {type});
      args.shape("numerators", *numerators, {rows, vocab});
      if (!coefficient) {
        fail("linear_numerators_: `coefficient` must be given with `numerators`, got None");
      }
      product.out = e.data;
      product.out_stride = e.row_stride;
      params.coefficient = args.vector("coefficient", *coefficient, rows, sum_type);
    }
    const int64_t tiles = (vocab + kVocabularyTile - 1) / kVocabularyTile;
    logp = torch::stable::new_empty(hidden, {rows}, sum_type);
    lse = torch::stable::new_empty(hidden, {rows}, sum_type);
    row_scale = torch::stable::new_empty(hidden, {numerators ? rows : 0}, sum_type);
    between_[0] = torch::stable::new_empty(hidden, {rows}, sum_type);
    between_[1] = torch::stable::new_empty(hidden, {rows}, sum_type);
    between_[2] = torch::stable::new_empty(hidden, {rows, tiles}, ScalarType::Double);

    params.target = args.vector<int64_t>("target", target, rows);
    params.lse_hint = args.optional_vector("lse_hint", lse_hint, rows, sum_type);
    params.inv_temperature = args.factor_of_logits("inv_temperature", inv_temperature, type);
    params.softcap = args.softcap(softcap, type);
    params.logp = logp.data_ptr();
    params.lse = lse.data_ptr();
    params.row_scale = row_scale.data_ptr();
    params.offset = between_[0].data_ptr();
    params.target_logit = between_[1].data_ptr();
    params.parts = static_cast<double*>(between_[2].data_ptr());
  }

 private:
  Tensor between_[3];
};

struct SequenceLogprob {
  Arguments args;
  SequenceLogprobParams params{};
  Tensor out;

  SequenceLogprob(const Tensor& values, const Tensor& lengths)
      : args("sequence_logprob", "values", values) {
    args.dimensions("values", values, 2);
    args.one_of("values", values.scalar_type(), {ScalarType::Float, ScalarType::Double});
    const int64_t sequences = values.size(0), tokens = values.size(1);
    if (tokens > 1 && values.stride(1) != 1) {
      fail("sequence_logprob: `values` must be contiguous along tokens, got strides ",
           list_of(values.strides()), ". Call .contiguous() on it");
    }
    out = torch::stable::new_empty(values, {sequences}, ScalarType::Double);

    params.values = values.data_ptr();
    params.is_double = values.scalar_type() == ScalarType::Double;
    params.sequences = sequences;
    params.tokens = tokens;
    params.row_stride = sequences > 1 ? values.stride(0) : tokens;
    params.lengths = args.vector<int64_t>("lengths", lengths, sequences);
    params.out = static_cast<double*>(out.data_ptr());
  }
};

struct LogPartition {
  Arguments args;
  LogPartitionParams params{};

  LogPartition(const Tensor& state, const Tensor& log_weight, const Tensor& prompt)
      : args("log_partition_", "state", state) {
    args.dimensions("state", state, 2);
    args.dimensions("log_weight", log_weight, 1);
    params.prompts = state.size(0);
    params.sequences = log_weight.size(0);
    params.state = args.state("state", state, {params.prompts, 3});
    params.log_weight = args.vector<double>("log_weight", log_weight, params.sequences);
    params.prompt = args.vector<int64_t>("prompt", prompt, params.sequences);
  }
};

inline void check_divergence(const char* op, int64_t id, double param) {
  if (id < 0 || id >= kDivergences) {
    fail(op, ": `divergence` must be in [0, ", int{kDivergences}, "), got ", id);
  }
  if (valid_divergence(static_cast<int32_t>(id), param)) return;
  const DivergenceInfo& info = kDivergenceInfo[id];
  fail(op, ": `divergence_param` of ", info.name, " must lie in (", info.low, ", ", info.high,
       "), got ", param);
}

inline void check_baseline(const char* op, int64_t id, double param, int64_t divergence,
                           bool has_state) {
  if (id < 0 || id >= kBaselines) {
    fail(op, ": `baseline` must be in [0, ", int{kBaselines}, "), got ", id);
  }
  const BaselineInfo& info = kBaselineInfo[id];
  if (info.scope == Scope::kEarlierBatches && !has_state) {
    fail(op, ": `baseline_state` must be given for the baseline ", info.name, ", got None");
  }
  if (valid_baseline(static_cast<int32_t>(id), param, static_cast<int32_t>(divergence))) return;
  if (info.takes_param) {
    fail(op, ": `baseline_param` of ", info.name, " must lie in (", info.low, ", ", info.high,
         "), got ", param);
  }
  fail(op, ": the baseline ", info.name, " is not exact for the divergence ",
       kDivergenceInfo[divergence].name, ". Use loo");
}

struct FdivWeights {
  Arguments args;
  FdivWeightsParams params{};
  Tensor weights, statistics;

  FdivWeights(const Tensor& log_pi, const Tensor& log_q, const Tensor& log_score,
              const Tensor& log_z, const Tensor& prompt, int64_t divergence,
              double divergence_param, int64_t baseline, double baseline_param,
              const OptionalTensor& baseline_state, double ratio_clip, double reward_clip)
      : args("fdiv_weights", "log_pi", log_pi) {
    check_divergence("fdiv_weights", divergence, divergence_param);
    check_baseline("fdiv_weights", baseline, baseline_param, divergence,
                   baseline_state.has_value());
    check_at_least("fdiv_weights", "ratio_clip", ratio_clip, 0.0);
    check_at_least("fdiv_weights", "reward_clip", reward_clip, 0.0);
    args.dimensions("log_pi", log_pi, 1);
    args.dimensions("log_z", log_z, 1);
    const int64_t b = log_pi.size(0);
    weights = torch::stable::new_empty(log_pi, {b}, ScalarType::Double);
    statistics = torch::stable::new_empty(log_pi, {kStatistics}, ScalarType::Double);

    params.sequences = b;
    params.prompts = log_z.size(0);
    params.log_pi = args.vector<double>("log_pi", log_pi, b);
    params.log_q = args.vector<double>("log_q", log_q, b);
    params.log_score = args.vector<double>("log_score", log_score, b);
    params.log_z = args.vector<double>("log_z", log_z, params.prompts);
    params.prompt = args.vector<int64_t>("prompt", prompt, b);
    params.divergence = static_cast<int32_t>(divergence);
    params.divergence_param = divergence_param;
    params.baseline = static_cast<int32_t>(baseline);
    params.baseline_param = baseline_param;
    params.baseline_state =
        baseline_state ? args.state("baseline_state", *baseline_state, {2}) : nullptr;
    params.ratio_clip = ratio_clip;
    params.reward_clip = reward_clip;
    params.weights = static_cast<double*>(weights.data_ptr());
    params.statistics = static_cast<double*>(statistics.data_ptr());
  }
};

struct FdivTerms {
  Arguments args;
  FdivTermsParams params{};
  Tensor out;

  FdivTerms(const Tensor& log_pi, const Tensor& log_q, const Tensor& log_score, const Tensor& log_z,
            const Tensor& prompt, int64_t divergence, double divergence_param)
      : args("fdiv_terms", "log_pi", log_pi) {
    check_divergence("fdiv_terms", divergence, divergence_param);
    args.dimensions("log_pi", log_pi, 1);
    args.dimensions("log_z", log_z, 1);
    const int64_t b = log_pi.size(0);
    out = torch::stable::new_empty(log_pi, {b}, ScalarType::Double);

    params.sequences = b;
    params.prompts = log_z.size(0);
    params.log_pi = args.vector<double>("log_pi", log_pi, b);
    params.log_q = args.vector<double>("log_q", log_q, b);
    params.log_score = args.vector<double>("log_score", log_score, b);
    params.log_z = args.vector<double>("log_z", log_z, params.prompts);
    params.prompt = args.vector<int64_t>("prompt", prompt, b);
    params.divergence = static_cast<int32_t>(divergence);
    params.divergence_param = divergence_param;
    params.out = static_cast<double*>(out.data_ptr());
  }
};

}  // namespace fdpg::binding

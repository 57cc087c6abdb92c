// params.h: one plain struct of pointers and sizes per op. What every kernel, on every device,
// is told, and all it is told.
//
// Laws of this file:
// - Strides are in elements, not bytes. Sizes and offsets are 64-bit: N * V passes 2^31.
// - Per-token quantities are fp32 (fp64 where the logits are fp64); per-sequence quantities are
//   fp64 throughout, because f-DPG exponentiates differences of sums over hundreds of tokens.
// - A pointer marked "or null" may be null; every other one points to what its comment says.
// - Legend: N rows of logits, V vocabulary, B sequences, T token columns, G prompts.
#pragma once

#include <cstdint>

namespace fdpg {

// Storage type of the logits. Names follow torch's scalar types.
enum class Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// What a CPU range kernel reports: kOk, or the index of the first offending row in its range.
inline constexpr int64_t kOk = -1;

// log p(target) and log-sum-exp of each row of logits, in one read of the row.
//   z = inv_temperature * logits, or inv_temperature * softcap tanh(logits / softcap)
//   lse = log sum_j exp z_j;  logp = z[target] - lse
//   entropy = lse - sum_j softmax(z)_j z_j   (a term with z_j = -inf counts as 0)
struct TokenLogprobParams {
  const void* logits;  // (N, V), row stride `row_stride`, unit stride along V
  Dtype dtype;
  int64_t rows;           // N
  int64_t vocab;          // V
  int64_t row_stride;     // >= V
  const int64_t* target;  // (N,)
  const bool* mask;       // (N,) or null; a row with mask false is not read and yields zeros
  double inv_temperature;
  double softcap;     // 0: none, here as below
  void* logp;         // (N,) fp32, or fp64 when dtype is kFloat64
  void* lse;          // (N,) same type
  void* entropy;      // (N,) same type, or null
  double* lse_exact;  // (N,) lse before it is rounded, for the gradient
};

// d logits, given upstream gradients of logp, lse and entropy:
//   dz_j = g_logp (1[j == target] - p_j) + g_lse p_j - g_entropy p_j (z_j - lse + entropy)
//   dlogits_j = inv_temperature * dz_j, with a softcap times 1 - tanh(logits_j / softcap)^2
// `grad_logits` may be the same buffer as `logits` (in place). Masked rows, and rows whose three
// gradients are all zero, are written as zeros without being read.
struct TokenLogprobBackwardParams {
  const void* logits;  // (N, V)
  void* grad_logits;   // (N, V), same dtype as logits
  Dtype dtype;
  int64_t rows;
  int64_t vocab;
  int64_t row_stride;       // of logits
  int64_t grad_row_stride;  // of grad_logits
  const int64_t* target;    // (N,)
  const bool* mask;         // (N,) or null
  double inv_temperature;
  double softcap;
  const double* lse_exact;   // (N,) as the forward returned it
  const void* entropy;       // (N,) or null; needed when grad_entropy is not null
  const void* grad_logp;     // (N,) or null
  const void* grad_lse;      // (N,) or null
  const void* grad_entropy;  // (N,) or null
};

// Log-probs, and what the gradient of sum_i coefficient_i logp_i is made of, in one visit of a row:
//   d/dlogits[i, j] = row_scale[i] * numerators[i, j]
//   numerators_j = e_j - s [j == target],  e_j = exp(z_j - h),  s = sum_j e_j;
//                  with a softcap times 1 - tanh(logits_j / softcap)^2
//   row_scale    = -coefficient * inv_temperature / s
// whatever the offset h: lse_hint where a kernel makes use of it, and something of its own where it
// does not, or where exponentials relative to the hint leave the range of fp32. Only the product is
// promised. A row scale is a number per row, so it may multiply the rows of other matrices in place
// of these: (row_scale * numerators) W = row_scale * (numerators W).
// `numerators` may be the same buffer as `logits`. Masked rows are not read and yield zeros; rows
// with coefficient 0 have numerators and scale 0.
struct TokenLogprobNumeratorsParams {
  const void* logits;     // (N, V)
  void* numerators;       // (N, V)
  Dtype dtype;            // of logits: kFloat32 or kFloat64
  Dtype numerator_dtype;  // the same, or kBFloat16 or kFloat16 for kFloat32
  int64_t rows;
  int64_t vocab;
  int64_t row_stride;            // of logits
  int64_t numerator_row_stride;  // of numerators
  const int64_t* target;         // (N,)
  const bool* mask;              // (N,) or null
  const void* coefficient;       // (N,) type of logits, as are the following
  const void* lse_hint;          // (N,) or null
  double inv_temperature;
  double softcap;
  void* logp;       // (N,)
  void* lse;        // (N,)
  void* row_scale;  // (N,)
};

// One draw from softmax(z) per row, z as for TokenLogprobParams, with its log-prob, in one read of
// the row and a second look at one block of it. The uniform of row i is a function of
// (seed, sample_id[i], position[i]) alone (random.h), so a draw does not depend on the batch.
// A row whose z holds NaN or +inf, or is -inf throughout, yields token 0 and NaN for the rest:
// nothing on the device can raise, so the caller looks at lse.
struct SampleLogprobParams {
  const void* logits;  // (N, V)
  Dtype dtype;
  int64_t rows;
  int64_t vocab;
  int64_t row_stride;
  double inv_temperature;
  double softcap;
  const int64_t* seed;       // (1,)
  const int64_t* sample_id;  // (N,)
  const int64_t* position;   // (N,)
  int64_t* token;            // (N,)
  void* logp;                // (N,) fp32, or fp64 when dtype is kFloat64
  void* lse;                 // (N,)
  void* entropy;             // (N,) of the distribution, or null
};

// sum over t < lengths[b] of values[b, t], in the fixed order t = 0, 1, ..., in fp64.
struct SequenceLogprobParams {
  const void* values;  // (B, T), row stride `row_stride`; fp32, or fp64 when is_double
  bool is_double;
  int64_t sequences;  // B
  int64_t tokens;     // T
  int64_t row_stride;
  const int64_t* lengths;  // (B,), 0 <= lengths[b] <= T
  double* out;             // (B,)
};

// Streaming importance-sampling estimate of Z per prompt, in log space:
//   state[g] = (log sum w, log sum w^2, number of samples),  w = P(x) / q(x)
// Samples are added in order; a log weight of -inf adds a zero and counts as a sample.
struct LogPartitionParams {
  const double* log_weight;  // (B,) log P(x) - log q(x)
  const int64_t* prompt;     // (B,) row of `state`
  int64_t sequences;         // B
  int64_t prompts;           // G
  double* state;             // (G, 3), updated in place; a fresh row is (-inf, -inf, 0)
};

// The weight of each sample in the policy-gradient estimate
//   grad D_f(pi || p)  =  -(1/B) sum_i weight_i grad log pi(x_i)
//   weight_i = ratio_i (r_i - b_i),   r = -f'(log_t),   log_t = log pi - (log P - log Z)
//   ratio = min(pi / q, ratio_clip);  r clamped to [-reward_clip, reward_clip]
// (f-DPG, arXiv 2302.08215, Theorem 1 and Fact 1.) A sample of a prompt with log Z = -inf, or one
// with log pi = -inf, is skipped: weight 0, counted, left out of every statistic and baseline.
struct FdivWeightsParams {
  const double* log_pi;     // (B,)
  const double* log_q;      // (B,)
  const double* log_score;  // (B,) log P, -inf off the support
  const double* log_z;      // (G,)
  const int64_t* prompt;    // (B,) 0..G-1, non-decreasing: samples are grouped by prompt
  int64_t sequences;        // B
  int64_t prompts;          // G
  int32_t divergence;       // index in the list of divergence.h
  double divergence_param;  // alpha or w; ignored by the others
  int32_t baseline;         // index in the list of baseline.h
  double baseline_param;    // decay of ema; ignored by the others
  double* baseline_state;   // (2,) sum and weight of the moving average, updated in place; or null
                            // for baselines that keep no state
  double ratio_clip;        // +inf: not truncated
  double reward_clip;       // +inf: not clipped
  double* weights;          // (B,)
  double* statistics;       // (kStatistics,), named in statistics.h
};

// One sample's term of the importance-sampling estimate of D_f(pi || p) under q:
//   log_t = log pi - log p:  (p/q) f~(t) on the support, (pi/q) f~'(inf) off it,
//   f~(t) = f(t) - f'(1)(t - 1), which is >= 0 and has the same divergence and less variance.
// The mean over samples of one prompt estimates D_f for that prompt.
struct FdivTermsParams {
  const double* log_pi;     // (B,)
  const double* log_q;      // (B,)
  const double* log_score;  // (B,)
  const double* log_z;      // (G,)
  const int64_t* prompt;    // (B,) 0..G-1
  int64_t sequences;
  int64_t prompts;
  int32_t divergence;
  double divergence_param;
  double* out;  // (B,); NaN for a prompt with log Z = -inf
};

// Attention of one new token per sequence over what a key-value cache holds of it:
//   s_t = scale q . k_t            or, with a softcap, softcap tanh(scale q . k_t / softcap)
//   s_t += bias_{T - end + t}      by how far the key is from the last one
//   out = sum_t softmax(s)_t v_t   over t in [begin, end); a sink adds a term to the normaliser
//   only
// Head h of the query attends to key head h / (H / Hk), and sequence b to row `rows[b]` of the
// cache. Sums are fp32, whatever the dtype (fp64 in fp64). Keys outside the span are not read; a
// sequence with an empty span yields zeros.
struct DecodeAttentionParams {
  const void* query;        // (B, H, D), unit stride along D, as all of these
  const void* keys;         // (R, Hk, T, D)
  const void* values;       // (R, Hk, T, E)
  void* out;                // (B, H, E), contiguous
  Dtype dtype;              // of these four
  int64_t sequences;        // B
  int64_t cache_rows;       // R
  int64_t heads;            // H
  int64_t key_heads;        // Hk
  int64_t tokens;           // T
  int64_t size;             // D <= kMaxHeadSize
  int64_t value_size;       // E <= kMaxHeadSize
  int64_t query_stride[2];  // along B, H
  int64_t key_stride[3];    // along R, Hk, T
  int64_t value_stride[3];
  const int64_t* begin;  // (B,) or null: zeros
  const int64_t* end;    // (B,), 0 <= begin <= end <= T
  const int64_t* rows;   // (B,) 0..R-1, or null: sequence b reads row b, and R is B
  const void* bias;      // (H, T) fp32, fp64 where dtype is; or null
  int64_t bias_stride;   // along H
  const void* sinks;     // (H,) as bias; or null
  double scale;
  double softcap;  // 0: none
};

inline constexpr int64_t kMaxHeadSize = 1024;

// A product of two matrices, each in either orientation, summed in fp32 (fp64 where dtype is):
//   out = alpha (a b + bias), or out += alpha (a b + bias)
struct MatmulParams {
  const void* a;        // (N, K), unit stride along N or K
  const void* b;        // (K, M), unit stride along K or M; or packed
  Dtype dtype;          // of a and b
  void* out;            // (N, M) as it is summed, or of `dtype`; unit stride along M
  int64_t rows;         // N
  int64_t depth;        // K
  int64_t columns;      // M
  int64_t a_stride[2];  // along N, K
  int64_t b_stride[2];  // along K, M
  int64_t out_stride;   // along N
  const void* bias;     // (M,) of the type of the sums, or null
  double alpha;
  bool accumulate;
  bool rounds_out;  // `out` is of 16 bits
  bool may_round;   // fp32 factors to bf16, where the CPU multiplies that faster
  bool packed;      // b is as MatmulPackParams has it, of bf16; b_stride is not looked at
};

// A factor b of many products as the kernel walks over it, rounded to bf16: panels of
// kVocabularyTile columns, in each of which pairs of neighbours along the depth follow one
// another, those of all columns (with AMX, of 16 columns, then of 16 others) at one place
// together; zeros where depth or columns have ended.
struct MatmulPackParams {
  const float* b;       // (K, M), unit stride along K or M
  void* out;            // (M / kVocabularyTile, K / 32 * 16, kVocabularyTile, 2), rounded up
  int64_t depth;        // K
  int64_t columns;      // M
  int64_t b_stride[2];  // along K, M
};

// What TokenLogprobNumeratorsParams says of logits = alpha (a b + bias), from the factors; `out` is
// where numerators go, of the dtype of the factors. Without it there are log-probs alone.
struct LinearNumeratorsParams {
  MatmulParams product;   // V columns; does not accumulate
  const int64_t* target;  // (N,)
  const void*
      coefficient;       // (N,) of the type of the sums, as are the following; null without `out`
  const void* lse_hint;  // (N,) or null
  double inv_temperature;
  double softcap;
  void* logp;       // (N,)
  void* lse;        // (N,)
  void* row_scale;  // (N,), not written without `out`
  // Between the walks over rows, tiles and rows again:
  void* offset;        // (N,)
  void* target_logit;  // (N,)
  double* parts;       // (N, V / kVocabularyTile, rounded up) sums of exponentials
};

inline constexpr int64_t kVocabularyTile = 64;

// Which of them.
enum class LinearWalk { kOffsets, kTiles, kRows };

// gelu(x) = x (1 + tanh u) / 2,  u = sqrt(2 / pi) (x + 0.044715 x^3): its limits at both ends, NaN
// for NaN. `out` may be `x`.
struct GeluTanhParams {
  const void* x;  // (count,)
  void* out;      // (count,)
  Dtype dtype;    // of both
  int64_t count;
};

// New keys and values to their places in a cache whose sequences are at positions of their own:
//   cache[b, h, position[b] + q, :] = states[b, h, q, :]
// once for keys and once for values. Bytes are copied, whatever they mean.
struct CacheAppendParams {
  struct Part {
    void* cache;              // (B, Hk, T, D), unit stride along D
    const void* states;       // (B, Hk, Q, D), unit stride along D
    int64_t row_bytes;        // D times the size of an element
    int64_t cache_stride[3];  // along B, Hk, T, in bytes
    int64_t state_stride[3];  // along B, Hk, Q, in bytes
  };
  Part parts[2];
  int64_t sequences;        // B
  int64_t heads;            // Hk
  int64_t tokens;           // T
  int64_t queries;          // Q
  const int64_t* position;  // (B,), 0 <= position[b] <= T - Q
};

}  // namespace fdpg

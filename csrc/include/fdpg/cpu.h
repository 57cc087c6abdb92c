// cpu.h: the CPU entry points, one per op: f(params, begin, end) works on rows [begin, end).
// Threads belong to the caller. Range kernels return kOk or the first row whose input is out of
// range (params.h); such a row's outputs are left NaN and the rest of the range is still computed.
#pragma once

#include <cstdint>

#include "fdpg/params.h"

namespace fdpg::cpu {

// Instruction set the dispatcher settled on: "amx", "avx512bf16", "avx512", "avx2" or
// "portable". The environment variable FDPG_CPU_ISA=portable|avx2|avx512|avx512bf16 lowers it (for
// tests and bug reports).
const char* isa();

// Chooses an instruction set by name for the calls that follow; false if this CPU lacks it or the
// name is unknown. Tests run every kernel through each.
bool set_isa(const char* name);

// Who made the CPU: "amd", "intel" or "other". For no kernel of ours; libraries ask it too, and are
// not equally good to all.
const char* vendor();

int64_t token_logprob(const TokenLogprobParams& p, int64_t begin, int64_t end);
int64_t token_logprob_backward(const TokenLogprobBackwardParams& p, int64_t begin, int64_t end);
int64_t token_logprob_numerators(const TokenLogprobNumeratorsParams& p, int64_t begin, int64_t end);
int64_t sample_logprob(const SampleLogprobParams& p, int64_t begin, int64_t end);
// Of B * Hk items: (sequence, key head) with the key head fastest, or with `rows`, where neighbours
// may read the same keys, the sequence. A bad row is a sequence.
int64_t decode_attention(const DecodeAttentionParams& p, int64_t begin, int64_t end);
// Of the tiles of out, kMatmulTileRows by kMatmulTileColumns; which they are is the kernel's
// affair.
int64_t matmul(const MatmulParams& p, int64_t begin, int64_t end);
inline constexpr int64_t kMatmulTileRows = 48, kMatmulTileColumns = kVocabularyTile;
// Of its panels of kMatmulTileColumns columns. Only where products of bf16 are made of pairs:
bool has_packed_products();
int64_t matmul_pack(const MatmulPackParams& p, int64_t begin, int64_t end);
// Its walks one after the other: of rows, of the tiles of out, of rows.
int64_t linear_numerators(const LinearNumeratorsParams& p, LinearWalk walk, int64_t begin,
                          int64_t end);
int64_t gelu_tanh(const GeluTanhParams& p, int64_t begin, int64_t end);        // of its elements
int64_t cache_append(const CacheAppendParams& p, int64_t begin, int64_t end);  // of B
int64_t sequence_logprob(const SequenceLogprobParams& p, int64_t begin, int64_t end);
int64_t fdiv_terms(const FdivTermsParams& p, int64_t begin, int64_t end);

// Whole-batch ops: their results tie samples together, and B is small.
int64_t log_partition(const LogPartitionParams& p);
int64_t fdiv_weights(const FdivWeightsParams& p);

}  // namespace fdpg::cpu

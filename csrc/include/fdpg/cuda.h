// cuda.h: the CUDA entry points, one per op. Each enqueues its kernels on `stream` and returns;
// none synchronises, allocates or waits for an answer of the device (what it is, the driver knows),
// so all of them can be captured in a graph. Results are deterministic: fixed reduction order, no
// floating-point atomics, and a row's result does not depend on the rows around it or on how it is
// aligned.
//
// Nothing on the device can raise. What the CPU reports as a bad row (cpu.h) is NaN in the outputs
// here: the caller looks at the outputs.
#pragma once

#include <cstddef>

#include "fdpg/params.h"

struct CUstream_st;

namespace fdpg::cuda {

using Stream = CUstream_st*;  // cudaStream_t, which this spells without CUDA's headers
using Status = int;           // cudaError_t, an enum that cannot be declared ahead; 0 is success

// The workspaces need no initialisation, and may be null where their size is 0. They must be
// aligned to 16 bytes.

std::size_t token_logprob_workspace(const TokenLogprobParams& p);
Status token_logprob(const TokenLogprobParams& p, void* workspace, Stream stream);

Status token_logprob_backward(const TokenLogprobBackwardParams& p, Stream stream);

std::size_t token_logprob_numerators_workspace(const TokenLogprobNumeratorsParams& p);
Status token_logprob_numerators(const TokenLogprobNumeratorsParams& p, void* workspace,
                                Stream stream);

std::size_t sample_logprob_workspace(const SampleLogprobParams& p);
Status sample_logprob(const SampleLogprobParams& p, void* workspace, Stream stream);

// A sequence whose position is out of range is left as it is.
Status cache_append(const CacheAppendParams& p, Stream stream);

Status decode_attention(const DecodeAttentionParams& p, Stream stream);

Status sequence_logprob(const SequenceLogprobParams& p, Stream stream);

Status log_partition(const LogPartitionParams& p, Stream stream);

std::size_t fdiv_weights_workspace(const FdivWeightsParams& p);
Status fdiv_weights(const FdivWeightsParams& p, void* workspace, Stream stream);

Status fdiv_terms(const FdivTermsParams& p, Stream stream);

}  // namespace fdpg::cuda

"""The fast operations: one module per op, each with its wrapper, fake kernel and gradient.

The kernels are C++ (``csrc/``), registered as ``torch.ops.fdpg.*`` when the compiled module loads;
:mod:`fdpg_fast.reference` has the same functions in plain PyTorch. Call the functions here, not
``torch.ops.fdpg.*``: it is the wrappers of ``token_logprob`` and ``sequence_logprob`` that record a
gradient, and those of ops without one (but ``sample_logprob``) that refuse it. What is checked
where: shapes, dtypes, devices and ids by the op itself, which raises ``RuntimeError`` naming the
op, the argument, what was expected and what came.

Numbers: per-token quantities are fp32 whatever the dtype of the logits (fp64 for fp64 logits),
per-sequence quantities fp64, everything logarithmic in nats.
"""

from fdpg_fast.ops.decode_attention import cache_append_, decode_attention
from fdpg_fast.ops.fdiv_terms import fdiv_terms
from fdpg_fast.ops.fdiv_weights import STATISTICS, Weights, fdiv_weights
from fdpg_fast.ops.gelu_tanh import gelu_tanh
from fdpg_fast.ops.linear_logprob import linear_logprob
from fdpg_fast.ops.log_partition import log_partition_, new_log_partition
from fdpg_fast.ops.policy_gradient import PolicyGradient, policy_gradient
from fdpg_fast.ops.sample_logprob import Sampled, random_key, sample_logprob
from fdpg_fast.ops.sequence_logprob import sequence_logprob
from fdpg_fast.ops.token_logprob import TokenLogprob, token_logprob

__all__ = [
    "STATISTICS",
    "PolicyGradient",
    "Sampled",
    "TokenLogprob",
    "Weights",
    "cache_append_",
    "decode_attention",
    "fdiv_terms",
    "fdiv_weights",
    "gelu_tanh",
    "linear_logprob",
    "log_partition_",
    "new_log_partition",
    "policy_gradient",
    "random_key",
    "sample_logprob",
    "sequence_logprob",
    "token_logprob",
]

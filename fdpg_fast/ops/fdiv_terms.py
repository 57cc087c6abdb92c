"""fdiv_terms: each sample's term in the estimate of an f-divergence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fdpg_fast import _build
from fdpg_fast.divergences import Divergence
from fdpg_fast.ops import custom_divergence
from fdpg_fast.ops.fdiv_weights import require_parsed
from fdpg_fast.ops.gradient import refuse_gradient
from fdpg_fast.ops.token_logprob import require_one_device

__all__ = ["fdiv_terms"]

_build.load()


def fdiv_terms(
    log_pi: Tensor,
    log_q: Tensor,
    log_score: Tensor,
    log_z: Tensor,
    prompt: Tensor,
    *,
    divergence: Divergence,
) -> Tensor:
    """Terms whose mean over samples x ~ q of a prompt estimates D_f(pi || p) for that prompt.

        (p/q) f~(t) on the support, (pi/q) f~'(inf) off it,   f~(t) = f(t) - f'(1) (t - 1)

    f~ has the same divergence as f; its terms are never negative and vary less. Not differentiable:
    the gradient of the divergence is what :func:`fdiv_weights` is for.

    Args:
        log_pi, log_q, log_score: ``[B]`` fp64, as for :func:`fdiv_weights`.
        log_z: ``[G]`` fp64.
        prompt: ``[B]`` int64, in [0, G).
        divergence: which f. A custom one is evaluated in PyTorch; without its ``f``, f~ is the
            integral of f', taken numerically.

    Returns:
        ``[B]`` fp64, nats for the KL family; NaN for a prompt with log Z = -inf.

    Raises:
        RuntimeError: a shape, dtype, device, prompt or parameter that the op cannot take, or a
            gradient is asked for.
        TypeError: ``divergence`` is none, but its name, say.
    """
    require_parsed("fdiv_terms", "divergence", Divergence, divergence)
    logs = {"log_pi": log_pi, "log_q": log_q, "log_score": log_score, "log_z": log_z}
    refuse_gradient("fdiv_terms", "Weigh log-probs by fdiv_weights, or .detach() it", **logs)
    if divergence.is_custom:
        return custom_divergence.terms(log_pi, log_q, log_score, log_z, prompt, divergence)
    result: Tensor = _OP(
        log_pi, log_q, log_score, log_z, prompt, divergence.id, divergence.param or 0.0
    )
    return result


_OP = torch.ops.fdpg.fdiv_terms.default


@torch.library.register_fake("fdpg::fdiv_terms")
def _fake(
    log_pi: Tensor, log_q: Tensor, log_score: Tensor, log_z: Tensor, prompt: Tensor, *others: Any
) -> Tensor:
    require_one_device(
        "fdiv_terms", log_pi=log_pi, log_q=log_q, log_score=log_score, log_z=log_z, prompt=prompt
    )
    return log_pi.new_empty(log_pi.shape[0])

"""fdiv_weights: what each sample weighs in the gradient of an f-divergence, and statistics."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdpg_fast import _build
from fdpg_fast.baselines import Baseline
from fdpg_fast.divergences import Divergence
from fdpg_fast.ops import custom_divergence
from fdpg_fast.ops.token_logprob import require_one_device

__all__ = ["STATISTICS", "Weights", "fdiv_weights", "require_parsed"]

STATISTICS: tuple[str, ...] = tuple(_build.load().statistics())
"""Names of the statistics of :func:`fdiv_weights`, in order; csrc/include/fdpg/statistics.h."""


class Weights(NamedTuple):
    """What :func:`fdiv_weights` returns.

    Attributes:
        weights: ``[B]`` fp64.
        statistics: ``[len(STATISTICS)]`` fp64, on the device: read it when you log.
    """

    weights: Tensor
    statistics: Tensor


def require_parsed(op: str, name: str, kind: type[Divergence | Baseline], value: object) -> None:
    """Raises TypeError if an argument is not of its kind."""
    if not isinstance(value, kind):
        raise TypeError(
            f"{op}: `{name}` must be a {kind.__name__}, got {value!r}. "
            f"{kind.__name__}.parse makes one of a name"
        )


def fdiv_weights(
    log_pi: Tensor,
    log_q: Tensor,
    log_score: Tensor,
    log_z: Tensor,
    prompt: Tensor,
    *,
    divergence: Divergence,
    baseline: Baseline,
    baseline_state: Tensor | None = None,
    ratio_clip: float = math.inf,
    reward_clip: float = math.inf,
) -> Weights:
    """Weights of the samples x_i ~ q in the policy gradient of D_f(pi || p).

        grad D_f(pi || p) = -(1/B) sum_i weight_i grad log pi(x_i)
        weight_i = ratio_i (r_i - b_i),   r = -f'(t),   t = pi / p,   p = P / Z,   ratio = pi / q

    f-DPG, arXiv 2302.08215, Theorem 1 (the pseudo-reward r) and Fact 1 (the baseline b). Nothing is
    differentiated here: the weights multiply a gradient, and are detached. Samples of a prompt with
    log Z = -inf get weight 0 and are counted. One call, nothing read back to the host.

    Args:
        log_pi: ``[B]`` fp64, log-probability of the sample under the policy.
        log_q: ``[B]`` fp64, under the proposal that drew it.
        log_score: ``[B]`` fp64, log P(x), unnormalised; -inf off the target's support.
        log_z: ``[G]`` fp64, log of the partition function of each prompt.
        prompt: ``[B]`` int64 in [0, G), non-decreasing: samples are grouped by prompt.
        divergence: which f. A :meth:`Divergence.custom` one is evaluated in PyTorch.
        baseline: which b.
        baseline_state: ``[2]`` fp64 for a baseline that keeps state (zeros at first), updated.
        ratio_clip: upper bound of pi/q.
        reward_clip: bound of abs(r).

    Returns:
        weights and statistics.

    Raises:
        RuntimeError: a shape, dtype, device, prompt, parameter or pairing that cannot be taken.
        TypeError: ``divergence`` or ``baseline`` is none, but its name, say.
    """
    require_parsed("fdiv_weights", "divergence", Divergence, divergence)
    require_parsed("fdiv_weights", "baseline", Baseline, baseline)
    log_pi, log_q, log_score, log_z = (t.detach() for t in (log_pi, log_q, log_score, log_z))
    if divergence.is_custom:
        baseline.require_valid_for(divergence)
        values = custom_divergence.weights_and_statistics(
            log_pi,
            log_q,
            log_score,
            log_z,
            prompt,
            divergence=divergence,
            baseline=baseline,
            baseline_state=baseline_state,
            ratio_clip=ratio_clip,
            reward_clip=reward_clip,
        )
        named = custom_divergence.order(values[1], STATISTICS)
        return Weights(values[0], named)
    return Weights(
        *_OP(
            log_pi,
            log_q,
            log_score,
            log_z,
            prompt,
            divergence.id,
            divergence.param or 0.0,
            baseline.id,
            baseline.param or 0.0,
            baseline_state,
            ratio_clip,
            reward_clip,
        )
    )


_OP = torch.ops.fdpg.fdiv_weights.default


@torch.library.register_fake("fdpg::fdiv_weights")
def _fake(
    log_pi: Tensor, log_q: Tensor, log_score: Tensor, log_z: Tensor, prompt: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    require_one_device(
        "fdiv_weights", log_pi=log_pi, log_q=log_q, log_score=log_score, log_z=log_z, prompt=prompt
    )
    return log_pi.new_empty(log_pi.shape[0]), log_pi.new_empty(len(STATISTICS))

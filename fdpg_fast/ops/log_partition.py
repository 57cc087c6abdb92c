"""log_partition_: the streaming estimate of the partition function Z of each prompt."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fdpg_fast import _build
from fdpg_fast.ops.token_logprob import require_one_device

__all__ = ["log_partition_", "new_log_partition"]

_build.load()


def new_log_partition(prompts: int, device: torch.device | str = "cpu") -> Tensor:
    """``[G, 3]`` fp64: the state of :func:`log_partition_` before the first sample."""
    empty = torch.tensor([-math.inf, -math.inf, 0.0], dtype=torch.float64, device=device)
    return empty.repeat(prompts, 1)


@torch.no_grad()
def log_partition_(state: Tensor, log_weight: Tensor, prompt: Tensor) -> None:
    """Adds samples x_i ~ q to the importance-sampling estimates of Z, in place and in log space.

        Z = E_q[w],   w = P(x) / q(x)           (f-DPG, arXiv 2302.08215, Algorithm 1)
        state[g] = (log sum w, log sum w^2, number of samples)

    From which log Z = state[:, 0] - log n, the effective sample size is
    exp(2 state[:, 0] - state[:, 1]), and the standard error of log Z follows. A statistic: nothing
    is differentiated.

    Args:
        state: ``[G, 3]`` fp64, updated.
        log_weight: ``[B]`` fp64, log P(x) - log q(x); -inf adds a zero and counts as a sample.
        prompt: ``[B]`` int64, in [0, G): the row of ``state`` that a sample belongs to.

    Raises:
        RuntimeError: a shape, dtype, device or prompt that the op cannot take.
    """
    _OP(state, log_weight, prompt)


_OP = torch.ops.fdpg.log_partition_.default


@torch.library.register_fake("fdpg::log_partition_")
def _fake(state: Tensor, log_weight: Tensor, prompt: Tensor) -> None:
    require_one_device("log_partition_", state=state, log_weight=log_weight, prompt=prompt)

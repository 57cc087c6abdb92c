"""What the tests of divergences share: the compiled list, with parameters, as test cases."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fdpg_fast import ops
from fdpg_fast.baselines import BASELINES, Baseline
from fdpg_fast.divergences import DIVERGENCES, Divergence

PROBES = (-1.0, 0.0, 1e-9, 0.01, 0.3, 0.5, 0.99, 1.0, 1.5, 2.0)
"""Parameters worth trying, where they are in range: where formulas change, and either side."""


def with_parameters(name: str) -> list[str]:
    """The texts of one listed divergence: its name, or one per parameter."""
    choice = DIVERGENCES[name]
    if choice.default is None:
        return [name]
    return [f"{name}({a})" for a in PROBES if choice.low < a < choice.high]


EVERY_DIVERGENCE = [text for name in DIVERGENCES for text in with_parameters(name)]
"""Each compiled divergence, at several parameters, as text."""

NONE = Baseline.parse("none")

EVERY_BASELINE = list(BASELINES)


def compiled_f_prime(divergence: Divergence, log_t: Tensor) -> Tensor:
    """f'(t) by the kernel: minus the weights of samples of q = pi, with log P = log pi - log t."""
    log_pi = torch.zeros_like(log_t)
    one_prompt = torch.zeros(len(log_t), dtype=torch.int64)
    log_z = torch.zeros(1, dtype=torch.float64)
    weights, _ = ops.fdiv_weights(
        log_pi, log_pi, -log_t, log_z, one_prompt, divergence=divergence, baseline=NONE
    )
    return -weights


def compiled_f(divergence: Divergence, log_t: Tensor) -> Tensor:
    """f(t) - f'(1) (t - 1) by the kernel: the terms of samples of q = p."""
    log_p = torch.zeros_like(log_t)
    one_prompt = torch.zeros(len(log_t), dtype=torch.int64)
    log_z = torch.zeros(1, dtype=torch.float64)
    return ops.fdiv_terms(log_t, log_p, log_p, log_z, one_prompt, divergence=divergence)


def batch(
    seed: int, sizes: list[int], *, on_policy: bool = False, zeros: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Random (log_pi, log_q, log_score, log_z, prompt) with ``sizes[g]`` samples of prompt g.

    Args:
        zeros: the share of samples with P(x) = 0.
    """
    generator = torch.Generator().manual_seed(seed)
    count = sum(sizes)
    noise = torch.randn(4, count, generator=generator, dtype=torch.float64)
    log_pi = -20 + 3 * noise[0]
    log_q = log_pi if on_policy else log_pi + 0.7 * noise[1]
    log_z = torch.randn(len(sizes), generator=generator, dtype=torch.float64)
    prompt = torch.repeat_interleave(
        torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.int64)
    )
    log_score = log_pi + log_z[prompt] + 1.5 * noise[2]
    drawn = torch.rand(count, generator=generator, dtype=torch.float64)
    log_score[drawn < zeros] = -math.inf
    return log_pi, log_q, log_score, log_z, prompt

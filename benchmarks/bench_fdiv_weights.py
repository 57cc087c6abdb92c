"""fdiv_weights, with log_partition_ and sequence_logprob: all of a step that is per sequence.

Jensen-Shannon, leave-one-out baseline, 16 samples of up to 40 tokens a prompt, one in three in the
target's support. From the tokens' log-probs to the weights: sums of sequences, log Z of each
prompt, weights, and the statistics of the batch; against the same in vectorised PyTorch, with and
without the statistics.

Bytes, by hand, with L tokens in B sequences: 4 L of log-probs; and per sequence, 8 each: a length
read, a sum written; log P and log q read, their difference written, read again with the prompt;
log pi, log q, log P and the prompt read, a weight written: 4 L + 96 B. FLOPs: some ten exponentials
and logarithms per sequence. It waits for neither, but for the calls themselves.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import peers
import pytest
import torch
from conftest import Contest
from shapes import NEEDS_CUDA
from torch import Tensor
from torch.nn.functional import softplus

from fdpg_fast import ops, reference
from fdpg_fast.baselines import Baseline
from fdpg_fast.divergences import Divergence

JS, LOO = Divergence.parse("js"), Baseline.parse("loo")
TOKENS, SAMPLES_PER_PROMPT = 40, 16
LOG_2 = math.log(2)


class Batch(NamedTuple):
    """Of samples x_i ~ q: ``values`` [B, T] log pi of tokens in fp32; the rest [B]."""

    values: Tensor
    lengths: Tensor
    log_q: Tensor
    log_score: Tensor
    prompt: Tensor


def batch(sequences: int) -> Batch:
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(sequences, generator=generator, dtype=torch.float64)

    values = -5 * torch.rand(sequences, TOKENS, generator=generator)
    lengths = torch.randint(1, TOKENS + 1, (sequences,), generator=generator)
    log_pi = reference.sequence_logprob(values, lengths)
    in_support = torch.rand(sequences, generator=generator) < 1 / 3
    return Batch(
        values,
        lengths,
        log_pi + 0.1 * normal(),
        torch.where(in_support, log_pi + normal(), -math.inf),
        torch.arange(sequences) // SAMPLES_PER_PROMPT,
    )


def fused(x: Batch, state: Tensor) -> tuple[Tensor, Tensor]:
    log_pi = ops.sequence_logprob(x.values, x.lengths)
    ops.log_partition_(state, x.log_score - x.log_q, x.prompt)
    log_z = state[:, 0] - state[:, 2].log()
    return ops.fdiv_weights(
        log_pi, x.log_q, x.log_score, log_z, x.prompt, divergence=JS, baseline=LOO
    )


# --------------------------------------------------------------------------------------------------
# The same in plain PyTorch


def sum_tokens(values: Tensor, lengths: Tensor) -> Tensor:
    inside = torch.arange(values.shape[1], device=values.device) < lengths[:, None]
    return torch.where(inside, values, 0.0).sum(1, dtype=torch.float64)


def add_to_partition(state: Tensor, log_weight: Tensor, prompt: Tensor) -> Tensor:
    """State after the samples, by way of the largest weight of each prompt."""
    highest = state[:, 0].scatter_reduce(0, prompt, log_weight, "amax")
    highest = torch.where(highest == -math.inf, 0.0, highest)  # -inf - -inf
    weight = (log_weight - highest[prompt]).exp()
    total = (state[:, 0] - highest).exp().index_add(0, prompt, weight)
    squares = (state[:, 1] - 2 * highest).exp().index_add(0, prompt, weight * weight)
    count = state[:, 2].index_add(0, prompt, torch.ones_like(weight))
    return torch.stack([total.log() + highest, squares.log() + 2 * highest, count], dim=1)


class Terms(NamedTuple):
    """What the statistics are made of, [B] each."""

    used: Tensor
    log_t: Tensor
    ratio: Tensor
    reward: Tensor
    baseline: Tensor
    target_ratio: Tensor
    weights: Tensor


def js_loo(x: Batch, log_pi: Tensor, log_z: Tensor) -> Terms:
    """-f'(t) = -log(2 t / (t + 1)) = softplus(-log t) - log 2; mean of the others by difference."""
    log_p = x.log_score - log_z[x.prompt]
    used = (log_z > -math.inf)[x.prompt] & (log_pi > -math.inf)
    log_t = torch.where(used, log_pi - log_p, 0.0)
    ratio = torch.where(used, (log_pi - x.log_q).exp(), 0.0)
    reward = softplus(-log_t, threshold=40.0) - LOG_2  # torch's 20 is for fp32
    gain = ratio * reward
    nothing = torch.zeros_like(log_z)
    others = nothing.index_add(0, x.prompt, ratio)[x.prompt] - ratio
    others_gain = nothing.index_add(0, x.prompt, gain)[x.prompt] - gain
    baseline = torch.where(used & (others > 0), others_gain / others, 0.0)
    target_ratio = torch.where(used, (log_p - x.log_q).exp(), 0.0)
    return Terms(used, log_t, ratio, reward, baseline, target_ratio, ratio * (reward - baseline))


def statistics(x: Batch, terms: Terms) -> Tensor:
    """As ops.STATISTICS names them; without clips, whose counts are 0."""
    used, log_t, ratio, reward, baseline, target_ratio, weights = terms
    n = used.sum().double()
    zero = torch.zeros_like(n)

    def mean(values: Tensor) -> Tensor:
        return torch.where(used, values, 0.0).sum() / n.clamp(min=1)

    def deviation(values: Tensor) -> Tensor:
        squares = torch.where(used, (values - mean(values)).square(), 0.0).sum()
        return (squares / (n - 1).clamp(min=1)).sqrt()

    def effective_size(values: Tensor) -> Tensor:
        squares = values.square().sum()
        return torch.where(squares > 0, values.sum().square() / squares, 0.0)

    # (p / q) f(t) with f(t) = t log(2 t / (t + 1)) + log(2 / (t + 1)), and (pi / q) log 2 off it.
    at_zero = torch.where(target_ratio > 0, LOG_2 - softplus(log_t, threshold=40.0), 0.0)
    divergence = target_ratio * at_zero - ratio * reward
    named = {
        "n_used": n,
        "n_skipped": len(used) - n,
        "n_off_support": (used & (x.log_score == -math.inf)).sum().double(),
        "reward_mean": mean(reward),
        "reward_std": deviation(reward),
        "baseline_mean": mean(baseline),
        "advantage_std": deviation(reward - baseline),
        "weight_abs_max": weights.abs().max(),
        "ratio_mean": mean(ratio),
        "ratio_max": ratio.max(),
        "ratio_ess": effective_size(ratio),
        "n_ratio_clipped": zero,
        "n_reward_clipped": zero,
        "target_ess": effective_size(target_ratio),
        "divergence": mean(divergence),
        "divergence_se": deviation(divergence) / n.clamp(min=1).sqrt(),
    }
    return torch.stack([named[name] for name in ops.STATISTICS])


def plain_weights(x: Batch, state: Tensor) -> tuple[Tensor, Tensor, Terms]:
    log_pi = sum_tokens(x.values, x.lengths)
    state = add_to_partition(state, x.log_score - x.log_q, x.prompt)
    terms = js_loo(x, log_pi, state[:, 0] - state[:, 2].log())
    return terms.weights, state, terms


def plain(x: Batch, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weights, state, terms = plain_weights(x, state)
    return weights, state, statistics(x, terms)


# --------------------------------------------------------------------------------------------------


def assert_right(x: Batch, got: tuple[Tensor, Tensor], state: Tensor) -> None:
    """Against the reference on the first prompts: it is quadratic, and they do not see the rest."""
    few = Batch(*(t[: 16 * SAMPLES_PER_PROMPT].cpu() for t in x))
    log_pi = reference.sequence_logprob(few.values, few.lengths)
    expected_state = reference.new_log_partition(16)
    reference.log_partition_(expected_state, few.log_score - few.log_q, few.prompt)
    log_z = expected_state[:, 0] - expected_state[:, 2].log()
    expected, _ = reference.fdiv_weights(
        log_pi, few.log_q, few.log_score, log_z, few.prompt, divergence=JS, baseline=LOO
    )
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(state[:16].cpu(), expected_state, **close)
    torch.testing.assert_close(got[0][: len(expected)].cpu(), expected, **close)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
@pytest.mark.parametrize("sequences", [256, 4096])
def test_weights(contest: Contest, sequences: int, device: str) -> None:
    x = Batch(*(t.to(device) for t in batch(sequences)))
    new = ops.new_log_partition(sequences // SAMPLES_PER_PROMPT, device)
    state = new.clone()

    got = fused(x, state)
    assert_right(x, got, state)
    for one, other in zip((got[0], state, got[1]), plain(x, new), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)

    compiled = peers.compiled(plain)
    contest.run(
        lambda: fused(x, state),  # adds the same samples again: as much work, and the same log Z
        {
            "PyTorch": lambda: plain(x, new),
            "PyTorch, without statistics": lambda: plain_weights(x, new),
            "torch.compile": lambda: compiled(x, new),
        },
        bytes_moved=4 * int(x.lengths.sum()) + 96 * sequences,
        calls=20,
        graph=device == "cuda",
        memory_bars={},
        shape=f"{sequences} sequences of {TOKENS} tokens, {SAMPLES_PER_PROMPT} a prompt",
        dtype="fp64",
        device=device,
    )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
@pytest.mark.parametrize("sequences", [256, 4096])
def test_partition_and_weights(contest: Contest, sequences: int, device: str) -> None:
    """Without the sums of tokens; asked for are 20 us of a GPU, for 4096 sequences."""
    x = Batch(*(t.to(device) for t in batch(sequences)))
    state = ops.new_log_partition(sequences // SAMPLES_PER_PROMPT, device)
    log_pi = ops.sequence_logprob(x.values, x.lengths)
    log_weight = x.log_score - x.log_q
    assert_right(x, fused(x, state), state)
    log_z = state[:, 0] - state[:, 2].log()

    def partition() -> None:
        ops.log_partition_(state, log_weight, x.prompt)

    def weights() -> None:
        ops.fdiv_weights(log_pi, x.log_q, x.log_score, log_z, x.prompt, divergence=JS, baseline=LOO)

    def both() -> None:
        partition()
        weights()

    contest.run(
        both,
        {
            "log_partition_ of them": partition,
            "fdiv_weights of them": weights,
            "sequence_logprob beside them": lambda: ops.sequence_logprob(x.values, x.lengths),
        },
        bytes_moved=96 * sequences,
        calls=20,
        graph=device == "cuda",
        shape=f"{sequences} sequences, {SAMPLES_PER_PROMPT} a prompt",
        dtype="fp64",
        device=device,
        microseconds_bar=20 if device == "cuda" and sequences == 4096 else None,
    )

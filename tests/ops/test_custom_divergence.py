"""A user's own divergence in PyTorch gives what the compiled kernel gives for the same formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fdpg_fast import ops
from fdpg_fast.baselines import BASELINES, Baseline
from fdpg_fast.divergences import Divergence

F64 = torch.float64

# As a user would write them: f' of log_t, and f'(inf).
WRITTEN = {
    "kl": (lambda d: -torch.exp(-d), 0.0),
    "tv": (lambda d: 0.5 * torch.sign(d), 0.5),
    "js": (lambda d: math.log(2) - torch.nn.functional.softplus(-d), math.log(2)),
    "hellinger": (lambda d: -torch.expm1(-d / 2), 1.0),
    "reverse_kl": (lambda d: d + 1, math.inf),
}


def pair(name: str) -> tuple[Divergence, Divergence]:
    f_prime, limit = WRITTEN[name]
    own = Divergence.custom(f_prime, name=f"my {name}", f_prime_inf=limit)
    return Divergence.parse(name), own


def batch(divergence: Divergence, spread: float) -> tuple[Tensor, ...]:
    """Samples of four prompts: one without Z, one sample alone; some off the support if allowed."""
    torch.manual_seed(0)
    prompt = torch.tensor([0] * 7 + [1] + [2] * 4 + [3] * 8)
    log_pi, log_q, log_score = (spread * torch.randn(20, dtype=F64) - 9 for _ in range(3))
    if divergence.allows_zero_targets:
        log_score[[1, 5, 14]] = -math.inf
    log_pi[3] = -math.inf
    return log_pi, log_q, log_score, torch.tensor([0.3, -1.0, -math.inf, 0.0], dtype=F64), prompt


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("baseline", [b for b in BASELINES if b != "analytic"])
@pytest.mark.parametrize("clip", [math.inf, 0.7])
def test_weights_and_statistics(name: str, baseline: str, clip: float) -> None:
    built_in, own = pair(name)
    b = Baseline.parse(baseline)
    states = [b.new_state(), b.new_state()]
    for _ in range(3):  # the moving average moves
        got, expected = (
            ops.fdiv_weights(
                *batch(built_in, 1.0),
                divergence=d,
                baseline=b,
                baseline_state=state,
                ratio_clip=clip,
                reward_clip=clip,
            )
            for d, state in zip((own, built_in), states, strict=True)
        )
        torch.testing.assert_close(got.weights, expected.weights)
        for i, statistic in enumerate(ops.STATISTICS):
            torch.testing.assert_close(
                got.statistics[i],
                expected.statistics[i],
                rtol=1e-6,
                atol=1e-9,
                msg=lambda m, s=statistic: f"{s}: {m}",
            )
        if b.keeps_state:
            torch.testing.assert_close(*states)


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("spread", [0.1, 1.0, 20.0])
def test_terms_are_the_integral_of_the_slope(name: str, spread: float) -> None:
    built_in, own = pair(name)
    x = batch(built_in, spread)
    expected = ops.fdiv_terms(*x, divergence=built_in)
    got = ops.fdiv_terms(*x, divergence=own)
    finite = expected.isfinite()
    assert torch.equal(got.isnan(), expected.isnan())
    torch.testing.assert_close(got[finite], expected[finite], rtol=1e-8, atol=1e-12)


def test_terms_use_f_where_it_is_given() -> None:
    own = Divergence.custom(
        lambda d: 0.5 * torch.sign(d),
        name="my tv with f",
        f_prime_inf=0.5,
        f=lambda d: 0.5 * torch.expm1(d).abs(),
    )
    x = batch(own, 1.0)
    expected = ops.fdiv_terms(*x, divergence=Divergence.parse("tv"))
    torch.testing.assert_close(ops.fdiv_terms(*x, divergence=own), expected, equal_nan=True)


def test_analytic_baseline_is_refused() -> None:
    _, own = pair("kl")
    with pytest.raises(ValueError, match="analytic"):
        ops.fdiv_weights(*batch(own, 1.0), divergence=own, baseline=Baseline.parse("analytic"))


def test_empty_batch() -> None:
    _, own = pair("js")
    nothing = torch.zeros(0, dtype=F64)
    result = ops.fdiv_weights(
        *(nothing, nothing, nothing, nothing),
        torch.zeros(0, dtype=torch.int64),
        divergence=own,
        baseline=Baseline.parse("loo"),
    )
    assert result.weights.shape == (0,)
    assert torch.equal(result.statistics, torch.zeros(len(ops.STATISTICS), dtype=F64))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
@pytest.mark.parametrize("which", ["built-in", "own"])
def test_compiles_whole(which: str) -> None:
    divergence = pair("js")[which == "own"]

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        weights = ops.fdiv_weights(*inputs, divergence=divergence, baseline=Baseline.parse("loo"))
        return *weights, ops.fdiv_terms(*inputs, divergence=divergence)

    inputs = batch(divergence, 1.0)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), call(*inputs), equal_nan=True)

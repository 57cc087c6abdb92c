"""fdiv_weights against the reference, for every divergence and baseline, and its edges."""

from __future__ import annotations

import math

import pytest
import torch
from divergence_cases import EVERY_BASELINE, EVERY_DIVERGENCE, batch
from torch import Tensor

from fdpg_fast import ops, reference
from fdpg_fast.baselines import Baseline
from fdpg_fast.divergences import DIVERGENCES, Divergence

OP = torch.ops.fdpg.fdiv_weights.default
JS, LOO = Divergence.parse("js"), Baseline.parse("loo")
RAGGED = [3, 1, 0, 7, 2, 111]


def pairs() -> list[tuple[str, str]]:
    """Every divergence with every baseline that may stand with it."""
    return [
        (divergence, baseline)
        for divergence in EVERY_DIVERGENCE
        for baseline in EVERY_BASELINE
        if baseline != "analytic" or divergence == "kl"
    ]


def check(inputs: tuple[Tensor, ...], divergence: str, baseline: str, **clips: float) -> None:
    """One call of the op and of the reference, with a state that has seen something."""
    keeps_state = Baseline.parse(baseline).keeps_state
    seen = torch.tensor([0.3, 0.9], dtype=torch.float64) if keeps_state else None
    got_state, expected_state = (None if seen is None else seen.clone() for _ in range(2))
    f, b = Divergence.parse(divergence), Baseline.parse(baseline)
    got = ops.fdiv_weights(*inputs, divergence=f, baseline=b, baseline_state=got_state, **clips)
    weights, statistics = reference.fdiv_weights(
        *inputs, divergence=f, baseline=b, baseline_state=expected_state, **clips
    )
    # The plain formula of alpha(1e-9) has lost half of its digits.
    rtol = 1e-6 if f.param == 1e-9 else 1e-10
    torch.testing.assert_close(got.weights, weights, rtol=rtol, atol=rtol)
    for name, value in zip(ops.STATISTICS, got.statistics.tolist(), strict=True):
        assert value == pytest.approx(statistics[name], rel=rtol, abs=rtol, nan_ok=True), name
    if got_state is not None:
        assert expected_state is not None
        torch.testing.assert_close(got_state, expected_state, rtol=rtol, atol=rtol)


@pytest.mark.parametrize(("divergence", "baseline"), pairs())
def test_agrees_with_reference(divergence: str, baseline: str) -> None:
    finite = Divergence.parse(divergence).allows_zero_targets
    log_pi, log_q, log_score, log_z, prompt = batch(1, RAGGED, zeros=0.2 if finite else 0.0)
    log_z[3] = -math.inf  # a prompt whose Z is still zero
    log_pi[0] = -math.inf
    check((log_pi, log_q, log_score, log_z, prompt), divergence, baseline)


@pytest.mark.parametrize("baseline", [b for b in EVERY_BASELINE if b != "analytic"])
def test_clips_agree_with_reference(baseline: str) -> None:
    inputs = batch(2, RAGGED, zeros=0.1)
    check(inputs, "hellinger", baseline, ratio_clip=1.2, reward_clip=0.8)
    # A clipped reward makes even an infinite one usable.
    check(inputs, "reverse_kl", baseline, ratio_clip=1.2, reward_clip=0.8)


@pytest.mark.parametrize("baseline", ["none", "mean", "loo"])
def test_sizes(baseline: str) -> None:
    for sizes in ([], [0, 0], [1], [2], [1, 1, 1], [64] * 3):
        check(batch(3, sizes), "js", baseline)
        check(batch(3, sizes, on_policy=True), "js", baseline)


def test_on_policy_ratio_is_one_to_the_bit() -> None:
    inputs = batch(4, [50, 50], on_policy=True)
    _, statistics = ops.fdiv_weights(*inputs, divergence=JS, baseline=LOO)
    named = dict(zip(ops.STATISTICS, statistics.tolist(), strict=True))
    assert (named["ratio_mean"], named["ratio_max"], named["ratio_ess"]) == (1.0, 1.0, 100.0)


def test_prompts_of_a_loo_batch_do_not_see_each_other() -> None:
    log_pi, log_q, log_score, log_z, prompt = batch(5, [4, 1, 9, 3])
    whole = ops.fdiv_weights(
        log_pi, log_q, log_score, log_z, prompt, divergence=JS, baseline=LOO
    ).weights
    for g in range(4):
        mine = prompt == g
        alone = ops.fdiv_weights(
            log_pi[mine],
            log_q[mine],
            log_score[mine],
            log_z[g : g + 1],
            torch.zeros(int(mine.sum()), dtype=torch.int64),
            divergence=JS,
            baseline=LOO,
        ).weights
        assert torch.equal(whole[mine], alone)


@pytest.mark.parametrize("baseline", EVERY_BASELINE)
def test_two_runs_agree_bit_for_bit(baseline: str) -> None:
    inputs = batch(6, RAGGED, zeros=0.2)
    b = Baseline.parse(baseline)
    runs = [
        ops.fdiv_weights(
            *inputs, divergence=Divergence.parse("kl"), baseline=b, baseline_state=b.new_state()
        )
        for _ in range(2)
    ]
    assert torch.equal(runs[0].weights, runs[1].weights)
    assert torch.equal(runs[0].statistics, runs[1].statistics)


def test_inputs_are_left_alone() -> None:
    inputs = batch(7, RAGGED)
    before = [x.clone() for x in inputs]
    ops.fdiv_weights(*inputs, divergence=JS, baseline=LOO)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def test_nan_shows() -> None:
    """A bad number must reach the caller, not be weighed as if it were fine."""
    for name in DIVERGENCES:
        inputs = batch(8, [4])
        for i in range(3):
            broken = [x.clone() for x in inputs]
            broken[i][2] = math.nan
            weights, statistics = ops.fdiv_weights(
                *broken, divergence=Divergence.parse(name), baseline=Baseline.parse("none")
            )
            assert weights[2].isnan(), (name, i)
            assert weights[[0, 1, 3]].isfinite().all(), (name, i)
            assert statistics[ops.STATISTICS.index("weight_abs_max")].isnan(), (name, i)


def test_infinite_reward_off_the_support_shows() -> None:
    log_pi, log_q, _, log_z, prompt = batch(9, [3])
    off = torch.full((3,), -math.inf, dtype=torch.float64)
    weights, _ = ops.fdiv_weights(
        log_pi,
        log_q,
        off,
        log_z,
        prompt,
        divergence=Divergence.parse("reverse_kl"),
        baseline=Baseline.parse("none"),
    )
    assert (weights == -math.inf).all()


@pytest.mark.parametrize("baseline", [b for b in EVERY_BASELINE if b != "analytic"])
@pytest.mark.parametrize("name", ["reverse_kl", "tv", "js", "chi2"])
def test_custom_agrees_with_kernel(name: str, baseline: str) -> None:
    """A user's f', in PyTorch, against the same divergence in the kernel."""
    listed, b = Divergence.parse(name), Baseline.parse(baseline)
    mine = Divergence.custom(
        lambda log_t: reference.f_prime(listed, log_t),
        name=f"my {name}",
        f_prime_inf=listed.f_prime_inf,
    )
    log_pi, log_q, log_score, log_z, prompt = batch(
        10, [3, 1, 20], zeros=0.2 if listed.allows_zero_targets else 0.0
    )
    log_z[1] = -math.inf
    states = [b.new_state(), b.new_state()]
    for _ in range(2):
        expected, got = (
            ops.fdiv_weights(
                log_pi,
                log_q,
                log_score,
                log_z,
                prompt,
                divergence=divergence,
                baseline=b,
                baseline_state=state,
                ratio_clip=1.5,
                reward_clip=20.0,
            )
            for divergence, state in zip((listed, mine), states, strict=True)
        )
        torch.testing.assert_close(got.weights, expected.weights, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(got.statistics, expected.statistics, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("baseline", EVERY_BASELINE)
def test_opcheck(baseline: str) -> None:
    inputs = batch(11, [3, 2])
    kl, b = Divergence.parse("kl"), Baseline.parse(baseline)
    arguments = (kl.id, 0.0, b.id, b.param or 0.0, b.new_state(), math.inf, 10.0)
    torch.library.opcheck(OP, (*inputs, *arguments))


def test_messages() -> None:
    log_pi, log_q, log_score, log_z, prompt = batch(12, [2, 2])

    def message(**changed: object) -> str:
        inputs = {
            "log_pi": log_pi,
            "log_q": log_q,
            "log_score": log_score,
            "log_z": log_z,
            "prompt": prompt,
            "divergence": JS,
            "baseline": LOO,
        } | changed
        with pytest.raises((RuntimeError, ValueError)) as error:
            ops.fdiv_weights(**inputs)  # type: ignore[arg-type]
        return str(error.value).splitlines()[0]

    assert "`prompt` must be in [0, 2), got 2 at sample 3" in message(
        prompt=torch.tensor([0, 0, 1, 2])
    )
    assert "`prompt` must not decrease" in message(prompt=torch.tensor([0, 1, 0, 1]))
    assert "`prompt`" in message(prompt=prompt[:3])
    assert "`log_q`" in message(log_q=log_q.float())
    assert "`log_score`" in message(log_score=log_score[:2])
    assert "`log_z`" in message(log_z=log_z[:, None])
    assert "`baseline_state` must be given" in message(baseline=Baseline.parse("ema"))
    assert "analytic" in message(baseline=Baseline.parse("analytic"))
    assert "`ratio_clip`" in message(ratio_clip=-1.0)
    assert "`reward_clip`" in message(reward_clip=math.nan)

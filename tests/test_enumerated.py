"""The algorithm on a language small enough to write out: exact expectations, no tolerance for bias.

Three tokens, one of which ends a sequence, at most three of them: 15 sequences x, for each of two
prompts c, under a softmax table per prefix. Every expectation below is a sum over all sequences, or
over all batches of two or three of them, weighed by what `ops.fdiv_weights` makes of them.

Shape legend: C prompts, X sequences, N prefixes, V tokens, K samples per prompt.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from divergence_cases import EVERY_BASELINE, EVERY_DIVERGENCE
from torch import Tensor

from fdpg_fast import ops, reference
from fdpg_fast.baselines import Baseline
from fdpg_fast.divergences import DIVERGENCES, Divergence

# Tables of 42 numbers: a second thread costs ten times what it brings.
pytestmark = pytest.mark.usefixtures("one_thread")

V, END, LONGEST, C = 3, 0, 3, 2


Weigher = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(log_pi, log_q, log_score, log_z, prompt) -> weights"""


def all_sequences() -> list[tuple[int, ...]]:
    """They end at the first END, included, or are cut at LONGEST."""
    return [
        x
        for n in range(1, LONGEST + 1)
        for x in itertools.product(range(V), repeat=n)
        if END not in x[:-1] and (x[-1] == END or n == LONGEST)
    ]


SEQUENCES = all_sequences()
PREFIXES = sorted({x[:n] for x in SEQUENCES for n in range(len(x))})
X = len(SEQUENCES)

STEPS = torch.zeros(X, len(PREFIXES), V, dtype=torch.float64)
"""(X, N, V): 1 where a sequence takes that token after that prefix."""
for row, x in enumerate(SEQUENCES):
    for n, token in enumerate(x):
        STEPS[row, PREFIXES.index(x[:n]), token] = 1


def log_prob(logits: Tensor) -> Tensor:
    """(C, N, V) -> (C, X): log-probabilities of all sequences."""
    return torch.einsum("cnv,xnv->cx", logits.log_softmax(-1), STEPS)


def random_logits(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.8 * torch.randn(C, len(PREFIXES), V, generator=generator, dtype=torch.float64)


def random_target(divergence: Divergence) -> tuple[Tensor, Tensor]:
    """log P (C, X) unnormalised, zero for a third of all x where f allows it; and log Z (C,)."""
    log_score = log_prob(random_logits(3)) + torch.tensor([[1.3], [-2.0]], dtype=torch.float64)
    if divergence.allows_zero_targets:
        log_score[:, ::3] = -math.inf
    return log_score, log_score.logsumexp(-1)


def test_the_language_is_complete() -> None:
    assert X == 15
    assert len(PREFIXES) == 7
    torch.testing.assert_close(log_prob(random_logits(0)).exp().sum(-1), torch.ones(C).double())


# --------------------------------------------------------------------------------------------------
# Two ways to the gradient of mean_c D_f(pi(.|c) || p(.|c)).


def exact_gradient(divergence: Divergence, logits: Tensor, log_score: Tensor) -> Tensor:
    """By the definition of D_f, and autograd."""
    logits = logits.clone().requires_grad_()
    pi, p = log_prob(logits).exp(), log_score.softmax(-1)
    formula, a = reference.FORMULAS[divergence.name], divergence.param
    on = p > 0
    d = (p[on] * formula.f(torch, pi[on] / p[on], a)).sum()
    if not on.all():
        d = d + formula.f_prime_inf(a) * pi[~on].sum()
    (gradient,) = torch.autograd.grad(d / C, logits)
    return gradient


def gradient_of(coefficient: Tensor, logits: Tensor) -> Tensor:
    """-sum_cx coefficient[c, x] grad log pi(x | c)."""
    logits = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(-(coefficient * log_prob(logits)).sum(), logits)
    return gradient


def expected_over_groups(
    weigher: Weigher, log_pi: Tensor, log_q: Tensor, log_score: Tensor, log_z: Tensor, k: int
) -> Tensor:
    """(C, X): E[(1/B) sum_i weight_i 1[x_i = x]] over all groups of K independent samples of q.

    One call: each of the X^K groups is a prompt of its own. That is all of the expectation for a
    baseline that looks no further than the prompt.
    """
    groups = torch.cartesian_prod(*[torch.arange(X)] * k).reshape(-1, k)  # (X^K, K)
    x = groups.flatten()
    prompt = torch.arange(len(groups)).repeat_interleave(k)
    expected = torch.zeros(C, X, dtype=torch.float64)
    for c in range(C):
        weights = weigher(
            log_pi[c, x], log_q[c, x], log_score[c, x], log_z[c].expand(len(groups)), prompt
        )
        probability = log_q[c, groups].sum(-1).exp().repeat_interleave(k)
        expected[c].index_add_(0, x, probability * weights / (k * C))
    return expected


def expected_over_batches(
    weigher: Weigher, log_pi: Tensor, log_q: Tensor, log_score: Tensor, log_z: Tensor
) -> Tensor:
    """(C, X): the same over all batches of one sample of each prompt, a call for each batch."""
    expected = torch.zeros(C, X, dtype=torch.float64)
    c = torch.arange(C)
    for batch in itertools.product(range(X), repeat=C):
        x = torch.tensor(batch)
        weights = weigher(log_pi[c, x], log_q[c, x], log_score[c, x], log_z, c)
        expected[c, x] += log_q[c, x].sum().exp() * weights / C
    return expected


def with_op(divergence: Divergence, baseline: Baseline) -> Weigher:
    """The op; a moving average has seen earlier batches and no other."""

    def weigher(*inputs: Tensor) -> Tensor:
        state = torch.tensor([0.7, 0.9], dtype=torch.float64) if baseline.keeps_state else None
        return ops.fdiv_weights(
            *inputs, divergence=divergence, baseline=baseline, baseline_state=state
        ).weights

    return weigher


def valid_pairs(texts: list[str]) -> list[tuple[str, str]]:
    return [
        (text, baseline)
        for text in texts
        for baseline in EVERY_BASELINE
        if baseline != "analytic" or text == "kl"
    ]


@pytest.mark.parametrize("policy", ["on", "off"])
@pytest.mark.parametrize(("text", "baseline"), valid_pairs(EVERY_DIVERGENCE))
def test_expected_gradient_is_the_gradient(text: str, baseline: str, policy: str) -> None:
    divergence, b = Divergence.parse(text), Baseline.parse(baseline)
    logits = random_logits(1)
    log_pi = log_prob(logits)
    log_q = log_pi if policy == "on" else log_prob(random_logits(2))
    target = random_target(divergence)
    weigher = with_op(divergence, b)
    if baseline == "mean":  # looks across prompts
        expected = expected_over_batches(weigher, log_pi, log_q, *target)
    else:
        expected = expected_over_groups(weigher, log_pi, log_q, *target, k=2)
    exact = exact_gradient(divergence, logits, target[0])
    assert exact.abs().max() > 1e-2 or divergence.param in (1e-9, 0.01, 0.99)
    tolerance = 1e-7 if divergence.param == 1e-9 else 1e-12  # of the plain formula
    torch.testing.assert_close(gradient_of(expected, logits), exact, rtol=tolerance, atol=tolerance)


def test_three_samples_per_prompt() -> None:
    """With two, leaving one out leaves one, and a mean over several others is not tried."""
    divergence, logits = Divergence.parse("js"), random_logits(1)
    target = random_target(divergence)
    loo = with_op(divergence, Baseline.parse("loo"))
    expected = expected_over_groups(loo, log_prob(logits), log_prob(random_logits(2)), *target, k=3)
    exact = exact_gradient(divergence, logits, target[0])
    torch.testing.assert_close(gradient_of(expected, logits), exact, rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------------------------------
# The same test refuses baselines that are known to be wrong.


def mean_with_self(log_pi: Tensor, log_q: Tensor, *rest: Tensor) -> Tensor:
    """The plain mean of the prompt's rewards, the sample's own among them."""
    weights = with_op(Divergence.parse("js"), Baseline.parse("none"))(log_pi, log_q, *rest)
    prompt = rest[-1]
    total = torch.zeros(int(prompt.max()) + 1, dtype=torch.float64).index_add_(0, prompt, weights)
    mean = total / prompt.bincount()
    return weights - (log_pi - log_q).exp() * mean[prompt]


def average_without_ratio(log_pi: Tensor, log_q: Tensor, *rest: Tensor) -> Tensor:
    """ratio r - b rather than ratio (r - b): right on policy, wrong off it."""
    weights = with_op(Divergence.parse("js"), Baseline.parse("none"))(log_pi, log_q, *rest)
    return weights - 0.3


def without_ratio(log_pi: Tensor, log_q: Tensor, *rest: Tensor) -> Tensor:
    """Samples of q, weighed as if they were the policy's."""
    return with_op(Divergence.parse("js"), Baseline.parse("none"))(log_pi, log_pi, *rest)


@pytest.mark.parametrize(
    ("cheat", "policy", "unbiased"),
    [
        (mean_with_self, "on", False),
        (mean_with_self, "off", False),
        (average_without_ratio, "on", True),
        (average_without_ratio, "off", False),
        (without_ratio, "off", False),
    ],
)
def test_a_wrong_baseline_is_seen(cheat: Weigher, policy: str, unbiased: bool) -> None:
    divergence = Divergence.parse("js")
    logits = random_logits(1)
    log_pi = log_prob(logits)
    log_q = log_pi if policy == "on" else log_prob(random_logits(2))
    target = random_target(divergence)
    expected = gradient_of(expected_over_groups(cheat, log_pi, log_q, *target, k=2), logits)
    exact = exact_gradient(divergence, logits, target[0])
    error = (expected - exact).abs().max() / exact.abs().max()
    assert error < 1e-12 if unbiased else error > 0.05


def test_truncating_the_ratio_is_a_bias_one_asks_for() -> None:
    divergence, logits = Divergence.parse("js"), random_logits(1)
    target = random_target(divergence)

    def weigher(*inputs: Tensor) -> Tensor:
        loo = Baseline.parse("loo")
        return ops.fdiv_weights(
            *inputs, divergence=divergence, baseline=loo, ratio_clip=1.0
        ).weights

    expected = expected_over_groups(
        weigher, log_prob(logits), log_prob(random_logits(2)), *target, k=2
    )
    exact = exact_gradient(divergence, logits, target[0])
    assert (gradient_of(expected, logits) - exact).abs().max() > 0.01 * exact.abs().max()


# --------------------------------------------------------------------------------------------------
# By drawing samples, as training does: agreement within the standard error.


@pytest.mark.parametrize("policy", ["on", "off"])
@pytest.mark.parametrize(("text", "baseline"), valid_pairs(list(DIVERGENCES)))
def test_monte_carlo_gradient(text: str, baseline: str, policy: str) -> None:
    """10,000 batches of K = 4 samples of each prompt, as one large batch."""
    divergence, b = Divergence.parse(text), Baseline.parse(baseline)
    logits, k, batches = random_logits(1), 4, 10_000
    log_pi = log_prob(logits)
    log_q = log_pi if policy == "on" else log_prob(random_logits(2))
    log_score, log_z = random_target(divergence)
    generator = torch.Generator().manual_seed(5)
    x = torch.stack(
        [torch.multinomial(q, batches * k, True, generator=generator) for q in log_q.exp()]
    ).reshape(C, batches, k)
    c = torch.arange(C)[:, None, None].expand_as(x)
    prompt = torch.arange(C * batches).repeat_interleave(k)
    flat = (c.flatten(), x.flatten())
    weights = with_op(divergence, b)(
        log_pi[flat], log_q[flat], log_score[flat], log_z.repeat_interleave(batches), prompt
    ).reshape(C, batches, k)

    # grad log pi(x | c) touches only the table of c: an estimate per prompt and batch.
    score = STEPS - STEPS.sum(-1, keepdim=True) * logits.softmax(-1)[:, None]  # (C, X, N, V)
    estimate = -torch.einsum("cbk,cbknv->cbnv", weights, score[c, x]) / (k * C)
    mean = estimate.mean(1)
    error = estimate.std(1) / math.sqrt(batches)
    exact = exact_gradient(divergence, logits, log_score)
    assert ((mean - exact).abs() <= 4.5 * error + 1e-12).all()
    assert error.max() < 0.05  # and it says something


def test_leaving_one_out_is_less_noisy_than_nothing() -> None:
    """On policy near the target, for the divergence whose rewards are far from zero there."""
    divergence, logits = Divergence.parse("reverse_kl"), random_logits(1)
    log_pi = log_prob(logits)
    log_score = log_pi + 0.3 * log_prob(random_logits(2))
    log_z = log_score.logsumexp(-1)
    second_moment = {}
    for name in ("none", "loo"):
        op = with_op(divergence, Baseline.parse(name))
        second_moment[name] = expected_over_groups(
            lambda *inputs, op=op: op(*inputs) ** 2, log_pi, log_pi, log_score, log_z, k=2
        ).sum()
    assert second_moment["loo"] < second_moment["none"] / 4


# --------------------------------------------------------------------------------------------------
# Z


@pytest.mark.parametrize("policy", ["on", "off"])
def test_z_is_unbiased(policy: str) -> None:
    """E[estimate of Z] over all pairs of samples is Z, streamed in two steps, with zeros in P."""
    log_score, log_z = random_target(Divergence.parse("js"))
    log_q = log_prob(random_logits(1 if policy == "on" else 2))
    first, second = torch.cartesian_prod(torch.arange(X), torch.arange(X)).T
    for c in range(C):
        log_weight = log_score[c] - log_q[c]
        state = ops.new_log_partition(X * X)
        ops.log_partition_(state, log_weight[first], torch.arange(X * X))
        ops.log_partition_(state, log_weight[second], torch.arange(X * X))
        assert (state[:, 2] == 2).all()
        probability = (log_q[c, first] + log_q[c, second]).exp()
        z = (probability * state[:, 0].exp() / 2).sum()
        assert z.item() == pytest.approx(log_z[c].exp().item(), rel=1e-12)
        squares = (probability * state[:, 1].exp() / 2).sum()
        exact = (log_q[c].exp() * (2 * log_weight).exp()).sum()
        assert squares.item() == pytest.approx(exact.item(), rel=1e-12)


def test_a_wrong_z_ruins_total_variation_and_only_rescales_kl() -> None:
    """Why Z is estimated with care: facts that the README may state."""
    logits = random_logits(1)
    cosine = {}
    for name in ("kl", "tv"):
        divergence = Divergence.parse(name)
        log_score, log_z = random_target(divergence)
        expected = expected_over_groups(
            with_op(divergence, Baseline.parse("none")),
            log_prob(logits),
            log_prob(logits),
            log_score,
            log_z + math.log(3),
            k=1,
        )
        got, exact = gradient_of(expected, logits), exact_gradient(divergence, logits, log_score)
        cosine[name] = torch.cosine_similarity(got.flatten(), exact.flatten(), 0).item()
    assert cosine["kl"] == pytest.approx(1, abs=1e-12)
    assert cosine["tv"] < 0.9


# --------------------------------------------------------------------------------------------------
# Training


def total_variation(logits: Tensor, log_score: Tensor) -> float:
    """The worst prompt's."""
    return (log_prob(logits).exp() - log_score.softmax(-1)).abs().sum(-1).max().item() / 2


@pytest.mark.parametrize("text", DIVERGENCES)
def test_training_reaches_the_target(text: str) -> None:
    """Sampling, streaming Z, leave-one-out, Adam: the whole algorithm; TV below 0.05."""
    divergence, loo = Divergence.parse(text), Baseline.parse("loo")
    log_score, _ = random_target(divergence)
    logits = random_logits(1).requires_grad_()
    start = total_variation(logits, log_score)
    assert start > 0.3
    k, steps = 256, 300
    optimiser = torch.optim.Adam([logits], lr=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.02, steps)
    state = ops.new_log_partition(C)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.arange(C).repeat_interleave(k)
    for _ in range(steps):
        log_pi = log_prob(logits)
        drawn = torch.multinomial(log_pi.detach().exp(), k, True, generator=generator)
        sample = (prompt, drawn.flatten())
        log_q, mine = log_pi.detach()[sample], log_score[sample]
        ops.log_partition_(state, mine - log_q, prompt)
        log_z = state[:, 0] - state[:, 2].log()
        weights, _ = ops.fdiv_weights(
            log_q, log_q, mine, log_z, prompt, divergence=divergence, baseline=loo
        )
        optimiser.zero_grad()
        (-(weights * log_pi[sample]).mean()).backward()
        optimiser.step()
        schedule.step()
    assert total_variation(logits.detach(), log_score) < 0.05
    log_z = state[:, 0] - state[:, 2].log()
    torch.testing.assert_close(log_z, log_score.logsumexp(-1), rtol=0, atol=0.05)

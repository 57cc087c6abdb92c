"""fdiv_terms against the reference, and against divergences summed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from divergence_cases import EVERY_DIVERGENCE, batch
from torch import Tensor

from fdpg_fast import ops, reference
from fdpg_fast.divergences import Divergence

OP = torch.ops.fdpg.fdiv_terms.default


@pytest.mark.parametrize("text", EVERY_DIVERGENCE)
@pytest.mark.parametrize("sizes", [[], [1], [3, 0, 8, 111]])
def test_agrees_with_reference(text: str, sizes: list[int]) -> None:
    divergence = Divergence.parse(text)
    inputs = batch(1, sizes, zeros=0.2)
    if sizes:
        inputs[3][0] = -math.inf
    got = ops.fdiv_terms(*inputs, divergence=divergence)
    expected = reference.fdiv_terms(*inputs, divergence=divergence)
    tolerance = 1e-6 if divergence.param == 1e-9 else 1e-11
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert torch.equal(got.isnan(), inputs[3][inputs[4]] == -math.inf)
    assert (got[~got.isnan()] >= 0).all()


def distributions() -> tuple[Tensor, Tensor, Tensor]:
    """pi, q, and a target that is zero somewhere, over six outcomes."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    logits[2, 4] = -math.inf
    pi, q, p = logits.softmax(dim=1)
    return pi, q, p


@pytest.mark.parametrize("text", EVERY_DIVERGENCE)
def test_expectation_is_the_divergence(text: str) -> None:
    """sum_x q(x) term(x) = D_f(pi || p) by its definition, whatever q and Z are."""
    divergence = Divergence.parse(text)
    formula, a = reference.FORMULAS[divergence.name], divergence.param
    pi, q, p = distributions()
    if not divergence.allows_zero_targets:
        p = p + 0.01
        p /= p.sum()
    on = p > 0
    f = formula.f(torch, pi[on] / p[on], a)
    expected = (p[on] * f).sum()
    if not on.all():
        expected += pi[~on].sum() * formula.f_prime_inf(a)
    log_z = torch.tensor([1.7], dtype=torch.float64)
    prompt = torch.zeros(6, dtype=torch.int64)
    terms = ops.fdiv_terms(pi.log(), q.log(), p.log() + log_z, log_z, prompt, divergence=divergence)
    tolerance = 1e-6 if divergence.param == 1e-9 else 1e-12
    assert (q * terms).sum().item() == pytest.approx(expected.item(), rel=tolerance, abs=tolerance)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tv", lambda pi, p: (pi - p).abs().sum() / 2),
        ("kl", lambda pi, p: (p * (p / pi).log()).sum()),
        ("reverse_kl", lambda pi, p: (pi * (pi / p).log()).sum()),
        ("chi2", lambda pi, p: ((p - pi) ** 2 / pi).sum()),
        ("reverse_chi2", lambda pi, p: ((pi - p) ** 2 / p).sum()),
        ("hellinger", lambda pi, p: ((pi.sqrt() - p.sqrt()) ** 2).sum()),
        (
            "js",
            lambda pi, p: (pi * (2 * pi / (pi + p)).log() + p * (2 * p / (pi + p)).log()).sum(),
        ),
    ],
)
def test_directions_are_as_named(text: str, expected: object) -> None:
    pi, q, p = distributions()
    p = (p + 0.01) / (p + 0.01).sum()
    prompt, log_z = torch.zeros(6, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    terms = ops.fdiv_terms(
        pi.log(), q.log(), p.log(), log_z, prompt, divergence=Divergence.parse(text)
    )
    assert (q * terms).sum().item() == pytest.approx(expected(pi, p).item(), rel=1e-12)  # type: ignore[operator]


def slope_at_one(text: str) -> float:
    return reference.f_prime(Divergence.parse(text), torch.zeros(1).double()).item()


@pytest.mark.parametrize("text", [t for t in EVERY_DIVERGENCE if abs(slope_at_one(t)) > 1e-6])
def test_less_noisy_than_f_itself(text: str) -> None:
    """On policy near the target, which is where a run ends: the reason for f~."""
    divergence = Divergence.parse(text)
    generator = torch.Generator().manual_seed(2)
    log_t = 0.1 * torch.randn(1000, generator=generator, dtype=torch.float64)
    zeros, prompt = torch.zeros_like(log_t), torch.zeros(1000, dtype=torch.int64)
    log_z = torch.zeros(1, dtype=torch.float64)
    terms = ops.fdiv_terms(zeros, zeros, -log_t, log_z, prompt, divergence=divergence)
    plain = reference.f(divergence, log_t) / log_t.exp()
    assert terms.std() < plain.std() / 2


def test_splitting_changes_no_bit() -> None:
    log_pi, log_q, log_score, log_z, prompt = batch(3, [40, 71], zeros=0.1)
    js = Divergence.parse("js")
    whole = ops.fdiv_terms(log_pi, log_q, log_score, log_z, prompt, divergence=js)
    parts = [
        ops.fdiv_terms(*some, log_z, mine, divergence=js)
        for *some, mine in zip(
            *(x.split(13) for x in (log_pi, log_q, log_score, prompt)), strict=True
        )
    ]
    assert torch.equal(whole, torch.cat(parts))


def test_opcheck() -> None:
    torch.library.opcheck(OP, (*batch(4, [3, 2]), Divergence.parse("alpha").id, 0.5))


def test_messages() -> None:
    log_pi, log_q, log_score, log_z, prompt = batch(5, [2, 2])
    js = Divergence.parse("js")
    with pytest.raises(RuntimeError, match=r"fdiv_terms: `prompt` must be in \[0, 2\), got 2"):
        ops.fdiv_terms(log_pi, log_q, log_score, log_z, prompt + 1, divergence=js)
    with pytest.raises(RuntimeError, match=r"fdiv_terms: .*`log_q`"):
        ops.fdiv_terms(log_pi, log_q.float(), log_score, log_z, prompt, divergence=js)
    with pytest.raises(RuntimeError, match=r"fdiv_terms: `divergence_param` of js_w must lie in"):
        torch.ops.fdpg.fdiv_terms(
            log_pi, log_q, log_score, log_z, prompt, Divergence.parse("js_w").id, 1.0
        )
    with pytest.raises(RuntimeError, match=r"fdiv_terms: `divergence` must be in"):
        torch.ops.fdpg.fdiv_terms(log_pi, log_q, log_score, log_z, prompt, 99, 0.0)

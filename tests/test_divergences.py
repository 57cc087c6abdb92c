"""Every divergence of the compiled list: properties, extremes, and a second opinion."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from divergence_cases import EVERY_DIVERGENCE, compiled_f, compiled_f_prime, with_parameters

from fdpg_fast import ops, reference
from fdpg_fast.baselines import Baseline
from fdpg_fast.divergences import (
    DIVERGENCES,
    Divergence,
    describe_divergences,
    require_finite_at_zero_targets,
)

EXTREMES = [0.0, 1e-12, 0.1, 1.0, 3.0, 30.0, 100.0, 700.0, 1000.0]


def log_t_grid() -> torch.Tensor:
    return torch.arange(-80, 81, dtype=torch.float64) / 10


def exact(value: mpmath.mpf) -> float:
    """The nearest double, infinite beyond the largest one."""
    return math.copysign(math.inf, value) if abs(value) > 1.79e308 else float(value)


@pytest.fixture(params=EVERY_DIVERGENCE)
def divergence(request: pytest.FixtureRequest) -> Divergence:
    return Divergence.parse(request.param)


def test_reference_has_every_listed_divergence_and_no_other() -> None:
    assert set(reference.FORMULAS) == set(DIVERGENCES)


def test_f_is_zero_at_one_and_f_prime_is_its_slope_in_the_reference(divergence: Divergence) -> None:
    assert reference.f(divergence, torch.zeros(1, dtype=torch.float64)).item() == 0
    t = log_t_grid().exp().requires_grad_()
    f = reference.f(divergence, t.log())
    (slope,) = torch.autograd.grad(f.sum(), t)
    expected = reference.f_prime(divergence, t.log()).detach()
    tolerance = 1e-5 if divergence.param == 1e-9 else 1e-9  # the plain formula divides by it
    away_from_kink = (t != 1).detach()
    torch.testing.assert_close(
        slope[away_from_kink], expected[away_from_kink], rtol=tolerance, atol=tolerance
    )


def test_compiled_f_prime_is_the_slope_of_compiled_f(divergence: Divergence) -> None:
    """By central differences in log t: d f~ / d log t = t (f' - f'(1))."""
    log_t, h = log_t_grid()[:-1] + 0.05, 1e-5  # off the kink of tv
    slope = (compiled_f(divergence, log_t + h) - compiled_f(divergence, log_t - h)) / (2 * h)
    f_prime = compiled_f_prime(divergence, log_t)
    at_one = compiled_f_prime(divergence, torch.zeros(1, dtype=torch.float64))
    expected = log_t.exp() * (f_prime - at_one)
    scale = 1 + compiled_f(divergence, log_t).abs()
    assert ((slope - expected).abs() / (scale + expected.abs())).max() < 1e-7


def test_compiled_agrees_with_a_thousand_digits(divergence: Divergence) -> None:
    formula, a = reference.FORMULAS[divergence.name], divergence.param
    log_t = torch.tensor([sign * x for x in EXTREMES for sign in (-1, 1)], dtype=torch.float64)
    got_f, got_f_prime = compiled_f(divergence, log_t), compiled_f_prime(divergence, log_t)
    with mpmath.workdps(1000):
        # A double parameter is exact in mpmath; so 1 - a here is not what doubles make of it.
        a = None if a is None else mpmath.mpf(a)
        slope_at_one = formula.f_prime(mpmath, mpmath.mpf(1), a)
        for i, x in enumerate(log_t.tolist()):
            t = mpmath.exp(mpmath.mpf(x))
            f = exact(formula.f(mpmath, t, a) - slope_at_one * (t - 1))
            f_prime = exact(formula.f_prime(mpmath, t, a))
            # Near t = 1, f~ is a difference of terms of size t - 1.
            assert got_f[i].item() == pytest.approx(f, rel=1e-11, abs=1e-15 + 1e-15 * abs(x)), x
            assert got_f_prime[i].item() == pytest.approx(f_prime, rel=1e-11, abs=1e-15), x


def test_f_prime_never_decreases(divergence: Divergence) -> None:
    """f is convex, up to both ends."""
    far = torch.tensor([*EXTREMES, math.inf], dtype=torch.float64)
    log_t = torch.cat([-far, far, log_t_grid()]).sort().values
    f_prime = compiled_f_prime(divergence, log_t)
    assert not f_prime.isnan().any()
    before, after = f_prime[:-1], f_prime[1:]
    assert ((after >= before) | (before - after <= 1e-15 * (1 + before.abs()))).all()


def test_limits(divergence: Divergence) -> None:
    """f'(inf) and f(0), as stated, as the formulas approach them, and as kernels use them."""
    formula, a = reference.FORMULAS[divergence.name], divergence.param
    f_zero, f_prime_inf = formula.f_zero(a), formula.f_prime_inf(a)
    assert divergence.f_prime_inf == pytest.approx(f_prime_inf, rel=1e-15)
    with mpmath.workdps(60):
        tiny = mpmath.mpf(10) ** mpmath.mpf(10) ** 11  # enough for t^1e-9
        if math.isfinite(f_zero):
            assert float(formula.f(mpmath, 1 / tiny, a)) == pytest.approx(f_zero, rel=1e-12)
        else:
            assert formula.f(mpmath, 1 / tiny, a) > 1e9
        if math.isfinite(f_prime_inf):
            assert float(formula.f_prime(mpmath, tiny, a)) == pytest.approx(f_prime_inf, rel=1e-12)
        else:
            assert formula.f_prime(mpmath, tiny, a) > 1e9
    ends = torch.tensor([-math.inf, math.inf], dtype=torch.float64)
    # P = 0 is log_t = inf to the kernel: the pseudo-reward off the support is -f'(inf).
    assert compiled_f_prime(divergence, ends)[1].item() == divergence.f_prime_inf
    slope_at_one = compiled_f_prime(divergence, torch.zeros(1, dtype=torch.float64)).item()
    assert compiled_f(divergence, ends)[0].item() == pytest.approx(f_zero + slope_at_one, rel=1e-15)


def test_divergence_is_positive_and_zero_only_at_equality(divergence: Divergence) -> None:
    log_t = log_t_grid()
    f = compiled_f(divergence, log_t)
    assert (f >= 0).all()
    assert (f[log_t.abs() > 0.05] > 0).all()
    assert f[log_t == 0].tolist() == [0.0]


DUALS = [
    ("kl", "reverse_kl"),
    ("chi2", "reverse_chi2"),
    ("skew_kl(0.3)", "skew_reverse_kl(0.7)"),
    ("js_w(0.3)", "js_w(0.7)"),
    ("alpha(0.3)", "alpha(0.7)"),
    ("alpha(-1)", "alpha(2)"),
    *((name, name) for name in ("tv", "js", "hellinger", "jeffreys")),
]


@pytest.mark.parametrize(("one", "other"), DUALS)
def test_exchanging_pi_and_p(one: str, other: str) -> None:
    """D_f(p || pi) has the generator t f(1/t); the normalised forms keep it."""
    log_t = log_t_grid()
    f = compiled_f(Divergence.parse(one), log_t)
    mirrored = log_t.exp() * compiled_f(Divergence.parse(other), -log_t)
    torch.testing.assert_close(f, mirrored, rtol=1e-11, atol=1e-13)


def test_duals_cover_the_list() -> None:
    covered = {Divergence.parse(text).name for pair in DUALS for text in pair}
    assert covered == set(DIVERGENCES), "say in DUALS what the new divergence is the mirror of"


# --------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize("text", EVERY_DIVERGENCE)
def test_text_round_trips(text: str) -> None:
    divergence = Divergence.parse(text)
    assert Divergence.parse(str(divergence)) == divergence
    assert divergence.id == list(DIVERGENCES).index(divergence.name)


def test_parameters_have_defaults() -> None:
    assert (
        Divergence.parse("alpha")
        == Divergence.parse("alpha(0.5)")
        == Divergence.parse(" alpha ( 5e-1 ) ")
    )
    assert Divergence.parse("js").param is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("jss", "unknown 'jss'. Did you mean 'js'?"),
        ("reverse-kl", "expected a name or name"),
        ("revers_kl", "Did you mean 'reverse_kl'"),
        ("JS", "Did you mean 'js'"),
        ("renyi", "Known divergences: kl, reverse_kl"),
        ("kl(2)", "kl takes no parameter"),
        ("alpha(x)", "expected a number in alpha(...), got 'x'"),
        ("alpha()", "expected a number"),
        ("alpha(inf)", "must be finite"),
        ("alpha(nan)", "must be finite"),
        ("js_w(0)", "strictly between 0 and 1, got 0"),
        ("js_w(1)", "strictly between 0 and 1, got 1"),
        ("", "expected a name"),
    ],
)
def test_messages(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^divergence: ") as error:
        Divergence.parse(text)
    assert message in str(error.value)


def test_help_has_a_line_per_divergence() -> None:
    lines = describe_divergences().splitlines()
    assert [line.split("(")[0].split()[0] for line in lines] == list(DIVERGENCES)
    assert all(len(line) <= 110 for line in lines)


def test_targets_of_zero(divergence: Divergence) -> None:
    if math.isfinite(divergence.f_prime_inf):
        require_finite_at_zero_targets(divergence, "the target")
        return
    with pytest.raises(ValueError, match="is infinite wherever the target is zero") as error:
        require_finite_at_zero_targets(divergence, "base.constrain(dog)")
    message = str(error.value)
    assert str(divergence) in message
    assert "base.constrain(dog)" in message
    assert "smooth" in message
    assert "reward" in message
    named = message.rsplit(":", 1)[1].split(", ")
    assert all(Divergence.parse(name).allows_zero_targets for name in named)


# --------------------------------------------------------------------------------------------------
# A user's own


def as_custom(text: str, name: str) -> Divergence:
    """A listed divergence, given as a user would give it."""
    listed = Divergence.parse(text)
    return Divergence.custom(
        lambda log_t: reference.f_prime(listed, log_t),
        name=name,
        f_prime_inf=listed.f_prime_inf,
        f=lambda log_t: reference.f(listed, log_t),
    )


def test_custom_gives_what_the_kernel_gives() -> None:
    log_pi = torch.tensor([-3.0, -4.0, -2.5, -6.0], dtype=torch.float64)
    log_q = log_pi + torch.tensor([0.1, -0.2, 0.0, 0.5], dtype=torch.float64)
    log_score = torch.tensor([-4.0, -2.0, -math.inf, -5.0], dtype=torch.float64)
    log_z = torch.tensor([0.3, -1.0], dtype=torch.float64)
    prompt = torch.tensor([0, 0, 0, 1])
    inputs = (log_pi, log_q, log_score, log_z, prompt)
    loo = Baseline.parse("loo")
    expected = ops.fdiv_weights(*inputs, divergence=Divergence.parse("hellinger"), baseline=loo)
    # No f given, and f' = 1 - 1/sqrt t: the estimate of the divergence integrates it.
    mine = Divergence.custom(lambda log_t: -torch.expm1(-log_t / 2), name="mine", f_prime_inf=1.0)
    got = ops.fdiv_weights(*inputs, divergence=mine, baseline=loo)
    torch.testing.assert_close(got.weights, expected.weights, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(got.statistics, expected.statistics, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("f_prime", "f_prime_inf", "message"),
    [
        (torch.sin, 1.0, "decreases near log_t"),
        (lambda x: -x, -math.inf, "must be a number or inf"),
        (lambda x: -x, 0.0, "decreases near"),
        (torch.log, math.inf, "NaN at log_t = -700"),
        (lambda x: x.sum(), 0.0, "tensor of shape"),
        (lambda x: 1.0, 1.0, "got float"),
        (torch.tanh, 2.0, "Say f_prime_inf=1"),
        (torch.tanh, math.inf, "Say f_prime_inf=1"),
        (lambda x: x, 5.0, "Say f_prime_inf=math.inf"),
    ],
)
def test_custom_is_checked(f_prime: object, f_prime_inf: float, message: str) -> None:
    with pytest.raises(ValueError, match=r"^divergence mine: ") as error:
        Divergence.custom(f_prime, name="mine", f_prime_inf=f_prime_inf)  # type: ignore[arg-type]
    assert message in str(error.value)


@pytest.mark.parametrize("text", [with_parameters(name)[-1] for name in DIVERGENCES])
def test_every_listed_divergence_would_pass_as_custom(text: str) -> None:
    custom = as_custom(text, "mine")
    assert custom.is_custom
    assert custom.allows_zero_targets == Divergence.parse(text).allows_zero_targets
    assert str(custom) == "mine"


def test_custom_may_not_take_a_listed_name() -> None:
    with pytest.raises(ValueError, match="'js' is built in"):
        Divergence.custom(torch.tanh, name="js", f_prime_inf=1.0)

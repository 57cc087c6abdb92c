from __future__ import annotations

import dataclasses
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import optimize
from toy_language import TEXTS, ToyModel, toy_model

from fdpg_fast.moment_fit import FitReport, WeightedFeatures, fit_moments
from fdpg_fast.scorers import contains, function, length, words
from fdpg_fast.targets import Base, FitError, Target, TargetError, from_spec

DOG = contains("dog")
SHE = contains("she", name="she")
HE = contains("he", name="he")
WORDS = length("words")


def probability(target: Target, prompts: int = 1) -> torch.Tensor:
    """p, exactly: (G, X)."""
    model = target.base.model
    return target.log_score(model.everything(prompts)).view(prompts, -1).softmax(-1)


def feature(scorer, model: ToyModel) -> torch.Tensor:
    return scorer(model.texts)


@pytest.fixture
def base() -> Base:
    return Base(toy_model())


# -- the algebra ---------------------------------------------------------------------------------


def test_pointwise_is_the_base_restricted(base):
    target = base.constrain({DOG: 1.0})
    has_dog = torch.tensor(["dog" in text for text in TEXTS])
    a = base.model.log_prob[0].exp()
    expected = torch.where(has_dog, a, 0) / a[has_dog].sum()
    torch.testing.assert_close(probability(target)[0], expected)
    scores = target.score(base.model.everything())
    assert torch.equal(scores.log_score[~has_dog], torch.full((5,), -math.inf).double())
    assert torch.equal(scores.log_score[has_dog], scores.log_base[has_dog])
    assert torch.equal(scores.features["contains 'dog'"], has_dog.double())
    assert (target.can_be_zero, target.needs_fit) == (True, False)
    assert target.moments == {"contains 'dog'": 1.0}
    assert str(target) == "a(x) · [contains 'dog']"


def test_constraint_is_the_product_with_its_indicator(base):
    rollout = base.model.everything()
    one, other = base.constrain({DOG: 1.0}), DOG * base
    assert torch.equal(one.log_score(rollout), other.log_score(rollout))
    assert one.moments == other.moments
    assert str(one) == str(other)


def test_never_is_the_constraint_on_its_negation(base):
    rollout = base.model.everything()
    never = base.constrain({DOG: 0.0})
    assert torch.equal(never.log_score(rollout), (base * ~DOG).log_score(rollout))
    assert never.moments == {"contains 'dog'": 0.0}


def test_reward_tilts_the_base(base):
    target = base.reward(WORDS, beta=0.5)
    expected = (base.model.log_prob[0] + feature(WORDS, base.model) / 0.5).softmax(-1)
    torch.testing.assert_close(probability(target)[0], expected)
    assert not target.can_be_zero
    assert target.moments == {}
    assert str(target) == "a(x) · exp(length in words / 0.5)"


def test_order_of_products_does_not_matter(base):
    rollout = base.model.everything()
    reward, weight = base.reward(WORDS, beta=2), function(lambda t: [len(x) for x in t], name="len")
    one = (reward * DOG * weight).log_score(rollout)
    other = (base * weight * (DOG * base) * reward).log_score(rollout)
    torch.testing.assert_close(one, other)


def test_base_and_scorers_are_asked_once(base):
    calls = []
    counted = function(lambda t: calls.append(1) or [0.5] * len(t), name="counted")
    target = base.reward(counted, beta=1) * counted * base.reward(counted, beta=2)
    target.score(base.model.everything())
    assert base.model.calls == 1
    assert len(calls) == 1


def test_smooth_floors_the_conditions_only(base):
    hard = base.reward(WORDS, beta=1) * DOG * SHE
    soft = hard.smooth(1e-3)
    rollout = base.model.everything()
    allowed = hard.log_score(rollout) > -math.inf
    reward = base.reward(WORDS, beta=1).log_score(rollout)
    expected = torch.where(allowed, reward, reward + math.log(1e-3))
    torch.testing.assert_close(soft.log_score(rollout), expected)
    assert not soft.can_be_zero
    assert hard.moments == {"contains 'dog'": 1.0, "she": 1.0}
    assert soft.moments == {}, "some of its samples violate the conditions"
    assert soft.verdicts == hard.verdicts
    assert "max([contains 'dog'] · [she], 0.001)" in str(soft)
    assert (soft * HE).can_be_zero  # a new condition is not smoothed by an old floor
    assert (soft * HE).moments == {"he": 1.0}


def test_smooth_share_of_violations_is_the_stated_one(base):
    a = base.model.log_prob[0].exp()
    z = a[feature(DOG, base.model) == 1].sum()
    violating = probability(base.constrain({DOG: 1}).smooth(0.01))[0][feature(DOG, base.model) == 0]
    assert violating.sum().item() == pytest.approx((0.01 * (1 - z) / (z + 0.01 * (1 - z))).item())


def test_positive_weight_never_forbids(base):
    positive = function(lambda t: [0.5 + len(x) for x in t], name="w", kind="positive")
    assert not (base * positive).can_be_zero
    assert (base * function(lambda t: [0.5] * len(t), name="w")).can_be_zero


def test_custom_log_score_replaces_the_base(base):
    def mine(rollout):
        return rollout.tokens[:, 1].double()

    target = base.custom(mine, can_be_zero=False) * DOG
    scores = target.score(base.model.everything())
    index = torch.arange(len(TEXTS)).double()
    expected = torch.where(feature(DOG, base.model) == 1, index, -math.inf)
    assert torch.equal(scores.log_score, expected)
    assert torch.equal(scores.log_base, base.model.log_prob[0])
    assert str(target) == "exp(mine(x)) · [contains 'dog']"
    assert not base.custom(mine, can_be_zero=False).can_be_zero
    assert base.custom(mine).can_be_zero


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda b: b.constrain({}), r"expected {scorer: moment}.* got \{\}"),
        (lambda b: b.constrain(DOG), r"expected {scorer: moment}.*: 1\.0}, got <boolean scorer"),
        (lambda b: b.constrain("dog"), "expected {scorer: moment}.*, got 'dog'"),
        (lambda b: b.constrain({DOG: 1.5}), "contains 'dog' expected 0 to 1"),
        (lambda b: b.constrain({DOG: math.nan}), "finite number, got nan"),
        (lambda b: b.constrain({"dog": 1.0}), "expected a scorer"),
        (lambda b: b.constrain({len: 1.0}), "kind='boolean'"),
        (lambda b: b.constrain({DOG: 0.4}).constrain({DOG: 0.5}), "two moments, 0.4 and 0.5"),
        (lambda b: b.constrain({DOG: 0}) * DOG, "both always and never"),
        (lambda b: b.reward(WORDS, beta=0), "`beta` expected above 0"),
        (lambda b: b.reward(WORDS, beta=-0.1), "`beta` expected above 0"),
        (lambda b: (b * DOG).smooth(0), "`epsilon` expected above 0"),
        (lambda b: b.custom(len).smooth(0.1), "can_be_zero=False"),
        (lambda b: b.custom(len) * b.custom(max), "keep one"),
        (lambda b: (b * DOG) * (Base(toy_model()) * DOG), "different bases"),
        (lambda b: b * function(len, name="f") * function(max, name="f"), "both called 'f'"),
        (lambda b: b.constrain({WORDS: 3}).score(b.model.everything()), "not fitted yet"),
    ],
)
def test_wrong_targets_are_refused(base, build, message):
    with pytest.raises(TargetError, match=message):
        build(base)


@pytest.mark.parametrize("model", ["gpt2", torch.nn.Linear(1, 1)])
def test_a_base_of_something_else_is_refused(model):
    with pytest.raises(TargetError, match=f"a LanguageModel, got {type(model).__name__}"):
        Base(model)


@pytest.mark.parametrize("number", [np.float32, np.float64, np.array, torch.tensor, Fraction])
def test_numbers_may_be_of_numpy_and_torch(base, number):
    half = number(0.5)
    target = base.constrain({DOG: half}).reward(WORDS, beta=half) * SHE
    target.load_state_dict({"contains 'dog'": number(0.25)})
    assert (target.goals[DOG], target.lambdas) == (0.5, {"contains 'dog'": 0.25})
    assert type(target.goals[DOG]) is float
    assert "/ 0.5)" in str(target)
    assert "max([she], 0.5)" in str(target.smooth(half))
    assert base.constrain({DOG: np.int64(1)}).moments == {"contains 'dog'": 1.0}
    for wrong in (np.bool_(True), torch.tensor([0.5]), np.array("0.5"), number(math.pi) * 1j):
        with pytest.raises(TargetError, match="moment of contains 'dog' expected a finite number"):
            base.constrain({DOG: wrong})


def test_negative_factor_names_scorer_and_text(base):
    target = base * function(lambda t: [-1.0 if "cat" in x else 1.0 for x in t], name="mood")
    with pytest.raises(TargetError, match=r"mood: .* got -1 for sample 1, 'a cat sat'.*reward"):
        target.score(base.model.everything())


def test_a_log_score_of_texts_is_told_what_it_gets(base):
    target = base.custom(lambda text: float(text.count("dog")), name="dogs")
    with pytest.raises(TargetError, match=r"dogs: raised AttributeError.*a Rollout.*base\.reward"):
        target.score(base.model.everything())


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda n: torch.zeros(n, 1), r"expected a tensor of shape \[8\], got \[8, 1\]"),
        (lambda n: [0.0] * n, "got list"),
        (lambda n: torch.full((n,), math.nan), "got nan for sample 0, 'the dog ran'"),
        (lambda n: torch.full((n,), math.inf), "got inf"),
        (lambda n: torch.full((n,), -math.inf), "can_be_zero=False promises, got -inf"),
    ],
)
def test_custom_log_score_is_checked(base, returned, message):
    target = base.custom(lambda r: returned(len(r)), can_be_zero=False, name="mine")
    with pytest.raises(TargetError, match="mine: .*" + message):
        target.score(base.model.everything())


# -- the fit -------------------------------------------------------------------------------------


def exact_lambdas(base: Base, start: Target, scorers: list, goals: list[float]) -> list[float]:
    """By scipy, on the whole language."""
    log_p = start.log_score(base.model.everything()).numpy()
    phi = np.stack([feature(s, base.model).numpy() for s in scorers], axis=1)

    def dual(lambdas):
        return np.logaddexp.reduce(log_p + phi @ lambdas) - lambdas @ goals

    def excess(lambdas):
        logits = log_p + phi @ lambdas
        p = np.exp(logits - logits.max())
        return (p / p.sum()) @ phi - goals

    near = optimize.minimize(dual, np.zeros(len(scorers))).x
    return optimize.root(excess, near, tol=1e-12).x.tolist()


def fit_exactly(target: Target) -> FitReport:
    """On every text equally often, weighted by a/q: sums over samples are sums over texts."""
    rollout = target.base.model.everything()
    often = torch.arange(len(rollout)).repeat(50)
    log_q = torch.full_like(rollout.log_q, -math.log(len(rollout)))
    uniform = dataclasses.replace(rollout, log_q=log_q).select(often)
    return target.fit(uniform, uniform, sampled_from_base=False)


@pytest.mark.parametrize(
    ("start", "scorers", "goals"),
    [
        (lambda b: b, [SHE], [0.5]),
        (lambda b: b, [WORDS], [3.2]),
        (lambda b: b, [SHE, DOG], [0.7, 0.2]),
        (lambda b: b * ~contains("nothing"), [SHE, WORDS], [0.5, 3.5]),
        (lambda b: b * DOG, [SHE], [0.9]),
        (lambda b: b.reward(WORDS, beta=1.0), [SHE], [0.1]),
    ],
    ids=["one", "real", "two", "hybrid", "hybrid-rare", "with-reward"],
)
def test_fit_finds_the_exact_lambdas(base, start, scorers, goals):
    target = start(base).constrain(dict(zip(scorers, goals, strict=True)))
    assert target.needs_fit
    report = fit_exactly(target)
    expected = exact_lambdas(base, start(base), scorers, goals)
    assert [target.lambdas[s.name] for s in scorers] == pytest.approx(expected, abs=1e-7)
    assert [m.fit for m in report.moments] == pytest.approx(goals, abs=1e-8)
    assert report.problems == ()
    assert report.iterations <= 12
    # Under the target itself, exactly, the moments are the goals.
    p = probability(target)[0]
    moments = [float(p @ feature(s, base.model)) for s in scorers]
    assert moments == pytest.approx(goals, abs=1e-8)
    a = base.model.log_prob[0]
    exact_kl = torch.nan_to_num(p * (p.log() - a), nan=0.0).sum()
    assert report.kl_to_base == pytest.approx(exact_kl.item(), abs=1e-9)


def test_held_out_moments_agree_within_their_error(base):
    target = base.constrain({SHE: 0.6, WORDS: 3.0})
    errors = []
    for seed in range(40):
        report = target.fit(base.model.draw(1000, seed), base.model.draw(1000, 100 + seed))
        errors += [(m.holdout - m.goal) / m.holdout_se for m in report.moments]
    # Two independent samples of equal size err: variance 2 in units of the held-out error.
    assert np.var(errors) == pytest.approx(2.0, rel=0.5)
    assert abs(np.mean(errors)) < 4 * math.sqrt(2 / len(errors))


def test_held_out_samples_that_disagree_are_a_problem(base):
    other = ToyModel(base.model.log_prob + 2.0 * feature(SHE, base.model))
    target = base.constrain({SHE: 0.5})
    report = target.fit(base.model.draw(4000, 0), other.draw(4000, 1))
    assert any("she is 0." in problem and "not 0.5" in problem for problem in report.problems)
    assert "WARNING: she is" in str(report)


def test_few_effective_samples_are_a_problem(base):
    target = base.constrain({SHE: 0.5})
    report = target.fit(base.model.draw(20, 3), base.model.draw(20, 4))
    assert any("ESS" in problem for problem in report.problems)


def test_each_prompt_has_its_own_z_in_the_fit():
    """E over prompts of the moments is the goal, although the prompts' own bases differ widely."""
    base = Base(toy_model(prompts=3, seed=5))
    target = base.constrain({SHE: 0.6})
    samples = base.model.draw(5_000, 0, prompts=3)
    report = target.fit(samples, base.model.draw(5_000, 1, prompts=3))
    p = probability(target, prompts=3)
    per_prompt = p @ feature(SHE, base.model)
    assert per_prompt.std() > 0.05
    assert per_prompt.mean().item() == pytest.approx(0.6, abs=0.02)
    assert report.moments[0].fit == pytest.approx(0.6, abs=1e-8)
    pooled_base = base.model.log_prob.exp() @ feature(SHE, base.model)
    assert report.moments[0].base == pytest.approx(pooled_base.mean().item(), abs=0.01)


def rates(prompts: int, mean: float, seed: int) -> np.ndarray:
    """How often each prompt shows a feature."""
    drawn = np.random.default_rng(seed).beta(9 * mean, 9 * (1 - mean), prompts)
    return np.clip(drawn, 1e-3, 1.0)


def few_of_each(rate: np.ndarray, each: int, seed: int) -> WeightedFeatures:
    """``each`` samples of every prompt, with a feature that is 1 at its rate."""
    seen = np.random.default_rng(seed).random((len(rate), each)) < rate[:, None]
    nothing = torch.zeros(seen.size, dtype=torch.float64)
    prompt = torch.arange(len(rate)).repeat_interleave(each)
    return WeightedFeatures(torch.tensor(seen.reshape(-1, 1)).double(), nothing, nothing, prompt)


@pytest.mark.parametrize(("each", "mean", "error"), [(8, 0.3, 0.02), (16, 0.1, 0.04)])
def test_few_samples_of_each_of_many_prompts(each, mean, error):
    """The means under the target are the goal in truth, not on the samples only.

    Prompts' plain means are off by 0.04 and 0.13 here, all to the same side.
    """
    found = []
    for seed in range(8):
        rate = rates(256, mean, seed)
        samples = [few_of_each(rate, each, 100 * seed + n) for n in (1, 2)]
        report = fit_moments(*samples, {"seen": 0.5})
        assert report.moments[0].fit == pytest.approx(0.5, abs=1e-8)
        odds = rate / (1 - rate) * math.exp(report.moments[0].lambda_)
        found.append((odds / (1 + odds)).mean())
    assert np.mean(found) == pytest.approx(0.5, abs=error)
    assert np.std(found) < error


def test_few_held_out_samples_of_each_of_many_prompts():
    """They do not see a problem where there is none; plain means are 8 of their errors away."""
    rate = rates(256, 0.1, 0)
    report = fit_moments(few_of_each(rate, 256, 1), few_of_each(rate, 16, 2), {"seen": 0.5})
    assert report.moments[0].holdout == pytest.approx(0.5, abs=3 * report.moments[0].holdout_se)
    assert report.problems == ()


def test_a_prompt_without_a_possible_sample_is_skipped_and_counted():
    logits = torch.zeros(2, len(TEXTS))
    logits[1, [i for i, text in enumerate(TEXTS) if "dog" in text]] = -1e3
    base = Base(ToyModel(logits))
    target = (base * DOG).constrain({SHE: 0.5})
    report = target.fit(base.model.draw(500, 0, prompts=2), base.model.draw(500, 1, prompts=2))
    assert report.prompts_skipped == 1
    assert probability(target, prompts=2)[0] @ feature(SHE, base.model) == pytest.approx(
        0.5, abs=0.1
    )


def test_fit_from_another_proposal_weighs_by_a_over_q(base):
    q = toy_model(seed=9)
    target = base.constrain({SHE: 0.5})
    report = target.fit(q.draw(20_000, 0), q.draw(20_000, 1), sampled_from_base=False)
    assert target.lambdas["she"] == pytest.approx(
        exact_lambdas(base, base, [SHE], [0.5])[0], abs=0.1
    )
    assert report.problems == ()


def test_a_feature_twice_is_no_trouble(base):
    """Two names for one feature leave the Hessian singular."""
    again = contains("she", name="again")
    target = base.constrain({SHE: 0.5, again: 0.5})
    fit_exactly(target)
    both = sum(target.lambdas.values())
    assert both == pytest.approx(exact_lambdas(base, base, [SHE], [0.5])[0], abs=1e-3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda b: b.constrain({contains("zebra"): 0.5}), "contains 'zebra' was never seen"),
        (lambda b: b.constrain({regex_all(): 0.5}), "everything was always seen"),
        (
            lambda b: (b * contains("cat")).constrain({SHE: 0.5}),
            r"she was never seen .* in the \d+ of 4000 samples .* other factors allow",
        ),
        (lambda b: (b * contains("zebra")).constrain({SHE: 0.5}), "allow none of 4000 samples"),
        (
            lambda b: b.constrain({WORDS: 40}),
            "length in words cannot have the mean 40: .* went from 1 to 5",
        ),
        # Each alone is possible, both at once are not: no text has "he" without "she" and ...
        (
            lambda b: b.constrain({contains("cat"): 0.8, SHE: 0.5}),
            r"contains 'cat' = 0.8 .*; she = 0.5 .* at once",
        ),
        (
            lambda b: b.constrain({SHE: 0.5, contains("she", name="again"): 0.6}),
            "she = 0.5 .*; again = 0.6 .* at once",
        ),
    ],
    ids=["never", "always", "never-together", "impossible", "range", "joint", "contradiction"],
)
def test_infeasible_moments_are_named(base, build, message):
    target = build(base)
    with pytest.raises(FitError, match=message) as raised:
        target.fit(base.model.draw(4000, 0), base.model.draw(4000, 1))
    assert re.search("Way out.*--target.fit_samples", str(raised.value))
    assert target.needs_fit  # and nothing was half-fitted


def test_feasible_or_not_as_a_linear_program_says():
    """On random problems: fitted where a mixture of all samples has the moments, else refused."""
    generator = np.random.default_rng(0)
    outcomes = []
    for _ in range(300):
        count, features = generator.integers(4, 12), generator.integers(1, 4)
        phi = generator.integers(0, 4, (count, features)).astype(float)
        mixture = generator.dirichlet(np.ones(count)) @ phi
        goal = mixture + generator.normal(size=features) * generator.choice([0.0, 0.5])
        if (phi.min(0) >= goal).any() or (phi.max(0) <= goal).any():
            continue  # refused before Newton begins
        # The largest smallest weight of a mixture that has the moments; above 0 inside the hull.
        columns = np.vstack([phi.T, np.ones(count)])
        program = optimize.linprog(
            np.r_[np.zeros(count), -1.0],
            A_ub=np.c_[-np.eye(count), np.ones(count)],
            b_ub=np.zeros(count),
            A_eq=np.c_[columns, np.zeros(features + 1)],
            b_eq=np.r_[goal, 1.0],
            bounds=[(0, None)] * count + [(None, None)],
        )
        feasible = program.success and -program.fun > 1e-6
        zeros = torch.zeros(count, dtype=torch.float64)
        weighted = WeightedFeatures(torch.tensor(phi), zeros, zeros, zeros.long())
        goals = {f"phi {k}": float(goal[k]) for k in range(features)}
        try:
            report = fit_moments(weighted, weighted, goals)
        except FitError:
            outcomes.append((feasible, False))
        else:
            assert [m.fit for m in report.moments] == pytest.approx(goal.tolist(), abs=1e-7)
            outcomes.append((feasible, True))
    assert all(feasible == fitted for feasible, fitted in outcomes)
    assert min(outcomes.count((True, True)), outcomes.count((False, False))) > 10


def regex_all():
    return function(lambda t: [1.0] * len(t), name="everything", kind="boolean")


def test_extreme_but_feasible_moments(base):
    target = base.constrain({SHE: 0.999})
    fit_exactly(target)
    assert float(probability(target)[0] @ feature(SHE, base.model)) == pytest.approx(
        0.999, abs=1e-5
    )


def test_state_round_trip(base):
    target = base.constrain({SHE: 0.5}) * DOG
    target.fit(base.model.draw(2000, 0), base.model.draw(2000, 1))
    state = target.state_dict()
    again = base.constrain({SHE: 0.5}) * DOG
    again.load_state_dict(state)
    rollout = base.model.everything()
    assert torch.equal(again.log_score(rollout), target.log_score(rollout))
    with pytest.raises(TargetError, match="another target"):
        base.constrain({HE: 0.5}).load_state_dict(state)


# -- from YAML -----------------------------------------------------------------------------------


def test_spec_builds_the_same_target(base, tmp_path):
    (tmp_path / "mine.py").write_text("def polite(texts):\n    return [len(x) for x in texts]\n")
    spec = {
        "constrain": [{"contains": "dog"}],
        "moments": [{"words": ["she", "her"], "name": "female", "moment": 0.5}],
        "reward": {"length": "words", "beta": 2.0},
        "times": [{"python": "mine.py:polite"}],
        "smooth": 1e-6,
    }
    target = from_spec(spec, base, tmp_path)
    female = words(["she", "her"], name="female")
    polite = function(lambda t: [len(x) for x in t], name="polite")
    expected = base.constrain({DOG: 1.0, female: 0.5}).reward(WORDS, beta=2.0) * polite
    expected = expected.smooth(1e-6)
    fit_exactly(target)
    fit_exactly(expected)
    rollout = base.model.everything()
    torch.testing.assert_close(target.log_score(rollout), expected.log_score(rollout))
    assert target.moments == {"female": 0.5}
    assert target.state_dict().keys() == {"female"}


def test_a_python_scorer_may_be_in_two_parts_of_a_spec(base, tmp_path):
    (tmp_path / "mine.py").write_text("def f(texts):\n    return [len(x) for x in texts]\n")
    spec = {
        "moments": [{"python": "mine.py:f", "moment": 15}],
        "reward": {"python": "mine.py:f", "beta": 2.0},
    }
    assert str(from_spec(spec, base, tmp_path)) == "a(x) · exp(f / 2) · exp(λ · f)"


def test_spec_of_a_log_score(base, tmp_path):
    (tmp_path / "mine.py").write_text("def score(rollout):\n    return rollout.lengths.double()\n")
    target = from_spec({"python": "mine.py:score"}, base, tmp_path)
    assert torch.equal(target.log_score(base.model.everything()), torch.ones(8).double())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "nothing is wanted"),
        ({"smooth": 0.1}, "nothing is wanted"),
        ({"constrian": []}, "unknown key 'constrian'. Did you mean 'constrain'"),
        ({"constrain": [{"length": "words"}]}, "0 or 1"),
        ({"constrain": "dog"}, "expected a list of scorers"),
        ({"moments": [{"contains": "dog"}]}, "expected a scorer and its `moment`"),
        ({"reward": {"length": "words"}}, "expected a scorer and its `beta`"),
        ({"reward": {"length": "words", "beta": "big"}}, "expected a finite number, got 'big'"),
        ("dog", "expected a mapping"),
    ],
)
def test_wrong_specs_are_named(base, spec, message):
    with pytest.raises(TargetError, match=message):
        from_spec(spec, base)

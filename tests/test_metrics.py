from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from toy_language import TEXTS, ToyModel, toy_model

from fdpg_fast import metrics
from fdpg_fast.divergences import Divergence
from fdpg_fast.partition import Partition
from fdpg_fast.rollout import Finish
from fdpg_fast.scorers import contains, length
from fdpg_fast.targets import Base, Scores, Target

DOG = contains("dog", name="dog")
WORDS = length("words")


def f(name: str, t: torch.Tensor) -> torch.Tensor:
    """The paper's four generators, by hand."""
    return {
        "kl": lambda: -t.log(),
        "reverse_kl": lambda: torch.where(t > 0, t * t.log(), 0.0),
        "tv": lambda: (t - 1).abs() / 2,
        "js": lambda: torch.where(t > 0, t * (2 * t / (t + 1)).log(), 0.0) + (2 / (t + 1)).log(),
    }[name]()


F_PRIME_INF = {"kl": 0.0, "reverse_kl": math.inf, "tv": 0.5, "js": math.log(2)}


def exact_divergence(name: str, pi: torch.Tensor, p: torch.Tensor) -> float:
    """Mean over prompts of E_p f(pi/p) + f'(inf) pi(p = 0), summed over all texts."""
    values = []
    for pi_c, p_c in zip(pi, p, strict=True):
        on = p_c > 0
        value = (p_c[on] * f(name, pi_c[on] / p_c[on])).sum()
        off = pi_c[~on].sum()
        values.append(value + F_PRIME_INF[name] * off if off > 0 else value)
    return torch.stack(values).mean().item()


class Setting:
    """A base, a target, a policy and a proposal, all different, over two prompts."""

    def __init__(self, build, prompts: int = 2) -> None:
        self.prompts = prompts
        self.base = Base(toy_model(prompts, seed=1))
        self.target: Target = build(self.base)
        self.policy = toy_model(prompts, seed=2)
        self.proposal = toy_model(prompts, seed=3)
        log_score = self.target.log_score(self.base.model.everything(prompts)).view(prompts, -1)
        self.log_z = log_score.logsumexp(-1)
        self.p = log_score.softmax(-1)
        self.pi, self.a = self.policy.log_prob.exp(), self.base.model.log_prob.exp()

    def estimates(self, per_prompt: int, seed: int, on_policy: bool = False):
        q = self.policy if on_policy else self.proposal
        rollout = q.draw(per_prompt, seed, self.prompts)
        scores = self.target.score(rollout)
        log_pi = self.policy.sequence_logprob(rollout)
        se = torch.zeros(self.prompts, dtype=torch.float64)
        return rollout, scores, metrics.measure(rollout, scores, log_pi, self.log_z, se)


@pytest.fixture(scope="module", params=["reward", "pointwise"])
def setting(request) -> Setting:
    builds = {"reward": lambda b: b.reward(WORDS, beta=2.0), "pointwise": lambda b: b * DOG}
    return Setting(builds[request.param])


def assert_consistent(values: list[float], errors: list[float], exact: float) -> None:
    """The mean over runs is right, and the stated standard error is that of a run."""
    value, error = torch.tensor(values), torch.tensor(errors)
    of_mean = value.std() / math.sqrt(len(value))
    assert abs(value.mean() - exact) < 4 * of_mean + 1e-9
    if value.std() > 1e-9:
        assert error.square().mean().sqrt().item() == pytest.approx(value.std().item(), rel=0.25)


@pytest.mark.parametrize("on_policy", [True, False], ids=["on-policy", "off-policy"])
def test_estimates_are_unbiased_and_their_errors_right(setting, on_policy):
    runs = [setting.estimates(100, seed, on_policy)[2] for seed in range(150)]
    exact = {name: exact_divergence(name, setting.pi, setting.p) for name in F_PRIME_INF}
    exact["kl_to_base"] = (setting.pi * (setting.pi / setting.a).log()).sum(1).mean().item()
    exact["entropy"] = -(setting.pi * setting.pi.log()).sum(1).mean().item()
    for feature in [s for factor in setting.target.factors for s in factor.scorers]:
        exact[f"moment: {feature.name}"] = (setting.pi @ feature(TEXTS)).mean().item()
    for name, value in exact.items():
        error_name = name.replace("moment: ", "moment_se: ") if ":" in name else f"{name}_se"
        if math.isinf(value):
            assert all(run[name] == math.inf for run in runs), name
            continue
        assert_consistent(
            [run[name].item() for run in runs], [run[error_name].item() for run in runs], value
        )


def test_what_the_target_is_itself(setting):
    exact_kl = (setting.p * torch.where(setting.p > 0, setting.p / setting.a, 1.0).log()).sum(1)
    surprise = torch.where(setting.p > 0, -setting.p.log(), 0.0)
    rollout, scores, of_pi = setting.estimates(5_000, 0)
    of_p = metrics.measure_target(rollout, scores, setting.log_z)
    assert of_p["kl_to_base"].item() == pytest.approx(exact_kl.mean().item(), abs=0.05)
    assert torch.equal(of_p["kl_to_base"], of_pi["kl_target_base"])
    exact_entropy = (setting.p * surprise).sum(1).mean().item()
    assert of_p["entropy"].item() == pytest.approx(exact_entropy, abs=4 * of_p["entropy_se"].item())
    for factor in setting.target.factors:
        for s in factor.scorers:
            exact = (setting.p @ s(TEXTS)).mean().item()
            error = of_p[f"moment_se: {s.name}"].item()
            assert of_p[f"moment: {s.name}"].item() == pytest.approx(exact, abs=4 * error + 1e-9)
    weight = setting.p / setting.proposal.log_prob.exp()
    chi = (setting.proposal.log_prob.exp() * weight.square()).sum(1)
    assert of_p["ess"].item() == pytest.approx((5_000 / chi).sum().item(), rel=0.05)


def test_kl_of_a_conditional_target_is_minus_log_z():
    setting = Setting(lambda b: b * DOG)
    of_pi = setting.estimates(50, 0)[2]
    torch.testing.assert_close(of_pi["kl_target_base"], -setting.log_z.mean())


def test_divergence_at_the_target_is_zero():
    """Not only in the mean: every term is, so the error is zero too."""
    setting = Setting(lambda b: b.reward(WORDS, beta=2.0))
    at_target = ToyModel(setting.p.log())
    rollout = at_target.draw(100, 0, 2)
    scores = setting.target.score(rollout)
    se = torch.zeros(2).double()
    measured = metrics.measure(rollout, scores, rollout.log_q, setting.log_z, se)
    for name in F_PRIME_INF:
        assert measured[name].item() == pytest.approx(0, abs=1e-12)
        assert measured[f"{name}_se"].item() == pytest.approx(0, abs=1e-12)


def test_other_divergences_on_the_same_samples(setting):
    rollout, scores, measured = setting.estimates(100, 0)
    log_pi = setting.policy.sequence_logprob(rollout)
    which = (Divergence.parse("kl"), Divergence.parse("alpha(0.5)"))
    other = metrics.divergence_estimates(
        log_pi, rollout.log_q, scores.log_score, setting.log_z, rollout.prompt_index, which
    )
    assert set(other) == {
        "kl",
        "kl_se",
        *(f"{which[1]}{e}" for e in ("", "_se")),
        "prompts_skipped",
    }
    assert torch.equal(other["kl"], measured["kl"])


def test_prompts_without_a_target_are_left_out_and_counted():
    setting = Setting(lambda b: b * DOG)
    rollout, scores, _ = setting.estimates(100, 0)
    log_score = scores.log_score.clone()
    log_score[:100] = -math.inf
    hidden = dataclasses.replace(scores, log_score=log_score)
    log_z = torch.tensor([-math.inf, setting.log_z[1].item()]).double()
    log_pi = setting.policy.sequence_logprob(rollout)
    se = torch.tensor([math.inf, 0.1]).double()
    measured = metrics.measure(rollout, hidden, log_pi, log_z, se)
    second = rollout.select(torch.arange(100, 200))
    alone = metrics.divergence_estimates(
        log_pi[100:], second.log_q, log_score[100:], log_z[1:], torch.zeros(100, dtype=torch.int64)
    )
    assert measured["prompts_skipped"] == 1
    for name in ("kl", "tv", "js"):
        torch.testing.assert_close(measured[name], alone[name])
        torch.testing.assert_close(measured[f"{name}_se"], alone[f"{name}_se"])
    assert measured["log_z"].item() == pytest.approx(log_z[1].item())
    assert measured["log_z_se"].item() == pytest.approx(0.1)
    assert measured["kl_target_base"].item() == pytest.approx(-log_z[1].item(), abs=1e-9)
    assert not metrics.measure_target(rollout, hidden, log_z)["moment: dog"].isnan()


def test_no_prompt_with_a_target_is_nan_and_no_error():
    setting = Setting(lambda b: b * DOG)
    rollout, scores, _ = setting.estimates(10, 0)
    nowhere = dataclasses.replace(scores, log_score=torch.full((20,), -math.inf).double())
    log_z = torch.full((2,), -math.inf).double()
    log_pi = setting.policy.sequence_logprob(rollout)
    measured = metrics.measure(rollout, nowhere, log_pi, log_z, torch.full((2,), math.inf).double())
    assert measured["prompts_skipped"] == 2
    for name in ("kl", "js", "log_z", "kl_target_base"):
        assert measured[name].isnan()
    assert measured["kl_to_base"].isfinite()


def test_where_no_sample_tells_of_a_known_target_nothing_is_certain():
    """All terms are alike there, so the mean of them would have no error at all."""
    setting = Setting(lambda b: b * DOG)
    rollout, scores, _ = setting.estimates(10, 0)
    missed = dataclasses.replace(scores, log_score=torch.full((20,), -math.inf).double())
    log_pi = setting.policy.sequence_logprob(rollout)
    measured = metrics.measure(rollout, missed, log_pi, setting.log_z, torch.zeros(2).double())
    for name in ("kl", "tv", "js"):
        assert measured[name].isnan()
        assert measured[f"{name}_se"].isnan()
    assert measured["reverse_kl"] == math.inf  # whatever the target is


def test_one_sample_per_prompt_takes_the_spread_over_prompts():
    prompt = torch.arange(50)
    values = torch.randn(50, generator=torch.Generator().manual_seed(0)).double()
    mean, error = metrics.Mean(prompt, 50)(values)
    torch.testing.assert_close(mean, values.mean())
    torch.testing.assert_close(error, values.std() / math.sqrt(50))


def test_prompts_count_alike_whatever_their_samples():
    prompt = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
    values = torch.tensor([0, 0, 0, 0, 0, 0, 1, 3.0]).double()
    mean, error = metrics.Mean(prompt, 2)(values)
    assert mean == 1.0
    assert error.item() == pytest.approx(math.sqrt(0 + 2 / 2) / 2)


def test_exact_token_entropies_replace_the_estimate():
    setting = Setting(lambda b: b * DOG)
    rollout, scores, _ = setting.estimates(10, 0, on_policy=True)
    entropy = -(setting.pi * setting.pi.log()).sum(1)
    log_pi = rollout.log_q
    measured = metrics.measure(
        rollout,
        scores,
        log_pi,
        setting.log_z,
        torch.zeros(2).double(),
        token_entropy=entropy[rollout.prompt_index][:, None],
    )
    torch.testing.assert_close(measured["entropy"], entropy.mean())
    torch.testing.assert_close(measured["entropy_per_token"], entropy.mean())  # one token each


def test_lengths_and_ends():
    setting = Setting(lambda b: b * DOG)
    rollout = setting.policy.draw(2, 0, 2)
    rollout = dataclasses.replace(
        rollout,
        lengths=torch.tensor([1, 2, 3, 6]),
        finish=torch.tensor([Finish.EOS, Finish.EOS, Finish.STOP, Finish.LENGTH]),
    )
    zeros = torch.zeros(4).double()
    scores = Scores(zeros, zeros, {})
    measured = metrics.measure(rollout, scores, rollout.log_q, zeros[:2], zeros[:2])
    assert measured["length"] == 3.0
    assert measured["finished"] == 0.75
    assert measured["cut_off"] == 0.25


def test_per_token_means_are_ratios_of_sums():
    """Of lengths that go with the text: the mean of ratios would be another number."""
    setting = Setting(lambda b: b * DOG)
    lengths = 1 + WORDS(TEXTS).long()
    runs = []
    for seed in range(150):
        rollout = setting.policy.draw(100, seed, 2)
        rollout = dataclasses.replace(rollout, lengths=lengths[rollout.tokens[:, 1]])
        scores = setting.target.score(rollout)
        se = torch.zeros(2).double()
        runs.append(metrics.measure(rollout, scores, rollout.log_q, setting.log_z, se))
    tokens = (setting.pi * lengths).sum()
    exact = {
        "entropy_per_token": -(setting.pi * setting.pi.log()).sum() / tokens,
        "base_perplexity": (-(setting.pi * setting.a.log()).sum() / tokens).exp(),
        "length": tokens / 2,
    }
    for name, value in exact.items():
        values, errors = ([run[key].item() for run in runs] for key in (name, f"{name}_se"))
        assert_consistent(values, errors, value.item())


def test_logprob_gap_sees_sampled_tokens_only():
    rollout = toy_model().draw(3, 0)
    sampler = torch.zeros(3, 200)
    trainer = torch.zeros(3, 200)
    rollout = dataclasses.replace(
        rollout, token_logprob=sampler, lengths=torch.tensor([200, 100, 1])
    )
    trainer[0, :5] = torch.tensor([0.5, -0.4, 0.3, 0.2, 0.1])
    trainer[1, 0] = 0.05
    trainer[2, 1:] = 9.0  # past the end
    gap = metrics.logprob_gap(trainer, rollout)
    assert gap["gap_max"].item() == pytest.approx(0.5)
    assert gap["gap_p99"].item() == pytest.approx(0.2)  # 301 tokens: the fourth largest
    assert gap["gap_mean"].item() == pytest.approx(1.55 / 301)
    assert gap["gap_sequence_max"].item() == pytest.approx(0.7)
    assert gap["gap_sequence_p99"].item() == pytest.approx(0.7)
    assert gap["gap_sequence_mean"].item() == pytest.approx((0.7 + 0.05) / 3)
    trainer[1, :100] = math.nan  # of weight 0, hence not computed
    gap = metrics.logprob_gap(trainer, rollout)
    assert gap["gap_mean"].item() == pytest.approx(1.5 / 201)
    assert gap["gap_sequence_mean"].item() == pytest.approx(0.7 / 2)
    gap = metrics.logprob_gap(torch.full_like(trainer, math.nan), rollout)
    assert all(value.isnan() for value in gap.values()), "nothing was measured"


def test_measure_takes_its_log_z_from_a_partition(setting):
    partition = Partition(2)
    rollout, scores, _ = setting.estimates(100, 0)
    log_z = partition.update(rollout, scores.log_score)
    log_pi = setting.policy.sequence_logprob(rollout)
    measured = metrics.measure(rollout, scores, log_pi, log_z, partition.standard_error)
    assert measured["log_z"].item() == pytest.approx(log_z.mean().item())
    expected = partition.standard_error.square().sum().sqrt() / 2
    assert measured["log_z_se"].item() == pytest.approx(expected.item())


def test_nothing_in_a_step_asks_the_device():
    """On fake tensors, which have no values: an .item() or a branch on one raises."""
    setting = Setting(lambda b: b * DOG)
    rollout, scores, _ = setting.estimates(10, 0)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def fake(thing):
            tensors = {k: mode.from_tensor(v) for k, v in vars(thing).items() if torch.is_tensor(v)}
            return dataclasses.replace(thing, **tensors)

        rollout, scores = fake(rollout), fake(scores)
        scores = dataclasses.replace(scores, features={"dog": torch.empty(20).double()})
        for mode_of_z in ("running", "batch"):
            partition = Partition(2, mode_of_z)
            log_z = partition.update(rollout, scores.log_score)
            error = partition.standard_error
            measured = metrics.measure(rollout, scores, rollout.log_q, log_z, error)
        measured |= metrics.measure_target(rollout, scores, log_z)
        measured |= metrics.logprob_gap(rollout.token_logprob, rollout)
    assert all(isinstance(value, FakeTensor) and value.ndim == 0 for value in measured.values())


# -- texts ---------------------------------------------------------------------------------------


def test_distinct_n_by_hand():
    texts = ["a b a", "A b!"]
    assert metrics.distinct_n(texts, 1) == 2 / 5
    assert metrics.distinct_n(texts, 2) == 2 / 3  # ab ba ab
    assert metrics.distinct_n(texts, 3) == 1.0
    assert math.isnan(metrics.distinct_n(texts, 4))
    assert math.isnan(metrics.distinct_n(["", "!"], 1))


def test_self_bleu_of_equal_and_of_unlike_texts():
    same = ["the dog ran over the hill today"] * 4
    unlike = [" ".join(f"w{i}x{j}" for j in range(8)) for i in range(4)]
    assert metrics.self_bleu(same) == pytest.approx(1.0)
    assert metrics.self_bleu(unlike) < 0.1
    assert metrics.self_bleu(unlike) < metrics.self_bleu(same[:2] + unlike[:2]) < 1
    assert math.isnan(metrics.self_bleu(["only one", " "]))


def test_self_bleu_subset_is_seeded():
    texts = [f"the {a} saw the {b} again" for a in "abcdefghij" for b in "klmnopqrst"]
    assert metrics.self_bleu(texts, most=8, seed=1) == metrics.self_bleu(texts, most=8, seed=1)
    assert metrics.self_bleu(texts, most=8, seed=1) != metrics.self_bleu(texts, most=8, seed=2)


def test_measure_texts_on_real_stories(shared):
    """More alike the narrower the choice: one sentence over and over, against real stories."""
    stories = json.loads((shared / "data/tinystories-1000/tinystories_clean.json").read_text())
    lines = [" ".join(str(story).split()[:40]) for story in stories[:40]]
    varied, narrow = metrics.measure_texts(lines), metrics.measure_texts(lines[:2] * 20)
    assert set(varied) == {"distinct_1", "distinct_2", "distinct_3", "self_bleu"}
    assert varied["distinct_2"] > narrow["distinct_2"]
    assert varied["self_bleu"] < narrow["self_bleu"]


# -- what should not be --------------------------------------------------------------------------


def test_negative_kl_is_implausible():
    assert metrics.implausible({"kl_to_base": -0.2, "kl_to_base_se": 0.1}) is None
    said = metrics.implausible({"kl_to_base": -0.4, "kl_to_base_se": 0.1})
    assert "-0.4 ± 0.1" in said
    assert "Likely causes" in said


def test_kl_far_from_that_of_the_target_is_a_runaway():
    assert metrics.runaway({"kl_to_base": 4.5, "kl_target_base": 3.7}) is None
    assert "learning rate" in metrics.runaway({"kl_to_base": 300.0, "kl_target_base": 3.7})
    assert metrics.runaway({"kl_to_base": 300.0, "kl_target_base": math.nan}) is None


# -- pass@k ----------------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_subsets_with_a_sample_that_passes() -> None:
    """Of every number that can pass of 7, and all subsets."""
    n = 7
    for k in range(1, n + 1):
        rows = [[float(i < c) for i in range(n)] for c in range(n + 1)]
        shares = [
            sum(any(subset) for subset in itertools.combinations(row, k)) / math.comb(n, k)
            for row in rows
        ]
        passed = torch.tensor(rows).flatten()
        prompt = torch.arange(n + 1).repeat_interleave(n)
        value, _ = metrics.pass_at_k(passed, prompt, n + 1, k)
        assert value.dtype == torch.float64
        assert value.item() == pytest.approx(sum(shares) / len(shares), rel=1e-14)
        # Prompts need not have equally many samples.
        uneven = torch.cat([passed[-n:], torch.zeros(n + 3)])
        prompt = torch.tensor([0] * n + [1] * (n + 3))
        assert metrics.pass_at_k(uneven, prompt, 2, k)[0].item() == 0.5


def test_pass_at_k_is_unbiased_over_all_outcomes_of_n_samples() -> None:
    rate, n = 0.2, 5
    for k in (1, 2, 4, 5):
        expected = 0.0
        for outcome in itertools.product([0, 1], repeat=n):
            chance = rate ** sum(outcome) * (1 - rate) ** (n - sum(outcome))
            one = torch.zeros(n, dtype=torch.int64)
            expected += chance * metrics.pass_at_k(torch.tensor(outcome), one, 1, k)[0].item()
        assert expected == pytest.approx(1 - (1 - rate) ** k, rel=1e-13)


def test_pass_at_k_is_exact_where_it_is_small() -> None:
    """One of 4,096 passes: k/n. Quotients of factorials are out of range, differences of their
    logs lose what is left."""
    passed = torch.zeros(4096)
    passed[7] = 1
    zeros = torch.zeros(4096, dtype=torch.int64)
    for k in (1, 16, 1024):
        value, _ = metrics.pass_at_k(passed, zeros, 1, k)
        assert value.item() == pytest.approx(k / 4096, rel=1e-12)


@pytest.mark.parametrize("k", [1, 4])
def test_the_error_of_pass_at_k_is_its_spread(k: int) -> None:
    rates, n, draws = torch.tensor([0.05, 0.3, 0.0]), 16, 4000
    generator = torch.Generator().manual_seed(0)
    prompt = torch.arange(3).repeat_interleave(n)
    found = torch.stack(
        [
            torch.stack(metrics.pass_at_k(batch, prompt, 3, k))
            for batch in torch.rand(draws, 3 * n, generator=generator) < rates[prompt]
        ]
    )
    spread, claimed = found[:, 0].std(), found[:, 1].square().mean().sqrt()
    assert 0.97 < claimed / spread < (1.03 if k == 1 else 1.15)
    assert metrics.pass_at_k(torch.ones(4), torch.arange(4) // 2, 2, 2)[1].isnan()


def test_pass_at_powers_of_what_a_sample_can_pass() -> None:
    base = Base(toy_model(2, seed=1))
    target = base.constrain({DOG: 1.0, contains("she", name="she"): 0.5}).reward(WORDS, beta=1.0)
    target.load_state_dict({"she": 0.0})
    assert target.verdicts == ("dog",)
    assert base.reward(DOG, beta=0.1).verdicts == ("dog",)
    assert base.constrain({DOG: 0.0}).verdicts == ()
    rollout = base.model.draw(16, seed=0, prompts=2)
    found = metrics.pass_at_powers(rollout, target.score(rollout), target.verdicts)
    ks = ["pass@1: dog", "pass@1_se: dog", "pass@4: dog", "pass@4_se: dog", "pass@16: dog"]
    assert list(found) == ks
    dogs = torch.tensor(["dog" in text for text in rollout.texts])
    assert found["pass@1: dog"].item() == pytest.approx(dogs.double().mean().item())
    assert found["pass@16: dog"].item() == dogs.view(2, 16).any(1).double().mean().item()
    for one in (base.model.draw(16, seed=0), base.model.draw(1, seed=0, prompts=2)):
        assert metrics.pass_at_powers(one, target.score(one), target.verdicts) == {}

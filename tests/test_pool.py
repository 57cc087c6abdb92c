"""Several models on the samples of all of them, where every divergence can be written out."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from toy_language import TEXTS, ToyModel

from fdpg_fast import reference
from fdpg_fast.divergences import Divergence
from fdpg_fast.pool import Pool
from fdpg_fast.scorers import contains, length
from fdpg_fast.targets import Base, Target

DOG = contains("dog", name="dog")
WHICH = tuple(map(Divergence.parse, ("kl", "reverse_kl", "tv", "js", "alpha(0.5)")))
PROMPTS, RUNS, DRAWS = 2, 150, 200
LENGTHS = torch.tensor([len(text.split()) for text in TEXTS]).double()


class Setting:
    """A base and three models: near to it, near to that one, and one that has collapsed."""

    def __init__(self, pointwise: bool) -> None:
        generator = torch.Generator().manual_seed(4)

        def noise(scale: float) -> torch.Tensor:
            return scale * torch.randn(PROMPTS, len(TEXTS), generator=generator).double()

        a = noise(1.0)
        near = a + noise(0.7)
        collapsed = near.clone()
        collapsed[:, 2] += 9.0  # "she saw the dog": what else p wants is drawn once in 500 times
        self.models = [ToyModel(x) for x in (a, near, near + noise(0.05), collapsed)]
        self.base = Base(self.models[0])
        self.target: Target = (
            self.base * DOG if pointwise else self.base.reward(length("words"), beta=1.0)
        )
        log_score = self.target.log_score(self.models[0].everything(PROMPTS)).view(PROMPTS, -1)
        self.log_z = log_score.logsumexp(-1)
        self.p = log_score.softmax(-1)

    def draw(self, seed: int, count: int = DRAWS) -> Pool:
        """Every model turns the same random numbers into texts."""
        uniform = torch.rand(PROMPTS, count, generator=torch.Generator().manual_seed(seed)).double()
        prompt = torch.arange(PROMPTS).repeat_interleave(count)
        rollouts = []
        for model in self.models:
            cumulative = model.log_prob.exp().cumsum(-1)
            texts = torch.searchsorted(cumulative, uniform).clamp(max=len(TEXTS) - 1)
            rollouts.append(model.rollout(texts.flatten(), prompt, PROMPTS))
        said = [torch.cat([m.sequence_logprob(r) for r in rollouts]) for m in self.models]
        return Pool(rollouts, [self.target.score(r) for r in rollouts], torch.stack(said))

    def exact(self, model: int, divergence: Divergence) -> float:
        """Mean over prompts of E_p f(pi/p) + f'(inf) pi(p = 0), by the definition."""
        formula, a = reference.FORMULAS[divergence.name], divergence.param
        pi, on = self.models[model].log_prob.exp(), self.p > 0
        ratio = torch.where(on, pi / self.p, 1.0)
        value = torch.where(on, self.p * formula.f(torch, ratio, a), 0.0).sum()
        off = torch.where(on, 0.0, pi).sum().item()
        return (value.item() + (formula.f_prime_inf(a) * off if off else 0.0)) / PROMPTS


@pytest.fixture(scope="module", params=["reward", "pointwise"])
def setting(request: pytest.FixtureRequest) -> Setting:
    return Setting(request.param == "pointwise")


@pytest.fixture(scope="module")
def pools(setting: Setting) -> list[Pool]:
    return [setting.draw(seed) for seed in range(RUNS)]


def assert_right(values: list[float], errors: list[float], exact: float) -> None:
    """No bias that 150 runs can see, a true standard error, and 95 % within two of them."""
    value, error = torch.tensor(values), torch.tensor(errors)
    assert abs(value.mean() - exact) < 4 * value.std() / math.sqrt(len(value))
    assert error.square().mean().sqrt().item() == pytest.approx(value.std().item(), rel=0.2)
    assert 0.88 <= ((value - exact).abs() <= 2 * error).double().mean() < 1


@pytest.mark.parametrize("divergence", WHICH, ids=str)
@pytest.mark.parametrize("model", range(4))
def test_divergences_are_right_within_their_errors(
    setting: Setting, pools: list[Pool], model: int, divergence: Divergence
) -> None:
    exact = setting.exact(model, divergence)
    found = [pool.divergences(model, [divergence]) for pool in pools]
    values = [one[str(divergence)].item() for one in found]
    if math.isinf(exact):
        assert all(math.isinf(value) for value in values)
    else:
        assert_right(values, [one[f"{divergence}_se"].item() for one in found], exact)


def test_log_z_is_that_of_all(setting: Setting, pools: list[Pool]) -> None:
    targets = [pool.target() for pool in pools]
    values, errors = ([one[k].item() for one in targets] for k in ("log_z", "log_z_se"))
    assert_right(values, errors, setting.log_z.mean().item())


def test_what_the_target_is_itself(setting: Setting, pools: list[Pool]) -> None:
    name = setting.target.factors[0].scorers[0].name
    feature = setting.target.factors[0].scorers[0](TEXTS)
    targets = [pool.target() for pool in pools]
    values = [one[f"moment: {name}"].item() for one in targets]
    exact = (setting.p @ feature).mean().item()
    if name == "dog":
        assert values == pytest.approx([1.0] * RUNS)
    else:
        assert_right(values, [one[f"moment_se: {name}"].item() for one in targets], exact)


@pytest.mark.parametrize("name", ["entropy", "entropy_per_token"])
def test_the_targets_entropy_is_as_uncertain_as_its_normaliser(
    setting: Setting, pools: list[Pool], name: str
) -> None:
    """-log p has log Z in it, which comes from the same samples: errors may add up, or cancel."""
    targets = [of_lengths(pool).target() for pool in pools]
    surprise = torch.where(setting.p > 0, -setting.p.log(), 0.0)
    exact = (setting.p * surprise).sum(1).mean().item()
    if name == "entropy_per_token":
        exact /= (setting.p @ LENGTHS).mean().item()
    values, errors = ([one[k].item() for one in targets] for k in (name, f"{name}_se"))
    assert_right(values, errors, exact)


def of_lengths(pool: Pool) -> Pool:
    """The same of texts that are longer than a token."""
    rollouts = [
        dataclasses.replace(r, lengths=LENGTHS.long()[r.tokens[:, 1]]) for r in pool.rollouts
    ]
    return Pool(rollouts, pool.of_rollouts, pool.log_prob)


def test_a_collapsed_model_does_not_see_what_it_misses() -> None:
    """Why samples are pooled: its own say that it is half as far from p as it is."""
    setting, kl = Setting(pointwise=True), WHICH[0]
    exact = setting.exact(3, kl)
    alone, pooled = [], []
    for seed in range(RUNS):
        pool = setting.draw(seed, 20)
        pooled.append(pool.divergences(3, [kl])["kl"].item())
        own = slice(-20 * PROMPTS, None)
        weight = pool.scores.log_score - pool.log_prob[3] - setting.log_z[pool.rollout.prompt_index]
        t = -weight[own][weight[own] > -math.inf]
        alone.append(((-t).exp() * t.neg()).sum().item() / (20 * PROMPTS))
    assert torch.tensor(pooled).median().item() == pytest.approx(exact, rel=0.15)
    assert torch.tensor(alone).median().item() < 0.5 * exact


def test_a_prompt_without_a_target_is_left_out() -> None:
    setting = Setting(pointwise=True)
    pool = setting.draw(0)
    rollouts = [m.draw(DRAWS, 0, PROMPTS) for m in setting.models]
    scores = [setting.target.score(r) for r in rollouts]
    for rollout, score in zip(rollouts, scores, strict=True):
        score.log_score[rollout.prompt_index == 0] = -math.inf
    said = [torch.cat([m.sequence_logprob(r) for r in rollouts]) for m in setting.models]
    half = Pool(rollouts, scores, torch.stack(said))
    assert half.log_z[0] == -math.inf
    measured = {**half.divergences(1, WHICH), **half.target()}
    assert measured["kl"].item() == pytest.approx(pool.divergences(1, WHICH)["kl"].item(), rel=0.9)
    assert all(v.isfinite() for k, v in measured.items() if not k.startswith("reverse_kl"))

"""Rejection sampling on a language of eight texts, where every law can be written out."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_report import Page
from tiny import write_tiny_model
from torch import Tensor
from toy_language import TEXTS, ToyModel, toy_model

from fdpg_fast import cli, ops, reference
from fdpg_fast.divergences import Divergence
from fdpg_fast.metrics import PAPER
from fdpg_fast.rejection import Curve, Rejection, RejectionError, Wish, curve_page, show_beta
from fdpg_fast.rollout import PromptBatch, Rollout
from fdpg_fast.scorers import contains, function, length
from fdpg_fast.targets import Base, Target

DOG = contains("dog", name="dog")
PROMPTS = 2
BETAS = (0.0, 1.0, 2.0, 8.0, 50.0)


def log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf


class ToySampler:
    """Draws from a table by keyed random numbers, as the real one does from a model."""

    def __init__(self, batch_size: int = 4096) -> None:
        self.batch_size = batch_size

    def draw(
        self,
        model: ToyModel,
        prompts: PromptBatch,
        each: int,
        key: int,
        *,
        first_sample_id: int = 0,
    ) -> Rollout:
        index = torch.arange(len(prompts)).repeat_interleave(each)
        ids = torch.arange(first_sample_id, first_sample_id + len(index))
        logits = model.log_prob[prompts.ids[index]]
        texts = ops.sample_logprob(logits, key, ids, torch.zeros_like(ids)).token
        drawn = model.rollout(texts, prompts.ids[index], PROMPTS)
        return dataclasses.replace(drawn, prompt_index=index, sample_ids=ids, prompts=prompts)


class Setting:
    """A base, a proposal that is not it, and a target; all laws are ``(G, X)`` tables."""

    def __init__(self, pointwise: bool) -> None:
        self.a, self.q = toy_model(PROMPTS, seed=0), toy_model(PROMPTS, seed=5)
        self.base = Base(self.a)
        self.target: Target = (
            self.base * DOG if pointwise else self.base.reward(length("words"), beta=2.0)
        )
        log_score = self.target.log_score(self.a.everything(PROMPTS)).view(PROMPTS, -1)
        self.score = log_score.exp()
        self.p = log_score.softmax(-1)
        self.top = (self.score / self.q.log_prob.exp()).max().item()
        texts = tuple(f"prompt {g}" for g in range(PROMPTS))
        self.prompts = PromptBatch(torch.arange(PROMPTS), ((0,),) * PROMPTS, texts)

    def rejection(self, *, seed: int = 0, batch: int = 4096, base: bool = False) -> Rejection:
        model = self.a if base else self.q
        return Rejection(model, self.target, ToySampler(batch), self.prompts, seed=seed)  # type: ignore[arg-type]

    def law(self, beta: float) -> tuple[Tensor, float]:
        """p_beta, and the acceptance rate."""
        q = self.q.log_prob.exp()
        accepted = torch.minimum(self.score, beta * q) / beta if beta else q * (self.score > 0)
        return accepted / accepted.sum(-1, keepdim=True), accepted.sum(-1).mean().item()

    def exact(self, beta: float, f: Divergence) -> float:
        """D_f(p_beta || p) by the definition, mean over prompts."""
        on = self.p > 0
        t = torch.where(on, self.law(beta)[0] / self.p, 1.0)
        values = self.p * reference.FORMULAS[f.name].f(torch, t, f.param)
        return torch.where(on, values, 0.0).sum().item() / PROMPTS


@pytest.fixture(scope="module", params=["reward", "pointwise"])
def setting(request: pytest.FixtureRequest) -> Setting:
    return Setting(request.param == "pointwise")


@pytest.fixture(scope="module")
def curves(setting: Setting) -> list[Curve]:
    return [setting.rejection(seed=seed).look(4_000) for seed in range(150)]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def chi_squared(accepted: list[tuple[str, str]], law: Tensor) -> float:
    """Over its degrees of freedom; about 1 if the texts have that law, prompt by prompt."""
    total, freedom = 0.0, 0
    for g in range(PROMPTS):
        seen = Counter(text for prompt, text in accepted if prompt == f"prompt {g}")
        expected = law[g] * seen.total()
        for text, count in zip(TEXTS, expected.tolist(), strict=True):
            assert (seen[text] == 0) or count > 0, f"{text!r} is impossible"
            total += (seen[text] - count) ** 2 / count if count else 0.0
        freedom += int((law[g] > 0).sum()) - 1
    return total / freedom


def distance(accepted: list[tuple[str, str]], p: Tensor) -> float:
    """Total variation between what was accepted and p, mean over prompts."""
    total = 0.0
    for g in range(PROMPTS):
        seen = Counter(text for prompt, text in accepted if prompt == f"prompt {g}")
        share = torch.tensor([seen[text] / seen.total() for text in TEXTS], dtype=torch.float64)
        total += (share - p[g]).abs().sum().item() / 2
    return total / PROMPTS


@pytest.mark.parametrize("beta", BETAS)
def test_what_is_accepted_has_the_law(setting: Setting, beta: float) -> None:
    law, rate = setting.law(beta)
    rejection = setting.rejection()
    accepted = list(rejection.take(log(beta), 2_000, 1_000_000))
    assert len(accepted) == 2_000 * PROMPTS
    assert chi_squared(accepted, law) < 2.6  # 1 in 1000 with 14 degrees of freedom
    predicted = setting.exact(beta, Divergence.parse("tv"))
    assert distance(accepted, setting.p) == pytest.approx(predicted, abs=0.03)  # 2000 tell no more
    if predicted > 0.05:
        assert chi_squared(accepted, setting.p) > 10  # it is not p yet
    harmonic = PROMPTS / sum(1 / a for a in acceptance_by_prompt(setting, beta))
    assert len(accepted) / rejection.proposals == pytest.approx(harmonic, rel=0.05)
    assert 0 < rate <= 1


def acceptance_by_prompt(setting: Setting, beta: float) -> list[float]:
    q = setting.q.log_prob.exp()
    share = (setting.score / (beta * q)).clamp(max=1) if beta else (setting.score > 0).double()
    return (q * share).sum(-1).tolist()


def test_from_the_largest_weight_on_it_is_the_target(setting: Setting) -> None:
    accepted = list(setting.rejection(seed=1).take(log(setting.top), 2_000, 1_000_000))
    assert chi_squared(accepted, setting.p) < 2.6


def test_conditions_on_the_base_need_no_beta() -> None:
    setting = Setting(pointwise=True)
    rejection = setting.rejection(base=True)
    assert chi_squared(list(rejection.take(-math.inf, 5_000, 1_000_000)), setting.p) < 2.6
    assert rejection.law(-math.inf) == "p itself: the base without what breaks a condition"
    # Of the tuned model it is another law, and a target with more in it than conditions too.
    assert "not p" in setting.rejection().law(-math.inf)
    setting.target = setting.target.reward(length("words"), beta=1.0)
    assert "not p" in setting.rejection(base=True).law(-math.inf)


@pytest.mark.parametrize("beta", [b for b in BETAS if b < 50])
def test_the_curve_is_right_within_its_errors(
    setting: Setting, curves: list[Curve], beta: float
) -> None:
    points = [curve.at(log(beta)) for curve in curves]
    pairs = {"accept": ([p.accept for p in points], setting.law(beta)[1])}
    pairs |= {
        str(f): ([p.divergences[str(f)] for p in points], setting.exact(beta, f)) for f in PAPER
    }
    for name, (estimates, exact) in pairs.items():
        value, error = torch.tensor(estimates, dtype=torch.float64).unbind(1)
        assert value.mean().item() == pytest.approx(exact, rel=0.03, abs=1e-3), name
        assert error.square().mean().sqrt().item() == pytest.approx(
            value.std().item(), rel=0.25, abs=1e-4
        ), name
        if exact > 0.01:
            assert ((value - exact).abs() <= 2 * error).double().mean() > 0.85, name


def test_distance_falls_with_beta_and_ends_at_nothing(
    setting: Setting, curves: list[Curve]
) -> None:
    points = curves[0].points()
    assert [point.log_beta for point in points] == sorted({point.log_beta for point in points})
    assert points[0].log_beta == -math.inf
    for name in ("kl", "reverse_kl", "tv", "js"):
        distance = [point.divergences[name][0] for point in points]
        assert distance == sorted(distance, reverse=True)
        assert distance[0] > 0.05
        assert distance[-1] == pytest.approx(0, abs=1e-9)
    rates = [point.accept[0] for point in points]
    assert rates == sorted(rates, reverse=True)
    assert rates[1] == pytest.approx(0.98 * rates[0], rel=1e-3)  # the curve has both its ends
    assert points[-1].log_beta == curves[0].top
    steps = [b.log_beta - a.log_beta for a, b in itertools.pairwise(points[1:])]
    assert steps == pytest.approx([steps[0]] * 11)


@pytest.mark.parametrize("constant", [4000.0, -4000.0])
def test_the_scale_of_the_target_is_of_no_account(constant: float) -> None:
    """P is known up to a constant, and exp(4000) is no number: beta is a log throughout."""
    setting = Setting(pointwise=False)
    plain = setting.rejection()
    curve = plain.look(1_000)
    setting.target = setting.target.reward(function(lambda texts: [constant] * len(texts)), beta=1)
    scaled = setting.rejection()
    other = scaled.look(1_000)
    points = [curve.points(), other.points()]
    for ours, theirs in zip(*points, strict=True):
        assert theirs.log_beta == pytest.approx(ours.log_beta + constant, abs=1e-5)
        assert theirs.accept == pytest.approx(ours.accept, rel=1e-4)
        for name, pair in ours.divergences.items():
            assert theirs.divergences[name] == pytest.approx(pair, rel=1e-3, abs=1e-6)
    for wish in ("accept=0.2", "tv=0.1"):
        ours, theirs = (Wish.parse(wish).log_beta(one) for one in (curve, other))
        assert theirs == pytest.approx(ours + constant, abs=1e-5)
    taken = list(plain.take(log(2), 50, 10_000))
    assert list(scaled.take(log(2) + constant, 50, 10_000)) == taken

    log_beta = other.top
    shown = show_beta(log_beta)
    assert shown.startswith("exp(")
    assert Wish.parse(f"beta={shown}").log_beta(other) == pytest.approx(log_beta, abs=0.01)
    page = Page(curve_page("title", scaled.law(log_beta), other, points[1], log_beta))
    assert f"min(P(x), {shown} q(x))" in page.words
    assert not {"inf", "nan"} & set(re.findall(r"\w+", page.words))
    for link in page.links:  # points are where they were, and not at the end of the numbers
        drawn = base64.b64decode(link.partition("base64,")[2]).decode()
        assert "nan" not in drawn
        assert "exp(" in drawn


def test_a_beta_beyond_everything_accepts_nothing(setting: Setting) -> None:
    rejection = setting.rejection()
    curve = rejection.look(100)
    beyond = Wish.parse("beta=exp(4000)").log_beta(curve)
    points = [*curve.points(), curve.at(beyond)]
    assert points[-1].accept[0] == 0
    assert "exp(4000.00) *" in curve_page("title", "law", curve, points, beyond)
    assert list(rejection.take(beyond, 1, 100)) == []


def test_prompts_of_different_scale_have_one_beta() -> None:
    """Where it is nothing beside P/q, all is accepted and p_beta is q."""
    setting = Setting(pointwise=False)
    curve = setting.rejection().look(1_000)
    far = function(lambda texts, prompts: [4000.0 * (p == "prompt 1") for p in prompts], name="far")
    setting.target = setting.target.reward(far, beta=1)
    point = setting.rejection().look(1_000).at(log(8))
    near = curve.at(log(8))
    first, second = (acceptance_by_prompt(setting, beta) for beta in (8, 0))
    assert point.accept[0] == pytest.approx((first[0] + second[1]) / 2, rel=0.1)
    assert near.divergences["tv"][0] < point.divergences["tv"][0] < 1


@pytest.mark.parametrize("wish", ["accept=0.2", "accept=0.001", "tv=0.1", "beta=3"])
def test_beta_by_what_it_gives(setting: Setting, curves: list[Curve], wish: str) -> None:
    kind, _, number = wish.partition("=")
    curve = curves[0]
    point = curve.at(Wish.parse(wish).log_beta(curve))
    found = {"accept": point.accept[0], "tv": point.divergences["tv"][0]}
    found["beta"] = math.exp(point.log_beta)
    assert found[kind] == pytest.approx(float(number), rel=1e-3)


def test_what_is_met_anyway_needs_no_beta(curves: list[Curve]) -> None:
    everything = curves[0].at(-math.inf)
    assert Wish.parse("accept=1").log_beta(curves[0]) == -math.inf or everything.accept[0] == 1
    assert Wish.parse("tv=1").log_beta(curves[0]) == -math.inf


NO_WISHES = "beta beta=0 beta=x beta=1e400 beta=exp(x) accept=1.5 accept=exp(-1) tv=0 rate=1 3"


@pytest.mark.parametrize("text", NO_WISHES.split())
def test_a_wish_that_cannot_be(text: str) -> None:
    with pytest.raises(RejectionError, match=r"expected beta=NUMBER .*, got '"):
        Wish.parse(text)


def test_batches_do_not_matter_and_seeds_do(setting: Setting) -> None:
    small, large = (setting.rejection(batch=b) for b in (7, 4096))
    drawn = [list(r.take(log(2), 50, 10_000)) for r in (small, large)]
    assert drawn[0] == drawn[1]
    assert small.proposals == large.proposals
    assert drawn[0] != list(setting.rejection(seed=1).take(log(2), 50, 10_000))


def test_it_streams_and_keeps_to_the_budget(setting: Setting) -> None:
    rejection = setting.rejection(batch=16)
    taken = rejection.take(log(8), 100, 20)
    next(taken)
    assert rejection.proposals <= 16
    assert len(list(taken)) < 200
    assert rejection.proposals == 20 * PROMPTS


def test_a_target_that_was_not_seen_is_said_so() -> None:
    setting = Setting(pointwise=True)
    setting.target = setting.base * contains("unicorn")
    with pytest.raises(RejectionError, match="none of prompt 'prompt 0' is possible") as error:
        setting.rejection().look(100)
    assert "--look" in str(error.value)


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rejection")
    model = write_tiny_model(folder / "model")
    words = [
        *("train", "dog", "--model.name", str(model), "--out", str(folder / "run")),
        *("--run.steps", "2", "--run.evaluation_samples", "0", "--prompts.source", "once there"),
        *("--sampling.max_new_tokens", "6", "--sampling.samples_per_prompt", "32"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fdpg_fast.trainer.write_report", lambda runs, path: path)
        assert cli.main(words) == 0
    return folder / "run"


def said(
    capsys: pytest.CaptureFixture[str], run: Path, *words: str, code: int = 0
) -> tuple[list[str], str]:
    """The samples on stdout, and stderr."""
    assert cli.main(["sample", str(run), "--jsonl", *words]) == code
    seen = capsys.readouterr()
    return [json.loads(line)["sample"] for line in seen.out.splitlines()], seen.err


def test_command_gives_samples_of_the_target_and_the_curve(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--qrs", "accept=0.1", "-n", "8", "--seed", "0", "--look", "256")
    samples, err = said(capsys, run, *words)
    assert len(samples) == 8
    assert all("dog" in sample.split() for sample in samples)
    for word in ("from 256 proposals", "accepted", "min(P(x)", "took    8 of"):
        assert word in err
    page = Page((run / "qrs.html").read_text(encoding="utf-8"))
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    assert len(page.links) == 5
    assert page.open == []
    assert "KL(p‖p_β)" in page.words
    again, _ = said(capsys, run, *words)
    assert again == samples


def test_command_rejects_plainly(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned, err = said(capsys, run, "--reject", "-n", "4", "--seed", "0")
    assert "law     q without what the target forbids: not p" in err
    base, err = said(capsys, run, "--reject", "--proposal", "base", "-n", "4", "--seed", "0")
    assert "law     p itself" in err
    assert all("dog" in sample.split() for sample in (*tuned, *base))


def test_command_ends_with_the_budget(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples, err = said(
        capsys, run, "--reject", "-n", "40", "--budget", "20", "--seed", "0", code=1
    )
    assert len(samples) < 20
    assert f"{len(samples)} of 40 texts, then the budget of 20 proposals" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--qrs", "accept=2"], "expected beta=NUMBER"),
        (["--qrs", "beta=1", "--reject"], "one of them"),
        (["--budget", "5"], "belong to --qrs or --reject"),
        (["--proposal", "mine", "--reject"], "choose from"),
    ],
)
def test_command_refuses_with_one_message(
    run: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    _, err = said(capsys, run, *words, code=2)
    assert message in err
    assert len(err.strip().splitlines()) == 1

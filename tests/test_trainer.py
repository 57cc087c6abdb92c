"""The trainer: what a step does, what it refuses, and that resuming changes nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tiny import write_tiny_model

import fdpg_fast as fdpg
from fdpg_fast import checkpoint, evaluation, ops
from fdpg_fast import trainer as training
from fdpg_fast.building import model_of, sampler_of, tuned_of
from fdpg_fast.config import Config, ConfigError
from fdpg_fast.evaluation import draw_texts, evaluate_run
from fdpg_fast.metrics import PAPER
from fdpg_fast.pool import Pool
from fdpg_fast.progress import PlainDisplay, SilentDisplay
from fdpg_fast.rejection import Rejection
from fdpg_fast.rollout import Finish, Rollout
from fdpg_fast.run_directory import RunDirectory, RunDirectoryError
from fdpg_fast.targets import Base, Scores, Target
from fdpg_fast.trainer import Trainer, TrainingError

SETTINGS: dict[str, Any] = {
    "max_new_tokens": 6,
    "samples_per_prompt": 32,
    "learning_rate": 3e-3,
    "steps": 6,
    "evaluation_samples": 0,
    "table_every": 2,
}


class Listener(SilentDisplay):
    """A display that keeps what it is told, and may act on it."""

    def __init__(self, at_step: Callable[[Mapping[str, Any]], None] | None = None) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.records: list[Mapping[str, Any]] = []
        self._at_step = at_step

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def step(self, record: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        self.records.append(record)
        if self._at_step:
            self._at_step(record)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The model is far too small to share: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Two seconds of plots for each run are only drawn where they are looked at."""
    if "plots" not in request.node.name:
        for module in (training, evaluation):
            monkeypatch.setattr(module, "write_report", lambda runs, path: path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def base(folder: Path) -> Base:
    return fdpg.load(str(folder))


def dogs(base: Base) -> Target:
    return base.constrain({fdpg.contains("dog"): 1.0})


def trainer(target: Target, **settings: Any) -> Trainer:
    given = {"display": Listener(), "prompts": "once there was", **SETTINGS, **settings}
    return Trainer(target, **given)


def weights(of: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in of.parameters.items()}


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# ---- a step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["js", "kl", "tv", "alpha(0.5)"])
def test_samples_move_to_the_target(base: Base, divergence: str) -> None:
    listener = Listener()
    run = trainer(
        dogs(base), divergence=divergence, steps=40, samples_per_prompt=64, display=listener
    )
    run.train()
    moments = [record["moment: contains 'dog'"] for record in listener.records]
    assert sum(moments[-5:]) / 5 > sum(moments[:5]) / 5 + 0.25
    assert all(record["gap_max"] < 1e-4 for record in listener.records)
    assert listener.warnings == []


def test_a_step_matches_the_formula_in_plain_pytorch(base: Base) -> None:
    """theta <- AdamW of mean_i w_i grad log pi(x_i), all of it written out."""
    run = trainer(dogs(base), baseline="none", learning_rate=1e-2)
    rollout = run.draw(run.policy, run.prompts.batch(0), 0)
    dog = torch.tensor(["dog" in text.split() for text in rollout.texts])
    log_z = dog.double().mean().log()  # samples of the base: P/q is one or zero
    log_t = torch.where(dog, log_z, math.inf)  # log pi - log P + log Z, with pi = a
    weight = -(math.log(2) - torch.nn.functional.softplus(-log_t))

    model = transformers.AutoModelForCausalLM.from_pretrained(base.model.name)
    model.train(False)
    total = torch.zeros(())
    for i, row in enumerate(rollout.tokens):
        start, end = 3, 3 + int(rollout.lengths[i])
        logits = model(row[None, :end]).logits[0, start - 1 : end - 1]
        logp = logits.log_softmax(-1).gather(1, row[start:end, None]).sum()
        total = total - weight[i].float() * logp / len(rollout)
    torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0).zero_grad()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    total.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    optimiser.step()

    seen: dict[str, torch.Tensor] = {}
    move = run._move

    def look(norm: torch.Tensor) -> None:
        seen.update({n: p.grad.clone() for n, p in run.parameters.items() if p.grad is not None})
        move(norm)

    run._move = look  # type: ignore[method-assign]
    run.step()
    for name, gradient in expected.items():
        torch.testing.assert_close(seen[name], gradient, rtol=1e-3, atol=1e-6)
    for name, parameter in model.named_parameters():
        large = expected[name].abs() > 1e-5  # Adam turns rounding of tiny gradients into steps
        torch.testing.assert_close(
            run.parameters[name][large], parameter.detach()[large], rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("micro_batch", [1, 7, 32])
def test_the_micro_batch_does_not_change_the_gradient(base: Base, micro_batch: int) -> None:
    norms = []
    for size in (None, micro_batch):
        listener = Listener()
        run = trainer(dogs(base), micro_batch=size, steps=1, display=listener)
        run.train()
        norms.append(listener.records[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_on_policy_weights_come_from_the_sampler(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = ops.fdiv_weights

    def spy(log_pi: torch.Tensor, log_q: torch.Tensor, *rest: Any, **named: Any) -> ops.Weights:
        asked.append((log_pi.clone(), log_q.clone()))
        return original(log_pi, log_q, *rest, **named)

    monkeypatch.setattr(ops, "fdiv_weights", spy)
    run = trainer(dogs(base), steps_per_batch=3)
    run.step()
    assert torch.equal(*asked[0])
    for again in (1, 2):  # later steps on the same samples score them again
        assert torch.equal(asked[again][1], asked[0][1])
        assert 1e-4 < (asked[again][0] - asked[again][1]).abs().max() < 10
    assert not torch.equal(asked[1][0], asked[2][0])


@pytest.mark.parametrize("lagging", [False, True])
@pytest.mark.parametrize("behaviour", ["sampler", "rescore"])
def test_whose_log_q_enters_the_ratio(
    base: Base, monkeypatch: pytest.MonkeyPatch, behaviour: str, lagging: bool
) -> None:
    """With a sampler that is off by 0.01 nats per token, and so tells the two apart."""
    asked: list[tuple[torch.Tensor, torch.Tensor]] = []
    drawn: list[Rollout] = []
    weigh, draw = ops.fdiv_weights, Trainer.draw

    def spy(log_pi: torch.Tensor, log_q: torch.Tensor, *rest: Any, **named: Any) -> ops.Weights:
        asked.append((log_pi.clone(), log_q.clone()))
        return weigh(log_pi, log_q, *rest, **named)

    def rough(*arguments: Any) -> Rollout:
        rollout = draw(*arguments)
        off = dataclasses.replace(
            rollout,
            token_logprob=rollout.token_logprob + 0.01,
            log_q=rollout.log_q + 0.01 * rollout.lengths,
        )
        drawn.append(off)
        return off

    monkeypatch.setattr(ops, "fdiv_weights", spy)
    monkeypatch.setattr(Trainer, "draw", rough)
    listener = Listener()
    run = trainer(
        dogs(base),
        behaviour=behaviour,
        adaptive_proposal=lagging,
        max_gap=1.0,
        steps=1,
        display=listener,
    )
    with torch.no_grad():  # the policy moves away from a proposal that lags
        run.parameters["transformer.wpe.weight"].mul_(3.0)
    before = {"pi": run.policy.frozen_copy(), "q": run.proposal.frozen_copy()}
    run.train()
    (log_pi, log_q), (rollout,) = asked[0], drawn
    scored = {name: model.sequence_logprob(rollout) for name, model in before.items()}
    expected = rollout.log_q if behaviour == "sampler" else scored["q"]
    torch.testing.assert_close(log_q, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(log_pi, scored["pi"] if lagging else expected, rtol=0, atol=1e-6)
    assert ((log_pi - log_q).abs().max() > 0.1) == lagging
    assert listener.records[0]["gap_mean"] == pytest.approx(0.01, rel=1e-2)


def test_the_gap_of_a_lagging_proposal_is_of_all_prompts(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though few samples are scored for it; those of the first prompt would be too alike."""
    run = trainer(
        dogs(base),
        adaptive_proposal=True,
        prompts=["once", "there", "was"],
        prompts_per_step=3,
        samples_per_prompt=64,
    )
    seen: list[list[int]] = []
    score = run.proposal.token_logprob

    def spy(rollout: Rollout, **named: Any) -> Any:
        seen.append(rollout.prompt_index.tolist())
        return score(rollout, **named)

    monkeypatch.setattr(run.proposal, "token_logprob", spy)
    run.step()
    (prompts,) = seen
    assert len(prompts) == training.GAP_SAMPLES
    assert min(map(prompts.count, range(3))) >= training.GAP_SAMPLES // 3


def test_the_header_says_who_attends_and_why(base: Base, folder: Path) -> None:
    padded = "fdpg_slot; scoring padded: kernels for packed sequences need a GPU"
    assert trainer(dogs(base)).header()["attention"] == padded
    eager = fdpg.load(str(folder), attention="eager")
    eager.model.scoring = "packed, by a kernel (another: has no soft cap)"  # as a GPU has it
    said = trainer(dogs(eager)).header()["attention"]
    assert said == "eager; scoring packed, by a kernel (another: has no soft cap)"


def test_a_lagging_proposal_follows_only_a_better_policy(base: Base) -> None:
    run = trainer(
        dogs(base), adaptive_proposal=True, proposal_every=3, samples_per_prompt=128, steps=40
    )

    def proposal() -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in run.proposal.model.named_parameters()}

    start = proposal()
    for _ in range(2):
        run.step()
        assert same(proposal(), start)  # not before proposal_every steps
    with torch.no_grad():
        for parameter in run.parameters.values():
            parameter.add_(torch.randn_like(parameter))  # now the policy is far worse
    run.step()
    assert same(proposal(), start)

    better = trainer(
        dogs(base), adaptive_proposal=True, proposal_every=3, samples_per_prompt=128, steps=40
    )
    first = {n: p.detach().clone() for n, p in better.proposal.model.named_parameters()}
    for _ in range(12):
        better.step()
    now = {n: p.detach().clone() for n, p in better.proposal.model.named_parameters()}
    assert not same(now, first)


def test_a_lagging_proposal_does_not_follow_into_what_it_has_not_seen(base: Base) -> None:
    """A policy that left all that q draws says so by what it lost, not by where it went; and of a
    batch without a sample that the target allows nothing is learnt."""
    run = trainer(dogs(base), adaptive_proposal=True, proposal_every=1, samples_per_prompt=64)
    rollout = run.draw(run.proposal, run.prompts.all(), 0)
    half = torch.arange(64) % 2 == 0
    start = {n: p.detach().clone() for n, p in run.proposal.model.named_parameters()}
    with torch.no_grad():
        for parameter in run.parameters.values():
            parameter.add_(1.0)

    def follows(allowed: torch.Tensor, log_pi: torch.Tensor) -> bool:
        score = torch.where(allowed, rollout.log_q, -math.inf)
        scores = Scores(rollout.log_q, score, {})
        log_z = torch.full((1,), math.log(0.5), dtype=torch.float64)
        update = SimpleNamespace(log_pi=log_pi)
        run._refresh_proposal(rollout, scores, log_z, update)  # type: ignore[arg-type]
        return not same(dict(run.proposal.model.named_parameters()), start)

    assert not follows(torch.zeros(64, dtype=torch.bool), rollout.log_q - 20)
    assert not follows(half, rollout.log_q - torch.where(half, 0.1, 20.0))
    assert follows(half, rollout.log_q + torch.where(half, 0.1, -20.0))


def test_a_lagging_proposal_reaches_the_target_too(base: Base) -> None:
    listener = Listener()
    run = trainer(
        dogs(base),
        adaptive_proposal=True,
        proposal_every=4,
        samples_per_prompt=64,
        steps=40,
        display=listener,
    )
    run.train()
    moments = [record["moment: contains 'dog'"] for record in listener.records]
    assert sum(moments[-5:]) / 5 > sum(moments[:5]) / 5 + 0.25
    assert all(record["gap_max"] < 1e-4 for record in listener.records)


def test_a_batch_enters_the_moving_average_once(base: Base) -> None:
    states = []
    for steps_per_batch in (1, 3):
        run = trainer(dogs(base), baseline="ema", steps_per_batch=steps_per_batch)
        run.step()
        states.append(run.baseline_state)
    assert torch.equal(*states)


def test_moments_are_fitted_before_training(base: Base) -> None:
    target = base.constrain({fdpg.words(["she", "her"]): 0.8})
    run = trainer(target, fit_samples=512, steps=2)
    run.train()
    assert not target.needs_fit
    assert 0 < next(iter(target.lambdas.values())) < 5


def test_lambdas_of_other_prompts_are_warned_of(base: Base) -> None:
    target = base.constrain({fdpg.contains("dog"): 0.5})
    for prompts, warns in (("once there was", False), ("once there was", False), ("a", True)):
        run = trainer(target, prompts=prompts, fit_samples=512)
        run.prepare()
        assert isinstance(run.display, Listener)
        assert any("fitted on other prompts" in one for one in run.display.warnings) == warns


@pytest.mark.parametrize("divergence", ["js", "kl"])
def test_one_sample_of_each_prompt_teaches_nothing_at_first_and_that_is_said(
    divergence: str, base: Base
) -> None:
    """In the first pass over them: each is the whole of what is known of its prompt's Z."""
    words = ("dog", "cat", "boy", "girl", "dragon", "she", "he")
    run = trainer(
        base.reward(fdpg.length("words"), beta=1.0),
        prompts=[f"once there was a {word}" for word in words],
        samples_per_prompt=1,
        steps=len(words),
        divergence=divergence,
    )
    run.train()
    assert isinstance(run.display, Listener)
    assert any("every sample had weight 0" in warning for warning in run.display.warnings)


def test_log_z_can_be_frozen_before_training(base: Base) -> None:
    listener = Listener()
    trainer(dogs(base), log_z="frozen", log_z_samples=512, steps=3, display=listener).train()
    assert len({record["log_z"] for record in listener.records}) == 1


def test_prompts_of_unequal_length(base: Base) -> None:
    listener = Listener()
    run = trainer(
        dogs(base),
        prompts=["once", "there was a cat and", "she"],
        prompts_per_step=2,
        samples_per_prompt=16,
        display=listener,
    )
    run.train()
    assert all(record["gap_max"] < 1e-4 for record in listener.records)
    assert listener.records[-1]["samples"] == 6 * 32


def test_a_users_own_divergence(base: Base, tmp_path: Path) -> None:
    tanh = fdpg.Divergence.custom(torch.tanh, name="tanh", f_prime_inf=1.0)
    run = trainer(dogs(base), divergence=tanh, steps=2, out=tmp_path, evaluation_samples=32)
    before = weights(run)
    evaluation = run.train()
    assert not same(weights(run), before)
    assert run.config.objective.divergence == evaluation["divergence"] == "tanh"
    value, error = evaluation["tuned"]["tanh"]
    assert value > 0
    assert error > 0
    assert "tanh, to the target" in RunDirectory(tmp_path).card.read_text()


def test_the_way_on_is_python_where_a_config_cannot_hold_a_part(tmp_path: Path) -> None:
    config = Config().replace(constrain=[{"contains": "dog"}])
    for name, part in {
        "whole": {"divergence": "alpha(0.5)"},
        "divergence": {"divergence": "tanh"},
        "stop": {"stop_in_python": "ran"},
        "target": {"built_in_python": "a(x)"},
    }.items():
        way_on = RunDirectory.create(tmp_path / name, config.replace(**part)).way_on()
        assert way_on.startswith("fdpg train" if name == "whole" else "in Python"), name


@pytest.mark.parametrize(
    ("schedule", "steps", "said"),
    [("linear", 8, True), ("linear", 4, False), ("constant", 8, False)],
)
def test_more_steps_than_planned_raise_the_learning_rate_and_say_so(
    schedule: str, steps: int, said: bool, base: Base, tmp_path: Path
) -> None:
    settings = {"schedule": schedule, "out": tmp_path}
    trainer(dogs(base), steps=4, **settings).train()
    listener = Listener()
    trainer(dogs(base), steps=steps, resume=True, display=listener, **settings)
    rate = "goes on as in a run of 8 steps from the start, not of 4: at 0.0015"
    assert any(rate in note for note in listener.notes) == said


def test_the_learning_rate_is_a_function_of_the_step(base: Base) -> None:
    def rates(**settings: Any) -> list[float]:
        run = trainer(dogs(base), steps=6, learning_rate=1.0, **settings)
        return [round(run.learning_rate(step), 4) for step in range(6)]

    assert rates() == [1.0] * 6
    assert rates(warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rates(warmup_steps=2, schedule="linear") == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    cosine = rates(schedule="cosine")
    assert cosine[0] == 1.0
    assert cosine[3] == 0.5
    assert cosine == sorted(cosine, reverse=True)
    for schedule in ("linear", "cosine"):  # steps after the last neither ascend nor begin anew
        run = trainer(dogs(base), steps=6, learning_rate=1.0, schedule=schedule)
        assert [run.learning_rate(step) for step in (6, 9, 12)] == [0.0] * 3


def test_gradients_are_clipped_to_the_norm(base: Base) -> None:
    run = trainer(dogs(base), max_grad_norm=1e-3)
    norms: list[float] = []
    step = run.optimiser.step

    def look(*args: Any) -> None:
        gradients = [p.grad for p in run.parameters.values() if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        step(*args)

    run.optimiser.step = look  # type: ignore[assignment, method-assign]
    run.step()
    assert norms == [pytest.approx(1e-3, rel=1e-2)]


def test_activation_checkpointing_changes_nothing_but_memory(folder: Path) -> None:
    norms = []
    for on in (False, True):
        listener = Listener()
        base = fdpg.load(str(folder), activation_checkpointing=on)
        trainer(dogs(base), steps=2, display=listener).train()
        norms.append([record["grad_norm"] for record in listener.records])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize("compute", ["bf16", "fp16"])
def test_half_compute_trains_with_fp32_weights(folder: Path, compute: str) -> None:
    listener = Listener()
    base = fdpg.load(str(folder), compute=compute)
    run = trainer(dogs(base), steps=2, display=listener)
    run.train()
    assert {p.dtype for p in run.parameters.values()} == {torch.float32}
    assert all(record["gap_mean"] < training.MAX_GAP[compute] for record in listener.records)


# ---- what stops a run --------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["reverse_kl", "reverse_chi2", "jeffreys", "alpha(2)"])
def test_a_divergence_that_is_infinite_on_the_target_is_refused(
    base: Base, tmp_path: Path, divergence: str
) -> None:
    with pytest.raises(ConfigError, match=r"smooth.*reward.*js"):
        trainer(dogs(base), divergence=divergence, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    trainer(dogs(base).smooth(1e-3), divergence=divergence, steps=1).train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": "jz"}, "Did you mean 'js'"),
        ({"baseline": "loop"}, "Did you mean 'loo'"),
        ({"baseline": "analytic"}, "kl only"),
        ({"step": 3}, "unknown key `step`"),
        ({"samples_per_prompt": 0}, "at least 1"),
        ({"prompts_per_step": 2}, "prompts_per_step"),
        ({"prompts": "once " * 40}, "do not fit the 32 tokens"),
        ({"prompts": ["once", " "]}, "prompt 1"),
        ({"prompts": []}, "at least one"),
    ],
)
def test_settings_that_cannot_be(base: Base, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(dogs(base), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": "jz"}, "Did you mean 'js'"),
        ({"divergence": "reverse_kl"}, "reverse_kl is infinite wherever"),
        ({"baseline": "loop"}, "Did you mean 'loo'"),
        ({"constrain": [{"contain": "dog"}]}, "Did you mean 'contains'"),
        ({"source": "gone.txt"}, "cannot read gone.txt"),
        ({"stop": "gone.py:stop"}, "no file 'gone.py'"),
        ({"peft": "lroa"}, "peft has no such kind"),
        ({"out": "taken"}, "holds files of something else"),
        ({"out": "taken", "resume": True}, "expected the folder of a run"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").touch()
    out, resume = tmp_path / settings.pop("out", "new"), settings.pop("resume", False)
    config = Config().replace(name="./gone", constrain=[{"contains": "dog"}]).replace(**settings)
    with pytest.raises((ValueError, RuntimeError), match=message):
        Trainer.from_config(config, out=out, resume=resume)
    with pytest.raises(fdpg.ModelError, match="no such folder"):
        Trainer.from_config(Config().replace(name="./gone", constrain=[{"contains": "dog"}]))


def test_a_weight_that_is_not_finite_stops_before_the_model_changes(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(dogs(base))
    run.step()
    before = weights(run)
    original = ops.fdiv_weights

    def broken(*args: Any, **named: Any) -> ops.Weights:
        made = original(*args, **named)
        made.weights[[3, 5]] = math.nan
        return made

    monkeypatch.setattr(ops, "fdiv_weights", broken)
    with pytest.raises(TrainingError, match=r"step 2: `weights` .* got nan for 2 samples \(3, 5\)"):
        run.step()
    assert same(weights(run), before)
    assert run.steps_done == 1


def test_a_gradient_that_is_not_finite_stops_before_the_model_changes(base: Base) -> None:
    run = trainer(dogs(base))
    before = weights(run)
    accumulate = run.policy.accumulate_gradient
    name = "transformer.h.1.mlp.c_fc.weight"

    def broken(*args: Any, **named: Any) -> torch.Tensor:
        result = accumulate(*args, **named)
        gradient = run.parameters[name].grad
        assert gradient is not None
        gradient[0, 0] = math.inf
        return result

    run.policy.accumulate_gradient = broken  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=rf"step 1: the gradient .* {name}"):
        run.train()
    assert same(weights(run), before)
    assert all(p.grad is None for p in run.parameters.values())


def test_a_gradient_beyond_fp16_stops_before_the_model_changes(folder: Path) -> None:
    base = fdpg.load(str(folder), compute="fp16")
    with torch.no_grad():
        for block in base.model.model.transformer.h:
            block.mlp.c_fc.weight.zero_()  # so that in the forward pass there is nothing to see
            block.mlp.c_proj.weight.normal_().sign_().mul_(6e4)
        base.model.model.transformer.ln_f.weight.mul_(30.0)
    run = trainer(dogs(base))
    before = weights(run)
    with pytest.raises(TrainingError, match=r"gradient expected finite .*--model\.compute fp32"):
        run.train()
    assert same(weights(run), before)


def test_a_trainer_that_disagrees_with_the_sampler_stops(base: Base) -> None:
    run = trainer(dogs(base))
    before = weights(run)
    accumulate = run.policy.accumulate_gradient
    run.policy.accumulate_gradient = (  # type: ignore[method-assign]
        lambda *args, **named: accumulate(*args, **named) + 0.01
    )
    with pytest.raises(TrainingError, match=r"disagree by 0\.01 nats per token"):
        run.train()
    assert same(weights(run), before)
    run.config = run.config.replace(max_gap=0.1)
    run.step()


def test_a_rewards_overflow_is_explained(base: Base) -> None:
    huge = fdpg.function(lambda texts: [1e200 * ("dog" in t) for t in texts], name="huge")
    run = trainer(base.reward(huge, beta=1e-100), divergence="reverse_kl")
    before = weights(run)
    with pytest.raises(TrainingError, match="reward_clip"):
        run.train()
    assert same(weights(run), before)


@pytest.mark.parametrize("steps", [1, 6])
def test_a_target_nobody_hits_is_said(base: Base, steps: int) -> None:
    listener = Listener()
    zebra = base.constrain({fdpg.contains("zebra"): 1.0})
    run = trainer(zebra, display=listener, steps=steps)
    before = weights(run)
    run.train()
    assert same(weights(run), before)
    assert all(record["n_skipped"] == 32 for record in listener.records)
    for name in ("divergence", "divergence_se"):  # which would be zero at the target alone
        assert all(math.isnan(record[name]) for record in listener.records)
    assert [w for w in listener.warnings if "no sample was possible" in w]


def test_a_step_without_an_allowed_sample_knows_no_divergence(base: Base, tmp_path: Path) -> None:
    run = trainer(base.constrain({fdpg.contains("zebra"): 1.0}), out=tmp_path / "run", steps=1)
    # As if earlier steps had seen one.
    earlier = run.draw(run.base, run.prompts.all(), 1)
    run.partition.freeze(earlier, earlier.log_q)
    run.train()
    (record,) = RunDirectory(tmp_path / "run").read("metrics.jsonl")
    assert (record["n_used"], record["target_ess"]) == (32, 0)
    for name in ("divergence", "divergence_se", "js", "js_se", "tv", "tv_se"):
        assert record[name] is None


def test_a_run_that_leaves_the_language_is_said_loudly(base: Base) -> None:
    listener = Listener()
    run = trainer(dogs(base), learning_rate=1.0, steps=12, samples_per_prompt=16, display=listener)
    run.train()
    assert listener.records[-1]["kl_to_base"] > 10
    assert any("running away" in w and "learning rate" in w for w in listener.warnings)


def test_a_scorer_that_raises_is_named(base: Base) -> None:
    def fragile(texts: Sequence[str]) -> list[float]:
        return [1 / 0 for _ in texts]

    with pytest.raises(fdpg.ScorerError, match="fragile: raised ZeroDivisionError"):
        trainer(base.reward(fragile, beta=1.0)).train()


def test_a_scorer_that_raises_costs_no_step(base: Base, tmp_path: Path) -> None:
    """Once it is mended, the run goes on as if it had never raised."""
    left = 3

    def dogs_of(texts: Sequence[str]) -> list[float]:
        nonlocal left
        left -= 1
        return [float("dog" in text) / (left >= 0) for text in texts]

    target = base.reward(fdpg.function(dogs_of, name="dogs"), beta=1.0)
    with pytest.raises(fdpg.ScorerError, match="dogs: raised ZeroDivisionError"):
        trainer(target, out=tmp_path / "parts").train()
    left = 100
    more = trainer(target, out=tmp_path / "parts", resume=True)
    assert more.steps_done == 3
    more.train()
    trainer(target, out=tmp_path / "whole").train()
    assert content(tmp_path / "whole") == content(tmp_path / "parts")


def test_weights_that_have_diverged_do_not_evict_a_checkpoint(base: Base, tmp_path: Path) -> None:
    def diverge(record: Mapping[str, Any]) -> None:
        if record["step"] == 3:
            next(iter(run.parameters.values())).detach().fill_(math.nan)

    run = trainer(
        dogs(base),
        out=tmp_path,
        checkpoint_every=2,
        keep_checkpoints=1,
        display=Listener(diverge),
    )
    with pytest.raises(fdpg.SamplingError, match=r"not finite.*Way out: a new run with a lower"):
        run.train()
    kept = checkpoint.latest(tmp_path / "checkpoints")
    assert kept is not None
    assert kept.name == "step-000002"


@pytest.mark.parametrize("resume", [False, True])
def test_what_failed_before_its_first_step_is_mended_in_its_folder(
    base: Base, tmp_path: Path, resume: bool
) -> None:
    impossible = base.constrain({fdpg.contains("zebra"): 0.5})
    with pytest.raises(fdpg.FitError, match="never seen"):
        trainer(impossible, out=tmp_path / "run", fit_samples=32).train()
    trainer(dogs(base), out=tmp_path / "run", steps=1, resume=resume).train()
    assert RunDirectory(tmp_path / "run").read_facts()["target"] == str(dogs(base))


def test_what_is_no_target_is_refused(base: Base) -> None:
    """Training toward the base would change nothing, and say nothing."""
    dog = fdpg.contains("dog")
    for given, kind in [(dog, "Scorer"), (base.model, "LanguageModel"), ("gpt2", "str")]:
        with pytest.raises(fdpg.TargetError, match=f"expected a target, got {kind}. Way out: base"):
            trainer(given)  # type: ignore[arg-type]
    with pytest.raises(fdpg.TargetError, match=r"got the base itself.*Way out: base\.constrain"):
        trainer(base)


def test_prompts_may_be_a_path(base: Base, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("once there\n")
    run = trainer(dogs(base), prompts=path)
    assert run.prompts.texts == ("once there",)
    assert run.config.prompts.source == str(path)
    for name in ("prompts.csv", "prompts"):  # whose names would be prompts
        with pytest.raises(fdpg.PromptError, match=r"expected a text, or one of \.txt, \.jsonl"):
            trainer(dogs(base), prompts=tmp_path / name)


# ---- folders, checkpoints, resuming ------------------------------------------------------------


def demanding(base: Base) -> tuple[Target, dict[str, Any]]:
    """A run with every kind of state: fitted lambdas, a moving baseline, a lagging proposal."""
    target = base.constrain({fdpg.words(["she", "her"]): 0.7})
    settings = {
        "baseline": "ema(0.9)",
        "adaptive_proposal": True,
        "proposal_every": 2,
        "steps_per_batch": 2,
        "fit_samples": 256,
        "schedule": "cosine",
        "max_grad_norm": 1.0,
        "prompts": ["once", "there was a cat and", "she"],
        "prompts_per_step": 2,
    }
    return target, settings


def plain(base: Base) -> tuple[Target, dict[str, Any]]:
    return dogs(base), {}


def content(run: Path) -> dict[str, bytes]:
    names = ("model/model.safetensors", "metrics.jsonl", "samples.jsonl")
    return {name: (run / name).read_bytes() for name in names}


@pytest.mark.parametrize("kind", [plain, demanding])
def test_resume_is_bit_exact(
    folder: Path, tmp_path: Path, kind: Callable[[Base], tuple[Target, dict[str, Any]]]
) -> None:
    """Six steps are three and three, byte for byte: weights, metrics and samples."""

    def run(out: str, **more: Any) -> None:
        target, settings = kind(fdpg.load(str(folder)))  # as in another process
        trainer(target, out=tmp_path / out, **{**settings, **more}).train()

    run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("parts", display=Listener(at_step=lambda r: interrupt(r, 3, signal.SIGINT)))
    run("parts", resume=True)
    assert content(tmp_path / "whole") == content(tmp_path / "parts")


def interrupt(record: Mapping[str, Any], step: int, number: signal.Signals) -> None:
    if record["step"] == step:
        os.kill(os.getpid(), number)


def test_the_same_seed_gives_the_same_run_and_another_another(base: Base, tmp_path: Path) -> None:
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        trainer(dogs(base), out=tmp_path / out, seed=seed, steps=3).train()
    a, b, c = (content(tmp_path / out) for out in "abc")
    assert a == b
    assert a["model/model.safetensors"] != c["model/model.safetensors"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, None), (signal.SIGTERM, 143)])
def test_signals_save_before_they_stop(
    base: Base, tmp_path: Path, number: signal.Signals, code: int | None
) -> None:
    earlier = signal.getsignal(number)
    # It comes while a step is shown, before the step's checkpoint: it must wait for that.
    display = Listener(at_step=lambda r: interrupt(r, 2, number))
    run = trainer(dogs(base), out=tmp_path / "run", display=display)
    with pytest.raises((KeyboardInterrupt, SystemExit)) as raised:
        run.train()
    assert getattr(raised.value, "code", None) == code
    newest = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert checkpoint.load(newest).step == 2
    assert signal.getsignal(number) == earlier
    # Not `fdpg train --resume`, which cannot build this target again.
    assert display.notes[-1].endswith(
        f"in Python, Trainer(..., out='{tmp_path / 'run'}', resume=True)"
    )
    with pytest.raises(RunDirectoryError, match=r"Way out: in Python, Trainer\(\.\.\., out="):
        RunDirectory(tmp_path / "run").require_model()


def test_ctrl_c_in_the_fit_leaves_at_once(base: Base, tmp_path: Path) -> None:
    """There is nothing to save yet, and a step may be far away."""
    display = Listener()

    def note(text: str) -> None:
        if text.startswith("fitting"):
            os.kill(os.getpid(), signal.SIGINT)
        display.notes.append(text)

    display.note = note  # type: ignore[method-assign]
    target = base.constrain({fdpg.words(["she", "her"]): 0.7})
    # A job in the background is started with it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer(target, out=tmp_path / "run", display=display).train()
    finally:
        signal.signal(signal.SIGINT, before)
    assert display.notes == []


def test_lines_after_the_checkpoint_are_written_again(base: Base, tmp_path: Path) -> None:
    """A process that died hard has logged steps that its newest checkpoint does not hold."""
    out = tmp_path / "run"
    trainer(dogs(base), out=out, steps=4, checkpoint_every=2).train()
    whole = content(out)
    run = RunDirectory(out)
    checkpoints = sorted(run.checkpoints.iterdir())
    (checkpoints[-1] / "manifest.json").unlink()  # as if it had never been finished
    trainer(dogs(base), out=out, steps=4, checkpoint_every=2, resume=True).train()
    assert content(out) == whole
    assert [r["step"] for r in run.read("metrics.jsonl")] == [1, 2, 3, 4]


def test_resume_can_add_steps_and_refuses_other_changes(base: Base, tmp_path: Path) -> None:
    trainer(dogs(base), out=tmp_path / "run", steps=2).train()
    more = trainer(dogs(base), out=tmp_path / "run", steps=3, resume=True)
    assert more.steps_done == 2
    more.train()
    assert more.steps_done == 3
    with pytest.raises(
        RunDirectoryError, match=r"`run\.steps` expected at least 3, .* got 2\. Way"
    ):
        trainer(dogs(base), out=tmp_path / "run", steps=2, resume=True)
    assert RunDirectory(tmp_path / "run").config().run.steps == 3
    with pytest.raises(RunDirectoryError, match=r"another optimiser\.learning_rate"):
        trainer(dogs(base), out=tmp_path / "run", learning_rate=1.0, resume=True)
    with pytest.raises(RunDirectoryError, match="--resume"):
        trainer(dogs(base), out=tmp_path / "run")


def test_resume_takes_the_target_that_the_run_has_fitted(base: Base, tmp_path: Path) -> None:
    target = base.constrain({fdpg.contains("dog"): 0.5})
    trainer(target, out=tmp_path, steps=1, fit_samples=256).train()
    assert not target.needs_fit
    more = trainer(target, out=tmp_path, steps=2, fit_samples=256, resume=True)
    assert more.steps_done == 1
    with pytest.raises(RunDirectoryError, match=r"another target\.built_in_python"):
        trainer(target * fdpg.contains("cat"), out=tmp_path, steps=2, resume=True, fit_samples=256)


def test_what_was_measured_before_more_steps_is_forgotten(base: Base, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    trainer(dogs(base), out=tmp_path, steps=1, evaluation_samples=16).train()
    assert "Measured on 16" in run.card.read_text()
    trainer(dogs(base), out=tmp_path, steps=1, resume=True).train()
    assert "Measured on 16" in run.card.read_text(), "it is the same model"
    trainer(dogs(base), out=tmp_path, steps=2, resume=True).train()
    assert run.read_json(run.evaluation) is None
    assert "Measured on" not in run.card.read_text()
    assert "Measured on" not in (run.model / "README.md").read_text()


def test_a_stop_function_that_the_config_names_ends_samples_everywhere(
    base: Base, tmp_path: Path
) -> None:
    """In training, and in what is drawn from the run's folder afterwards, from wherever."""
    (tmp_path / "mine.py").write_text("def ran(text):\n    return text.split()[-1:] == ['ran']\n")
    content = {
        "model": {"name": base.model.name},
        "prompts": {"source": "once"},
        "target": {"constrain": [{"contains": "dog"}]},
        "sampling": {"max_new_tokens": 20, "samples_per_prompt": 32, "stop": "mine.py:ran"},
        "run": {"steps": 1, "evaluation_samples": 32},
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(content))
    out = tmp_path / "run"
    run = Trainer.from_config(Config.read(tmp_path / "mine.yaml"), out=out, display=Listener())
    seen = run.draw(run.policy, run.prompts.batch(0), 0)
    assert Finish.STOP in seen.finish
    measured = run.train()
    assert measured is not None
    again = evaluate_run(RunDirectory(out), samples=32, seed=run.config.run.seed)
    assert again["texts"] == measured["texts"]
    assert again["divergence"] == measured["divergence"] == "js"
    texts = [
        text
        for _, text in draw_texts(
            RunDirectory(out), prompt=None, count=200, max_new_tokens=None, seed=1
        )
    ]
    rejection = Rejection.of_run(
        RunDirectory(out), proposal="tuned", prompt=None, count=1, max_new_tokens=None, seed=1
    )
    texts += rejection._sampler.draw(rejection.model, rejection.prompts, 200, 1).texts
    assert sum(text.split()[-1:] == ["ran"] for text in texts) > 10
    assert not any("ran" in text.split()[:-1] for text in texts)
    with pytest.raises(ConfigError, match=r"`sampling.stop`: python: no file 'gone.py' in"):
        sampler_of(run.config.replace(stop="gone.py:ran"))


def test_a_stop_function_in_python_is_missed_where_it_is_not(base: Base, tmp_path: Path) -> None:
    """Not silently done without: it would be another distribution."""

    def ran(text: str) -> bool:
        return text.split()[-1:] == ["ran"]

    out = tmp_path / "run"
    run = trainer(dogs(base), out=out, steps=1, stop=ran)
    run.train()
    assert run.sampler.stop is ran
    config = RunDirectory(out).config()
    assert config.sampling.stop_in_python == ran.__qualname__
    for ask in (
        lambda: draw_texts(RunDirectory(out), prompt=None, count=1, max_new_tokens=None, seed=1),
        lambda: trainer(dogs(base), config=config),
    ):
        with pytest.raises(ConfigError, match=r"ran, says, .*Way out: .*Trainer\(stop=.*FILE\.py"):
            ask()
    with pytest.raises(RunDirectoryError, match=r"another sampling\.stop_in_python"):
        trainer(dogs(base), out=out, steps=2, resume=True)
    more = trainer(dogs(base), out=out, steps=2, resume=True, stop=ran)
    assert (more.steps_done, more.sampler.stop) == (1, ran)


def test_a_config_of_another_target_is_not_recorded_as_that_of_the_run(
    base: Base, tmp_path: Path
) -> None:
    """Whoever builds the run again from its folder would measure what it was not trained on."""
    cats = Config().replace(constrain=[{"contains": "cat"}], name="elsewhere")
    run = trainer(dogs(base), config=cats, out=tmp_path / "run", steps=1)
    run.train()
    config = RunDirectory(tmp_path / "run").config()
    assert config.target.spec() == {}
    assert config.target.built_in_python == dogs(base).describe(fitted=False)
    assert config.model.name == base.model.name
    with pytest.raises(ConfigError, match="was built in Python"):
        evaluate_run(RunDirectory(tmp_path / "run"), samples=None, seed=None)

    same_target = cats.replace(constrain=[{"contains": "dog"}])
    assert trainer(dogs(base), config=same_target).config.target == same_target.target


def test_a_comparison_may_be_asked_of_a_run_without_one(base: Base) -> None:
    run = trainer(dogs(base), evaluation_samples=0)
    assert run.evaluate()["samples"] == Config().run.evaluation_samples
    assert trainer(dogs(base), evaluation_samples=8).evaluate()["samples"] == 8


@pytest.mark.parametrize("peft", ["none", "lora"])
def test_a_run_in_python_knows_how_its_base_was_loaded(
    folder: Path, tmp_path: Path, peft: str
) -> None:
    """What samples or measures it later loads a model as the run did."""
    base = fdpg.load(str(folder), trust_remote_code=True, activation_checkpointing=True)
    base.model.eos_ids = (3, 5)
    run = trainer(base.reward(fdpg.length(), beta=1.0), out=tmp_path, steps=1, peft=peft)
    run.train()
    found = RunDirectory(tmp_path).config().model
    assert (found.trust_remote_code, found.activation_checkpointing) == (True, True)
    tuned = tuned_of(run.config, RunDirectory(tmp_path).model)
    assert tuned.eos_ids == model_of(run.config, found.name).eos_ids == (3, 5)


def test_another_models_checkpoint_is_refused(base: Base, tmp_path: Path) -> None:
    trainer(dogs(base), out=tmp_path / "run", steps=1).train()
    newest = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    other = fdpg.load(str(write_tiny_model(tmp_path / "other", context=16)))
    with pytest.raises(fdpg.CheckpointError, match="another model's"):
        trainer(dogs(other)).load_checkpoint(newest)


def test_what_a_run_leaves_on_the_disk_plots_included(base: Base, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = trainer(dogs(base), out=out, evaluation_samples=32, checkpoint_every=2)
    evaluation = run.train()
    assert sorted(p.name for p in out.iterdir()) == [
        *("README.md", "checkpoints", "config.yaml", "evaluation.json", "metrics.jsonl"),
        *("model", "report.html", "run.json", "samples.jsonl", "timing.jsonl"),
    ]
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-000004", "step-000006"]
    assert evaluation is not None
    assert evaluation["tuned"]["moment: contains 'dog'"][0] > 0
    assert json.loads((out / "evaluation.json").read_text())["samples"] == 32
    assert not [p for p in out.rglob("*") if p.suffix in (".pt", ".bin", ".pkl", ".pth")]
    card = (out / "model" / "README.md").read_text()
    assert "contains 'dog'" in card
    assert "from_pretrained" in card


def test_a_run_in_python_ends_with_the_table_too(
    base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trainer(dogs(base), out=tmp_path, evaluation_samples=32, steps=1, display=PlainDisplay())
    run.train()
    *_, model, report = capsys.readouterr().out.partition("32 fresh samples")[2].splitlines()
    assert (model, report) == (f"model   {tmp_path}/model", f"report  {tmp_path}/report.html")


def test_transformers_loads_the_tuned_model_with_the_same_logprobs(
    base: Base, tmp_path: Path
) -> None:
    run = trainer(dogs(base), out=tmp_path / "run")
    run.train()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    rollout = run.draw(run.policy, run.prompts.batch(0), 0)
    for i in range(8):
        row = tokenizer("once there was")["input_ids"] + tokenizer(rollout.texts[i])["input_ids"]
        row += [0] * bool(rollout.finished[i])
        assert row == rollout.tokens[i, : len(row)].tolist()
        logits = model(torch.tensor([row])).logits[0, 2:-1]
        logp = logits.log_softmax(-1).gather(1, torch.tensor(row[3:])[:, None]).sum()
        assert logp.item() == pytest.approx(rollout.log_q[i].item(), abs=1e-4)


def test_base_and_tuned_are_measured_on_the_samples_of_both(base: Base) -> None:
    """On its own alone, few samples of a rare thing may weigh so much that tv is above 1."""
    run = trainer(dogs(base))
    run.train()
    measured = run.evaluate(64)
    prompts, key = run.prompts.all(), ops.random_key(0, 0, evaluation.STREAM)
    rollouts = [run.sampler.draw(model, prompts, 64, key) for model in (run.base, run.policy)]
    said = [[m.sequence_logprob(r) for r in rollouts] for m in (run.base, run.policy)]
    pool = Pool(
        rollouts,
        [run.target.score(r) for r in rollouts],
        torch.stack([torch.cat(one) for one in said]),
    )
    for number, name in enumerate(("base", "tuned")):
        expected = pool.divergences(number, PAPER)
        for f in ("kl", "tv", "js"):
            assert measured[name][f][0] == pytest.approx(expected[f].item(), abs=1e-5)
            assert measured[name][f][1] == pytest.approx(expected[f"{f}_se"].item(), abs=1e-5)
        assert measured[name]["tv"][0] <= 1
    assert measured["target"]["log_z"][0] == pytest.approx(pool.target()["log_z"].item(), abs=1e-5)


def test_what_is_wrong_with_a_fit_is_said_once(
    base: Base, capsys: pytest.CaptureFixture[str]
) -> None:
    target = base.constrain({fdpg.contains("dog"): 0.5})
    trainer(target, fit_samples=32, display=PlainDisplay()).prepare()
    said = capsys.readouterr()
    assert "lambda" in said.out
    assert (said.out + said.err).count("the target's weights rest on few samples") == 1


def test_samples_to_look_at_are_of_all_prompts(base: Base, tmp_path: Path) -> None:
    prompts = ["once", "there", "she", "the big dog"]
    run = trainer(dogs(base), prompts=prompts, prompts_per_step=4, steps=2, out=tmp_path / "run")
    run.train()
    table = RunDirectory(tmp_path / "run").read("samples.jsonl")
    assert {row["prompt"] for row in table} == set(prompts)
    texts = run.evaluate(32)["texts"]
    assert texts["prompt"] == [prompt for prompt in prompts for _ in range(4)]
    assert len(texts["base"]) == len(texts["tuned"]) == 16


def test_nothing_is_written_without_a_folder(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer(dogs(base), steps=2).train()
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_comes_after_the_records_of_its_steps(base: Base, tmp_path: Path) -> None:
    """Else a process that dies after it would resume with a hole in metrics.jsonl."""
    run = trainer(dogs(base), out=tmp_path / "run", log_every=100)
    for _ in range(3):
        run.step()
    run.save_checkpoint()
    assert run.run is not None
    assert [record["step"] for record in run.run.read("metrics.jsonl")] == [1, 2, 3]


def test_numbers_are_read_at_once_every_few_steps(base: Base, tmp_path: Path) -> None:
    listener = Listener()
    trainer(dogs(base), out=tmp_path / "run", log_every=4, display=listener).train()
    assert [record["step"] for record in listener.records] == [4, 6]
    records = RunDirectory(tmp_path / "run").read("metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]


def test_a_step_that_ran_out_of_memory_leaves_no_gradient_to_the_next(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first(fails: bool) -> dict[str, torch.Tensor]:
        run = trainer(dogs(base), log_z="batch", micro_batch=16, samples_per_prompt=64)
        if fails:
            backward, calls = run.policy._backward, iter(range(100))

            def out_of_memory(*given: Any) -> torch.Tensor:
                if next(calls) == 1:
                    raise torch.OutOfMemoryError("planted")
                return backward(*given)

            monkeypatch.setattr(run.policy, "_backward", out_of_memory)
            with pytest.raises(torch.OutOfMemoryError):
                run.step()
        run.step()
        return weights(run)

    assert same(first(fails=True), first(fails=False))

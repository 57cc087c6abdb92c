"""Sampler, trainer and plain fp64 say the same of every sample, for every family, padded or not."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import batch, double, language_model, reference_logprob

from fdpg_fast import models
from fdpg_fast.attention import SLOT
from fdpg_fast.models import LanguageModel
from fdpg_fast.prompts import Prompts
from fdpg_fast.rollout import PromptBatch, Rollout
from fdpg_fast.sampler import Sampler

pytestmark = pytest.mark.usefixtures("one_thread")

# The promise: nats per token in fp32.
TOLERANCE = 1e-4

FAMILIES = (
    "gpt2",
    "llama",
    "opt",
    "mistral",
    "qwen2",
    "qwen3",
    "gpt_neox",
    "phi",
    "gemma2",
    "gemma3_text",
    "cohere",
    "granite",
    "gpt_oss",
)
PROMPTS = {
    "one prompt": batch([7, 3, 9]),
    "unequal prompts": batch([7], [7, 3, 9, 11, 2, 30, 8, 1, 1], [5, 5, 60, 4]),
}
# Ids that end a sample: many, so that samples are short; padding is id 0, once among them.
EOS = {"padding ends": tuple(range(0, 8)), "padding does not end": tuple(range(50, 58))}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return language_model(request.param)


def draw(model: LanguageModel, prompts: PromptBatch) -> Rollout:
    """24 samples on 10 slots: slots are refilled while others are in the middle of a sample."""
    rollout = Sampler(12, batch_size=10, check_every=3).draw(model, prompts, 24 // len(prompts), 5)
    assert len(set(rollout.lengths.tolist())) > 2
    return rollout


@pytest.mark.parametrize("eos", EOS)
@pytest.mark.parametrize("prompts", PROMPTS)
def test_sampler_scorer_and_fp64_agree(model: LanguageModel, prompts: str, eos: str) -> None:
    model.eos_ids = EOS[eos]
    assert model.attention == SLOT
    rollout = draw(model, PROMPTS[prompts])
    with torch.no_grad():
        truth = reference_logprob(double(model), rollout)
    torch.testing.assert_close(rollout.token_logprob.double(), truth, rtol=0, atol=TOLERANCE)
    scored = model.token_logprob(rollout)
    torch.testing.assert_close(scored.double(), truth, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(model.sequence_logprob(rollout), truth.sum(1), rtol=0, atol=1e-3)
    torch.testing.assert_close(rollout.log_q, truth.sum(1), rtol=0, atol=1e-3)


def assert_gradient(model: LanguageModel, rollout: Rollout, micro_batches: Sequence[Any]) -> None:
    """Log-probs and gradient of ``accumulate_gradient`` are those of log_softmax in fp64."""
    weights = torch.randn(len(rollout), dtype=torch.float64)
    plain = double(model)
    plain.zero_grad()
    logp = reference_logprob(plain, rollout)
    (-(weights * logp.sum(1)).sum() / 100).backward()
    truth = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert truth
    for micro_batch in micro_batches:
        model.model.zero_grad()
        found = model.accumulate_gradient(
            rollout, weights, denominator=100, micro_batch=micro_batch
        )
        torch.testing.assert_close(found.double(), logp.detach(), rtol=0, atol=TOLERANCE)
        for name, parameter in model.model.named_parameters():
            if name in truth:
                assert parameter.grad is not None, name
                scale = float(truth[name].abs().max())
                error = float((parameter.grad.double() - truth[name]).abs().max())
                assert error <= 1e-4 * scale + 1e-7, (name, micro_batch, error, scale)


@pytest.mark.parametrize("prompts", PROMPTS)
def test_gradient_is_that_of_log_softmax(model: LanguageModel, prompts: str) -> None:
    model.eos_ids = EOS["padding ends"]
    assert_gradient(model, draw(model, PROMPTS[prompts]), (None, 1, 5))


@pytest.mark.parametrize("way", ["packed", "eager", "sdpa"])
@pytest.mark.parametrize("eos", EOS)
def test_every_way_of_scoring_agrees(
    model: LanguageModel, eos: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.eos_ids = EOS[eos]
    rollout = draw(model, PROMPTS["unequal prompts"])
    if way == "packed":
        monkeypatch.setattr(model, "packs", True)
        assert model._packing_error() < 1e-6
        width = (rollout.prompt_lengths + rollout.lengths - 1).sum()
        seen = [batch.tokens.numel() for batch in model._micro_batches(rollout, None, 7, 4096)]
        assert sum(seen) == width, "padding was computed"
    elif way == "sdpa" and not model.model._supports_sdpa:
        pytest.skip(f"transformers has no sdpa for {model.name}")
    else:
        model._use_attention(way)
    try:
        with torch.no_grad():
            truth = reference_logprob(double(model), rollout)
        scored = model.token_logprob(rollout)
        torch.testing.assert_close(scored.double(), truth, rtol=0, atol=TOLERANCE)
        assert_gradient(model, rollout, (None, 5))
    finally:
        model._use_attention(SLOT)


def test_packing_that_does_not_keep_sequences_apart_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = language_model("opt")
    monkeypatch.setattr(models, "announced", lambda packing: contextlib.nullcontext())
    assert model._packing_error() > 2 * max(models.PACKING_TOLERANCE.values())


def test_the_end_of_text_token_is_scored_and_learns() -> None:
    """trl#6357, disco: where padding is the end token, its term was masked out."""
    model = language_model("gpt2", eos_ids=(0,))
    prompts = batch([4, 4])
    rollout = Sampler(12, batch_size=64).draw(model, prompts, 400, 1)
    ended = rollout.finished.nonzero()[:, 0]
    assert len(ended) > 3
    last = rollout.lengths[ended] - 1
    assert (model.token_logprob(rollout)[ended, last] < 0).all()
    # Raising log pi of ended samples by their last token alone must raise that token's logit.
    one = rollout.select(ended[:1])
    model.accumulate_gradient(one, torch.ones(1, dtype=torch.float64), denominator=1)
    before = model.token_logprob(one)[0, last[0]].item()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-3 * parameter.grad
    assert model.token_logprob(one)[0, last[0]].item() > before


@pytest.mark.parametrize("name", ["stories_3m", "stories_260k"])
def test_real_models(name: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(name)
    model = LanguageModel.load(path)
    assert model.attention == SLOT
    texts = ["Once upon a time", "Lily", "One day, Tom and his mom went to the big park to see the"]
    prompts = Prompts(texts, model.encode, per_step=3).all()
    rollout = Sampler(24, batch_size=16).draw(model, prompts, 8, 3)
    with torch.no_grad():
        truth = reference_logprob(double(model), rollout)
    for found in (rollout.token_logprob, model.token_logprob(rollout, micro_batch=7)):
        torch.testing.assert_close(found.double(), truth, rtol=0, atol=TOLERANCE)
    model.accumulate_gradient(rollout, torch.ones(24, dtype=torch.float64), denominator=24)
    plain = double(model)
    plain.zero_grad()
    (-reference_logprob(plain, rollout).sum() / 24).backward()
    for own, true in zip(model.parameters(), plain.parameters(), strict=True):
        error = (own.grad.double() - true.grad).abs().max()
        assert error <= 1e-4 * true.grad.abs().max() + 1e-7

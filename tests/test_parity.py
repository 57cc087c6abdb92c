"""Sampler, trainer and plain fp64 say the same of every sample, for every family, padded or not."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from families import ENCODER_DECODER, batch, double, language_model, reference_logprob
from torch import Tensor
from versions import TRANSFORMERS, UNFIT

from fdpg_fast import attention, models
from fdpg_fast.attention import SLOT
from fdpg_fast.models import LanguageModel
from fdpg_fast.prompts import Prompts
from fdpg_fast.rollout import Rollout
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
    *ENCODER_DECODER,
)
# Ids that end a sample: many, so that samples are short; padding is id 0, once among them.
PADDING_ENDS, PADDING_DOES_NOT_END = tuple(range(0, 8)), tuple(range(50, 58))
UNEQUAL = batch([7], [7, 3, 9, 11, 2, 30, 8, 1, 1], [5, 5, 60, 4])
CASES = {
    "one prompt": (batch([7, 3, 9]), PADDING_ENDS),
    "padding ends": (UNEQUAL, PADDING_ENDS),
    "padding does not end": (UNEQUAL, PADDING_DOES_NOT_END),
}


@dataclass(frozen=True)
class Case:
    """Samples of a model, and what it says of them in fp64."""

    model: LanguageModel
    rollout: Rollout
    weights: Tensor  # (B,) fp64
    logp: Tensor  # (B, S) fp64
    gradient: dict[str, Tensor]  # of -(1 / DENOMINATOR) sum_i weights_i log pi(x_i)

    def check(self, found: Tensor, way: object = None) -> None:
        """``(B, S)`` log-probs, and the gradient that `.grad` holds, which is cleared."""
        torch.testing.assert_close(found.double(), self.logp, rtol=0, atol=TOLERANCE)
        for name, parameter in self.model.model.named_parameters():
            if name in self.gradient:
                assert parameter.grad is not None, name
                truth = self.gradient[name]
                scale = float(truth.abs().max())
                error = float((parameter.grad.double() - truth).abs().max())
                assert error <= 1e-4 * scale + 1e-7, (name, way, error, scale)
        self.model.model.zero_grad()


DENOMINATOR = 100


def case_of(model: LanguageModel, rollout: Rollout) -> Case:
    weights = torch.randn(len(rollout), dtype=torch.float64).to(model.device)
    plain = double(model)
    plain.zero_grad()
    logp = reference_logprob(plain, rollout)
    (-(weights * logp.sum(1)).sum() / DENOMINATOR).backward()
    gradient = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert gradient
    return Case(model, rollout, weights, logp.detach(), gradient)


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, device: str) -> LanguageModel:
    model = language_model(request.param, device=device)
    fits = model.name not in UNFIT
    assert model.attention == (model.own_attention[0] if fits else model._stock_attention)
    return model


def drawn(model: LanguageModel, case: str) -> Case:
    """24 samples on 10 slots: slots are refilled while others are in the middle of a sample."""
    prompts, model.eos_ids = CASES[case]
    with warnings.catch_warnings():
        if model.name == "gpt_oss":  # a graph cannot hold how transformers groups its experts
            warnings.filterwarnings("ignore", "sampling without CUDA graphs", RuntimeWarning)
        sampler = Sampler(12, batch_size=10, check_every=3)
        rollout = sampler.draw(model, prompts, 24 // len(prompts), 5)
    assert len(set(rollout.lengths.tolist())) > 2
    return case_of(model, rollout)


@pytest.fixture(scope="module", params=CASES)
def case(model: LanguageModel, request: pytest.FixtureRequest) -> Case:
    return drawn(model, request.param)


def test_sampler_and_scorer_agree_with_fp64(case: Case) -> None:
    model, rollout, truth = case.model, case.rollout, case.logp
    for found in (rollout.token_logprob, model.token_logprob(rollout)):
        torch.testing.assert_close(found.double(), truth, rtol=0, atol=TOLERANCE)
    for total in (rollout.log_q, model.sequence_logprob(rollout)):
        torch.testing.assert_close(total, truth.sum(1), rtol=0, atol=1e-3)


def accumulate(case: Case, micro_batch: int | None = None) -> Tensor:
    return case.model.accumulate_gradient(
        case.rollout, case.weights, denominator=DENOMINATOR, micro_batch=micro_batch
    )


def padded_on_the_left(case: Case) -> Tensor:
    """As a user's own code calls the transformers model, or its ``generate`` does."""
    model, rollout = case.model, case.rollout
    texts = rollout.prompt_lengths + rollout.lengths
    pad = (texts.max() - texts)[:, None]  # columns before each text
    columns = torch.arange(int(texts.max()), device=model.device)
    mask, position = columns >= pad, (columns - pad).clamp(min=0)
    ids = rollout.tokens.gather(1, position).where(mask, 0)
    given = {"position_ids": position} if model._takes_positions else {}
    logits = model.model(input_ids=ids, attention_mask=mask.long(), use_cache=False, **given).logits
    every = torch.log_softmax(logits[:, :-1], -1).gather(2, ids[:, 1:, None])[..., 0]
    place = torch.arange(case.logp.shape[1], device=model.device)
    inside = place < rollout.lengths[:, None]
    first = pad + rollout.prompt_lengths[:, None] - 1
    logp = every.gather(1, (first + place).clamp(max=every.shape[1] - 1)).where(inside, 0.0)
    (-(case.weights * logp.sum(1)).sum() / DENOMINATOR).backward()
    return logp.detach()


WAYS = [
    *itertools.product(("alone", "right", "left"), ("own", "eager", "sdpa")),
    ("packed", "own"),  # others do not keep packed sequences apart
]


@pytest.mark.parametrize(("rows", "attention"), WAYS)
def test_every_way_of_scoring_agrees(
    case: Case, rows: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probs and gradient: where the padding is, and who attends."""
    model, rollout, own = case.model, case.rollout, case.model.attention
    if rows in ("left", "packed") and model.name in ENCODER_DECODER:
        pytest.skip(f"the prompts of {model.name} are texts of their own, padded on the right")
    if attention == "sdpa" and not model.model._supports_sdpa:
        pytest.skip(f"transformers has no sdpa for {model.name}")
    if rows == "packed":
        if model.name in UNFIT:
            pytest.skip(f"{model.name} is not packed in transformers {TRANSFORMERS}")
        if model.device.type == "cuda":
            pytest.skip("kernels for packed sequences take half precision, and have a test below")
        monkeypatch.setattr(model, "packs", True)
        assert model._packing_error() < 1e-6
        width = (rollout.prompt_lengths + rollout.lengths - 1).sum()
        seen = [batch.tokens.numel() for batch in model._micro_batches(rollout, None, 7, 4096)]
        assert sum(seen) == width, "padding was computed"
    if attention != "own":
        model._use_attention(attention)
    try:
        if rows == "left":
            case.check(padded_on_the_left(case))
            return
        sizes = (1,) if rows == "alone" else (None, 5)
        scored = model.token_logprob(rollout, micro_batch=sizes[0])
        torch.testing.assert_close(scored.double(), case.logp, rtol=0, atol=TOLERANCE)
        for size in sizes:
            case.check(accumulate(case, size), size)
    finally:
        model._use_attention(own)


# Dynamo looks at `.grad` of the encoder's states, which the decoder is given.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_compiled_model_agrees(family: str) -> None:
    """Traced by dynamo, which is where masks and positions could be taken for constants; what a
    compiler then makes of the graph is its own affair, and takes it ten seconds a family."""
    torch._dynamo.reset()  # models share code, of which dynamo keeps only so many graphs
    case = drawn(language_model(family), "padding ends")
    traced = []

    def backend(graph: Any, inputs: Any) -> Any:
        traced.append(graph)
        return graph

    plain = case.model.model
    two = family in ENCODER_DECODER
    parts = (plain.get_encoder(), plain.get_decoder()) if two else (plain.base_model,)
    for part in parts:
        part.compile(backend=backend, dynamic=True, fullgraph=True)
    for micro_batch in (None, 12):  # with 5, some of one prompt: a one is a constant to dynamo
        case.check(accumulate(case, micro_batch), micro_batch)
    assert len(traced) == len(parts)  # for all shapes


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen3", "gpt_neox"])
def test_packed_kernels_agree_with_padded_ones(family: str) -> None:
    """On a GPU, in half precision: the same samples, and the same gradient, within its rounding."""
    model = language_model(family, device="cuda", compute="bf16")
    assert model.packs, model.checks
    prompts, model.eos_ids = CASES["padding ends"]
    rollout = Sampler(12, batch_size=10, check_every=3).draw(model, prompts, 8, 5)
    weights = torch.randn(len(rollout), dtype=torch.float64).to(model.device)
    logp, gradients = [], []
    for packs in (True, False):
        model.packs = packs
        logp.append(model.token_logprob(rollout))
        model.accumulate_gradient(rollout, weights, denominator=DENOMINATOR)
        found = [p.grad.flatten() for p in model.model.parameters() if p.grad is not None]
        gradients.append(torch.cat(found).double())
        model.model.zero_grad()
    bound = models.PACKING_TOLERANCE["bf16"]
    torch.testing.assert_close(logp[0], logp[1], rtol=0, atol=bound)
    torch.testing.assert_close(rollout.token_logprob, logp[1], rtol=0, atol=2 * bound)
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < bound


def test_packing_that_does_not_keep_sequences_apart_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = language_model("opt")
    monkeypatch.setattr(models, "announced", lambda packing: contextlib.nullcontext())
    assert model._packing_error() > 2 * max(models.PACKING_TOLERANCE.values())


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma2", "gemma3_text"])
def test_a_packed_kernel_that_ignores_windows_is_found(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At load, if its texts of 4 to 12 tokens are longer than the window. The kernels of a GPU are
    tried with windows in the test above."""
    model, packed = language_model(family, changes={"sliding_window": 3}), attention._packed
    assert model._packing_error() < 1e-6

    def ignoring(module: Any, q: Tensor, k: Tensor, v: Tensor, packing: Any, *rest: Any) -> Any:
        return packed(module, q, k, v, packing.within(None), *rest)

    monkeypatch.setattr(attention, "_packed", lambda *given, **_: ignoring(*given))
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
def test_real_models(name: str, device: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(name)
    model = LanguageModel.load(path, device=device, compute="fp32")
    assert model.attention == SLOT
    texts = ["Once upon a time", "Lily", "One day, Tom and his mom went to the big park to see the"]
    prompts = Prompts(texts, model.encode, per_step=3).all()
    rollout = Sampler(24, batch_size=16).draw(model, prompts, 8, 3)
    case = case_of(model, rollout)
    for found in (rollout.token_logprob, model.token_logprob(rollout, micro_batch=7)):
        torch.testing.assert_close(found.double(), case.logp, rtol=0, atol=TOLERANCE)
    case.check(accumulate(case))

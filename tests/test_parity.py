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
from transformers.masking_utils import causal_mask_function
from versions import TRANSFORMERS, UNFIT

from fdpg_fast import attention, models
from fdpg_fast.attention import FLASH_ATTN, PACKED_KERNELS, SLOT, VARLEN_ATTN
from fdpg_fast.models import LanguageModel
from fdpg_fast.prompts import Prompts
from fdpg_fast.rollout import Rollout
from fdpg_fast.sampler import Sampler
from fdpg_fast.self_test import PACKING_TOLERANCE, packing_error

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
        assert packing_error(model, model._packed_kernel) < 1e-6
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


def compiled(model: LanguageModel, what: str = "whole", **options: Any) -> None:
    """Has ``torch.compile`` take what draws and scores, or its layers, for all shapes."""
    plain = model.model
    parts = [plain.base_model]
    if model.name in ENCODER_DECODER:
        parts = [plain.get_encoder(), plain.get_decoder()]
    if what == "layers":
        parts = next(part for part in plain.modules() if isinstance(part, torch.nn.ModuleList))
    for part in parts:
        part.compile(dynamic=True, **options)


class Traced:
    """A backend that keeps what dynamo traced, and runs it as it is."""

    def __init__(self) -> None:
        self.graphs: list[Any] = []

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs.append(graph)
        return graph


# Dynamo looks at `.grad` of the encoder's states, which the decoder is given.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_compiled_model_agrees(family: str) -> None:
    """Traced by dynamo, which is where masks and positions could be taken for constants; what a
    compiler then makes of the graph is its own affair, and takes it ten seconds a family."""
    model, traced = language_model(family), Traced()
    cases = [drawn(model, name) for name in CASES]
    torch._dynamo.reset()  # models share code, of which dynamo keeps only so many graphs
    compiled(model, backend=traced, fullgraph=True)
    for case, micro_batch in itertools.product(cases, (None, 12)):
        case.check(accumulate(case, micro_batch), micro_batch)
    # One for all shapes; but a one is a constant to dynamo, and an encoder may read one prompt.
    assert len(traced.graphs) == (4 if family in ENCODER_DECODER else 1)


@pytest.mark.parametrize(
    ("family", "what", "most"),
    [
        ("gpt2", "whole", 2),  # prompts, and a step
        ("llama", "layers", 4),
        ("mistral", "whole", 2),
        pytest.param("bart", "whole", 5, marks=pytest.mark.slow),  # the first step is another
    ],
)
def test_a_compiled_model_draws(family: str, what: str, most: int) -> None:
    """The same samples as it does uncompiled, by one graph of a step however many keys it attends
    to, and the next draw has nothing to trace."""
    model, traced = language_model(family, eos_ids=PADDING_ENDS), Traced()
    prompts, sampler = UNEQUAL, Sampler(30, batch_size=10, check_every=3)
    before = [sampler.draw(model, prompts, 8, key) for key in (5, 6)]
    torch._dynamo.reset()
    compiled(model, what, backend=traced)
    for rollout, key in zip(before, (5, 6), strict=True):
        warm = len(traced.graphs)
        again = sampler.draw(model, prompts, 8, key)
        assert torch.equal(again.tokens, rollout.tokens)
        torch.testing.assert_close(again.token_logprob, rollout.token_logprob, rtol=0, atol=1e-5)
        assert (len(traced.graphs) > warm) == (key == 5)
        assert len(traced.graphs) <= most


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.*:DeprecationWarning"
)  # torch.compile's own imports
@pytest.mark.parametrize(
    ("family", "one_layer"), [("gpt2", {"n_layer": 1}), ("llama", {"num_hidden_layers": 1})]
)
def test_what_inductor_makes_of_a_model_agrees(family: str, one_layer: dict[str, int]) -> None:
    """With the compiler that ``torch.compile`` has by default: scoring, training and drawing."""
    model = language_model(family, changes=one_layer)
    case = drawn(model, "padding ends")
    torch._dynamo.reset()
    compiled(model)
    scored = model.token_logprob(case.rollout)
    torch.testing.assert_close(scored.double(), case.logp, rtol=0, atol=TOLERANCE)
    for micro_batch in (None, 12, 1):
        case.check(accumulate(case, micro_batch), micro_batch)
    case.check(padded_on_the_left(case), "left")
    again = Sampler(12, batch_size=10, check_every=3).draw(model, UNEQUAL, 8, 5)
    assert torch.equal(again.tokens, case.rollout.tokens)
    torch.testing.assert_close(again.token_logprob.double(), case.logp, rtol=0, atol=TOLERANCE)


# What kernels for packed sequences do not have.
REFUSED = {
    ("gemma2", VARLEN_ATTN): "has no soft cap",
    ("gpt_oss", VARLEN_ATTN): "has no attention sinks",
    ("gpt_oss", FLASH_ATTN): "has no attention sinks",
}


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", PACKED_KERNELS)
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ENCODER_DECODER])
def test_packed_kernels_agree_with_fp64(
    family: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, in half precision, as well as padded rows do; or the model says why not packed."""
    if family in UNFIT:
        pytest.skip(f"{family} is not packed in transformers {TRANSFORMERS}")
    monkeypatch.setattr(models, "PACKED_KERNELS", (kernel,))
    refusal = REFUSED.get((family, kernel))
    if kernel == FLASH_ATTN and not (known := attention._flash_attn())[0]:
        refusal = known[1]
    loud = pytest.warns(RuntimeWarning, match=f"scoring padded rows.*{kernel}")
    with loud if refusal else contextlib.nullcontext():
        model = language_model(family, device="cuda", compute="bf16")
    if refusal:
        assert (model.packs, model.scoring) == (False, f"padded: {kernel}: {refusal}")
        return
    assert (model.packs, model.scoring) == (True, f"packed, by {kernel}")
    case = drawn(model, "padding ends")
    truth = torch.cat([gradient.flatten() for gradient in case.gradient.values()])

    def errors() -> tuple[float, float]:
        """Of a token's log-prob, the mean; of the gradient, a share of it."""
        off = model.token_logprob(case.rollout) - case.logp
        accumulate(case)
        named = dict(model.model.named_parameters())
        found = torch.cat([named[name].grad.flatten() for name in case.gradient]).double()
        model.model.zero_grad()
        mean = off.abs().sum() / case.rollout.lengths.sum()
        return float(mean), float((found - truth).norm() / truth.norm())

    seen = list(model._micro_batches(case.rollout, None, 7, 4096))
    assert all(one.packing is not None and one.packing.kernel == kernel for one in seen)
    packed = errors()
    model.packs = False
    padded = errors()
    for ours, theirs, most in zip(packed, padded, (2e-2, 0.2), strict=True):
        assert ours <= min(2 * theirs, most), (packed, padded)


def test_packing_that_does_not_keep_sequences_apart_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = language_model("opt")
    monkeypatch.setattr(models, "announced", lambda packing: contextlib.nullcontext())
    assert packing_error(model, model._packed_kernel) > 2 * max(PACKING_TOLERANCE.values())


WINDOWED = ("mistral", "qwen2", "gemma2", "gemma3_text", "gpt_oss")


@pytest.mark.parametrize("window", [3, 20])
@pytest.mark.parametrize("family", WINDOWED)
def test_a_packed_kernel_that_ignores_windows_is_found(
    family: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At load, though most texts there are of 4 to 12 tokens. The kernels of a GPU are tried with
    windows in the test above."""
    changes = {"sliding_window": window, "max_position_embeddings": 2 * window + 20}
    model, packed = language_model(family, changes=changes), attention._packed
    assert packing_error(model, model._packed_kernel) < 1e-6

    def ignoring(module: Any, q: Tensor, k: Tensor, v: Tensor, packing: Any, *rest: Any) -> Any:
        return packed(module, q, k, v, packing.within(None), *rest)

    monkeypatch.setattr(attention, "_packed", lambda *given, **_: ignoring(*given))
    assert packing_error(model, model._packed_kernel) > 2 * max(PACKING_TOLERANCE.values())


@pytest.mark.parametrize("window", [3, 30])
@pytest.mark.parametrize("family", WINDOWED)
def test_decoding_that_ignores_windows_is_found(
    family: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At load, and loudly; but of a window that no text can exceed there is nothing to find."""
    visible = attention._visible

    def ignoring(**given: Any) -> Tensor:
        return visible(**given | {"mask_function": causal_mask_function})

    monkeypatch.setattr(attention, "_visible", ignoring)
    with pytest.warns(RuntimeWarning, match="sampling without a key-value cache.* differs by"):
        model = language_model(family, changes={"sliding_window": window})
    assert model.attention == model._stock_attention
    assert language_model(family, changes={"sliding_window": 33}).attention == SLOT


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

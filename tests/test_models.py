"""Any causal model of transformers becomes a policy: sound weights, right paths, clear errors."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import CONFIGS, VOCAB, batch, double, language_model, reference_logprob, tiny
from tiny import write_tiny_model
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)

from fdpg_fast import environment, models, ops, pretrained
from fdpg_fast._build import load
from fdpg_fast.attention import SLOT, SLOT_MASKED, attention_report
from fdpg_fast.models import Head, LanguageModel, ModelError
from fdpg_fast.ops import matmul
from fdpg_fast.rollout import Rollout
from fdpg_fast.sampler import Sampler
from fdpg_fast.self_test import SelfTest

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = batch([7, 3, 9], [4], [1, 2, 3, 4, 5, 6, 7])
EOS = tuple(range(6))


def draw(model: LanguageModel, each: int = 6, longest: int = 10) -> Rollout:
    return Sampler(longest, batch_size=8).draw(model, PROMPTS, each, key=3)


def gradients(model: LanguageModel) -> list[torch.Tensor]:
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.model.zero_grad()
    return found


# --- weights, dropout, precision ---------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gpt_neox"])
def test_dropout_is_off_even_in_train_mode(family: str) -> None:
    rates = {
        "gpt2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
        "llama": {"attention_dropout": 0.5},
        "opt": {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5},
        "gpt_neox": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
    }[family]
    model = language_model(family, changes=rates)
    for name in rates:
        assert getattr(model.model.config, name) == 0.0
    ids = torch.arange(12)[None]
    still = model.model(input_ids=ids, use_cache=False).logits
    model.model.train()
    for _ in range(2):
        again = model.model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(again, still, rtol=0, atol=1e-5)


def test_masters_are_fp32_whatever_the_checkpoint(tmp_path: Path) -> None:
    """trl#5329: transformers 5 loads bf16 checkpoints as bf16, and AdamW then trains those."""
    write_tiny_model(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path).bfloat16().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    model = LanguageModel.load(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model = LanguageModel.from_model(tiny("llama").bfloat16())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("compute", "least", "most"), [("bf16", 1e-4, 0.5), ("fp16", 1e-5, 0.1)])
def test_half_compute_keeps_log_probs_in_fp32(compute: str, least: float, most: float) -> None:
    model = language_model("llama", eos_ids=EOS, compute=compute)
    assert model.compute == compute
    rollout = draw(model)
    assert rollout.token_logprob.dtype == torch.float32
    exact = reference_logprob(double(model), rollout).detach().float()
    for found in (model.token_logprob(rollout), rollout.token_logprob):
        error = (found - exact).abs()
        assert least < error.max() < most, f"{compute} was not used, or is far off"
    weights = torch.ones(len(rollout), dtype=torch.float64)
    model.accumulate_gradient(rollout, weights, denominator=1)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_compute_that_is_slow_here_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    assert matmul.has_16_bit_products("bf16") or not load().has_packed_products()
    for fast, compute in ((False, "fp32"), (False, "auto"), (True, "bf16")):
        monkeypatch.setattr(pretrained, "has_16_bit_products", lambda _, fast=fast: fast)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            language_model("llama", compute=compute)
    monkeypatch.setattr(pretrained, "has_16_bit_products", lambda compute: compute == "bf16")
    with pytest.warns(RuntimeWarning, match="torch has no fp16 products for this CPU.*Use.* fp32"):
        language_model("llama", compute="fp16")


@pytest.mark.parametrize("denominator", [1, 10**8])
@pytest.mark.parametrize("family", ["gpt2", "cohere", "strange"])
@pytest.mark.filterwarnings("ignore:.*its output layer is not a known formula")
def test_gradients_in_fp16_are_not_lost(family: str, denominator: int) -> None:
    """Those of a mean over 1e8 samples are below the smallest number of fp16; and what `.grad`
    holds already must come through as it is."""
    if family == "strange":
        model = LanguageModel.from_model(_strange(), eos_ids=EOS, compute="fp16")
    else:
        model = language_model(family, eos_ids=EOS, compute="fp16")
    rollout = draw(model)
    weights = torch.randn(len(rollout), dtype=torch.float64)
    plain = double(model)
    plain.zero_grad()
    (-(weights * reference_logprob(plain, rollout).sum(1)).sum() / denominator).backward()
    for before in (None, 1.0):
        for own in model.parameters():
            own.grad = None if before is None else torch.full_like(own, before / denominator)
        model.accumulate_gradient(rollout, weights, denominator=denominator)
        for own, true in zip(model.parameters(), plain.parameters(), strict=True):
            expected = true.grad + (before or 0.0) / denominator
            error = (own.grad.double() - expected).abs().max()
            assert error < 0.02 * expected.abs().max() + 1e-9 / denominator


def test_only_the_head_of_bf16_compute_rounds_its_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a CPU that is faster so."""
    models = [language_model("llama", eos_ids=EOS, compute=name) for name in ("fp32", "bf16")]
    monkeypatch.setattr(matmul, "_OURS_ROUNDS", True)
    seen: list[bool] = []
    monkeypatch.setattr(Head, "logits", lambda *_, **__: seen.append(matmul.may_round()))
    for model in models:
        model.logits(torch.zeros(3, model.head.weight.shape[1]))
    assert seen == [False, True]
    assert not matmul.may_round()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("asked", ["highest", "high", "medium"])
def test_what_a_caller_rounds_is_not_rounded_where_paths_are_compared(
    asked: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With TF32 they would differ by a hundred times the tolerance, and none would be trusted."""
    backends = torch.backends
    seen: list[str] = []
    measure = SelfTest.measure

    def watched(self: SelfTest) -> dict[str, float]:
        backend = backends.cuda.matmul if device == "cuda" else backends.mkldnn.matmul
        seen.append(backend.fp32_precision)
        return measure(self)

    monkeypatch.setattr(SelfTest, "measure", watched)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(asked)
    try:
        found = language_model("llama", device=device).self_test()
        assert torch.get_float32_matmul_precision() == asked
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {"ieee"}
    assert found.keys() >= {"head", "scoring", "decoding"}


def test_auto_compute_is_fp32_on_the_cpu() -> None:
    assert language_model("gpt2", compute="auto").compute == "fp32"


@pytest.mark.parametrize(("major", "compute"), [(7, "fp32"), (8, "bf16")])
def test_auto_compute_is_bf16_on_a_gpu_that_has_it(
    major: int, compute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two GPUs, of which the other is current and the opposite; torch would emulate it."""
    inside: list[torch.device] = []

    @contextlib.contextmanager
    def current(device: torch.device) -> Iterator[None]:
        inside.append(device)
        yield
        inside.pop()

    def properties(_: Any) -> Any:
        return SimpleNamespace(major=major if inside else 15 - major)

    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (major, 0))
    monkeypatch.setattr(environment, "refusal_of_gpu", lambda capability: None)
    monkeypatch.setattr(environment, "attention_report", lambda: [])
    assert pretrained.compute_of("auto", torch.device("cuda", 0)) == compute
    said = "used" if compute == "bf16" else "not used: it has none"
    assert dict(environment.describe())["cuda:0"] == f"a GPU; bf16 {said}"


def test_a_gpu_that_no_kernel_was_compiled_for_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without nvcc, say: pip has compiled the CPU's alone, and every op would fail."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(pretrained, "refusal_of_gpu", lambda capability: f"none for {capability}")
    with pytest.warns(RuntimeWarning, match=r"the GPU is not used: none for \(9, 0\)"):
        assert pretrained.device_of("auto") == torch.device("cpu")
    with pytest.raises(ModelError, match=r"device 'cuda:0': none for \(9, 0\)"):
        pretrained.device_of("cuda:0")
    monkeypatch.setattr(pretrained, "refusal_of_gpu", lambda capability: None)
    assert pretrained.device_of("auto") == pretrained.device_of("cuda") == torch.device("cuda", 0)


def test_copies_have_weights_of_their_own() -> None:
    model = language_model("gpt2", eos_ids=EOS)
    rollout = draw(model)
    before = model.token_logprob(rollout)
    frozen, learner = model.frozen_copy(), model.trainable_copy()
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert all(parameter.requires_grad for parameter in learner.parameters())
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    for same in (model, frozen):
        torch.testing.assert_close(same.token_logprob(rollout), before, rtol=0, atol=0)
    after = learner.token_logprob(rollout)
    assert (after - before).abs().max() > 0.01
    frozen.copy_weights_from(learner)
    torch.testing.assert_close(frozen.token_logprob(rollout), after, rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


# --- scoring and gradient ------------------------------------------------------------------------


def test_scores_do_not_depend_on_the_micro_batch() -> None:
    model = language_model("gpt2", eos_ids=EOS)
    rollout = draw(model)
    whole = model.token_logprob(rollout)
    for size in (1, 5, 100):
        part = model.token_logprob(rollout, micro_batch=size)
        torch.testing.assert_close(part, whole, rtol=0, atol=1e-5)
    inside = torch.arange(10) < rollout.lengths[:, None]
    assert (whole[~inside] == 0).all()
    with pytest.raises(ValueError, match="micro_batch: expected at least 1 sample, got 0"):
        model.token_logprob(rollout, micro_batch=0)


@pytest.mark.parametrize("packs", [False, True])
def test_micro_batches_hold_little_padding(packs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "PADDED_TOKENS", 64)
    model = language_model("gpt2", eos_ids=EOS)
    model.packs = packs
    rollout = draw(model, each=40)
    widths = rollout.prompt_lengths + rollout.lengths - 1
    assert len(set(widths.tolist())) > 8
    seen, batches = [], list(model._micro_batches(rollout, None, None, budget=200))
    for one in batches:
        rows = one.row.unique()
        seen += rows.tolist()
        computed, needed = one.tokens.numel(), int(widths[rows].sum())
        assert computed <= 200
        limit = 0.0 if packs else models.PADDING
        assert computed - needed <= limit * computed or (computed <= 64 and not packs)
    assert sorted(seen) == list(range(len(rollout)))
    assert len(batches) <= 1.5 * int(widths.sum()) / 200 + 3
    # One text that is longer than the budget is a batch of its own.
    assert len(list(model._micro_batches(rollout, None, None, budget=1))) == len(rollout)


def test_a_compiled_model_reads_padded_rows() -> None:
    """Where sequences lie in a packed row is constant to torch.compile: each would be another."""
    model = language_model("gpt2", eos_ids=EOS)
    model.packs = True
    rollout = draw(model)
    assert all(one.packing for one in model._micro_batches(rollout, None, 7, 4096))
    model.model.get_submodule("transformer").compile(backend="eager")
    assert not any(one.packing for one in model._micro_batches(rollout, None, 7, 4096))


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_entropy_and_log_sum_exp(family: str) -> None:
    model = language_model(family, eos_ids=EOS)
    rollout = draw(model)
    scored = model.token_logprob(rollout, entropy=True)
    assert scored.entropy is not None
    torch.testing.assert_close(scored.logp, rollout.token_logprob, rtol=0, atol=1e-4)
    torch.testing.assert_close(scored.lse, rollout.lse, rtol=0, atol=1e-4)
    row, length = 0, int(rollout.lengths[0])
    text = rollout.tokens[row, : 3 + length]
    logits = double(model)(input_ids=text[None], use_cache=False).logits[0, 2:-1]
    logp = torch.log_softmax(logits, dim=-1)
    torch.testing.assert_close(
        scored.entropy[row, :length].double(), -(logp.exp() * logp).sum(-1), rtol=0, atol=1e-4
    )


def test_the_tied_weight_gets_both_its_gradients() -> None:
    model = language_model("gpt2", eos_ids=EOS)
    assert model.model.lm_head.weight is model.model.transformer.wte.weight
    rollout = draw(model)
    weights = torch.randn(len(rollout), dtype=torch.float64)
    model.accumulate_gradient(rollout, weights, denominator=1)
    plain = double(model)
    plain.zero_grad()
    (-(weights * reference_logprob(plain, rollout).sum(1)).sum()).backward()
    own, truth = model.model.lm_head.weight.grad, plain.lm_head.weight.grad
    assert (own.double() - truth).abs().max() < 1e-4 * truth.abs().max()
    # Rows of tokens that are never read get a gradient from the head, those read from both.
    assert (own.abs().sum(1) > 0).all()


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_the_gradient_is_told_the_samplers_log_sum_exp(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it knows its weights before it has seen all logits; without it is right, but slower."""
    model = language_model(family, eos_ids=EOS)
    rollout = draw(model)
    hints: list[Tensor] = []
    gradient = ops.policy_gradient

    def spy(*given: Any, **named: Any) -> Any:
        hints.append(named["lse_hint"])
        return gradient(*given, **named)

    monkeypatch.setattr(ops, "policy_gradient", spy)
    weights = torch.ones(len(rollout), dtype=torch.float64)
    model.accumulate_gradient(rollout, weights, denominator=1, micro_batch=5)
    batches = list(model._micro_batches(rollout, None, 5, models.GRADIENT_TOKENS))
    assert len(batches) > 1
    for hint, one in zip(hints, batches, strict=True):
        assert torch.equal(hint, rollout.lse[one.row, one.column])


@pytest.mark.parametrize("learns", ["lm_head.bias", "lm_head.weight", "final_layernorm.weight"])
def test_parts_of_the_head_learn_alone(learns: str) -> None:
    model = language_model("phi", eos_ids=EOS)
    rollout = draw(model)
    weights = torch.randn(len(rollout), dtype=torch.float64)
    plain = double(model)
    plain.zero_grad()
    (-(weights * reference_logprob(plain, rollout).sum(1)).sum() / 7).backward()
    for name, parameter in model.model.named_parameters():
        parameter.requires_grad_(name.endswith(learns))
    for calls in (1, 2):
        model.accumulate_gradient(rollout, weights, denominator=7)
        for (name, own), true in zip(
            model.model.named_parameters(), plain.parameters(), strict=True
        ):
            assert (own.grad is not None) == name.endswith(learns), name
            if own.grad is not None:
                expected = (calls * true.grad).float()
                torch.testing.assert_close(own.grad, expected, rtol=1e-4, atol=1e-5)


def test_gradients_add_up_over_calls() -> None:
    model = language_model("llama", eos_ids=EOS)
    rollout = draw(model)
    weights = torch.randn(len(rollout), dtype=torch.float64)
    model.accumulate_gradient(rollout, weights, denominator=7)
    whole = gradients(model)
    first = torch.arange(5)
    rest = torch.arange(5, len(rollout))
    for rows in (first, rest):
        model.accumulate_gradient(rollout.select(rows), weights[rows], denominator=7)
    for a, b in zip(gradients(model), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


CALLERS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "another default type": lambda: default_dtype(torch.bfloat16),
}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_the_caller_has_set_does_not_matter_to_a_gradient(
    family: str, compute: Any, caller: str
) -> None:
    """Nor do weights of before an update, which a caller's autocast would keep in 16 bits."""
    model = language_model(family, eos_ids=EOS, compute=compute)
    rollout = draw(model)
    weights = torch.randn(len(rollout), dtype=torch.float64)

    def found() -> list[Tensor]:
        logp = model.accumulate_gradient(rollout, weights, denominator=7)
        return [logp, *gradients(model), model.token_logprob(rollout)]

    def update(factor: float) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(factor)

    plain = [found()]
    update(0.5)
    plain.append(found())
    update(2.0)
    with CALLERS[caller]():
        there = [found()]
        update(0.5)
        there.append(found())
    for ours, theirs in zip(there, plain, strict=True):
        assert all(map(torch.equal, ours, theirs))
        assert all(x.dtype == torch.float32 for x in ours)


def test_a_model_is_the_same_where_autocast_is_on() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")
        model = language_model("llama")
    assert model.checks == language_model("llama").checks


def test_samples_of_weight_zero_are_not_computed() -> None:
    model = language_model("gpt2", eos_ids=EOS)
    rollout = draw(model)
    weights = torch.randn(len(rollout), dtype=torch.float64)
    weights[3::2] = 0
    rows_seen = []
    hidden = model.hidden

    def watched(tokens: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        rows_seen.append(len(tokens))
        return hidden(tokens, *rest, **named)

    model.hidden = watched  # type: ignore[method-assign]
    logp = model.accumulate_gradient(rollout, weights, denominator=7)
    used = weights.nonzero()[:, 0]
    assert sum(rows_seen) == len(used)
    sparse = gradients(model)
    model.accumulate_gradient(rollout.select(used), weights[used], denominator=7)
    for a, b in zip(sparse, gradients(model), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    inside = torch.arange(10) < rollout.lengths[:, None]
    assert logp[3::2][inside[3::2]].isnan().all()
    assert not logp[used].isnan().any()
    assert (logp[~inside] == 0).all()
    # Nothing to learn from: no gradient, no error.
    none = model.accumulate_gradient(rollout, torch.zeros_like(weights), denominator=7)
    assert none[inside].isnan().all()


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "phimoe"])
def test_activation_checkpointing_changes_nothing(family: str) -> None:
    """Nor do routers add noise, or draw, as those of the latter two do in train mode."""
    model = language_model(family, eos_ids=EOS)
    rollout = draw(model)
    weights = torch.randn(len(rollout), dtype=torch.float64)
    model.accumulate_gradient(rollout, weights, denominator=1)
    saving = language_model(family, eos_ids=EOS, activation_checkpointing=True)
    norms = [m for name, m in saving.model.named_modules() if re.search(r"1\.(ln_1|input_l)", name)]
    calls: list[int] = []
    norms[0].register_forward_hook(lambda *_: calls.append(1))
    logp = saving.accumulate_gradient(rollout, weights, denominator=1)
    assert len(calls) == 2, "it is computed again"
    torch.testing.assert_close(logp, rollout.token_logprob, rtol=0, atol=1e-5)
    for a, b in zip(gradients(saving), gradients(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
    assert not saving.model.training
    torch.testing.assert_close(draw(saving).tokens, rollout.tokens)


def test_bad_weights_and_ids_are_named() -> None:
    model = language_model("gpt2", eos_ids=EOS)
    rollout = draw(model)
    weights = torch.ones(len(rollout), dtype=torch.float64)
    weights[4] = torch.nan
    with pytest.raises(ValueError, match="`weights` must be finite, got nan for sample 4"):
        model.accumulate_gradient(rollout, weights, denominator=1)
    with pytest.raises(ValueError, match=r"`weights` must have shape \[\d+\], .* got \[3\]"):
        model.accumulate_gradient(rollout, torch.ones(3).double(), denominator=1)
    with pytest.raises(ValueError, match="`denominator` must be above 0, got 0"):
        model.accumulate_gradient(rollout, torch.ones_like(weights), denominator=0)
    assert all(parameter.grad is None for parameter in model.parameters())
    rollout.tokens[5, 2] = VOCAB
    with pytest.raises(ValueError, match=r"must be in 0\.\.60, got 61 in row 5, column 2"):
        model.token_logprob(rollout)


# --- families ------------------------------------------------------------------------------------


def test_heads_are_found_by_their_numbers() -> None:
    """One config name means opposite things in two families; only logits can tell."""
    assert language_model("gpt2").head.scale == 1.0
    assert language_model("cohere").head.scale == 0.25
    assert language_model("granite").head.scale == pytest.approx(1 / 3)
    assert language_model("gemma2").softcap == language_model("gemma2").head.softcap == 3.0


@pytest.mark.parametrize("biased", [True, False])
def test_logits_are_scaled_and_not_capped(biased: bool) -> None:
    """The cap is left to the kernels that read them."""
    hidden, weight = torch.randn(5, 8), torch.randn(7, 8)
    bias = torch.randn(7) if biased else None
    expected = 0.3 * torch.nn.functional.linear(hidden, weight, bias)
    out = torch.full((5, 7), torch.nan)
    torch.testing.assert_close(Head(weight, bias, 0.3, 2.0).logits(hidden, out=out), expected)
    torch.testing.assert_close(out, expected)


class _Strange(GPT2LMHeadModel):
    """A head that no formula of ours describes."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + torch.sin(out.logits)
        return out


def _strange() -> Any:
    plain = tiny("gpt2")
    strange = _Strange(plain.config)
    strange.load_state_dict(plain.state_dict())
    return strange


def test_an_unknown_head_is_right_and_loud() -> None:
    with pytest.warns(RuntimeWarning, match="its output layer is not a known formula"):
        model = LanguageModel.from_model(_strange(), name="strange", eos_ids=EOS)
    assert model.head is None
    assert model.attention == SLOT
    rollout = draw(model)
    with torch.no_grad():
        truth = reference_logprob(double(model), rollout)
    for found in (rollout.token_logprob, model.token_logprob(rollout)):
        torch.testing.assert_close(found.double(), truth, rtol=0, atol=1e-4)
    weights = torch.randn(len(rollout), dtype=torch.float64)
    model.accumulate_gradient(rollout, weights, denominator=1)
    reference = double(model)
    reference.zero_grad()
    (-(weights * reference_logprob(reference, rollout).sum(1)).sum()).backward()
    for own, true in zip(model.parameters(), reference.parameters(), strict=True):
        error = (own.grad.double() - true.grad).abs().max()
        assert error < 1e-4 * true.grad.abs().max()


@pytest.mark.parametrize("family", ["falcon", "bloom", "gpt_neo"])
def test_a_family_without_slots_is_right_and_loud(family: str) -> None:
    with pytest.warns(RuntimeWarning, match="sampling without a key-value cache"):
        model = language_model(family, eos_ids=EOS)
    assert model.attention != SLOT
    rollout = draw(model, each=3)
    with torch.no_grad():
        truth = reference_logprob(double(model), rollout)
    for found in (rollout.token_logprob, model.token_logprob(rollout)):
        torch.testing.assert_close(found.double(), truth, rtol=0, atol=1e-4)


def test_a_family_that_needs_numbers_in_its_mask_decodes_with_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As one does that adds to its masks: spans of live keys fail or mislead it."""

    def wrong(query: Tensor, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> Tensor:
        return query.new_zeros(*query.shape[:2], values.shape[3])

    monkeypatch.setattr(ops, "decode_attention", wrong)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is not slow, so nothing is said
        model = language_model("llama", eos_ids=EOS)
    assert model.attention == SLOT_MASKED
    rollout = draw(model, each=3)
    truth = reference_logprob(double(model), rollout)
    torch.testing.assert_close(rollout.token_logprob.double(), truth, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("phi3", {}),
        (
            "llama",
            {
                "max_position_embeddings": 16,
                "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
            },
        ),
    ],
)
def test_positions_do_not_depend_on_the_longest_text_of_a_batch(
    family: str, changes: dict[str, Any]
) -> None:
    """As those of longrope and dynamic NTK would beyond 16 tokens here."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = language_model(family, eos_ids=EOS, changes=changes)
    assert model.context_length == 16
    expected = ["phi3: reads up to 16 tokens here, not 40"] if family == "phi3" else []
    assert [str(one.message)[:40] for one in said] == expected
    prompts = batch([7], list(range(6, 15)))
    rollout = Sampler(7, batch_size=6).draw(model, prompts, 12, key=3)
    texts = rollout.prompt_lengths + rollout.lengths
    assert (int(texts.min()) < 9, int(texts.max())) == (True, 16)
    truth = reference_logprob(double(model), rollout)
    for found in (rollout.token_logprob, model.token_logprob(rollout)):
        torch.testing.assert_close(found.double(), truth, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="do not fit the 16 tokens"):
        Sampler(8).draw(model, prompts, 1, key=3)


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_llama_4_reads_as_far_as_attention_is_not_scaled_by_a_count_of_its_own(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From position 15 on here, and 8191 by default; without slots there is one count for all."""
    llama = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 8}
    llama |= {"num_key_value_heads": 2, "intermediate_size": 48, "intermediate_size_mlp": 48}
    llama |= {"max_position_embeddings": 40, "attention_chunk_size": 8, "num_local_experts": 2}
    llama |= {"floor_scale": 16, "attn_scale": 2.0}
    monkeypatch.setitem(CONFIGS, "llama4_text", llama)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = language_model("llama4_text", eos_ids=EOS, attention=attention)
    limited = any("reads up to 15 tokens here, not 40" in str(one.message) for one in said)
    slots = attention == "auto"
    assert (model.has_cache, limited, model.context_length == 15) == (slots, slots, slots)
    longest = 15 if slots else 30
    rollout = Sampler(longest - 3, batch_size=6).draw(model, batch([7, 5, 2], [1]), 12, key=3)
    assert longest - 4 < int((rollout.prompt_lengths + rollout.lengths).max()) <= longest
    truth = reference_logprob(double(model), rollout)
    for found in (rollout.token_logprob, model.token_logprob(rollout)):
        torch.testing.assert_close(found.double(), truth, rtol=0, atol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_can_be_chosen(attention: str) -> None:
    model = language_model("gpt2", eos_ids=EOS, attention=attention)
    assert model.attention == attention
    slots = language_model("gpt2", eos_ids=EOS)
    assert (slots.attention, draw(slots).texts) == (SLOT, draw(model).texts)


def test_attention_that_does_not_exist_or_fit() -> None:
    with pytest.raises(ModelError, match=r"cannot use attention 'quick'.*fdpg env"):
        language_model("gpt2", attention="quick")
    with pytest.raises(ModelError, match=f"attention '{SLOT}' does not fit: FalconForCausalLM"):
        language_model("falcon", attention=SLOT)
    report = {name: available for name, available, _ in attention_report()}
    assert report[SLOT]
    assert report["sdpa"]


def test_the_self_test_finds_a_wrong_path() -> None:
    model = language_model("gpt2")
    found = model.self_test()
    assert set(found) == {"tolerance", "scoring", "head", "decoding"}
    assert max(found[name] for name in ("scoring", "head", "decoding")) <= found["tolerance"]
    model._fused = (1.1, None)
    with pytest.raises(ModelError, match=r"differs from the model's own forward pass by .* nats"):
        model.self_test()


def test_a_model_whose_padded_scoring_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no other way to score: packed rows are a GPU's, and single ones nobody waits for."""
    monkeypatch.setattr(SelfTest, "scoring_error", lambda *_: 0.5)
    with (
        pytest.warns(RuntimeWarning, match="sampling without a key-value cache"),
        pytest.raises(ModelError, match=r"scoring differs .* 0\.5 nats .* cannot be trained"),
    ):
        language_model("gpt2")


def test_a_model_is_compiled_if_what_is_called_of_it_is() -> None:
    """Else its steps would be neither compiled nor recorded: as a whole it is not called."""
    for part in ("", "transformer", "transformer.h.0"):
        model = language_model("gpt2")
        assert not model.is_compiled
        model.model.get_submodule(part).compile(backend="eager")
        assert model.is_compiled == (part != "")
    strange = _strange()
    with pytest.warns(RuntimeWarning, match="its output layer is not a known formula"):
        model = LanguageModel.from_model(strange, eos_ids=EOS)
    strange.compile(backend="eager")
    assert model.is_compiled  # its logits are its own


def test_padding_ids_at_the_ends_of_texts_are_no_reason_to_warn(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The id of padding, of the beginning of a text and of its end is 0 here."""
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]  # given once only
    model = language_model("gpt2", changes={"pad_token_id": 0})
    rollout = Sampler(5).draw(model, batch([0], [0, 3]), 4, key=1)
    for one in (model, model.trainable_copy()):
        one.sequence_logprob(rollout)
        one.accumulate_gradient(rollout, torch.ones(8).double(), denominator=8)
    assert "attention_mask" not in caplog.text
    tiny("gpt2", pad_token_id=0)(input_ids=torch.zeros(1, 2, dtype=torch.int64))
    assert "attention_mask" in caplog.text  # of others it is said still


def test_packing_is_used_where_it_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is settled on a GPU; which kernel runs there is not at stake."""
    model = language_model("gpt2")
    assert not model.packs
    assert model.scoring == "padded: kernels for packed sequences need a GPU"
    model.device, model.compute = torch.device("cuda"), "bf16"
    differ = "packed sequences differ from single ones by"
    for flash, torchs, scoring in (
        (0.0, torch.inf, "packed, by flash-attn"),
        ("head size 512", 0.0, "packed, by torch's varlen_attn (flash-attn: head size 512)"),
        (1.0, 0.0, f"packed, by torch's varlen_attn (flash-attn: {differ} 1 nats)"),
        (1.0, torch.inf, f"padded: flash-attn: {differ} 1 nats; torch's varlen_attn: {differ} inf"),
        (1.0, "no cap", f"padded: flash-attn: {differ} 1 nats; torch's varlen_attn: no cap"),
    ):
        found = {"flash-attn": flash, "torch's varlen_attn": torchs}

        def error(_: LanguageModel, kernel: str, found: dict[str, Any] = found) -> float:
            if isinstance(error := found[kernel], str):
                raise RuntimeError(error)
            return float(error)

        monkeypatch.setattr(model, "packs", False)
        monkeypatch.setattr(models, "packing_error", error)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            assert model._settle_packing().startswith(scoring)
        assert (model.packs, len(warned)) == ((True, 0) if "packed, " in scoring else (False, 1))
        for one in warned:
            assert "gpt2: scoring padded rows, which is right but slower: flash" in str(one.message)
    monkeypatch.setattr(model, "packs", False)
    model.compute = "fp32"
    assert model._settle_packing() == "padded: kernels for packed sequences take fp16 and bf16"
    model.attention = "eager"
    assert model._settle_packing() == "padded: eager does not keep packed sequences apart"
    assert not model.packs


# --- files ---------------------------------------------------------------------------------------


def test_load_save_load(tmp_path: Path) -> None:
    model = LanguageModel.load(write_tiny_model(tmp_path / "one"))
    assert model.name == str(tmp_path / "one")
    assert model.eos_ids == (0,)
    assert model.bos_prompt == (0,)
    assert model.context_length == 32
    assert model.vocab_size == 20
    assert model.encode("once there was") == [1, 2, 3]
    assert model.decode(torch.tensor([[1, 2, 0]])) == ["once there"]
    rollout = Sampler(8).draw(model, batch([1, 2]), 6, key=0)
    model.save(tmp_path / "two")
    assert not list((tmp_path / "two").glob("*.bin")), "no pickle"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert plain.dtype == torch.float32
    assert plain.config._attn_implementation != SLOT, "our name must not be in the file"
    assert plain.generation_config.temperature == 1.0
    assert plain.generation_config.top_k == 0
    with torch.no_grad():
        truth = reference_logprob(plain.double(), rollout)
    torch.testing.assert_close(rollout.token_logprob.double(), truth, rtol=0, atol=1e-4)
    again = LanguageModel.load(tmp_path / "two")
    torch.testing.assert_close(again.token_logprob(rollout), model.token_logprob(rollout))
    assert (again.eos_ids, again.bos_prompt) == (model.eos_ids, model.bos_prompt)


def test_what_ends_a_sample_is_saved(tmp_path: Path) -> None:
    model = LanguageModel.load(write_tiny_model(tmp_path / "one"), eos_ids=[3])
    model.save(tmp_path / "two")
    assert LanguageModel.load(tmp_path / "two").eos_ids == (3,), "not the tokenizer's 0 as well"
    for ids in ((5, 4), ()):
        model.eos_ids = ids
        model.save(tmp_path / "two")
        assert LanguageModel.load(tmp_path / "two").eos_ids == ids
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
        assert plain.generation_config.eos_token_id == (list(ids) or None)


def test_what_cannot_be_loaded_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"no/such-model.*local folder, set HF_HOME.*embedded"):
        LanguageModel.load("no/such-model")
    with pytest.raises(ModelError, match=r"model 'no:such-model': no such folder here"):
        LanguageModel.load("no:such-model")
    with pytest.raises(ModelError, match=r"runs/dogs/model': no such folder"):
        LanguageModel.load("runs/dogs/model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"empty.*a folder that save_pretrained wrote"):
        LanguageModel.load(tmp_path / "empty")
    folder = write_tiny_model(tmp_path / "broken")
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelError, match=r"broken.*cannot be loaded"):
        LanguageModel.load(folder)


def test_what_has_no_log_probs_is_refused() -> None:
    plain = tiny("gpt2")
    message = r"GPT2Model: expected logits of shape \[1, 9, 61\] .*Way out: .*AutoModelForCausalLM"
    with pytest.raises(ModelError, match=message):
        LanguageModel.from_model(plain.transformer)
    with pytest.raises(ModelError, match=r"Classification: expected logits .* got \[1, 2\]: "):
        LanguageModel.from_model(GPT2ForSequenceClassification(plain.config))
    t5 = tiny("t5")
    with pytest.raises(ModelError, match=r"T5Model: expected logits .*AutoModelForSeq2SeqLM"):
        LanguageModel.from_model(AutoModel.from_config(t5.config))
    for given, kind in [("gpt2", "str"), (torch.nn.Linear(2, 2), "Linear")]:
        with pytest.raises(ModelError, match=f"expected a model of transformers, got {kind}. Way"):
            LanguageModel.from_model(given)


def test_what_reads_ahead_is_refused() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "initializer_range": 0.2, "vocab_size": 61}
    with pytest.raises(ModelError, match=r"BertForMaskedLM: .* on what comes after it, .*CausalLM"):
        LanguageModel.from_model(BertForMaskedLM(BertConfig(**sizes)))
    # The same family, made to read from left to right.
    decoder = BertLMHeadModel(BertConfig(**sizes, is_decoder=True))
    with pytest.warns(RuntimeWarning, match="its output layer is not a known formula"):
        LanguageModel.from_model(decoder, eos_ids=(1,))


def test_code_of_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "mine"
    config["auto_map"] = {
        "AutoConfig": "mine.Config",
        "AutoModelForCausalLM": "mine.Model",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError, match="trust_remote_code"):
        LanguageModel.load(folder)
    assert not (tmp_path / "ran").exists()


class _Tokenizer:
    """As much of a tokenizer as ids need; `adds` is what it puts around a text."""

    def __init__(self, adds: tuple[Sequence[int], Sequence[int]] = ((), ()), **ids: int) -> None:
        self.adds = adds
        self.bos_token_id, self.eos_token_id = ids.get("bos"), ids.get("eos")

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        bare = [int(word) for word in text.split()]
        before, after = self.adds if add_special_tokens else ((), ())
        return type("Encoding", (), {"input_ids": [*before, *bare, *after]})


def test_where_end_and_beginning_come_from() -> None:
    plain = tiny("gpt2")
    plain.generation_config.eos_token_id = [9, 2]
    plain.config.eos_token_id = 2
    plain.config.bos_token_id = None
    model = LanguageModel.from_model(plain, _Tokenizer(eos=5, bos=7))
    assert model.eos_ids == (9, 2, 5)
    assert model.bos_prompt == (7,)
    plain.generation_config.eos_token_id = plain.config.eos_token_id = 50256
    model = LanguageModel.from_model(plain, _Tokenizer())
    assert model.eos_ids == (), "ids that the vocabulary does not have end nothing"
    with pytest.raises(ModelError, match="neither a begin-of-text nor an end-of-text token"):
        _ = model.bos_prompt
    assert LanguageModel.from_model(plain, eos_ids=[3]).bos_prompt == (3,)


def test_ids_that_could_end_no_sample_are_refused() -> None:
    for wrong in (VOCAB, -1, "</s>"):
        message = rf"gpt2: `eos_ids` must be in 0\.\.60, got {wrong!r}, which no sample .*Way out"
        with pytest.raises(ModelError, match=message):
            language_model("gpt2", eos_ids=[3, wrong])  # type: ignore[list-item]
    model = language_model("gpt2", eos_ids=[3, VOCAB - 1])
    with pytest.raises(ModelError, match=message):
        model.eos_ids = (3, wrong)
    assert model.eos_ids == (3, 60), "it is what it was"


def test_a_prompt_may_begin_a_text_but_not_end_it() -> None:
    model = language_model("gpt2")
    for adds, expected in (
        (((), ()), [4, 5]),
        (((1,), ()), [1, 4, 5]),
        (((1,), (2,)), [1, 4, 5]),
        (((), (2, 2)), [4, 5]),
    ):
        model.tokenizer = _Tokenizer(adds)
        assert model.encode("4 5") == expected


def test_devices_and_compute_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    for device in ("gpu", "mps", "xpu:0", "meta"):
        with pytest.raises(ModelError, match=f"expected auto, cpu, cuda or cuda:N, got '{device}'"):
            language_model("gpt2", device=device)
    with pytest.raises(ModelError, match="expected auto, fp32, bf16, fp16, got 'int8'"):
        language_model("gpt2", compute="int8")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="this torch sees no GPU"):
            language_model("gpt2", device="cuda")
    model = tiny("gpt2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device in ("cuda:2", "cuda:7"):
        with pytest.raises(ModelError, match=f"device '{device}': expected cuda:0 to cuda:1"):
            LanguageModel.from_model(model, device=device)

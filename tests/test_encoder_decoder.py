"""Encoder-decoder models: the prompt is read once, the decoder's law is sampled, scored and saved.

That sampler, trainer and fp64 agree on log-probs and gradients is in ``test_parity.py``.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from families import ENCODER_DECODER, batch, double, language_model, reference_logprob, tiny
from test_sampler import assert_same_samples, samples
from tiny import write_tiny_t5
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSeq2SeqLM
from versions import TRANSFORMERS, UNFIT

from fdpg_fast import cli
from fdpg_fast import sampler as sampler_module
from fdpg_fast.attention import SHARED, attention_report
from fdpg_fast.encoder_decoder import EncoderDecoderModel, PromptDecoder, _Slots
from fdpg_fast.models import LanguageModel, ModelError
from fdpg_fast.prompts import Prompts
from fdpg_fast.rollout import Rollout
from fdpg_fast.run_directory import RunDirectory
from fdpg_fast.sampler import Sampler

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = batch([7, 3, 9, 11, 2], [4], [1, 2, 3, 4, 5, 6, 7, 8, 9])
EOS = tuple(range(6))


@pytest.fixture(scope="module", params=ENCODER_DECODER)
def model(request: pytest.FixtureRequest) -> EncoderDecoderModel:
    made = language_model(request.param, eos_ids=EOS)
    assert isinstance(made, EncoderDecoderModel)
    return made


def draw(model: LanguageModel, slots: int = 8, key: int = 3, each: int = 6) -> Rollout:
    return Sampler(10, batch_size=slots, check_every=3).draw(model, PROMPTS, each, key=key)


def gradients(model: LanguageModel, rollout: Rollout, **options: Any) -> dict[str, Tensor]:
    weights = torch.linspace(-1, 1, len(rollout), dtype=torch.float64)
    model.model.zero_grad()
    model.accumulate_gradient(rollout, weights, denominator=10, **options)
    return {name: p.grad.clone() for name, p in model.named_parameters().items()}


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, gradient in left.items():
        torch.testing.assert_close(gradient, right[name], rtol=1e-4, atol=1e-5, msg=name)


# --- the law ------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [100, 6000])
def test_samples_follow_the_law_of_the_model(slots: int) -> None:
    """chi-squared against every sample of up to three tokens, after two prompts: also where slots
    are refilled, with the prompt that they had and with the other."""
    model = language_model("t5", eos_ids=(0,), changes={"vocab": 5})
    prompts, each = batch([4, 1, 2], [3]), 3000
    rollout = Sampler(3, batch_size=slots).draw(model, prompts, each, key=11)
    plain, texts = double(model), samples(rollout)
    for g, prompt in enumerate(prompts.tokens):
        found = texts[g * each : (g + 1) * each]
        expected: dict[tuple[int, ...], float] = {}
        for tail in itertools.product(range(5), repeat=3):
            written = torch.tensor([[3, *tail[:-1]]])
            with torch.no_grad():
                logits = plain(input_ids=torch.tensor([prompt]), decoder_input_ids=written).logits
            logp = torch.log_softmax(logits[0], -1).gather(1, torch.tensor(tail)[:, None])[:, 0]
            end = tail.index(0) + 1 if 0 in tail else 3
            expected[tail[:end]] = float(logp[:end].sum().exp())
        assert sum(expected.values()) == pytest.approx(1.0)
        assert set(map(tuple, found)) <= set(expected)
        likely = {text: p for text, p in expected.items() if each * p >= 5}
        counts = [sum(tuple(text) == other for text in found) for other in likely]
        wanted = [each * p for p in likely.values()]
        statistic = sum((c - w) ** 2 / w for c, w in zip(counts, wanted, strict=True))
        freedom = len(likely) - 1
        assert freedom > 10
        assert statistic < freedom + 4 * (2 * freedom) ** 0.5


def test_what_a_checkpoint_forces_upon_samples_is_ignored(tmp_path: Path) -> None:
    """Else the law sampled by generate would not be the law scored. The start token stays."""
    plain = tiny("bart")
    draws = draw(LanguageModel.from_model(plain, eos_ids=EOS))
    plain.generation_config.update(
        forced_bos_token_id=9, forced_eos_token_id=2, num_beams=4, min_length=5, temperature=0.1
    )
    plain.generation_config.decoder_start_token_id = 3
    model = LanguageModel.from_model(plain, eos_ids=EOS)
    assert_same_samples(draw(model), draws)
    model.save(tmp_path)
    saved = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).generation_config
    assert saved.decoder_start_token_id == 3
    for name in ("forced_bos_token_id", "forced_eos_token_id", "num_beams", "min_length"):
        assert not getattr(saved, name), name


def test_samples_do_not_depend_on_the_batch(model: EncoderDecoderModel) -> None:
    one = draw(model, slots=1)
    for slots in (5, 7, 64):
        assert_same_samples(one, draw(model, slots))
    assert samples(draw(model, key=4)) != samples(one)
    apart = [
        samples(Sampler(10).draw(model, batch(prompt), 6, key=3, first_sample_id=6 * g))
        for g, prompt in enumerate(PROMPTS.tokens)
    ]
    assert samples(one) == list(itertools.chain(*apart))


def test_prompts_come_and_go(model: EncoderDecoderModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than there are slots, read a few at a time, in a draw and in one that has its memory:
    what a slot reads is never another's."""
    monkeypatch.setattr(PromptDecoder, "PREFILL_TOKENS", 30)
    torch.manual_seed(0)
    sampler = Sampler(20, batch_size=7)
    for _ in range(3):
        lengths = torch.randint(1, 20, (25,)).tolist()
        prompts = batch(*[torch.randint(6, 61, (n,)).tolist() for n in lengths])
        rollout = sampler.draw(model, prompts, 3, key=3)
        assert len(set(rollout.lengths.tolist())) > 10
        torch.testing.assert_close(
            model.token_logprob(rollout), rollout.token_logprob, rtol=0, atol=1e-4
        )
        assert_same_samples(rollout, Sampler(20).draw(model, prompts, 3, key=3))


def test_a_stop_function_ends_samples(model: EncoderDecoderModel) -> None:
    def stop(text: str) -> bool:
        return len(text.split()) == 4

    rollout = Sampler(10, batch_size=8, check_every=3, stop=stop).draw(model, PROMPTS, 6, key=3)
    whole = samples(draw(model))
    assert samples(rollout) == [text[:4] for text in whole]
    assert max(map(len, whole)) > 4
    torch.testing.assert_close(model.token_logprob(rollout), rollout.token_logprob)


# --- what is computed ---------------------------------------------------------------------------


class _Counted:
    """How many rows each call of a module takes."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.rows: list[int] = []
        module.register_forward_hook(self, with_kwargs=True)

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        self.rows.append(len(kwargs["input_ids"] if "input_ids" in kwargs else args[0]))


def counted(model: LanguageModel) -> tuple[_Counted, _Counted]:
    """Of its encoder, and of what makes the keys of a prompt."""
    name = "EncDecAttention.k" if model.name.startswith("t5") else "encoder_attn.k_proj"
    keys = [m for n, m in model.model.named_modules() if n.endswith(name)]
    assert len(keys) > 1
    return _Counted(model.model.get_encoder()), _Counted(keys[0])


@pytest.mark.parametrize("family", ENCODER_DECODER)
def test_each_prompt_is_read_once(family: str) -> None:
    if family in UNFIT:
        pytest.skip(f"{family} reads a prompt once per sample in transformers {TRANSFORMERS}")
    model = language_model(family, eos_ids=EOS)
    encoder, keys = counted(model)
    rollout = draw(model)
    positions = [1] if family == "bart" else []  # a table of them is asked for by one text
    assert (encoder.rows, keys.rows) == ([3], [3, *positions])
    for use in (model.token_logprob, lambda x: gradients(model, x)):
        encoder.rows.clear()
        keys.rows.clear()
        use(rollout)
        assert (encoder.rows, keys.rows) == ([3], [3])
    # By each micro-batch that has samples of it, that is: 4 | 2 + 2 | 4 | 4 | 2 of 6 + 6 + 6.
    encoder.rows.clear()
    model.token_logprob(rollout, micro_batch=4)
    assert encoder.rows == [1, 2, 1, 1, 1]


def test_a_sampler_keeps_memory_that_fits_and_no_prompts() -> None:
    """Also from a model to another whose heads have another size."""
    sampler, fresh = Sampler(12, batch_size=8), Sampler(12, batch_size=8)
    for size in (8, 16):
        model = language_model("t5", eos_ids=EOS, changes={"d_kv": size})
        drawn = sampler.draw(model, PROMPTS, 4, key=1)
        assert torch.equal(drawn.tokens, fresh.draw(model, PROMPTS, 4, key=1).tokens)
        fresh = Sampler(12, batch_size=8)
        decoder = sampler._decoder
        assert isinstance(decoder, PromptDecoder)
        for cache in (decoder.cache, decoder.cache.prompts):
            assert cache.slot_layers[0].keys.shape[3] == size
        assert not decoder.prompts
        assert not decoder.found


def test_a_model_takes_over_memory_that_is_longer_than_what_it_can_read() -> None:
    """And a model without an encoder none of one that has one."""
    sampler = Sampler(40, batch_size=5)
    for name in ("t5", "bart", "llama", "t5"):
        changes = {"max_position_embeddings": 60} if name == "llama" else {}
        model = language_model(name, eos_ids=EOS, changes=changes)
        found = sampler.draw(model, PROMPTS, 4, key=1)
        assert_same_samples(found, Sampler(40, batch_size=5).draw(model, PROMPTS, 4, key=1))
        assert isinstance(sampler._decoder, PromptDecoder) == (name != "llama")


def test_micro_batches_hold_every_sample_once(model: EncoderDecoderModel) -> None:
    """And no more tokens than they should, those of the prompts included, unless one sample has."""
    rollout = draw(model)
    used = torch.arange(len(rollout)) % 3 > 0
    for mask, budget in ((None, 40), (used, 40), (used, 1), (None, 4096)):
        seen = []
        for part in model._micro_batches(rollout, mask, None, budget):
            size = part.tokens.numel() + len(part.prompts) * max(map(len, part.prompts))
            rows = part.row.unique()
            assert size <= budget or len(rows) == 1
            seen += rows.tolist()
        wanted = range(len(rollout)) if mask is None else used.nonzero()[:, 0].tolist()
        assert sorted(seen) == list(wanted)


class _Questions(TorchDispatchMode):
    """Refuses questions to the device."""

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        asked = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")
        assert op.overloadpacket.__name__ not in asked
        return op(*args, **(kwargs or {}))


def keys_at(decoder: PromptDecoder) -> tuple[int, int]:
    own, prompts = decoder.cache.slot_layers[0], decoder.cache.prompts.slot_layers[0]
    return own.keys.data_ptr(), prompts.keys.data_ptr()


def test_a_step_asks_the_device_nothing(
    model: EncoderDecoderModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the memory of the samples is kept, within a draw and from one to the next."""
    if model.name in UNFIT:
        pytest.skip(f"transformers {TRANSFORMERS} asks when it makes a mask for {model.name}")
    monkeypatch.setattr(sampler_module, "_can_be_replayed", lambda decoder, steps: False)
    monkeypatch.setitem(sampler_module.LEAST_SAVED, "cpu", 0)
    sampler = Sampler(40, batch_size=7)
    sampler.draw(model, PROMPTS, 6, key=3)
    step, decoder = sampler_module._Work.step, sampler._decoder
    assert isinstance(decoder, PromptDecoder)
    places, slots = {keys_at(decoder)}, set()

    def watched(work: Any, decoder: PromptDecoder, row: Tensor, reach: int) -> None:
        with _Questions(), monkeypatch.context() as patch:
            patch.setattr(Tensor, "tolist", None)  # dispatches nothing that the mode could see
            step(work, decoder, row, reach)
        places.add(keys_at(decoder))
        slots.add(len(row))

    monkeypatch.setattr(sampler_module._Work, "step", watched)
    sampler.draw(model, PROMPTS, 6, key=4)
    assert len(places) == 1
    assert len(slots) > 1


def test_samples_longer_than_what_memory_is_taken_at_a_time(model: EncoderDecoderModel) -> None:
    model = model.frozen_copy()
    model.eos_ids = ()
    assert (model.context_length == 40) == (model.name == "bart")
    rollout = Sampler(40, batch_size=5).draw(model, PROMPTS, 2, key=3)
    assert set(rollout.lengths.tolist()) == {40}
    torch.testing.assert_close(
        model.token_logprob(rollout), rollout.token_logprob, rtol=0, atol=1e-4
    )
    if model.name != "bart":
        return  # no limit: see the next test
    with pytest.raises(ValueError, match="of 5 tokens and 41 new ones do not fit the 40 tokens"):
        Sampler(41).draw(model, PROMPTS, 2, key=3)
    with pytest.raises(ValueError, match="of 41 tokens and 1 new ones do not fit the 40 tokens"):
        Sampler(1).draw(model, batch([1] * 41), 2, key=3)


@pytest.mark.filterwarnings("ignore:.*cache, which is right but slow")  # transformers
@pytest.mark.parametrize("family", ["t5", "t5_gated", "mt5", "umt5"])
def test_relative_positions_have_no_limit(family: str) -> None:
    """The encoder reads, and the decoder writes, more than the 40 tokens of n_positions."""
    model = language_model(family, eos_ids=(5,))
    torch.manual_seed(0)
    prompts = batch(torch.randint(6, 61, (150,)).tolist(), [7, 3], [4] * 70)
    rollout = Sampler(60, batch_size=5).draw(model, prompts, 4, key=3)
    assert int(rollout.lengths.max()) == 60
    with torch.no_grad():
        truth = reference_logprob(double(model), rollout)
    for found in (rollout.token_logprob, model.token_logprob(rollout)):
        torch.testing.assert_close(found.double(), truth, rtol=0, atol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_of_transformers_serves_too(
    model: EncoderDecoderModel, attention: str
) -> None:
    stock = language_model(model.name, eos_ids=EOS, attention=attention)
    rollout = draw(stock)
    assert_same_samples(rollout, draw(model))
    assert_close(gradients(stock, rollout), gradients(model, rollout))


def test_what_is_wrong_is_found_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {name: usable for name, usable, _ in attention_report()}[SHARED]
    share = EncoderDecoderModel.share

    def wrong(self: EncoderDecoderModel, prompt: Tensor) -> Any:
        return share(self, prompt.flip(0) if self.attention == SHARED else prompt)

    monkeypatch.setattr(EncoderDecoderModel, "share", wrong)
    with pytest.warns(
        RuntimeWarning, match="without a key-value cache, which is right but slow: T5For"
    ):
        model = language_model("t5")
    assert model.attention == model._stock_attention
    # What is wrong by any attention is refused.
    monkeypatch.setattr(
        EncoderDecoderModel, "share", lambda self, prompt: share(self, prompt.flip(0))
    )
    with (
        pytest.raises(ModelError, match="t5: scoring differs from the model's own forward pass"),
        pytest.warns(RuntimeWarning, match="once per sample"),
    ):
        language_model("t5")


class _OfOthers(_Slots):
    def __init__(self, rows: Tensor, lengths: Tensor) -> None:
        super().__init__(rows.flip(0), lengths)


@pytest.mark.parametrize(
    ("family", "wrong"),
    [
        ("t5", ("PromptCache.get_seq_length", lambda self, layer=0: 0)),
        ("bart", ("_by_slot", lambda module, args, out: out)),
        ("bart", ("_Slots", _OfOthers)),
        ("t5", ("_Slots", _OfOthers)),
    ],
)
def test_what_decoding_gets_wrong_is_found_at_load(
    family: str, wrong: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And samples by reading all of a text at every step are the same."""
    right = draw(language_model(family, eos_ids=EOS))
    name, function = wrong
    monkeypatch.setattr(f"fdpg_fast.encoder_decoder.{name}", function)
    with pytest.warns(RuntimeWarning, match="without a key-value cache, .* differs by"):
        model = language_model(family, eos_ids=EOS)
    for slots in (5, 64):
        assert_same_samples(draw(model, slots), right)


# --- precision, memory, heads -------------------------------------------------------------------


@pytest.mark.parametrize("compute", ["bf16", "fp16"])
def test_half_compute(model: EncoderDecoderModel, compute: Any) -> None:
    half = language_model(model.name, eos_ids=EOS, compute=compute)
    rollout = draw(half)
    exact = reference_logprob(double(half), rollout).detach()
    for found in (rollout.token_logprob, half.token_logprob(rollout)):
        assert 1e-5 < (found - exact).abs().max() < {"bf16": 0.2, "fp16": 0.02}[compute]
    assert all(torch.isfinite(g).all() for g in gradients(half, rollout).values())


def test_activation_checkpointing_changes_nothing(model: EncoderDecoderModel) -> None:
    rollout = draw(model)
    saving = language_model(model.name, eos_ids=EOS, activation_checkpointing=True)
    assert_close(gradients(saving, rollout), gradients(model, rollout))


def test_logits_of_the_model_itself_serve_too(
    model: EncoderDecoderModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout, expected = draw(model), gradients(model, draw(model))
    monkeypatch.setattr(model, "_fused", None)
    model.self_test()
    assert_same_samples(draw(model), rollout)
    assert_close(gradients(model, rollout), expected)


# --- a user's side ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*The tied weights mapping")
def test_a_checkpoint_loads_with_plain_transformers(
    model: EncoderDecoderModel, tmp_path: Path
) -> None:
    """Of a policy that has learnt, while its base stays what it was."""
    policy = model.trainable_copy()
    before = model.token_logprob(draw(model))
    rollout = draw(policy)
    gradients(policy, rollout)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter -= 1e-3 * parameter.grad
    policy.save(tmp_path)
    plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        theirs = reference_logprob(plain.eval(), rollout)
    assert (theirs - rollout.token_logprob).abs().max() > 1e-3, "it has learnt nothing"
    torch.testing.assert_close(
        policy.token_logprob(rollout).double(), theirs.double(), rtol=0, atol=1e-4
    )
    torch.testing.assert_close(model.token_logprob(draw(model)), before, rtol=0, atol=0)


def test_texts_are_read_whole(tmp_path: Path) -> None:
    model = LanguageModel.load(write_tiny_t5(tmp_path))
    assert isinstance(model, EncoderDecoderModel)
    assert model.encode("once there") == [1, 2, 0]  # with the end that the encoder knows
    assert model.bos_prompt == (0,)
    prompts = Prompts.load(["once there", "a"], model, 2, max_new_tokens=32).all()
    rollout = Sampler(32).draw(model, prompts, 3, key=1)
    assert rollout.prompt_lengths.tolist() == [3] * 3 + [2] * 3
    longer = Prompts.load("a " * 32, model, max_new_tokens=33).all()
    assert len(longer.tokens[0]) == 33, "though n_positions is 32"


def test_a_model_that_does_not_say_how_to_start_is_refused() -> None:
    plain = tiny("t5")
    plain.config.decoder_start_token_id = plain.generation_config.decoder_start_token_id = None
    with pytest.raises(ModelError, match="T5ForConditionalGeneration: has no decoder_start_token"):
        LanguageModel.from_model(plain)


def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dog becomes likelier, and what was written says how to load it."""
    monkeypatch.setattr("fdpg_fast.trainer.write_report", lambda runs, path: path)
    model, out = write_tiny_t5(tmp_path / "model"), tmp_path / "run"
    words = [
        *("train", "dog", "--model.name", str(model), "--out", str(out)),
        *("--run.steps", "12", "--run.evaluation_samples", "64", "--run.log_every", "1"),
        *("--sampling.max_new_tokens", "6", "--sampling.samples_per_prompt", "32"),
        *("--prompts.source", "once there", "--optimiser.learning_rate", "0.01"),
    ]
    assert cli.main(words) == 0
    run = RunDirectory.open(out)
    assert all(record["gap_max"] < 1e-4 for record in run.read("metrics.jsonl"))
    plain = AutoModelForSeq2SeqLM.from_pretrained(run.model)
    assert plain.generation_config.decoder_start_token_id == 0
    assert "AutoModelForSeq2SeqLM.from_pretrained" in (run.model / "README.md").read_text()
    first, last = (LanguageModel.load(path) for path in (model, run.model))
    prompts = Prompts.load("once there", first).all()
    dogs = [
        sum(5 in text for text in samples(Sampler(6).draw(one, prompts, 200, key=1)))
        for one in (first, last)
    ]
    assert dogs[1] > 1.5 * dogs[0]

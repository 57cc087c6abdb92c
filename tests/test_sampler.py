"""The sampler draws from the model, the same samples in any batch, and says what fails."""

from __future__ import annotations

import contextlib
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
from families import batch, language_model, tiny
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

from fdpg_fast import sampler as sampler_module
from fdpg_fast.attention import REACH_STEP, SLOT, SLOT_MASKED, SlotCache, SlotDecoder, rounded_reach
from fdpg_fast.models import LanguageModel
from fdpg_fast.replay import Replays
from fdpg_fast.rollout import Finish, Rollout
from fdpg_fast.sampler import Sampler, SamplingError

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ([7, 3], [9], [1, 2, 3, 4, 5, 6, 7])
EOS = tuple(range(6))


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return language_model("gpt2", eos_ids=EOS)


def samples(rollout: Rollout) -> list[list[int]]:
    """The sampled ids of each row, without prompt and padding."""
    ends = rollout.prompt_lengths + rollout.lengths
    bounds = zip(rollout.prompt_lengths.tolist(), ends.tolist(), strict=True)
    return [
        row[start:end] for row, (start, end) in zip(rollout.tokens.tolist(), bounds, strict=True)
    ]


def assert_same_samples(left: Rollout, right: Rollout) -> None:
    """Equal but for a rare tie: products round differently in another batch."""
    pairs = zip(samples(left), samples(right), strict=True)
    different = sum(a != b for a, b in pairs)
    assert different <= 1 + len(left) // 100


@pytest.mark.parametrize(
    ("slots", "deterministic"),
    [(64, False), (1000, False), (8000, False), (64, True)],  # 8000: without refill
)
def test_samples_follow_the_law_of_the_model(slots: int, deterministic: bool) -> None:
    """Chi-squared against every text that a model of five tokens can write."""
    vocab, longest, count = 5, 3, 8000
    model = language_model("gpt2", changes={"vocab": vocab, "seed": 3})
    prompt = [3, 1]
    sampler = Sampler(longest, batch_size=slots, deterministic=deterministic)
    rollout = sampler.draw(model, batch(prompt), count, key=11)

    def next_logprob(text: list[int]) -> Tensor:
        with torch.no_grad():
            logits = model.model(input_ids=torch.tensor([text]), use_cache=False).logits
        return torch.log_softmax(logits[0, -1].double(), dim=-1)

    law: dict[tuple[int, ...], float] = {}
    for text in itertools.product(range(vocab), repeat=longest):
        end = text.index(0) + 1 if 0 in text else longest
        if any(text[end:]):
            continue  # the same sample as another text: it has ended
        logp = sum(float(next_logprob([*prompt, *text[:t]])[text[t]]) for t in range(end))
        law[text[:end]] = math.exp(logp)
    assert sum(law.values()) == pytest.approx(1)

    seen = dict.fromkeys(law, 0)
    for sample in samples(rollout):
        seen[tuple(sample)] += 1
    # Texts expected fewer than five times are counted together, as the test requires.
    rare = [text for text in law if law[text] * count < 5]
    groups = [[text] for text in law if text not in rare] + ([rare] if rare else [])
    observed = [sum(seen[text] for text in group) for group in groups]
    expected = [sum(law[text] for text in group) * count for group in groups]
    assert len(groups) > 21
    assert scipy.stats.chisquare(observed, expected).pvalue > 1e-3


def test_a_sample_ends_with_its_first_end_of_text(model: LanguageModel) -> None:
    longest = 10
    rollout = Sampler(longest, batch_size=16).draw(model, batch(*PROMPTS), 30, key=2)
    texts = samples(rollout)
    assert 0 < int(rollout.finished.sum()) < len(rollout)
    assert set(rollout.finish.tolist()) == {Finish.EOS, Finish.LENGTH}
    for text, finished in zip(texts, rollout.finished.tolist(), strict=True):
        assert not any(token in EOS for token in text[:-1])
        assert finished == (text[-1] in EOS)
        assert finished or len(text) == longest
    inside = torch.arange(longest) < rollout.lengths[:, None]
    assert (rollout.token_logprob[inside] < 0).all()
    assert (rollout.token_logprob[~inside] == 0).all()
    assert (rollout.lse[~inside] == 0).all()
    assert rollout.texts[0] == " ".join(map(str, texts[0]))
    assert rollout.prompt_texts[30] == "9"
    for row, tokens in enumerate(rollout.tokens.tolist()):
        prompt = PROMPTS[rollout.prompt_index[row]]
        assert tokens[: len(prompt)] == prompt
        assert not any(tokens[len(prompt) + len(texts[row]) :])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_samples_do_not_depend_on_the_batch(family: str) -> None:
    model = language_model(family, eos_ids=EOS)
    prompts = batch(*PROMPTS)
    one = Sampler(12, batch_size=1).draw(model, prompts, 16, key=9)
    for slots, every in ((7, 1), (64, 8), (64, 100)):
        other = Sampler(12, batch_size=slots, check_every=every).draw(model, prompts, 16, key=9)
        assert_same_samples(one, other)
    assert samples(Sampler(12).draw(model, prompts, 16, key=10)) != samples(one)


def test_samples_depend_on_their_number_and_not_on_their_neighbours(model: LanguageModel) -> None:
    """So many processes can share a draw, and prompts may come in any company."""
    sampler = Sampler(12, batch_size=8)
    together = samples(sampler.draw(model, batch(*PROMPTS), 16, key=4))
    apart = [
        samples(sampler.draw(model, batch(prompt), 16, key=4, first_sample_id=16 * g))
        for g, prompt in enumerate(PROMPTS)
    ]
    assert sum(a != b for a, b in zip(together, itertools.chain(*apart), strict=True)) <= 1


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_each_distinct_prompt_is_read_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many samples it has, and however often it is among the prompts."""
    model = language_model(family, eos_ids=EOS)
    prompts = batch([7, 3], [9, 8, 5], [7, 3], [2, 4], [7, 3], [9, 8, 5])
    apart = [
        Sampler(12).draw(model, batch(p), 6, 3, first_sample_id=6 * g)
        for g, p in enumerate(prompts.tokens)
    ]
    part = model.model.get_encoder() if family == "t5" else model.model.base_model
    forward, read = part.forward, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        read.append(kwargs["input_ids"])
        return forward(*args, **kwargs)

    monkeypatch.setattr(part, "forward", counted)
    together = Sampler(12, batch_size=8).draw(model, prompts, 6, 3)
    read = [ids for ids in read if ids.shape[1] > 1]  # what steps read is one token
    assert sum(map(len, read)) == 3
    assert together.prompt_index.tolist() == [g for g in range(6) for _ in range(6)]
    pairs = zip(samples(together), itertools.chain(*map(samples, apart)), strict=True)
    assert sum(a != b for a, b in pairs) <= 1


def test_keys_of_prompts_are_held_while_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read some at a time, forgotten when their last sample has begun; and none after the draw."""
    model = language_model("gpt2", eos_ids=EOS)
    prompts = batch(*[[1 + i % 50, 2, 3 + i // 9] for i in range(60)], [1, 2, 3])  # one once more
    whole = Sampler(6, batch_size=8).draw(model, prompts, 2, 3)
    held = []

    class Watched(SlotDecoder):
        PREFILL_TOKENS = 30

        def step(self, tokens: Tensor, reach: int) -> Tensor:
            held.append(len(self.found))
            return super().step(tokens, reach)

    monkeypatch.setattr("fdpg_fast.models.SlotDecoder", Watched)
    sampler = Sampler(6, batch_size=8)
    few = sampler.draw(model, prompts, 2, 3)
    assert_same_samples(whole, few)
    assert max(held) <= 10 + 1
    assert sampler._decoder is not None
    assert not sampler._decoder.found  # type: ignore[attr-defined]


def test_memory_is_kept_from_draw_to_draw(model: LanguageModel) -> None:
    sampler = Sampler(12, batch_size=8)
    places = []
    for key in range(3):
        sampler.draw(model, batch(*PROMPTS), 4, key=key)
        decoder = sampler._decoder
        assert isinstance(decoder, SlotDecoder)
        places.append([layer.keys.data_ptr() for layer in decoder.cache.slot_layers])
    assert places[0] == places[1] == places[2]
    # Another model, with heads of other sizes, may follow.
    other = language_model("llama", eos_ids=EOS)
    mixed = sampler.draw(other, batch(*PROMPTS), 4, key=0)
    assert_same_samples(mixed, Sampler(12, batch_size=8).draw(other, batch(*PROMPTS), 4, key=0))


def test_what_the_caller_has_set_does_not_matter() -> None:
    """A default type, or that no gradient will be asked for; nor is a trace of it kept."""
    model = language_model("gpt2", eos_ids=EOS)
    sampler, prompts = Sampler(20, batch_size=8), batch(*PROMPTS)
    expected = sampler.draw(model, prompts, 8, key=5)
    try:
        for dtype in (torch.bfloat16, torch.float64):
            torch.set_default_dtype(dtype)
            for kept in (sampler, Sampler(20, batch_size=8)):
                rollout = kept.draw(model, prompts, 8, key=5)
                assert samples(rollout) == samples(expected)
                for values in (rollout.token_logprob, rollout.lse, model.token_logprob(rollout)):
                    assert values.dtype == torch.float32
                torch.testing.assert_close(rollout.token_logprob, expected.token_logprob)
    finally:
        torch.set_default_dtype(torch.float32)
    sampler = Sampler(20, batch_size=8)
    with torch.inference_mode():
        fresh = language_model("gpt2", eos_ids=EOS)
        rollout = sampler.draw(fresh, prompts, 8, key=5)
    assert not rollout.token_logprob.is_inference()
    for drawn in (rollout, sampler.draw(fresh, prompts, 8, key=5)):
        assert samples(drawn) == samples(expected)


def test_prompts_of_another_width_find_memory_that_fits(model: LanguageModel) -> None:
    """And what an earlier draw left in it is not seen, shorter or longer."""
    sampler, places = Sampler(12, batch_size=8), set()
    for width in (3, 9, 2, 14, 20, 5):
        prompts = batch(list(range(1, width + 1)), [7])
        rollout = sampler.draw(model, prompts, 8, key=width)
        assert isinstance(sampler._decoder, SlotDecoder)
        places.add(sampler._decoder.cache.slot_layers[0].keys.data_ptr())
        again = Sampler(12, batch_size=8).draw(model, prompts, 8, key=width)
        assert samples(rollout) == samples(again)
        torch.testing.assert_close(rollout.token_logprob, again.token_logprob, rtol=0, atol=0)
    assert len(places) == 1


class _Watched(TorchDispatchMode):
    """Refuses questions to the device, and memory of the size of a layer's cache or of the logits;
    keeps what was called with which shapes, and what memory was taken."""

    QUESTIONS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __init__(self, cache: SlotCache, logits: Tensor) -> None:
        super().__init__()
        kept = [tensor for layer in cache.slot_layers for tensor in (layer.keys, layer.values)]
        kept.append(logits)
        self.places = {tensor.untyped_storage().data_ptr() for tensor in kept}
        self.limit = min(tensor.untyped_storage().nbytes() for tensor in kept)
        self.calls: list[tuple[Any, ...]] = []
        self.taken: list[StorageWeakRef] = []

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert op.overloadpacket.__name__ not in self.QUESTIONS
        out = op(*args, **(kwargs or {}))
        results = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self.calls.append((op, *(tuple(x.shape) for x in (*given, *results))))
        for tensor in results:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.places | {
                x.untyped_storage().data_ptr() for x in given
            }:
                assert storage.nbytes() < self.limit, op
                self.taken.append(StorageWeakRef(storage))
        return out


def _asks(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a step asks the device for numbers")


def _moves(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``Tensor.to``, but for where a GPU's numbers would be waited for."""
    if any(isinstance(x, str) and x.startswith("cpu") for x in (*args, *kwargs.values())):
        _asks()
    return TO(self, *args, **kwargs)


TO = Tensor.to
# Of these a mode of dispatch sees some, and on a CPU none of the first four.
ASKING = ("cpu", "numpy", "tolist", "__array__", "item", "__bool__", "__int__", "__float__")
ASKING = (*ASKING, "__index__", "is_nonzero", "nonzero")


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_a_step_asks_the_device_nothing_and_keeps_no_memory(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole step: the model, the draw, and the book-keeping of slots and samples."""
    context = {"n_positions" if family == "gpt2" else "max_position_embeddings": 80}
    # So many words that logits are larger than any activation.
    model = language_model(family, eos_ids=range(20), changes={"vocab": 997, **context})
    sampler = Sampler(40, batch_size=8)
    sampler.draw(model, batch(*PROMPTS), 4, key=0)
    step, seen = sampler_module._Work.step, []
    asked, looks = [], []

    def watched(work: Any, decoder: SlotDecoder, row: Tensor, reach: int) -> None:
        assert model._logits is not None
        with _Watched(decoder.cache, model._logits) as mode, monkeypatch.context() as patch:
            for name in ASKING:
                patch.setattr(Tensor, name, _asks)
            patch.setattr(Tensor, "to", _moves)
            step(work, decoder, row, reach)
        assert all(storage.expired() for storage in mode.taken)
        seen.append(((len(row), decoder.cache.reach), len(mode.taken), mode.calls))

    def counted(name: str, calls: list[Tensor]) -> None:
        method = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda self: (calls.append(self), method(self))[1])

    monkeypatch.setattr(sampler_module, "_can_be_replayed", lambda decoder, steps: False)
    monkeypatch.setattr(sampler_module._Work, "step", watched)
    monkeypatch.setitem(sampler_module.LEAST_SAVED, "cpu", 0)
    counted("cpu", looks)
    counted("tolist", asked)
    rollout = sampler.draw(model, batch(*PROMPTS), 4, key=0)
    assert rollout.finished.any()
    assert len(seen) >= 40
    # Of each shape the same work, operation by operation, at every step, whatever has ended.
    assert {reach for (_, reach), *_ in seen} == {32, 64}
    assert len({slots for (slots, _), *_ in seen}) > 1
    first = {shape: (taken, calls) for shape, taken, calls in reversed(seen)}
    assert all((taken, calls) == first[shape] for shape, taken, calls in seen)
    # A look every few steps, or fewer when the longest sample ends.
    assert len(looks) <= len(seen) / sampler_module.CHECK_EVERY["cpu"] + 2
    # A refill now and then, and what the draw needs to begin and to end.
    assert len(asked) <= 20


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("attention", [SLOT, SLOT_MASKED])
@pytest.mark.parametrize("shrinks", [False, True])
def test_replays_draw_the_same_tokens(
    device: str, attention: str, shrinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step is a function of memory that is there before it, of its slots and of its reach."""
    monkeypatch.setitem(sampler_module.LEAST_SAVED, device, 0 if shrinks else torch.inf)
    model = language_model(
        "llama",
        eos_ids=(0,),
        device=device,
        attention=attention,
        changes={"max_position_embeddings": 80},
    )
    # Slots, reach, and whether it was recorded or replayed.
    steps: list[tuple[int, int, bool]] = []

    class Counted(Replays):
        def __call__(self, reach: int) -> None:
            super().__call__(reach)
            rounded = rounded_reach(reach, self.recorder.device)
            steps.append((len(self.memory[0]), rounded, rounded in self.replays))

    def stop(text: str) -> bool:
        return text.split()[-1:] == ["30"]

    long = [list(range(1, 30)), [5]]
    sampler, known = Sampler(40, batch_size=8, stop=stop), []
    for prompts, before in (
        (PROMPTS, "none"),
        (long, "none"),
        (PROMPTS, "of other samples"),
        (PROMPTS, "of as many"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(sampler_module, "_can_be_replayed", lambda decoder, steps: False)
            eager = Sampler(40, batch_size=8, stop=stop).draw(model, batch(*prompts), 8, key=7)
        if before == "none":
            sampler, known = Sampler(40, batch_size=8, stop=stop), []
        steps.clear()
        with monkeypatch.context() as patch:
            patch.setattr(sampler_module, "Replays", Counted)
            replayed = sampler.draw(model, batch(*prompts), 8, key=7)
        assert set(eager.finish.tolist()) == set(Finish)
        assert samples(replayed) == samples(eager)
        for name in ("token_logprob", "lse", "lengths", "finish", "tokens"):
            assert torch.equal(getattr(replayed, name), getattr(eager, name)), name
        reaches = {reach for _, reach, _ in steps}
        assert ({slots for slots, *_ in steps} == {8}) != shrinks
        if device == "cuda":
            assert reaches == {128}
        elif prompts is not PROMPTS:
            assert reaches == {32, 64, 96}
        as_usual = [shape for *shape, again in steps if not again]
        if device == "cpu":
            # The first of a draw; where that is recorded, they have been compared.
            assert as_usual == ([] if before == "of as many" else [[8, steps[0][1]]])
        else:
            shapes = map(list, dict.fromkeys(step[:2] for step in steps))
            assert as_usual == [shape for shape in shapes if shape not in known]
            known += as_usual


@pytest.mark.parametrize(
    ("family", "slots", "count", "least"),
    [
        ("gpt2", 8, 512, 0.92),  # by refill; without it, a quarter
        ("gpt2", 256, 256, 0.84),  # by fewer slots for the last samples; without, a quarter
        ("gpt2", 64, 256, 0.87),  # by both; without the latter, 0.6
        ("t5", 64, 256, 0.87),
    ],
)
def test_short_samples_do_not_wait_for_long_ones(
    family: str, slots: int, count: int, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How much of what the slots do is tokens of samples, whose lengths have a geometric law with a
    mean a quarter of the longest."""
    longest = 64
    model = language_model(
        family, eos_ids=range(4), changes={"vocab": 64, "n_positions": longest + 6}
    )
    with torch.no_grad():  # all logits alike: a sample ends with probability 1/16 at every token
        norm = {"gpt2": "transformer.ln_f", "t5": "decoder.final_layer_norm"}[family]
        for weight in model.model.get_submodule(norm).parameters():
            weight.zero_()
    steps, logits = [], LanguageModel.logits

    def counted(self: LanguageModel, hidden: Tensor) -> Tensor:
        steps.append(len(hidden))
        return logits(self, hidden)

    monkeypatch.setattr(LanguageModel, "logits", counted)
    with monkeypatch.context() as patch:  # a replay would not be counted
        patch.setattr(sampler_module, "_can_be_replayed", lambda decoder, steps: False)
        sampler = Sampler(longest, batch_size=slots)
        rollout = sampler.draw(model, batch([5], [6, 7]), count // 2, key=3)
    useful = int(rollout.lengths.sum())
    assert useful / count == pytest.approx(longest / 4, rel=0.15)
    assert useful / sum(steps) > least
    # Of few sizes, each of which is recorded for itself.
    assert set(steps) <= {slots, 1, 2, 4, 8, *range(16, slots, 16)}


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("gpt2", "auto"),
        ("llama", "auto"),
        ("gemma2", "auto"),
        ("opt", "sdpa"),  # without a cache
        ("t5", "auto"),
        ("bart", "eager"),  # without sharing a prompt's keys
    ],
)
def test_samples_do_not_depend_on_how_many_slots_are_left(
    family: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do those of the draw after it, in the same memory."""
    model = language_model(family, eos_ids=EOS, attention=attention)
    kind, sizes = type(model.decoder(1, 1, [[5]])), []
    first = kind.first

    def counted(self: Any, slots: int, moved: Tensor, into: Tensor) -> Any:
        sizes.append(slots)
        return first(self, slots, moved, into)

    monkeypatch.setattr(kind, "first", counted)

    def stop(text: str) -> bool:
        return text.split()[-1:] == ["30"]

    draws = []
    for least in (torch.inf, 0):
        monkeypatch.setitem(sampler_module.LEAST_SAVED, "cpu", least)
        sampler = Sampler(20, batch_size=13, stop=stop)
        draws.append([sampler.draw(model, batch(*PROMPTS), 8, key=key) for key in (5, 6)])
        assert sizes == [] if least else set(sizes) & {8, 4}
    for whole, fewer in zip(*draws, strict=True):
        assert_same_samples(whole, fewer)
        same = (whole.tokens == fewer.tokens).all(1)
        torch.testing.assert_close(
            fewer.token_logprob[same], whole.token_logprob[same], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_moved_samples_keep_all_their_keys(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a reach that is less was recorded after one that is more, and has come back to
    the latter by replay, which Python has no part in."""
    step = REACH_STEP[device]
    monkeypatch.setitem(sampler_module.LEAST_SAVED, device, 0)
    sizes = {"max_position_embeddings": 4 * step}
    model = language_model("llama", eos_ids=(), device=device, changes=sizes)

    def stop(text: str) -> bool:
        """Not of the first samples, which end together; of the others at times of their own."""
        words = text.split()
        return short_ones and len(words) > step + 8 and words[-1] in {"1", "2", "3", "4"}

    short_ones = False

    class Refilled(SlotDecoder):
        def assign(self, slots: Tensor, prompts: Tensor) -> None:
            nonlocal short_ones
            short_ones = bool(prompts.any())
            super().assign(slots, prompts)

    monkeypatch.setattr("fdpg_fast.models.SlotDecoder", Refilled)
    monkeypatch.setattr("fdpg_fast.sampler.SlotDecoder", Refilled)
    prompts = batch([*range(1, 30)] * (2 * step // 29), [5, 6])
    rollout = Sampler(2 * step, batch_size=16, stop=stop).draw(model, prompts, 16, key=3)
    assert len(set(rollout.lengths[16:].tolist())) > 4
    exact = model.token_logprob(rollout)
    torch.testing.assert_close(rollout.token_logprob, exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("learns", [True, False])
def test_weights_are_rounded_once_in_a_draw(learns: bool, device: str) -> None:
    """In bf16 compute; the samples are those of weights rounded at every step, also after the
    weights have changed."""
    model = language_model("gpt2", eos_ids=EOS, compute="bf16", device=device)
    model = model.trainable_copy() if learns else model.frozen_copy()
    weight = model.model.transformer.h[0].mlp.c_fc.weight
    rounded = 0

    class Rounding(TorchDispatchMode):
        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            nonlocal rounded
            result = op(*args, **(kwargs or {}))
            if op.overloadpacket.__name__ in ("_to_copy", "copy_", "matmul_pack_"):
                source = args[-1].data_ptr()
                into = args[0] if result is None else result
                rounded += source == weight.data_ptr() and into.dtype == torch.bfloat16
            return result

    for _ in range(2):
        rounded = 0
        with Rounding():
            rollout = Sampler(12, batch_size=8).draw(model, batch(*PROMPTS), 8, key=1)
        assert rounded == 1
        assert weight.requires_grad == learns
        assert not torch.is_autocast_enabled(device)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LanguageModel, "unchanging", lambda self: contextlib.nullcontext())
            plain = Sampler(12, batch_size=8).draw(model, batch(*PROMPTS), 8, key=1)
        assert samples(rollout) == samples(plain)
        torch.testing.assert_close(rollout.token_logprob, plain.token_logprob, rtol=0, atol=0)
        with torch.no_grad():
            weight.mul_(-1.0)


def test_a_stop_function_that_raises_is_named_with_its_text(model: LanguageModel) -> None:
    def fragile(text: str) -> bool:
        raise KeyError("oops")

    message = r"stop: .*fragile raised KeyError: 'oops', on the sample so far, '\d+'\."
    with pytest.raises(SamplingError, match=message):
        Sampler(4, stop=fragile).draw(model, batch(*PROMPTS), 2, key=1)


def test_layers_with_a_forward_of_their_own_are_not_rounded_ahead() -> None:
    """As a GPU has it: a router, say, may take no rows without a batch."""

    class Router(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            assert input.dim() == 3
            return super().forward(input)

    model = language_model("llama", compute="bf16")
    layers = [module for module in model.model.modules() if isinstance(module, nn.Linear)]
    layers[0].__class__ = Router
    with torch.no_grad():
        model._round_weights()


def test_a_sample_ends_where_the_stop_function_says(model: LanguageModel) -> None:
    """Cut at the first prefix that it is true of: what is left is what would have been drawn
    without it, whenever it is asked."""
    prompts = batch(*PROMPTS)

    def stop(written: str) -> bool:
        ids = [int(word) for word in written.split()]  # as a model without a tokenizer decodes
        assert ids
        assert not any(token in EOS for token in ids)
        return len(ids) >= 3 and sum(ids[-3:]) > 90

    whole = Sampler(12, batch_size=16).draw(model, prompts, 32, key=6)
    wanted, why = [], []
    for text, finish in zip(samples(whole), whole.finish.tolist(), strict=True):
        judged = len(text) - (finish == Finish.EOS)
        ends = [n for n in range(1, judged + 1) if stop(" ".join(map(str, text[:n])))]
        wanted.append(text[: ends[0]] if ends else text)
        why.append(Finish.STOP if ends else finish)
    assert set(why) == set(Finish)
    for slots, every in ((96, 1), (5, 4), (16, 100)):
        sampler = Sampler(12, batch_size=slots, check_every=every, stop=stop)
        rollout = sampler.draw(model, prompts, 32, key=6)
        got = samples(rollout)
        differ = [i for i in range(len(got)) if got[i] != wanted[i]]
        assert len(differ) <= 1  # a tie
        same = torch.tensor([i for i in range(len(got)) if i not in differ])
        assert rollout.finish[same].tolist() == [why[i] for i in same]
        inside = torch.arange(12) < rollout.lengths[:, None]
        for values, all_values in (
            (rollout.token_logprob, whole.token_logprob),
            (rollout.lse, whole.lse),
        ):
            assert (values[~inside] == 0).all()
            torch.testing.assert_close(
                values[same], all_values.where(inside, 0.0)[same], rtol=1e-4, atol=1e-4
            )
        torch.testing.assert_close(rollout.log_q, rollout.token_logprob.double().sum(1))
        ends = (rollout.prompt_lengths + rollout.lengths)[:, None]
        assert (rollout.tokens[torch.arange(rollout.tokens.shape[1]) >= ends] == 0).all()
        assert rollout.texts[0] == " ".join(map(str, got[0]))


def test_sampling_habits_of_a_checkpoint_are_ignored(tmp_path: Path) -> None:
    """trl#5783: a generation config made temperature 1 nearly greedy, without a word."""
    plain = tiny("gpt2")
    plain.generation_config = GenerationConfig(
        do_sample=True, temperature=0.01, top_k=1, top_p=0.1, eos_token_id=[4, 0]
    )
    plain.save_pretrained(tmp_path)
    model = LanguageModel.from_model(type(plain).from_pretrained(tmp_path))
    assert model.eos_ids == (4, 0)
    rollout = Sampler(8).draw(model, batch([7, 3]), 64, key=1)
    assert len({tuple(text) for text in samples(rollout)}) > 50
    same = language_model("gpt2", eos_ids=(4, 0))
    assert_same_samples(rollout, Sampler(8).draw(same, batch([7, 3]), 64, key=1))
    assert model.model.generation_config.temperature == 1.0
    assert model.model.generation_config.top_k == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_named(value: float) -> None:
    model = language_model("gpt2")
    sampler = Sampler(6, batch_size=4)
    good = sampler.draw(model, batch([7, 3]), 8, key=0)
    spoiled = model.frozen_copy()
    with torch.no_grad():
        spoiled.model.transformer.ln_f.weight[0] = value
    with pytest.raises(SamplingError, match=r"not finite: prompt '7 3', sample 5, token 0"):
        sampler.draw(spoiled, batch([7, 3]), 8, key=0, first_sample_id=5)
    # What it left in memory does no harm.
    assert samples(sampler.draw(model, batch([7, 3]), 8, key=0)) == samples(good)


def test_what_cannot_be_drawn_is_named(model: LanguageModel) -> None:
    sampler = Sampler(10)
    with pytest.raises(ValueError, match=r"'' has no tokens. Start it with the model's bos_prompt"):
        sampler.draw(model, batch([]), 4, key=0)
    long = [1] * 31
    with pytest.raises(ValueError, match=r"of 31 tokens and 10 new ones do not fit the 40 tokens"):
        sampler.draw(model, batch([3], long), 4, key=0)
    for wrong in (61, -1):
        with pytest.raises(ValueError, match=rf"has token id {wrong}, expected 0\.\.60"):
            sampler.draw(model, batch([3, wrong]), 4, key=0)
    with pytest.raises(ValueError, match="`samples_per_prompt` must be at least 1, got 0"):
        sampler.draw(model, batch([3]), 0, key=0)
    with pytest.raises(ValueError, match="at least one prompt"):
        sampler.draw(model, batch(), 4, key=0)
    for setting in ("max_new_tokens", "batch_size", "check_every"):
        with pytest.raises(ValueError, match=f"`{setting}` must be at least 1, got 0"):
            Sampler(**{"max_new_tokens": 4, setting: 0})


def test_a_prompt_may_fill_the_context(model: LanguageModel) -> None:
    rollout = Sampler(1).draw(model, batch([1] * 39), 4, key=0)
    assert rollout.lengths.tolist() == [1] * 4

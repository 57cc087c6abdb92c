"""Draw samples from a language model: fixed shapes, each prompt read once, log-probs as drawn.

A draw is B = prompts x samples_per_prompt samples on a fixed number of slots. Every slot writes one
sample at a time; when a sample ends its slot takes the next one. Once none waits, the last samples
are moved to the first slots, as often as it pays, and the others are computed no more. The random
number of a token is a function of (key, sample id, place in the sample), so samples depend neither
on the slot nor on the number of slots, beyond ties that floating-point rounding decides.

Deterministic draws give a sample the same bits whatever is drawn with it. For that every step has
64 slots, idle ones too, and no other shape; each prompt is read by itself; and products are those
whose rows do not depend on one another. 64 divides evenly among threads, so that none has a rest at
its end, which torch's vector loops do by other code.

A step is a function of memory that is there before it, of the number of slots, and of the number of
keys that it attends to, rounded up: it is recorded once for each, and replayed (replay.py).

Samples are draws from the model itself: temperature 1, nothing truncated. A sample ends with its
first end-of-text token, which belongs to it, or at the first prefix that a stop function is true
of, or at ``max_new_tokens``. Where it ends is a function of its tokens, so its log-prob is still
the sum over them.

Shape legend: B samples, G prompts, P longest prompt, S ``max_new_tokens``, T = P + S.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fdpg_fast import ops
from fdpg_fast.attention import SHARED, SLOT, Decoder, SlotDecoder, rounded_reach
from fdpg_fast.models import LanguageModel
from fdpg_fast.ops.matmul import own_products
from fdpg_fast.replay import Recorder, Recordings, Replays, lasting, recorder_for
from fdpg_fast.rollout import Finish, PromptBatch, Rollout, Texts

__all__ = ["LogitsError", "Sampler", "SamplingError"]

DETERMINISTIC_SLOTS = 64
# So many steps, on a CPU, before it pays to record one.
LEAST_STEPS = 16
# Steps between looks at which samples have ended. A GPU must be waited for; a CPU takes 0.1 ms for
# one, as long as for one slot in a step of 3 M parameters. Share of the speed without waste,
# lengths by a geometric law with a mean of 16 of up to 64 tokens:
#   samples, slots    every 4    every 2    every 1
#   1024, 64             0.93       0.97       1.00
#   1024, 256            0.90       0.97
#   256, 64              0.84       0.87       0.88
#   256, 256             0.71       0.73       0.73
CHECK_EVERY = {"cpu": 2, "cuda": 4}
# Few numbers of slots, so that few are recorded.
SLOTS_STEP = 16
# So many rows, over all steps that may come, must fewer slots save before it pays to record anew.
# A tape of a GPT-2 of 3 M parameters takes 14 ms, a row of its steps 0.12; a graph of one of 124 M
# takes an H100 some 15 ms, a row 0.002.
LEAST_SAVED = {"cpu": 256, "cuda": 16384}


class SamplingError(RuntimeError):
    """No sample can be drawn; the message names the prompt and the way out."""


class LogitsError(SamplingError):
    """Logits that are not finite: it is the weights that are wrong."""


class Sampler:
    """Draws rollouts; keeps its memory from one draw to the next.

    Args:
        max_new_tokens: S, the longest sample.
        batch_size: most samples in work at a time; speed and memory, not the samples, depend on it.
        check_every: steps between looks at which samples have ended (the only times the device is
            asked anything). An ended sample's slot waits for the next look. None: as many as suit
            the device, see ``CHECK_EVERY``.
        stop: ends a sample early: given the text sampled so far, as ``model.decode`` gives it and
            without the prompt, whether it is a whole sample, as in ``lambda text: "\\n" in text``.
            Asked of each prefix once, shortest first, when the device is; the answer must depend on
            the text alone. So samples are the same whatever the other settings; a slot may write up
            to ``check_every`` tokens past the end, which are dropped.
        deterministic: whether samples and their log-probs have the same bits on one kind of device
            whatever is drawn with them: however many samples, of which prompts, by how many
            processes, refilled or not. Else they are the same but for rounding, which a tie between
            two tokens turns on once in a great while. It takes 64 slots whatever ``batch_size``,
            and not every model: none with ALiBi, with experts, or compiled.
    """

    def __init__(
        self,
        max_new_tokens: int,
        batch_size: int = 256,
        check_every: int | None = None,
        stop: Callable[[str], bool] | None = None,
        *,
        deterministic: bool = False,
    ) -> None:
        for name, value in (
            ("max_new_tokens", max_new_tokens),
            ("batch_size", batch_size),
            ("check_every", check_every),
        ):
            if value is not None and value < 1:
                raise ValueError(f"Sampler: `{name}` must be at least 1, got {value}")
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.check_every = check_every
        self.stop = stop
        self.deterministic = deterministic
        self._decoder: Decoder | None = None
        self._work: _Work | None = None
        self._recorder: Recorder | None = None
        self._recordings: Recordings = {}
        self._weights: list[int] = []  # ids of those that the recordings name, and so keep

    @torch.inference_mode(False)  # memory that is kept must serve a draw outside of the caller's
    @torch.no_grad()
    def draw(
        self,
        model: LanguageModel,
        prompts: PromptBatch,
        samples_per_prompt: int,
        key: int,
        *,
        first_sample_id: int = 0,
    ) -> Rollout:
        """Draw ``samples_per_prompt`` samples of each prompt.

        Args:
            model: what to draw from.
            prompts: G prompts of any lengths.
            samples_per_prompt: K; the samples of a prompt stand together.
            key: of the random numbers, as ``ops.random_key(seed, step)`` makes it.
            first_sample_id: samples are numbered from here; a process of many gives its own range.

        Raises:
            ValueError: a prompt is empty, too long for the model, or has ids the model lacks; or
                draws of the model cannot be deterministic.
            SamplingError: ``stop`` raised.
            LogitsError: logits are NaN or infinite.
        """
        self._check(model, prompts, samples_per_prompt)
        # Not kept while in use: after an error its memory may hold NaN, which masks do not hide.
        (before, self._decoder), (written, self._work) = (self._decoder, None), (self._work, None)
        slots = min(self.batch_size, len(prompts) * samples_per_prompt)
        if self.deterministic:
            slots = DETERMINISTIC_SLOTS
        of_samples = (samples_per_prompt, self.max_new_tokens, key, first_sample_id)
        work = _Work(model, prompts, *of_samples, slots, reuse=written)
        decoder = work.decoder(model, reuse=before)
        warm = _continues(decoder, before)
        before = written = None  # memory that does not fit goes before there is new
        with model.unchanging(), contextlib.ExitStack() as stack:
            if self.deterministic:
                assert isinstance(decoder, SlotDecoder)
                decoder.PREFILL_TOKENS = 1  # each prompt by itself
                stack.enter_context(own_products())
                stack.enter_context(_dividing_evenly(slots))
            decoder.prefill(work.distinct, work.distinct_index.bincount().tolist())
            self._run(model, work, decoder, warm)
            if not lasting(self._recordings):
                self._recordings.clear()
        rollout = work.rollout(model)
        self._decoder = work.decoder(model, reuse=decoder)  # its memory, no prompts
        self._work = work
        return rollout

    def _run(self, model: LanguageModel, work: _Work, decoder: Decoder, warm: bool) -> None:
        """Fill all rows of ``work``; ``warm``: not the first to do so in this memory."""
        device, idle, slots = model.device, work.count, len(work.row)
        samples, row = torch.arange(work.count), work.row
        occupant, position = torch.full((slots,), idle), torch.zeros(slots, dtype=torch.int64)
        # Another number of slots is another compilation, and other bits.
        stays = model.is_compiled or self.deterministic
        least = math.inf if stays else LEAST_SAVED.get(device.type, 0)
        every = self.check_every or CHECK_EVERY.get(device.type, 4)
        step: Callable[[int], None] = functools.partial(work.step, decoder, row)
        if _can_be_replayed(decoder, self.max_new_tokens):
            recorder, recordings = self._recordings_of(model, work, warm)
            step = Replays(step, work.memory(decoder, row), recorder, recordings, warm)
        while True:
            free = (occupant == idle).nonzero()[:, 0]
            fresh, samples = samples[: len(free)], samples[len(free) :]
            if len(fresh):
                taken = free[: len(fresh)]
                occupant[taken], position[taken] = fresh, work.prompt_length[fresh] - 1
                decoder.assign(taken, work.distinct_index[fresh])
                row[taken.to(device)] = fresh.to(device)
            live = (occupant != idle).nonzero()[:, 0]
            if len(live) == 0:
                return
            writing, at = occupant[live], position[live]
            reach = 1 + int((at - work.unread[writing]).max())
            left = int((work.last_position[writing] - at).max()) + 1
            fewer = min(slots, _enough(len(live)))
            recorded = isinstance(step, Replays) and fewer in step.recordings
            if fewer < slots and (recorded or (slots - fewer) * left >= least):
                moved = live[live >= fewer]
                into = (occupant[:fewer] == idle).nonzero()[: len(moved), 0]
                occupant[into] = occupant[moved]
                occupant, slots = occupant[:fewer], fewer
                row[into.to(device)] = row[moved.to(device)]
                row, decoder = row[:fewer], decoder.first(fewer, moved, into)
                one = functools.partial(work.step, decoder, row)
                memory = work.memory(decoder, row)
                step = step.of(one, memory) if isinstance(step, Replays) else one
            for step_of in range(min(every, left)):
                step(min(reach + step_of, work.most_read))
            if (stop := self.stop) is not None:
                work.cut(row, writing.tolist(), model, stop)
            occupant, position = torch.stack((row, decoder.positions)).cpu()

    def _recordings_of(
        self, model: LanguageModel, work: _Work, warm: bool
    ) -> tuple[Recorder, Recordings]:
        """What records steps, and those of the last draw that are still of this memory."""
        if self._recorder is None or self._recorder.device != model.device:
            self._recorder = recorder_for(model.device)
        if not self._recorder.keeps:
            return self._recorder, {}
        tensors = itertools.chain(model.model.parameters(), model.model.buffers())
        known, self._weights = self._weights, [id(x) for x in tensors]
        if not (warm and work.in_place and self._weights == known):
            self._recordings.clear()
        return self._recorder, self._recordings

    def _check(self, model: LanguageModel, prompts: PromptBatch, samples_per_prompt: int) -> None:
        if samples_per_prompt < 1:
            raise ValueError(
                f"draw: `samples_per_prompt` must be at least 1, got {samples_per_prompt}"
            )
        if self.deterministic and (why := _mixes_rows(model)) is not None:
            raise ValueError(
                f"draw: `deterministic` needs a model whose texts do not touch in any product, got "
                f"{model.name}, which {why}. Leave it off: samples are the same then but for "
                "rounding."
            )
        if len(prompts) == 0:
            raise ValueError("draw: `prompts` must hold at least one prompt, got none")
        for text, tokens in zip(prompts.texts, prompts.tokens, strict=True):
            if not tokens:
                raise ValueError(
                    f"draw: prompt {text!r} has no tokens. Start it with the model's bos_prompt."
                )
            if self.max_new_tokens > model.room(len(tokens)):
                raise ValueError(
                    f"draw: prompt {text!r} of {len(tokens)} tokens and {self.max_new_tokens} new "
                    f"ones do not fit the {model.context_length} tokens that {model.name} can "
                    "read. Shorten the prompt or set a smaller max_new_tokens."
                )
            outside = [token for token in tokens if not 0 <= token < model.vocab_size]
            if outside:
                raise ValueError(
                    f"draw: prompt {text!r} has token id {outside[0]}, expected "
                    f"0..{model.vocab_size - 1}. Is it encoded with the tokenizer of {model.name}?"
                )


def _mixes_rows(model: LanguageModel) -> str | None:
    """What lets a text's last bits depend on others, of shapes that are all the same."""
    if model.attention not in (SLOT, SHARED):
        return f"attends by {model.attention}, not {SLOT} or {SHARED}"
    if model.mixes_experts:
        return "has experts"
    return "is compiled" if model.is_compiled else None


@contextlib.contextmanager
def _dividing_evenly(slots: int) -> Iterator[None]:
    """With as many of torch's threads as divide ``slots``, a power of two, evenly."""
    before = torch.get_num_threads()
    torch.set_num_threads(math.gcd(1 << (before.bit_length() - 1), slots))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _enough(live: int) -> int:
    """Slots for so many samples, rounded up."""
    if live < SLOTS_STEP:
        return 1 << (live - 1).bit_length()
    return -(-live // SLOTS_STEP) * SLOTS_STEP


def _is_whole(text: str, stop: Callable[[str], bool]) -> bool:
    try:
        return bool(stop(text))
    except Exception as error:  # a user's function can be wrong in any way
        name = getattr(stop, "__qualname__", repr(stop))
        raise SamplingError(
            f"stop: {name} raised {type(error).__name__}: {error}, on the sample so far, {text!r}. "
            "It is given this one text, and returns whether that is whole."
        ) from error


def _can_be_replayed(decoder: Decoder, steps: int) -> bool:
    """Whether its steps have few shapes and ask the device nothing, and recording them pays."""
    if not isinstance(decoder, SlotDecoder):
        return False
    device = decoder.positions.device
    if device.type == "cuda":
        return True
    return device.type == "cpu" and steps >= LEAST_STEPS and not decoder.model.is_compiled


def _continues(decoder: Decoder, before: Decoder | None) -> bool:
    """Whether it is of the model of ``before``, whose memory it has taken over."""
    return (
        isinstance(decoder, SlotDecoder)
        and isinstance(before, SlotDecoder)
        and decoder.model is before.model
        and decoder.cache is before.cache
    )


class _Work:
    """The samples of one draw while they are written, on the device.

    One row more than there are samples: idle slots write to the last row, which is thrown away, so
    that a step has one shape whoever has finished. ``reuse`` lends what memory is of the same size.

    Attributes:
        in_place: whether all that a step reads and writes is where it was in ``reuse``.
    """

    READ_AND_WRITTEN = (
        *("key", "sample_id", "start", "eos", "row"),
        *("tokens", "logp", "lse", "lengths", "finish"),
    )

    def __init__(
        self,
        model: LanguageModel,
        prompts: PromptBatch,
        samples_per_prompt: int,
        max_new_tokens: int,
        key: int,
        first_sample_id: int,
        slots: int,
        *,
        reuse: _Work | None,
    ) -> None:
        device = model.device
        self.prompts = prompts
        self.key = torch.tensor([key], dtype=torch.int64, device=device)
        self.prompt_index = torch.arange(len(prompts)).repeat_interleave(samples_per_prompt)
        # What is read: equal prompts once.
        places = {tokens: i for i, tokens in enumerate(dict.fromkeys(prompts.tokens))}
        self.distinct = list(places)
        self.distinct_index = torch.tensor([places[tokens] for tokens in prompts.tokens])
        self.distinct_index = self.distinct_index[self.prompt_index]
        self.count = len(self.prompt_index)
        lengths = torch.tensor([len(tokens) for tokens in prompts.tokens])
        self.prompt_length = lengths[self.prompt_index]
        self.width = int(lengths.max()) + max_new_tokens
        # Tokens of a row that are not among what its slot reads: an encoder reads them.
        self.unread = (self.prompt_length - 1) * model.prompt_apart
        self.most_read = max_new_tokens if model.prompt_apart else self.width
        # The last token that is read stands here: the one after it predicts nothing.
        self.last_position = lengths[self.prompt_index] + max_new_tokens - 2

        # Rounded up: the same for prompts of nearly the same length.
        padded = torch.zeros(len(prompts), rounded_reach(self.width, device), dtype=torch.int64)
        for g, tokens in enumerate(prompts.tokens):
            padded[g, : len(tokens)] = torch.tensor(tokens)
        rows = self.count + 1
        idle_index = torch.cat((self.prompt_index, self.prompt_index[:1]))
        self.tokens = padded[idle_index].to(device)
        self.start = lengths[idle_index].to(device)  # position of the first sampled token
        self.sample_id = torch.arange(first_sample_id, first_sample_id + rows, device=device)
        self.logp = torch.zeros(rows, max_new_tokens, dtype=torch.float32, device=device)
        self.lse = torch.zeros_like(self.logp)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.finish = torch.zeros(rows, dtype=torch.int8, device=device)
        # Which sample each slot writes, or `count`: it is idle.
        self.row = torch.full((slots,), self.count, dtype=torch.int64, device=device)
        self.judged = [0] * self.count  # tokens of each sample that the stop function has seen
        self.softcap = model.softcap
        self.eos = torch.tensor(model.eos_ids, dtype=torch.int64, device=device)
        self.in_place = reuse is not None and self._moved_to(reuse)

    def _moved_to(self, other: _Work) -> bool:
        """Puts what a step reads and writes where it is in ``other``; whether all of it fits."""
        all_fit = True
        for name in self.READ_AND_WRITTEN:
            values, before = getattr(self, name), getattr(other, name)
            if before.shape == values.shape and before.device == values.device:
                setattr(self, name, before.copy_(values))
            else:
                all_fit = False
        return all_fit

    def decoder(self, model: LanguageModel, reuse: Decoder | None) -> Decoder:
        return model.decoder(len(self.row), self.most_read, self.distinct, reuse=reuse)

    def memory(self, decoder: Decoder, row: Tensor) -> list[Tensor]:
        """What a step writes that is read after it, but for keys and values."""
        return [row, decoder.positions, self.tokens, self.logp, self.lse, self.lengths, self.finish]

    def step(self, decoder: Decoder, row: Tensor, reach: int) -> None:
        """One token for every slot; ``row`` ``(slots,)`` is updated: idle where a sample ended."""
        position = decoder.positions
        logits = decoder.step(self.tokens[row, position], reach)
        # Place in the sample; the clamp is for idle slots, whose prompt had another length.
        place = (position + 1 - self.start[row]).clamp_(0, self.logp.shape[1] - 1)
        drawn = ops.sample_logprob(
            logits, self.key, self.sample_id[row], place, softcap=self.softcap
        )
        self.tokens[row, position + 1] = drawn.token
        self.logp[row, place] = drawn.logp.float()
        self.lse[row, place] = drawn.lse.float()
        self.lengths[row] = place + 1
        ended = (drawn.token[:, None] == self.eos).any(dim=1)
        self.finish[row] = ended.to(torch.int8)  # Finish.LENGTH or Finish.EOS
        idle = (row == self.count) | ended | (place + 1 == self.logp.shape[1])
        row.masked_fill_(idle, self.count)
        position.add_(~idle)

    def cut(
        self, row: Tensor, samples: list[int], model: LanguageModel, stop: Callable[[str], bool]
    ) -> None:
        """End those of ``samples`` that have come to a prefix that ``stop`` is true of."""
        at = torch.tensor(samples, device=row.device)
        lengths, finish, tokens = (x[at].tolist() for x in (self.lengths, self.finish, self.tokens))
        ends: dict[int, int] = {}
        for sample, length, why, text in zip(samples, lengths, finish, tokens, strict=True):
            start, first = int(self.prompt_length[sample]), self.judged[sample] + 1
            self.judged[sample] = length
            for end in range(first, length + (why != Finish.EOS)):
                if _is_whole(model.decode([text[start : start + end]])[0], stop):
                    ends[sample] = end
                    break
        if not ends:
            return
        at = torch.tensor(list(ends), device=row.device)
        kept = torch.tensor(list(ends.values()), device=row.device)
        self.lengths[at], self.finish[at] = kept, int(Finish.STOP)
        column = torch.arange(self.tokens.shape[1], device=row.device)
        self.tokens[at] = self.tokens[at].where(column < (self.start[at] + kept)[:, None], 0)
        inside = column[: self.logp.shape[1]] < kept[:, None]
        for values in (self.logp, self.lse):
            values[at] = values[at].where(inside, 0.0)
        row.masked_fill_(torch.isin(row, at), self.count)

    def rollout(self, model: LanguageModel) -> Rollout:
        """What was drawn, once no slot is live."""
        n = self.count
        bad = ~torch.isfinite(self.lse[:n])
        if bool(bad.any()):
            sample, place = bad.nonzero()[0].tolist()
            text = self.prompts.texts[int(self.prompt_index[sample])]
            raise LogitsError(
                f"draw: the logits of {model.name} are not finite: prompt {text!r}, sample "
                f"{int(self.sample_id[sample])}, token {place}. The weights have diverged or are "
                "corrupt. Way out: a new run with a lower learning rate; of weights as loaded, "
                "intact files and compute fp32."
            )
        # Copies: the next draw writes where this one did.
        tokens = self.tokens[:n, : self.width].clone()
        start, lengths, logp = (x[:n].clone() for x in (self.start, self.lengths, self.logp))
        return Rollout(
            tokens=tokens,
            prompt_lengths=start,
            lengths=lengths,
            prompt_index=self.prompt_index.to(model.device),
            sample_ids=self.sample_id[:n].clone(),
            token_logprob=logp,
            lse=self.lse[:n].clone(),
            log_q=ops.sequence_logprob(logp, lengths),
            finish=self.finish[:n].clone(),
            prompts=self.prompts,
            texts=Texts(model.decode, tokens, start, lengths),
        )

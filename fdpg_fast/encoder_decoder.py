"""Encoder-decoder models of transformers (T5, BART): the encoder reads the prompt, the decoder
writes the sample.

A sample x given a prompt c has log pi(x | c) = sum_t log pi(x_t | c, start, x_1 .. x_{t-1}), where
``start`` is the checkpoint's ``decoder_start_token_id``: the decoder reads it first, and it is no
part of the sample. That is the law sampled and the law scored. Tokens that a checkpoint would force
upon ``generate`` (``forced_bos_token_id``, ``forced_eos_token_id``, a least length, beams) are not
of it, and are dropped: a model that has learnt to begin with such a token does so by itself.

In a :class:`fdpg_fast.rollout.Rollout` nothing is different: a row is the prompt, then the sample.
All that is different is here. Each distinct prompt is encoded once, and its keys and values for the
decoder's cross-attention are computed once and read by all of its samples. In scoring and training
:func:`shared_attention` takes these for so many queries of one text. In decoding, prompts stand in
memory beside the slots, and each slot says which it reads; its own tokens count from the start
token, and families know two ways to ask where they are: a table of positions, from which each slot
is given its own row (BART), and a bias by how far two tokens are apart (T5), of which the model
computes that of the last of all slots, and each slot takes what it needs.

All this needs transformers 5.14 for BART and 5.15 for T5, and families that look their attention up
(UMT5 and LongT5 do not). Of others each sample has its prompt's states for itself, and each step
reads all of a sample again: the model says so at load.

Shape legend: G prompts, P prompt tokens (longest), B samples or slots, K most samples of a prompt,
R prompts that slots read, W decoder tokens, H heads, D head size or hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AttentionInterface, GenerationConfig
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_outputs import BaseModelOutput

from fdpg_fast import ops
from fdpg_fast.attention import (
    SHARED,
    Decoder,
    RecomputeDecoder,
    SlotCache,
    SlotDecoder,
    rounded_reach,
    slot_attention,
    span_mask,
)
from fdpg_fast.models import Head, LanguageModel, MicroBatch, ModelError
from fdpg_fast.rollout import Rollout
from fdpg_fast.self_test import SelfTest, difference, padded

__all__ = ["EncoderDecoderModel", "PromptCache", "PromptDecoder", "shared_attention"]


@dataclass(frozen=True)
class _Seats:
    """Which texts read which prompt.

    Attributes:
        rows: ``(G, K)`` int64: the texts of each prompt; text 0 where it has fewer than K.
        place: ``(B,)`` int64: where each text is in the flattened ``rows``.
    """

    rows: Tensor
    place: Tensor

    @classmethod
    def of(cls, prompt: Tensor, device: torch.device) -> _Seats:
        """Of texts that read prompts ``prompt``, ``(B,)`` int64 on the CPU: each of 0..G-1."""
        counts = torch.bincount(prompt)
        order = torch.argsort(prompt, stable=True)
        rank = torch.arange(len(prompt)) - (counts.cumsum(0) - counts)[prompt[order]]
        rows = torch.zeros(len(counts), int(counts.max()), dtype=torch.int64)
        rows[prompt[order], rank] = order
        place = torch.empty_like(prompt)
        place[order] = prompt[order] * rows.shape[1] + rank
        return cls(*(x.to(device, non_blocking=True) for x in (rows, place)))


@dataclass(frozen=True)
class _Slots:
    """Which slots read which prompt in decoding.

    Attributes:
        rows: ``(B,)`` int64: the row of each slot's prompt in its cache.
        lengths: ``(B,)`` int64: the tokens of that prompt.
    """

    rows: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class _Source:
    """What a decoder attends to.

    Attributes:
        states: ``(G, P, D)`` last hidden states of the encoder; without seats, of each text. In
            decoding, where their keys are known, any.
        mask: ``(G, P)`` bool: which of them are there; in decoding any of four dimensions, which no
            family touches.
        seats: which texts read which prompt; None: text i reads prompt i.
    """

    states: Tensor
    mask: Tensor
    seats: _Seats | _Slots | None


@dataclass(frozen=True)
class _Batch(MicroBatch):
    """The same, and its distinct prompts."""

    prompts: list[tuple[int, ...]]
    prompt: Tensor  # (b,) int64 on the CPU, which of them each sample continues


def shared_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    seats: _Seats | _Slots | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function registered as :data:`SHARED`: cross-attention to prompts that texts
    share, and otherwise as :func:`fdpg_fast.attention.slot_attention`.

    Args:
        query: ``(B, H, W, D)``; ``key`` and ``value`` of cross-attention: ``(G, H, P, D)``, or in
            decoding, where W is 1, ``(R, H, P, D)``.
        attention_mask: boolean (True: attend); of cross-attention ``(G, 1, W, P)``, the same for
            every query.
        scaling: factor of the scores, ``D ** -0.5`` by default.
        seats: which texts read which prompt.

    Returns:
        ``(B, W, H, D)``, and None for the attention weights that nobody asks for.
    """
    if seats is None or getattr(module, "is_causal", True):
        return slot_attention(module, query, key, value, attention_mask, scaling, **kwargs)
    # Of positions of one text in the other no family knows anything: T5's bias is zero here.
    kwargs.pop("position_bias", None)
    if isinstance(seats, _Slots):
        out = ops.decode_attention(
            query[:, :, 0].to(key.dtype),
            key,
            value,
            seats.lengths,
            rows=seats.rows,
            scale=scaling,
            softcap=kwargs.get("softcap") or 0.0,
        )
        return out[:, None], None
    each = (seats.rows.shape[1], query.shape[2])  # K texts of W queries
    folded = query[seats.rows].transpose(1, 2).flatten(2, 3)  # (G, H, K W, D)
    mask = None if attention_mask is None else attention_mask[:, :, :1]
    out, _ = slot_attention(module, folded, key, value, mask, scaling, **kwargs)
    return out.unflatten(1, each).flatten(0, 1)[seats.place], None


def _whole_mask(*args: Any, **kwargs: Any) -> Any:
    """``sdpa_mask`` that never looks whether it could be left out, which asks the device; of slots
    as :func:`fdpg_fast.attention.span_mask`."""
    if isinstance(kwargs.get("q_offset"), Tensor):
        return span_mask(*args, **kwargs)
    skip = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(*args, **{**kwargs, **skip})


# Not a ContextVar, at which torch.compile would break the model's graph.
_placed: PromptCache | None = None


@contextlib.contextmanager
def _as_placed(cache: PromptCache) -> Iterator[None]:
    """Positions of tokens are those of the slots of ``cache``."""
    global _placed
    before, _placed = _placed, cache
    try:
        yield
    finally:
        _placed = before


def _by_slot(module: torch.nn.Module, args: Any, out: Tensor) -> Tensor:
    """Forward hook of what makes vectors of the positions of W tokens, ``(1, W, D)`` or ``(W, D)``:
    in decoding ``(B, 1, D)``."""
    if _placed is None or _placed.table is None:
        return out
    return _placed.table[_placed.positions][:, None]


class EncoderDecoderModel(LanguageModel):
    """One encoder-decoder model with its tokenizer.

    Attributes:
        start_id: the token that the decoder reads first.
        context_length: most tokens that the encoder can read, and most that the decoder can; of T5,
            whose positions are relative, no number that matters.
    """

    own_attention: ClassVar[tuple[str, ...]] = (SHARED,)
    without_own_attention: ClassVar[str] = (
        "reading each prompt's states once per sample, and sampling without a key-value cache"
    )
    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    prompt_apart: ClassVar[bool] = True

    def __init__(self, model: Any, tokenizer: Any = None, **options: Any) -> None:
        self.start_id = _start_id(model)
        if (positions := _position_module(model)) is not None:
            positions.register_forward_hook(_by_slot)
        accepted = inspect.signature(model.get_decoder().forward).parameters
        self._decoder_takes_positions = "position_ids" in accepted
        super().__init__(model, tokenizer, **options)

    # --- text -----------------------------------------------------------------------------------

    @property
    def bos_prompt(self) -> tuple[int, ...]:
        """What stands for "no prompt": what the tokenizer makes of an empty text."""
        made = () if self.tokenizer is None else tuple(self.encode(""))
        return made or super().bos_prompt

    def encode(self, text: str) -> list[int]:
        """The ids of a text that the encoder reads, with the tokens that the tokenizer puts around
        it: the text is whole."""
        if self.tokenizer is None:
            return super().encode(text)
        ids: list[int] = self.tokenizer(text).input_ids
        return ids

    def room(self, prompt_tokens: int) -> int:
        """How many tokens can be sampled after a prompt of so many; negative: it is too long."""
        return self.context_length if prompt_tokens <= self.context_length else -1

    # --- forward pass ---------------------------------------------------------------------------

    @property
    def has_cache(self) -> bool:
        """Whether sampling keeps keys and values, rather than reading the sample at every step."""
        return self.attention in self.own_attention

    @property
    def head(self) -> Head | None:
        """The output layer as one formula, or None for a family whose head is not of that form."""
        head, bias = super().head, getattr(self.model, "final_logits_bias", None)  # BART's
        return head if head is None or bias is None else dataclasses.replace(head, bias=bias[0])

    def read(
        self, prompts: Sequence[Sequence[int]], width: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The encoder's last hidden states ``(G, P, D)`` of prompts, padded to ``width`` or the
        longest, and ``(G, P)`` bool: which of them are there."""
        width = width or max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[*p, *([0] * (width - len(p)))] for p in prompts], device=self.device)
        lengths = torch.tensor([[len(prompt)] for prompt in prompts], device=self.device)
        mask = torch.arange(width, device=self.device) < lengths
        with self._autocast():
            out = self.model.get_encoder()(input_ids=ids, attention_mask=mask, use_cache=False)
        return out.last_hidden_state, mask

    def write(self, tokens: Tensor, source: _Source, cache: Any = None) -> Tensor:
        """The decoder's last hidden states ``(B, W, D)`` fp32 of ``tokens`` ``(B, W)``; for a
        family without a fused head its logits, as of :meth:`LanguageModel.hidden`."""
        options: dict[str, Any] = {"use_cache": cache is not None}
        if cache is not None:
            options[self._cache_name] = cache
        if source.seats is not None:
            options["seats"] = source.seats
        states: Tensor
        with self._autocast():
            if self._fused is None:
                states = self.model(
                    encoder_outputs=BaseModelOutput(last_hidden_state=source.states),
                    attention_mask=source.mask,
                    decoder_input_ids=tokens,
                    **options,
                ).logits
            else:
                if _placed is not None and self._decoder_takes_positions:
                    options["position_ids"] = _placed.positions[:, None]
                states = self.model.get_decoder()(
                    input_ids=tokens,
                    encoder_hidden_states=source.states,
                    encoder_attention_mask=source.mask,
                    **options,
                ).last_hidden_state
        return states.float()

    def share(self, prompt: Tensor) -> tuple[Tensor, _Seats | None]:
        """How texts read prompts ``prompt``, ``(B,)`` int64 on the CPU: which prompts must be there
        (one for each text, unless the attention can share them), and who reads which."""
        if self.attention != SHARED:
            return prompt.to(self.device, non_blocking=True), None
        wanted, prompt = prompt.unique(return_inverse=True)
        return wanted.to(self.device, non_blocking=True), _Seats.of(prompt, self.device)

    def decoder(
        self,
        slots: int,
        length: int,
        prompts: Sequence[Sequence[int]],
        reuse: Decoder | None = None,
    ) -> Decoder:
        """As :meth:`LanguageModel.decoder`."""
        if not self.has_cache:
            return RereadDecoder(self, slots, length)
        rows = min(slots, len(prompts))
        width = rounded_reach(max(map(len, prompts)), self.device)
        length = min(self.context_length, rounded_reach(length, self.device))
        cache = reuse.cache if isinstance(reuse, PromptDecoder) else None
        if cache is None or not (
            cache.fits(self.decoder_layers, slots, length, self.device)
            and cache.length <= self.context_length  # a longer one has no table of positions
            and (cache.prompts.slots >= rows and cache.prompts.length >= width)
        ):
            cache = PromptCache(self.decoder_layers, slots, length, rows, width, self.device)
        return PromptDecoder(self, cache)

    def prompt_keys(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Cache]:
        """States ``(N, P, D)`` of N prompts, and of each layer the keys and values ``(N, H, P, D)``
        that its cross-attention makes of them, as it does at a decoder's first token."""
        states, mask = self.read(prompts)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        first = torch.full((len(prompts), 1), self.start_id, device=self.device)
        rows, seats = self.share(torch.arange(len(prompts)))
        self.write(first, _Source(states[rows], mask[rows], seats), cache)
        return states, cache.cross_attention_cache

    @functools.cached_property
    def decoder_layers(self) -> int:
        """How many there are, under whatever name a config has for it."""
        return len(self.prompt_keys([[self.start_id]])[1].layers)

    def position_table(self, length: int, state: Tensor) -> Tensor | None:
        """Vectors ``(length, D)`` of positions, where the decoder has a module for them; ``state``
        ``(1, 1, D)`` is any of the encoder's."""
        if (module := _position_module(self.model)) is None:
            return None
        tables: list[Tensor] = []
        handle = module.register_forward_hook(lambda module, args, out: tables.append(out))
        try:
            tokens = torch.full((1, length), self.start_id, device=self.device)
            self.write(tokens, _Source(state, state.new_ones(1, 1, dtype=torch.bool), None))
        finally:
            handle.remove()
        return tables[0].flatten(0, -2).clone()

    # --- log-probs ------------------------------------------------------------------------------

    def _micro_batches(
        self, rollout: Rollout, used: Tensor | None, micro_batch: int | None, budget: int
    ) -> Iterator[_Batch]:
        """The samples of a rollout, or those marked ``used``, prompt by prompt: each is encoded
        once, but for those whose samples do not fit one micro-batch. Long prompts first."""
        self._check_batches(rollout, micro_batch)
        sizes, prompt, lengths = (
            x.cpu() for x in (rollout.prompt_lengths, rollout.prompt_index, rollout.lengths)
        )
        keys = list(zip((-sizes).tolist(), prompt.tolist(), (-lengths).tolist(), strict=True))
        order = torch.tensor(sorted(range(len(keys)), key=keys.__getitem__), dtype=torch.int64)
        if used is not None:
            order = order[used[order]]
        tokens = self._decoder_tokens(rollout)
        while len(order):
            size = micro_batch or _fitting(sizes[order], prompt[order], lengths[order], budget)
            rows, order = order[:size], order[size:]
            ones = torch.ones(len(rows), dtype=torch.int64)
            batch = self._micro_batch(tokens, rows, ones, lengths[rows])
            wanted, index = prompt[rows].unique(return_inverse=True)
            prompts = [rollout.prompts.tokens[g] for g in wanted.tolist()]
            yield _Batch(**vars(batch), prompts=prompts, prompt=index)

    def _decoder_tokens(self, rollout: Rollout) -> Tensor:
        """``(B, 1 + S)``: the start token, then the sample."""
        longest = rollout.token_logprob.shape[1]
        starts = rollout.prompt_lengths.to(self.device)[:, None]
        tokens = rollout.tokens.to(self.device)
        place = (starts + torch.arange(longest, device=self.device)).clamp_(max=tokens.shape[1] - 1)
        return torch.nn.functional.pad(tokens.gather(1, place), (1, 0), value=self.start_id)

    def _states(self, batch: MicroBatch) -> Tensor:
        assert isinstance(batch, _Batch)  # as _micro_batches makes them
        states, mask = self.read(batch.prompts)
        rows, seats = self.share(batch.prompt)
        written = self.write(batch.tokens, _Source(states[rows], mask[rows], seats))
        return written.flatten(0, 1)[batch.source]

    # --- trust, but measure ---------------------------------------------------------------------

    def _settle_packing(self) -> str:
        return "padded, each prompt encoded once"

    def _use_attention(self, name: str) -> None:
        super()._use_attention(name)
        # Before 5.20 transformers passed over parts whose config is a copy of the model's, as T5's.
        for part in (self.model.get_encoder(), self.model.get_decoder()):
            part.set_attn_implementation(name)

    def _comparison(self) -> EncoderDecoderTest:
        return EncoderDecoderTest(self)


class EncoderDecoderTest(SelfTest):
    """The self-test of such a model: texts are what the decoder writes of two prompts."""

    model: EncoderDecoderModel

    def texts(self) -> list[list[int]]:
        return [[self.model.start_id, *row[1:]] for row in super().texts()]

    def prompts(self, rows: list[list[int]]) -> tuple[list[list[int]], Tensor]:
        """Two prompts of unequal length, and which of them each text has."""
        longest = super().texts()[1]
        short = torch.tensor([len(row) <= len(longest) // 2 for row in rows])
        return [longest, longest[: -(-len(longest) // 3)]], short.long()

    def plain_forward(self, row: list[int]) -> Any:
        prompts, index = self.prompts([row])
        ids = torch.tensor([prompts[int(index)]], device=self.model.device)
        return self.model.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            decoder_input_ids=torch.tensor([row], device=self.model.device),
            use_cache=False,
        )

    def hidden(self, rows: list[list[int]]) -> Tensor:
        prompts, index = self.prompts(rows)
        states, mask = self.model.read(prompts)
        wanted, seats = self.model.share(index)
        source = _Source(states[wanted], mask[wanted], seats)
        return self.model.write(padded(rows, self.model.device)[0], source)

    def decoding_error(self) -> float:
        """Of texts that begin one after the other, so that none is where another is."""
        model, rows = self.model, self.rows
        prompts, index = self.prompts(rows)
        longest = max(len(row) for row in rows)
        decoder = model.decoder(len(rows), longest, prompts)
        decoder.prefill(prompts, index.bincount().tolist())
        worst = 0.0
        for step in range(2 * (len(rows) - 1) + longest):
            place = [step - 2 * i for i in range(len(rows))]
            begun = torch.tensor([i for i, at in enumerate(place) if at == 0], dtype=torch.int64)
            if len(begun):
                decoder.assign(begun, index[begun])
            at = [min(max(at, 0), len(row) - 1) for at, row in zip(place, rows, strict=True)]
            tokens = torch.tensor([row[i] for i, row in zip(at, rows, strict=True)])
            logits = decoder.step(tokens.to(model.device), 1 + max(at))
            for i in range(len(rows)):
                if at[i] == place[i]:
                    error = difference(logits[i], self.reference[i][at[i]], model.softcap)
                    worst = max(worst, error)
            goes_on = [0 <= i < len(row) - 1 for i, row in zip(place, rows, strict=True)]
            decoder.positions.add_(torch.tensor(goes_on, device=model.device))
        return worst


def _fitting(sizes: Tensor, prompt: Tensor, lengths: Tensor, budget: int) -> int:
    """How many of these samples, prompt by prompt, the next micro-batch reads, padding and prompts
    included: ``sizes`` of their prompts, the longest first, and ``lengths`` of their own."""
    prompts = 1 + torch.nn.functional.pad(prompt.diff() != 0, (1, 0)).cumsum(0)
    written = torch.arange(1, len(lengths) + 1) * lengths.cummax(0).values
    return max(1, int((prompts * sizes[0] + written <= budget).sum()))


class PromptCache(SlotCache):
    """Keys and values of what B slots have written, and of the prompts that they read.

    Attributes:
        prompts: of these, a row for each; :attr:`rows` of its slots are what they read.
        rows: ``(B,)`` int64: which of them each slot reads.
        lengths: ``(B,)`` int64: the tokens of that prompt.
        in_text: ``(B,)`` int64: where the next token of each slot goes in its text, prompt and all.
        table: vectors of positions, ``(T, D)``, if the model has such.
    """

    OF_SLOTS = ("positions", "rows", "lengths", "in_text")

    def __init__(
        self, layers: int, slots: int, length: int, rows: int, width: int, device: torch.device
    ) -> None:
        super().__init__(layers, slots, length, device)
        self.prompts = SlotCache(layers, rows, width, device)
        self.rows: Tensor = torch.zeros_like(self.positions)
        self.lengths: Tensor = torch.ones_like(self.positions)
        self.in_text: Tensor = torch.zeros_like(self.positions)
        self.table: Tensor | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.reach - 1  # where the one query of the slot that has come furthest may be


class _Both(EncoderDecoderCache):
    """What slots have written and what they read, as a decoder of transformers takes it."""

    def __init__(self, cache: PromptCache) -> None:
        super().__init__(cache, cache.prompts)
        self.is_updated = dict.fromkeys(range(len(cache.layers)), True)

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return self.self_attention_cache.get_query_offset(layer_idx)


class PromptDecoder(SlotDecoder):
    """Decoding over a :class:`PromptCache`: one token of work per slot and step."""

    model: EncoderDecoderModel
    cache: PromptCache

    def __init__(self, model: EncoderDecoderModel, cache: PromptCache) -> None:
        super().__init__(model, cache)
        cache.rows.zero_()
        cache.lengths.fill_(1)
        self.held = [-1] * cache.slots  # the prompt of each slot
        self.row_of: dict[int, int] = {}  # of prompts that slots hold
        self.state: Tensor | None = None  # of any token, for what asks whether there are any

    @property
    def positions(self) -> Tensor:
        return self.cache.in_text

    def _read(self, prompts: Sequence[Sequence[int]]) -> Cache:
        states, keys = self.model.prompt_keys(prompts)
        if self.state is None:
            self.state = states[:1, :1].clone()
            self._know_positions(self.state)
        return keys

    def _know_positions(self, state: Tensor) -> None:
        cache = self.cache
        table = self.model.position_table(cache.length, state)
        if table is not None and cache.table is not None and cache.table.shape == table.shape:
            table = cache.table.copy_(table)  # where recorded steps read it
        cache.table = table

    def _place(self, slots: list[int], prompts: list[int]) -> None:
        for slot, prompt in zip(slots, prompts, strict=True):
            self.held[slot] = prompt
        held = set(self.held)
        self.row_of = {prompt: row for prompt, row in self.row_of.items() if prompt in held}
        fresh = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.row_of]
        free = sorted(set(range(self.cache.prompts.slots)) - set(self.row_of.values()))
        self._copy(fresh, self.cache.prompts, free[: len(fresh)])
        self.row_of |= dict(zip(fresh, free, strict=False))
        device = self.positions.device
        at = torch.tensor(slots, device=device)
        rows = [self.row_of[prompt] for prompt in prompts]
        lengths = [len(self.prompts[prompt]) for prompt in prompts]
        self.cache.rows[at] = torch.tensor(rows, device=device)
        self.cache.lengths[at] = torch.tensor(lengths, device=device)

    def step(self, tokens: Tensor, reach: int) -> Tensor:
        cache, model = self.cache, self.model
        assert self.state is not None  # a slot has been assigned
        # Of a text the decoder reads no prompt, but a start token in place of its last one.
        cache.positions.copy_(cache.in_text - cache.lengths + 1)
        tokens = tokens.masked_fill(cache.positions == 0, model.start_id)
        cache.set_reach(reach)
        some = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=tokens.device)
        source = _Source(self.state, some, _Slots(cache.rows, cache.lengths))
        with _as_placed(cache):
            hidden = model.write(tokens[:, None], source, _Both(cache))
        return model.logits(hidden[:, 0])

    def first(self, slots: int, moved: Tensor, into: Tensor) -> PromptDecoder:
        decoder = super().first(slots, moved, into)
        assert isinstance(decoder, PromptDecoder)
        decoder.held = self.held[:slots]
        for slot, other in zip(into.tolist(), moved.tolist(), strict=True):
            decoder.held[slot] = self.held[other]
        return decoder


class RereadDecoder(RecomputeDecoder):
    """Decoding without a cache: each step reads all that a slot has written, and its prompt's
    states. Slow, and right for every encoder-decoder model."""

    model: EncoderDecoderModel

    def prefill(self, prompts: Sequence[Sequence[int]], uses: Sequence[int]) -> None:
        super().prefill(prompts, uses)
        device = self.positions.device
        size = max(1, SlotDecoder.PREFILL_TOKENS // (width := max(map(len, prompts))))
        parts = [
            self.model.read(prompts[begin : begin + size], width)
            for begin in range(0, len(prompts), size)
        ]
        self.states, self.mask = (torch.cat(part) for part in zip(*parts, strict=True))
        self.index = torch.zeros(len(self.rows), dtype=torch.int64, device=device)
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)

    def assign(self, slots: Tensor, prompts: Tensor) -> None:
        slots, prompts = slots.to(self.positions.device), prompts.to(self.positions.device)
        self.index[slots] = prompts
        self.positions[slots] = self.lengths[prompts] - 1

    def step(self, tokens: Tensor, reach: int) -> Tensor:
        place = (self.positions - self.lengths[self.index] + 1).clamp(0, reach - 1)
        self.tokens[self.rows, place] = tokens.masked_fill(place == 0, self.model.start_id)
        source = _Source(self.states[self.index], self.mask[self.index], None)
        hidden = self.model.write(self.tokens[:, :reach], source)
        return self.model.logits(hidden[self.rows, place])

    def first(self, slots: int, moved: Tensor, into: Tensor) -> RereadDecoder:
        self.index[into] = self.index[moved]
        decoder = super().first(slots, moved, into)
        assert isinstance(decoder, RereadDecoder)
        decoder.index = self.index[:slots]
        return decoder


def _position_module(model: Any) -> torch.nn.Module | None:
    """What makes vectors of the positions of what the decoder reads, by the name it has in BART."""
    return getattr(model.get_decoder(), "embed_positions", None)


def _start_id(model: Any) -> int:
    """The token that the decoder reads first: as ``generate`` of transformers chooses it."""
    generation: GenerationConfig | None = getattr(model, "generation_config", None)
    for name in ("decoder_start_token_id", "bos_token_id"):
        for source in (generation, model.config):
            found = getattr(source, name, None)
            if isinstance(found, int):
                return found
    raise ModelError(
        f"{type(model).__name__}: has no decoder_start_token_id, so it is not known what its "
        "decoder reads first. Way out: set it in the checkpoint's config.json; T5's is 0"
    )


AttentionInterface.register(SHARED, shared_attention)
AttentionMaskInterface.register(SHARED, _whole_mask)

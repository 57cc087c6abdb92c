"""Encoder-decoder models of transformers (T5, BART): the encoder reads the prompt, the decoder
writes the sample.

A sample x given a prompt c has log pi(x | c) = sum_t log pi(x_t | c, start, x_1 .. x_{t-1}), where
``start`` is the checkpoint's ``decoder_start_token_id``: the decoder reads it first, and it is no
part of the sample. That is the law sampled and the law scored. Tokens that a checkpoint would force
upon ``generate`` (``forced_bos_token_id``, ``forced_eos_token_id``, a least length, beams) are not
of it, and are dropped: a model that has learnt to begin with such a token does so by itself.

In a :class:`fdpg_fast.rollout.Rollout` nothing is different: a row is the prompt, then the sample.
All that is different is here. Each distinct prompt is encoded once, and its keys and values for the
decoder's cross-attention are computed once and read by all of its samples, which
:func:`shared_attention` takes for so many queries of one text. Positions of samples count from the
start token, so all slots decode in step, and a slot waits for new work until all are free; once the
last samples fit into fewer slots they go on with these. The cache counts tokens in Python, so no
step is recorded (replay.py), neither as a CUDA graph nor as a tape. Sharing needs transformers 5.6
for BART and 5.15 for T5; with earlier ones each sample has its prompt's keys for itself, and the
model says so at load.

Shape legend: G prompts, P prompt tokens (longest), B samples or slots, K most samples of a prompt,
W decoder tokens, H heads, D head size or hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AttentionInterface, GenerationConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_outputs import BaseModelOutput

from fdpg_fast.attention import SHARED, Decoder, SlotDecoder, rounded_reach, slot_attention
from fdpg_fast.models import Head, LanguageModel, MicroBatch, ModelError, difference
from fdpg_fast.rollout import Rollout

__all__ = ["EncoderDecoderModel", "StepDecoder", "shared_attention"]


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
        return cls(rows.to(device), place.to(device))


@dataclass(frozen=True)
class _Source:
    """What a decoder attends to.

    Attributes:
        states: ``(G, P, D)`` last hidden states of the encoder; without seats, of each text.
        mask: ``(G, P)`` bool: which of them are there.
        seats: which texts read which prompt; None: text i reads prompt i.
    """

    states: Tensor
    mask: Tensor
    seats: _Seats | None


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
    seats: _Seats | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function registered as :data:`SHARED`: cross-attention to prompts that texts
    share, and otherwise as :func:`fdpg_fast.attention.slot_attention`.

    Args:
        query: ``(B, H, W, D)``; ``key`` and ``value`` of cross-attention: ``(G, H, P, D)``.
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
    each = (seats.rows.shape[1], query.shape[2])  # K texts of W queries
    folded = query[seats.rows].transpose(1, 2).flatten(2, 3)  # (G, H, K W, D)
    mask = None if attention_mask is None else attention_mask[:, :, :1]
    out, _ = slot_attention(module, folded, key, value, mask, scaling, **kwargs)
    return out.unflatten(1, each).flatten(0, 1)[seats.place], None


def _whole_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """``sdpa_mask`` that never looks whether it could be left out, which asks the device."""
    skip = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: Tensor | None = sdpa_mask(*args, **{**kwargs, **skip})
    return mask


class EncoderDecoderModel(LanguageModel):
    """One encoder-decoder model with its tokenizer.

    Attributes:
        start_id: the token that the decoder reads first.
        context_length: most tokens that the encoder can read, and most that the decoder can; of T5,
            whose positions are relative, no number that matters.
    """

    own_attention: ClassVar[tuple[str, ...]] = (SHARED,)
    without_own_attention: ClassVar[str] = "reading each prompt's states once per sample"
    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"

    def __init__(self, model: Any, tokenizer: Any = None, **options: Any) -> None:
        self.start_id = _start_id(model)
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
        """Whether sampling keeps keys and values: always."""
        return True

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
            return prompt.to(self.device), None
        wanted, prompt = prompt.unique(return_inverse=True)
        return wanted.to(self.device), _Seats.of(prompt, self.device)

    def decoder(self, slots: int, length: int, reuse: Decoder | None = None) -> Decoder:
        """A decoder for ``slots`` texts; ``reuse`` lends its memory."""
        if isinstance(reuse, StepDecoder) and reuse.positions.device == self.device:
            return StepDecoder(self, slots, reuse.own)
        return StepDecoder(self, slots)

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
        return (
            "padded, each prompt encoded once; all slots sample in step, without refill, and steps "
            "are not recorded"
        )

    def _use_attention(self, name: str) -> None:
        super()._use_attention(name)
        # Before 5.20 transformers passed over parts whose config is a copy of the model's, as T5's.
        for part in (self.model.get_encoder(), self.model.get_decoder()):
            part.set_attn_implementation(name)

    def _texts(self) -> list[list[int]]:
        return [[self.start_id, *row[1:]] for row in super()._texts()]

    def _prompts(self, rows: list[list[int]]) -> tuple[list[list[int]], Tensor]:
        """Two prompts of unequal length for the texts of the self-test, and which has which."""
        longest = super()._texts()[1]
        short = torch.tensor([len(row) <= len(longest) // 2 for row in rows])
        return [longest, longest[: -(-len(longest) // 3)]], short.long()

    def _plain_forward(self, row: list[int]) -> Any:
        prompts, index = self._prompts([row])
        ids = torch.tensor([prompts[int(index)]], device=self.device)
        written = torch.tensor([row], device=self.device)
        return self.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            decoder_input_ids=written,
            use_cache=False,
        )

    def _padded_hidden(self, rows: list[list[int]]) -> Tensor:
        prompts, index = self._prompts(rows)
        states, mask = self.read(prompts)
        wanted, seats = self.share(index)
        return self.write(self._padded(rows)[0], _Source(states[wanted], mask[wanted], seats))

    def _decoding_error(self, rows: list[list[int]], reference: list[Tensor]) -> float:
        prompts, index = self._prompts(rows)
        decoder = StepDecoder(self, len(rows))
        decoder.prefill(prompts, index.bincount().tolist())
        decoder.assign(torch.arange(len(rows)), index)
        tokens, worst = self._padded(rows)[0], 0.0
        for place in range(tokens.shape[1]):
            logits = decoder.step(tokens[:, place], place + 1)
            for i, row in enumerate(rows):
                if place < len(row):
                    error = difference(logits[i], reference[i][place], self.softcap)
                    worst = max(worst, error)
        return worst


def _fitting(sizes: Tensor, prompt: Tensor, lengths: Tensor, budget: int) -> int:
    """How many of these samples, prompt by prompt, the next micro-batch reads, padding and prompts
    included: ``sizes`` of their prompts, the longest first, and ``lengths`` of their own."""
    prompts = 1 + torch.nn.functional.pad(prompt.diff() != 0, (1, 0)).cumsum(0)
    written = torch.arange(1, len(lengths) + 1) * lengths.cummax(0).values
    return max(1, int((prompts * sizes[0] + written <= budget).sum()))


class _StepLayer(CacheLayerMixin):
    """Keys and values of one layer, ``(B, H, T, D)``, of texts that are at one position."""

    keys: Any  # Tensor once initialised
    values: Any
    is_compileable = True
    is_sliding = False

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.written, self.device = 0, device

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros, not empty: a masked key has weight 0, and 0 * NaN from old memory would be NaN.
        def room(states: Tensor) -> Tensor:
            batch, heads, _, size = states.shape
            return states.new_zeros(batch, heads, self._reach(states.shape[2]), size)

        self.keys, self.values = room(key_states), room(value_states)
        self.is_initialized = True

    def _reach(self, queries: int) -> int:
        return rounded_reach(self.written + queries, self.device)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        end, reach = self.written + key_states.shape[2], self._reach(key_states.shape[2])
        before = self.keys, self.values
        if not self.is_initialized or not (
            self.keys.shape[2] >= reach
            and self.keys.shape[:2] == key_states.shape[:2]
            and self.keys.shape[3] == key_states.shape[3]
            and self.keys.dtype == key_states.dtype
        ):
            self.lazy_initialization(key_states, value_states)
            if self.written:  # longer than any sample so far
                for old, new in zip(before, (self.keys, self.values), strict=True):
                    new[:, :, : self.written] = old[:, :, : self.written]
        self.keys[:, :, self.written : end] = key_states
        self.values[:, :, self.written : end] = value_states
        self.written = end
        return self.keys[:, :, :reach], self.values[:, :, :reach]

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        # Before transformers 5.4 it is given the positions of the queries.
        queries = len(query_length) if isinstance(query_length, Tensor) else query_length
        return self._reach(queries), 0

    def get_seq_length(self) -> int:
        return self.written

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # an earlier transformers' name for it

    def reset(self) -> None:
        self.written = 0

    def first(self, texts: int, moved: Tensor, into: Tensor) -> _StepLayer:
        """Of the first ``texts`` of these, as of a decoder's slots."""
        layer = copy.copy(self)
        if self.is_initialized:
            for states in (self.keys, self.values):
                states[into, :, : self.written] = states[moved, :, : self.written]
            layer.keys, layer.values = self.keys[:texts], self.values[:texts]
        return layer


class StepDecoder:
    """Decoding of all slots in step: one token of work per slot and step, and each prompt's keys
    and values there once. New work comes to all slots at once."""

    refills = False

    def __init__(
        self, model: EncoderDecoderModel, slots: int, own: Sequence[_StepLayer] = ()
    ) -> None:
        self.model = model
        self.positions = torch.zeros(slots, dtype=torch.int64, device=model.device)
        self.own = own  # of each layer, once their number is known
        self.fresh = True  # no slot has read a token yet

    def prefill(self, prompts: Sequence[Sequence[int]], uses: Sequence[int]) -> None:
        self.lengths = torch.tensor([len(prompt) for prompt in prompts])
        width = int(self.lengths.max())
        size = max(1, SlotDecoder.PREFILL_TOKENS // width)
        parts = [
            self._read(prompts[begin : begin + size], width)
            for begin in range(0, len(prompts), size)
        ]
        self.states, self.mask, *self.cross = (torch.cat(part) for part in zip(*parts, strict=True))
        if len(self.own) != len(self.cross) // 2:
            device = self.positions.device
            self.own = [_StepLayer(device) for _ in range(len(self.cross) // 2)]

    def _read(self, prompts: Sequence[Sequence[int]], width: int) -> list[Tensor]:
        """States ``(N, P, D)`` and mask of N prompts, and of each layer the keys and the values
        ``(N, H, P, D)``, as a decoder computes them at its first token."""
        model, count = self.model, len(prompts)
        states, mask = model.read(prompts, width)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        first = torch.full((count, 1), model.start_id, device=model.device)
        rows, seats = model.share(torch.arange(count))
        model.write(first, _Source(states[rows], mask[rows], seats), cache)
        layers: Sequence[Any] = cache.cross_attention_cache.layers
        return [states, mask, *[x for layer in layers for x in (layer.keys, layer.values)]]

    def assign(self, slots: Tensor, prompts: Tensor) -> None:
        self.index = torch.full((len(self.positions),), int(prompts[0]))  # idle slots read any
        self.index[slots] = prompts
        for layer in self.own:
            layer.reset()
        self._attend()
        self.fresh = True
        at = (self.lengths[prompts] - 1).to(self.positions.device)
        self.positions[slots.to(self.positions.device)] = at

    def _attend(self) -> None:
        """Have each slot read its own texts and prompt ``index``."""
        rows, seats = self.model.share(self.index)
        self.source = _Source(self.states[rows], self.mask[rows], seats)
        cross = DynamicCache()
        for i in range(len(self.own)):
            cross.update(self.cross[2 * i][rows], self.cross[2 * i + 1][rows], i)
        self.cache = EncoderDecoderCache(Cache(layers=[*self.own]), cross)

    def step(self, tokens: Tensor, reach: int) -> Tensor:
        if self.fresh:
            tokens, self.fresh = torch.full_like(tokens, self.model.start_id), False
        hidden = self.model.write(tokens[:, None], self.source, self.cache)
        return self.model.logits(hidden[:, 0])

    def first(self, slots: int, moved: Tensor, into: Tensor) -> StepDecoder:
        decoder = copy.copy(self)
        self.index[into] = self.index[moved]
        moved, into = moved.to(self.positions.device), into.to(self.positions.device)
        self.positions[into] = self.positions[moved]
        decoder.positions, decoder.index = self.positions[:slots], self.index[:slots]
        decoder.own = [layer.first(slots, moved, into) for layer in self.own]
        decoder._attend()
        return decoder


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

"""Attention over slots: a preallocated key-value cache whose rows are at positions of their own.

Transformers' own static cache holds one position for the whole batch, so prompts of unequal length
must be padded on the left and a finished row cannot be given new work. Here each row of the batch
is a slot with its own position. Three registration points of transformers make any family use it
without knowing: a :class:`SlotCache` in place of its cache, :func:`slot_mask` in place of its mask
builder (the model still chooses causal, sliding or per-layer masks), and :func:`slot_attention`.
Tried on 23 families with transformers 5.4 (but for OPT and BioGPT), 5.12 (the same) and 5.23; up
to 5.3 the self-test at load finds that masks are built another way, and samples without a cache.

Shape legend: B slots, H query heads, Hk key-value heads, G = H / Hk, D head size, Q queries per
slot, T stored positions, N prompts, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import inspect
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.attention import varlen
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fdpg_fast import ops
from fdpg_fast.packing import Packing, current

__all__ = [
    "PACKED_KERNELS",
    "REACH_STEP",
    "SHARED",
    "SLOT",
    "SLOTS",
    "SLOT_MASKED",
    "Decoder",
    "RecomputeDecoder",
    "SlotCache",
    "SlotDecoder",
    "attention_report",
    "flash_attn_fits",
    "rounded_reach",
    "slot_attention",
    "slot_mask",
    "span_mask",
]

# A name that holds "sdpa", "flash" or "/" would be checked against the model's own support flags.
SLOT = "fdpg_slot"
# The same with masks of numbers, for families that add to their masks (ALiBi).
SLOT_MASKED = "fdpg_slot_masked"
SLOTS = (SLOT, SLOT_MASKED)
# Of encoder-decoder models; encoder_decoder.py registers it.
SHARED = "fdpg_shared"

# Attended and stored lengths are rounded up to this: few shapes, and above 50 keys of 8 numbers
# torch's batched product goes to MKL (64 keys took 0.78 ms, 48 took 1.0 ms: B=256, H=16, 2 cores).
# Each shape is a step to be recorded, which takes a GPU longer (replay.py); and there
# decode_attention reads live keys alone.
REACH_STEP = {"cpu": 32, "cuda": 128}

# Whose kernels attend within packed sequences on a GPU: the one that knows soft caps first.
FLASH_ATTN, VARLEN_ATTN = PACKED_KERNELS = ("flash-attn", "torch's varlen_attn")

# torch 2.11's takes as many key heads as query heads.
_VARLEN_SHARES_HEADS = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters

# Up to this many keys, attention on the CPU is faster as plain matrix products than as sdpa.
SHORT = 64


def rounded_reach(needed: int, device: torch.device) -> int:
    """``needed`` keys, or some more."""
    step = REACH_STEP.get(device.type, 1)
    return -(-needed // step) * step


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, ``(B, Hk, T, D)``, written at each slot's own position."""

    keys: Any  # Tensor once initialised
    values: Any
    is_compileable = True  # so that a mask is always made, also for one query
    is_sliding = False  # a window is in the mask, not in the storage

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros, not empty: a masked key has weight 0, and 0 * NaN from old memory would be NaN.
        slots, length = self.cache.slots, self.cache.length
        heads = key_states.shape[1]
        self.keys = key_states.new_zeros(slots, heads, length, key_states.shape[3])
        self.values = value_states.new_zeros(slots, heads, length, value_states.shape[3])
        self.is_initialized = True

    def _fits(self, states: Tensor) -> bool:
        return (
            self.is_initialized
            and self.keys.shape[1] == states.shape[1]
            and self.keys.shape[3] == states.shape[3]
            and self.keys.dtype == states.dtype
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        # Under autocast rotated keys may be fp32 beside values in 16 bits. In training attention
        # gets either in 16, so half the bytes do.
        if key_states.dtype != value_states.dtype:
            dtype = min(key_states.dtype, value_states.dtype, key=lambda dtype: dtype.itemsize)
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        if not self._fits(key_states):
            self.lazy_initialization(key_states, value_states)
        cache = self.cache
        ops.cache_append_(self.keys, self.values, key_states, value_states, cache.positions)
        return self.keys[:, :, : cache.reach], self.values[:, :, : cache.reach]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.reach, 0

    def get_seq_length(self) -> int:
        return 0  # positions are always given, so nobody counts from this

    def get_max_length(self) -> int:
        return self.cache.length

    get_max_cache_shape = get_max_length  # an earlier transformers' name for it


class SlotCache(Cache):
    """Keys and values of B slots, each with its own number of stored tokens.

    Attributes:
        positions: ``(B,)`` int64 on the device: where the next token of each slot goes.
        reach: keys ``[0, reach)`` are attended; a host number, at least every position + queries.
        slots, length: B and T. Storage is allocated when the first key comes, once.
    """

    OF_SLOTS: ClassVar[tuple[str, ...]] = ("positions",)  # what else there is of each slot

    def __init__(self, layers: int, slots: int, length: int, device: torch.device) -> None:
        self.slots, self.length, self.reach = slots, length, length
        self.positions = torch.zeros(slots, dtype=torch.int64, device=device)
        self.steps = torch.arange(length, device=device)
        self.slot_layers = [_SlotLayer(self) for _ in range(layers)]
        super().__init__(layers=[*self.slot_layers])

    def fits(self, layers: int, slots: int, length: int, device: torch.device) -> bool:
        """Whether it can be memory of so many slots, each of up to ``length`` tokens."""
        of_this_size = slots == self.slots and length <= self.length
        return of_this_size and layers == len(self.layers) and device == self.positions.device

    def first(self, slots: int, moved: Tensor, into: Tensor) -> SlotCache:
        """As :meth:`Decoder.first`."""
        moved, into = moved.to(self.positions.device), into.to(self.positions.device)
        cache = copy.copy(self)
        cache.slots = slots
        for name in self.OF_SLOTS:
            values = getattr(self, name)
            values[into] = values[moved]
            setattr(cache, name, values[:slots])
        cache.slot_layers = [_SlotLayer(cache) for _ in self.slot_layers]
        cache.layers = [*cache.slot_layers]
        for layer, whole in zip(cache.slot_layers, self.slot_layers, strict=True):
            if whole.is_initialized:
                for states in (whole.keys, whole.values):
                    # Of all lengths: a step that is replayed does not move the reach.
                    states[into] = states[moved]
                layer.keys, layer.values = whole.keys[:slots], whole.values[:slots]
                layer.is_initialized = True
        return cache

    def query_positions(self, queries: int) -> Tensor:
        """``(B, Q)``: the positions of the next Q tokens of each slot."""
        return self.positions[:, None] + self.steps[:queries]

    def set_reach(self, needed: int) -> None:
        """Attend to the first ``needed`` keys, rounded up."""
        self.reach = min(self.length, rounded_reach(needed, self.positions.device))

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return self.positions  # a row of numbers where transformers has one: slot_mask knows

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        # Before transformers had get_query_offset, this was where it asked for the offset.
        return 0 if hasattr(Cache, "get_query_offset") else self.positions


def span_mask(*args: Any, **kwargs: Any) -> Tensor | Packing | None:
    """The mask builder registered as :data:`SLOT`: where a decoding step's live keys are.

    For one query per slot, ``(B, 1, 1, 2)`` int64: the first live key, and the one after the last,
    which :func:`slot_attention` hands to ``ops.decode_attention``; otherwise :func:`slot_mask`.
    Should live keys ever not be neighbours, which nobody asks in the middle of a step, a slot gets
    a span that cannot be, hence NaN, and the self-test at load sees it.
    """
    offset = kwargs.get("q_offset")
    slots = isinstance(offset, Tensor) and offset.ndim == 1
    if not slots or kwargs["q_length"] != 1 or current() is not None:
        return slot_mask(*args, **kwargs)
    live = _visible(**kwargs)
    begin = live.int().argmax(-1, keepdim=True)  # the first of equals
    end = begin + live.sum(-1, keepdim=True)
    place = torch.arange(live.shape[3], device=live.device)
    spanned = (place >= begin) & (place < end)
    end = end.masked_fill((live != spanned).any(-1, keepdim=True), -1)
    # All first keys lie side by side, and all ends: every layer asks for them.
    return torch.stack((begin[..., 0], end[..., 0])).movedim(0, -1)


def slot_mask(*args: Any, **kwargs: Any) -> Tensor | Packing | None:
    """The mask builder registered as :data:`SLOT_MASKED`: ``sdpa_mask``, plus an offset per row.

    With the offsets of a :class:`SlotCache` the result is additive, ``(B, 1, Q, T)``, 0 or -inf.
    While packed sequences are announced it is their :class:`Packing`, with the layer's window.
    """
    if (packing := current()) is not None:
        return packing.within(kwargs.get("local_size"))
    offset = kwargs.get("q_offset")
    if not (isinstance(offset, Tensor) and offset.ndim == 1):
        return sdpa_mask(*args, **kwargs)
    return torch.zeros((), device=offset.device).where(_visible(**kwargs), -torch.inf)


def _visible(
    *, q_offset: Tensor, q_length: int, kv_length: int, mask_function: Any, **kwargs: Any
) -> Tensor:
    """``(B, 1, Q, T)`` bool: which keys each slot's queries attend to."""
    device = q_offset.device
    batch = torch.arange(q_offset.shape[0], device=device)[:, None, None, None]
    head = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device)
    query = (q_offset[:, None] + torch.arange(q_length, device=device))[:, None, :, None]
    key = torch.arange(kv_length, device=device)[None, None, None, :]
    visible: Tensor = mask_function(batch, head, query, key)
    return visible.expand(len(batch), 1, q_length, -1)


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Packing | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function registered as :data:`SLOT`.

    Args:
        query: ``(B, H, Q, D)``; ``key`` and ``value``: ``(B, Hk, T, D)``.
        attention_mask: boolean (True: attend) or additive, ``(B, 1, Q, T)``; None: causal; or
            spans, as :func:`span_mask` makes them; or where packed sequences lie, ``(1, H, N, D)``.
        scaling: factor of the scores, ``D ** -0.5`` by default.
        softcap: scores are ``softcap * tanh(scores / softcap)`` (Gemma 2), which sdpa cannot do.
        s_aux: ``(H,)`` attention sinks (gpt-oss), which sdpa cannot do either.
        kwargs: of transformers; ``position_bias``, ``(1, H, Q, T)``, is added to the scores (T5),
            and with spans is of a query at T - 1.

    Returns:
        ``(B, Q, H, D)``, and None for the attention weights that nobody asks for.
    """
    if isinstance(attention_mask, Packing):
        return _packed(module, query, key, value, attention_mask, scaling, softcap, s_aux, **kwargs)
    if attention_mask is not None and attention_mask.dtype == torch.int64:
        out = ops.decode_attention(
            query[:, :, 0].to(key.dtype),
            key,
            value,
            attention_mask[:, 0, 0, 1],
            begin=attention_mask[:, 0, 0, 0],
            bias=None if (bias := kwargs.get("position_bias")) is None else bias[0, :, 0],
            scale=scaling,
            softcap=softcap or 0.0,
            sinks=s_aux,
        )
        return out[:, None], None
    beyond_sdpa = softcap is not None or s_aux is not None
    usual = getattr(module, "is_causal", True) and kwargs.get("position_bias") is None
    # On the CPU sdpa's tiling costs more than it saves when there is little to tile (fp32, ms):
    #   one query, B=256 H=16 D=8, 2 cores: T=48 2.0, products 1.0;  T=256 5.3, products 3.0
    #   forward and backward, B=64 H=16 D=8, 1 core: T=43 17, products 11;  T=200 132, products 473
    small = query.device.type == "cpu" and (query.shape[2] == 1 or key.shape[2] <= SHORT)
    if beyond_sdpa or (small and usual):
        return _products(query, key, value, attention_mask, scaling, softcap, s_aux), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )


def _packed(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within each of several sequences that lie in one row."""
    window = packing.window
    if window != sliding_window:
        raise ValueError(
            f"the mask of a layer has a window of {window}, its attention one of {sliding_window}"
        )
    if query.device.type == "cuda":
        return _varlen(query, key, value, packing, scaling, softcap, sinks), None
    outs = []
    parts = (x.split(packing.lengths, dim=2) for x in (query, key, value))
    for length, q, k, v in zip(packing.lengths, *parts, strict=True):
        mask = None
        if window is not None and window < length:
            mask = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - window)[None, None]
        outs.append(slot_attention(module, q, k, v, mask, scaling, softcap, sinks, **kwargs)[0])
    return torch.cat(outs, dim=1), None


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The same by the kernel that the packing names; ValueError if that cannot do it."""
    flash = packing.kernel == FLASH_ATTN
    if flash and not (known := _flash_attn())[0]:
        raise ValueError(known[1])
    if value.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"takes fp16 and bf16, not {value.dtype}")
    if sinks is not None:
        raise ValueError("has no attention sinks")
    if softcap and not flash:
        raise ValueError("has no soft cap")
    # Under autocast rotated queries and keys may be fp32 beside values in half precision.
    q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    ends, longest = packing.boundaries, max(packing.lengths)
    window = (-1 if packing.window is None else packing.window - 1, 0)  # before it, and after it
    if flash:
        from flash_attn import flash_attn_varlen_func

        out: Tensor = flash_attn_varlen_func(
            q,
            k,
            v,
            ends,
            ends,
            longest,
            longest,
            softmax_scale=scaling,
            causal=True,
            window_size=window,
            softcap=softcap or 0.0,
        )
        return out[None]
    if (shared := query.shape[1] // key.shape[1]) > 1 and not _VARLEN_SHARES_HEADS:
        k, v = (x.repeat_interleave(shared, dim=1) for x in (k, v))
    grouped: Any = {"enable_gqa": True} if k.shape[1] != q.shape[1] else {}
    attended = varlen.varlen_attn(
        q, k, v, ends, ends, longest, longest, scale=scaling, window_size=window, **grouped
    )
    assert isinstance(attended, Tensor)  # nothing beside it was asked for
    return attended[None]


def _products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention as two matrix products; keys and values are not repeated for grouped queries."""
    batch, heads, queries, size = query.shape
    key_heads, keys = key.shape[1], key.shape[2]
    groups = heads // key_heads
    scaled = query * (size**-0.5 if scaling is None else scaling)
    scaled = scaled.reshape(batch, key_heads, groups * queries, size)
    scores = torch.matmul(scaled, key.transpose(2, 3)).float()
    scores = scores.view(batch, key_heads, groups, queries, keys)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None and queries > 1:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
        mask = mask.tril(keys - queries)[None, None]
    if mask is not None:
        mask = mask[:, :, None]  # (B, 1, 1, Q, T)
        if mask.dtype == torch.bool:
            # Not -inf: padding on the left sees nothing, and 0 * NaN of it would be seen by all.
            hidden = torch.finfo(torch.float32).min
            mask = torch.zeros((), device=mask.device).where(mask, hidden)
        scores = scores + mask
    if sinks is not None:
        column = sinks.float().view(1, key_heads, groups, 1, 1)
        scores = torch.cat((scores, column.expand(batch, -1, -1, queries, -1)), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :keys].to(value.dtype)
    out = torch.matmul(weights.reshape(batch, key_heads, groups * queries, keys), value)
    return out.reshape(batch, heads, queries, -1).transpose(1, 2)


class _Model(Protocol):
    """What a decoder needs of a :class:`fdpg_fast.models.LanguageModel`."""

    device: torch.device

    @property
    def layers(self) -> int: ...
    @property
    def is_compiled(self) -> bool: ...
    def hidden(self, tokens: Tensor, positions: Tensor, cache: Cache | None = None) -> Tensor: ...
    def logits(self, hidden: Tensor) -> Tensor: ...


class Decoder(Protocol):
    """The next token's logits for B slots, each at a position of its own.

    Attributes:
        positions: ``(B,)`` int64 on the device: where the token given to :meth:`step` stands. The
            caller moves it, for the slots that go on.
    """

    @property
    def positions(self) -> Tensor: ...

    def prefill(self, prompts: Sequence[Sequence[int]], uses: Sequence[int]) -> None:
        """Take N prompts, each of which is read once, all but its last token unless that is an
        encoder's, too, and will be assigned ``uses[i]`` times."""

    def assign(self, slots: Tensor, prompts: Tensor) -> None:
        """Put prompt ``prompts[i]`` in slot ``slots[i]``, ready for its last token."""

    def step(self, tokens: Tensor, reach: int) -> Tensor:
        """Logits ``(B, V)`` after ``tokens`` ``(B,)``, as the model's ``logits`` gives them; every
        live position is below ``reach``, not counting what the decoder does not read.

        The result may be a buffer that the next call writes to.
        """

    def first(self, slots: int, moved: Tensor, into: Tensor) -> Decoder:
        """A decoder of the first ``slots`` of these, in their memory, where what slots ``moved``
        hold is put ``into`` others first."""


class SlotDecoder:
    """Decoding over a :class:`SlotCache`: one token of work per slot and step."""

    PREFILL_TOKENS = 16384  # prompt tokens that are read at a time, and in one forward pass

    def __init__(self, model: _Model, cache: SlotCache) -> None:
        self.model, self.cache = model, cache
        self.positions.zero_()
        self.prompts: Sequence[Sequence[int]] = ()
        self.uses: list[int] = []  # that are to come
        self.unread: list[int] = []
        self.found: dict[int, tuple[Cache | None, int]] = {}  # of those read: bank, row there

    @property
    def positions(self) -> Tensor:
        return self.cache.positions

    def prefill(self, prompts: Sequence[Sequence[int]], uses: Sequence[int]) -> None:
        self.prompts, self.uses = prompts, list(uses)
        self.unread = list(range(len(prompts)))

    def _read_next(self) -> None:
        """Some prompts, in their order: those assigned to the last slots are forgotten by then."""
        order: list[int] = []
        tokens = 0
        while self.unread and (not order or tokens < self.PREFILL_TOKENS):
            order.append(self.unread.pop(0))
            tokens += len(self.prompts[order[-1]])
        order.sort(key=lambda i: len(self.prompts[i]))
        while order:
            longest = max(1, len(self.prompts[order[-1]]) - 1)
            take = order[-max(1, self.PREFILL_TOKENS // longest) :]
            del order[-len(take) :]
            bank = self._read([self.prompts[i] for i in take])
            self.found.update((i, (bank, row)) for row, i in enumerate(take))

    def _read(self, prompts: Sequence[Sequence[int]]) -> Cache | None:
        """Keys and values of prompts padded on the right, which causal attention never sees."""
        longest = max(len(prompt) for prompt in prompts) - 1
        if longest == 0:
            return None  # a single token each: `step` reads it
        device = self.model.device
        rows = [[*prompt[:-1], *([0] * (longest + 1 - len(prompt)))] for prompt in prompts]
        bank = SlotCache(self.model.layers, len(prompts), longest, device)
        self.model.hidden(torch.tensor(rows, device=device), bank.query_positions(longest), bank)
        return bank

    def assign(self, slots: Tensor, prompts: Tensor) -> None:
        chosen: list[int] = prompts.tolist()
        while any(i not in self.found for i in chosen):
            self._read_next()
        self._place(slots.tolist(), chosen)
        device = self.positions.device
        lengths = [len(self.prompts[i]) for i in chosen]
        self.positions[slots.to(device)] = torch.tensor(lengths, device=device) - 1
        for i in chosen:
            self.uses[i] -= 1
            if not self.uses[i]:
                del self.found[i]

    def _place(self, slots: list[int], prompts: list[int]) -> None:
        """Put keys and values of prompts where those of slots are."""
        self._copy(prompts, self.cache, slots)

    def _copy(self, prompts: list[int], cache: SlotCache, into: list[int]) -> None:
        wanted = [self.found[i] for i in prompts]
        device = cache.positions.device
        for bank in {id(bank): bank for bank, _ in wanted if bank is not None}.values():
            mine = [i for i, (other, _) in enumerate(wanted) if other is bank]
            rows = torch.tensor([wanted[i][1] for i in mine], device=device)
            places = torch.tensor([into[i] for i in mine], device=device)
            sources: Sequence[Any] = bank.layers
            for layer, source in zip(cache.slot_layers, sources, strict=True):
                if not layer._fits(source.keys):
                    layer.lazy_initialization(source.keys, source.values)
                length = source.keys.shape[2]
                layer.keys[places, :, :length] = source.keys[rows]
                layer.values[places, :, :length] = source.values[rows]

    def step(self, tokens: Tensor, reach: int) -> Tensor:
        self.cache.set_reach(reach)
        hidden = self.model.hidden(tokens[:, None], self.positions[:, None], self.cache)
        return self.model.logits(hidden[:, 0])

    def first(self, slots: int, moved: Tensor, into: Tensor) -> SlotDecoder:
        decoder = copy.copy(self)
        decoder.cache = self.cache.first(slots, moved, into)
        return decoder


class RecomputeDecoder:
    """Decoding without a cache, for families the slot cache does not fit: each step reads the whole
    text again. Slow, and right for every causal model."""

    def __init__(self, model: _Model, slots: int, length: int) -> None:
        self.model = model
        self.positions = torch.zeros(slots, dtype=torch.int64, device=model.device)
        self.tokens = torch.zeros(slots, length, dtype=torch.int64, device=model.device)
        self.rows = torch.arange(slots, device=model.device)
        self.prompts: Sequence[Sequence[int]] = ()

    def prefill(self, prompts: Sequence[Sequence[int]], uses: Sequence[int]) -> None:
        self.prompts = prompts

    def assign(self, slots: Tensor, prompts: Tensor) -> None:
        for slot, index in zip(slots.tolist(), prompts.tolist(), strict=True):
            prompt = self.prompts[index]
            self.tokens[slot, : len(prompt)] = torch.tensor(prompt)
            self.positions[slot] = len(prompt) - 1

    def step(self, tokens: Tensor, reach: int) -> Tensor:
        self.tokens[self.rows, self.positions] = tokens
        positions = torch.arange(reach, device=self.model.device).expand(len(self.rows), -1)
        hidden = self.model.hidden(self.tokens[:, :reach], positions)
        return self.model.logits(hidden[self.rows, self.positions.clamp(max=reach - 1)])

    def first(self, slots: int, moved: Tensor, into: Tensor) -> RecomputeDecoder:
        decoder = copy.copy(self)
        for values in (self.positions, self.tokens):
            values[into] = values[moved]
        decoder.positions, decoder.tokens = self.positions[:slots], self.tokens[:slots]
        decoder.rows = self.rows[:slots]
        return decoder


def flash_attn_fits(
    installed: bool, capability: tuple[int, int] | None, error: str | None
) -> tuple[bool, str]:
    """Whether flash-attn's kernels can be used, and why, from what is known of this place.

    Args:
        installed: whether there is such a package.
        capability: of the GPU; None: there is none.
        error: what its import says, if it fails, as it does when built for another torch.
    """
    if not installed:
        return False, "not installed"
    if capability is None:
        return False, "needs a GPU"
    if capability < (8, 0):
        own = ".".join(map(str, capability))
        return False, f"needs a GPU of compute capability 8.0, this one has {own}"
    if error is not None:
        return False, f"cannot be imported: {error}"
    return True, "installed and fits"


@functools.cache
def _flash_attn() -> tuple[bool, str]:
    """The same of this machine; imports it only where nothing else stands in its way."""
    installed = importlib.util.find_spec("flash_attn") is not None
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    fits, why = flash_attn_fits(installed, capability, None)
    if fits:
        try:
            importlib.import_module("flash_attn")
        except Exception as error:  # of a linker, or its own
            fits, why = flash_attn_fits(installed, capability, str(error).partition("\n")[0])
    return fits, why


def attention_report() -> list[tuple[str, bool, str]]:
    """The attention functions: name, whether it can be used here, and why, for ``fdpg env``."""
    cuda = torch.cuda.is_available()
    flash, why = _flash_attn()
    packed = "needs a GPU; scoring and training are padded without it"
    if cuda:
        packed = FLASH_ATTN if flash else f"{VARLEN_ATTN} ({FLASH_ATTN}: {why})"
    return [
        (SLOT, True, "slot cache for sampling, sdpa for scoring; what `auto` takes if it fits"),
        (SLOT_MASKED, True, "the same for families that add to their masks; `auto`'s second"),
        (SHARED, True, "encoder-decoder models: samples share the keys of their prompt"),
        ("packed", cuda, packed),
        ("sdpa", True, "torch's scaled_dot_product_attention; samples without a cache, slowly"),
        ("eager", True, "plain matrix products; samples without a cache, slowly"),
        ("flash_attention_2", flash, f"{why}; samples without a cache, slowly" if flash else why),
    ]


AttentionInterface.register(SLOT, slot_attention)
AttentionMaskInterface.register(SLOT, span_mask)
AttentionInterface.register(SLOT_MASKED, slot_attention)
AttentionMaskInterface.register(SLOT_MASKED, slot_mask)

"""Slot attention, mask and cache against the textbook formula."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from fdpg_fast import attention
from fdpg_fast.attention import (
    REACH_STEP,
    SlotCache,
    attention_report,
    slot_attention,
    slot_mask,
    span_mask,
)
from fdpg_fast.packing import Packing

pytestmark = pytest.mark.usefixtures("one_thread")


def textbook(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One head of one slot at a time, in fp64: ``(B, Q, H, D)``."""
    batch, heads, queries, size = query.shape
    group = heads // key.shape[1]
    out = torch.zeros(batch, queries, heads, size, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            scores = query[b, h].double() @ key[b, h // group].double().T / math.sqrt(size)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores = scores.masked_fill(~visible[b, 0], -torch.inf)
            if sinks is not None:
                scores = torch.cat((scores, sinks[h].double().expand(queries, 1)), dim=1)
            weights = torch.softmax(scores, dim=1)[:, : key.shape[2]]
            out[b, :, h] = weights @ value[b, h // group].double()
    return out


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("kind", ["bool", "additive", "none"])
@pytest.mark.parametrize("short", [True, False])
def test_slot_attention(
    short: bool,
    kind: str,
    heads: tuple[int, int],
    queries: int,
    sinks: bool,
    softcap: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "SHORT", 64 if short else 0)
    batch, size = 3, 5
    keys = queries if kind == "none" and queries > 1 else 7
    torch.manual_seed(0)
    query = 3 * torch.randn(batch, heads[0], queries, size)
    key, value = 3 * torch.randn(2, batch, heads[1], keys, size)
    if kind == "none":  # causal; a single query sees all
        visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        visible = visible.expand(batch, 1, -1, -1)
        mask = None
    else:
        visible = torch.rand(batch, 1, queries, keys) < 0.5
        visible[..., 0] = True
        mask = visible if kind == "bool" else torch.zeros(()).where(visible, -torch.inf)
    s_aux = torch.randn(heads[0]) if sinks else None
    module = torch.nn.Module()
    module.num_key_value_groups = heads[0] // heads[1]  # type: ignore[assignment]
    out, weights = slot_attention(module, query, key, value, mask, softcap=softcap, s_aux=s_aux)
    assert weights is None
    expected = textbook(query, key, value, visible, softcap, s_aux)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("kernel", ["none", "torch", "torch 2.11", "flash_attn"])
def test_packed_sequences_do_not_see_each_other(
    kernel: str, window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the GPU's kernels are called with is checked by one that does what they document."""
    lengths, heads, size = torch.tensor([3, 1, 5]), (4, 2), 8
    name = "flash-attn" if kernel == "flash_attn" else "torch's varlen_attn"
    packing = Packing.of(lengths, torch.device("cpu"), name).within(window)
    torch.manual_seed(0)
    query = 3 * torch.randn(1, heads[0], 9, size)
    key, value = 3 * torch.randn(2, 1, heads[1], 9, size)
    if kernel != "none":
        query, key, value = query.half(), key.half(), value.half()
    expected = []
    for q, k, v in zip(*(x.split(lengths.tolist(), 2) for x in (query, key, value)), strict=True):
        n = q.shape[2]
        visible = torch.ones(n, n, dtype=torch.bool).tril().triu(1 - (window or n))
        expected.append(textbook(q, k, v, visible[None, None], softcap, None))

    def documented(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ends: Tensor,
        also: Tensor,
        longest: int,
        other: int,
        *,
        window_size: tuple[int, int],
        softcap: float = 0.0,
        **options: Any,
    ) -> Tensor:
        assert torch.equal(ends, also)
        assert (ends.dtype, ends.tolist(), longest, other) == (torch.int32, [0, 3, 4, 9], 5, 5)
        assert (
            options
            == {
                "torch": {"scale": None, "enable_gqa": True},
                "torch 2.11": {"scale": None},
                "flash_attn": {"softmax_scale": None, "causal": True},
            }[kernel]
        )
        assert (q.shape[1] == k.shape[1]) == (kernel == "torch 2.11")
        left, right = window_size
        outs = []
        for begin, end in itertools.pairwise(ends.tolist()):
            one = [x[begin:end].transpose(0, 1)[None] for x in (q, k, v)]
            at = torch.arange(end - begin)
            before = at[:, None] - at
            visible = before >= -right
            if left >= 0:
                visible &= before <= left
            outs.append(textbook(*one, visible[None, None], softcap or None, None)[0])
        return torch.cat(outs)

    monkeypatch.setattr(attention.varlen, "varlen_attn", documented)
    monkeypatch.setattr(attention, "_VARLEN_SHARES_HEADS", kernel == "torch")
    fake = ModuleType("flash_attn")
    fake.flash_attn_varlen_func = documented  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    monkeypatch.setattr(attention, "_flash_attn", lambda: (True, "told so"))
    if kernel == "none":
        module = torch.nn.Module()
        module.num_key_value_groups = 2  # type: ignore[assignment]
        out, _ = slot_attention(
            module, query, key, value, packing, softcap=softcap, sliding_window=window
        )
    elif kernel in ("torch", "torch 2.11") and softcap:
        with pytest.raises(ValueError, match="no soft cap"):
            attention._varlen(query, key, value, packing, None, softcap, None)
        return
    else:  # as under autocast, where rotated queries and keys stay fp32
        out = attention._varlen(query.float(), key.float(), value, packing, None, softcap, None)
    torch.testing.assert_close(out.double(), torch.cat(expected, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("facts", "fits", "why"),
    [
        ((False, (9, 0), None), False, "not installed"),
        ((True, None, None), False, "needs a GPU"),
        ((True, (7, 5), None), False, "capability 8.0, this one has 7.5"),
        ((True, (8, 0), "undefined symbol: x"), False, "cannot be imported: undefined symbol: x"),
        ((True, (12, 0), None), True, "installed and fits"),
    ],
)
def test_flash_attn_is_chosen_where_it_can_be_used_and_says_why(
    facts: tuple[bool, tuple[int, int] | None, str | None],
    fits: bool,
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a machine of these facts; a package that is there but broken does not cost packing."""
    installed, capability, error = facts
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # also where it is installed
    if installed:
        del sys.modules["flash_attn"]
        line = "" if error is None else f"raise ImportError({error + chr(10) + 'and more'!r})"
        (tmp_path / "flash_attn.py").write_text(line)
        monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(attention, "_flash_attn", attention._flash_attn.__wrapped__)
    try:
        assert attention._flash_attn()[0] == fits
    finally:
        sys.modules.pop("flash_attn", None)
    assert why in attention._flash_attn()[1]
    report = {name: (available, reason) for name, available, reason in attention_report()}
    assert report["flash_attention_2"][0] == fits
    assert why in report["flash_attention_2"][1]
    assert report["packed"][0] == (capability is not None)
    if capability is not None:
        kernel, _, reason = report["packed"][1].partition(" (")
        assert kernel == ("flash-attn" if fits else "torch's varlen_attn")
        assert fits or why in reason


def test_packed_attention_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 2, 3, 8)
    packing = Packing.of(torch.tensor([3]), x.device)
    with pytest.raises(ValueError, match="has a window of None, its attention one of 4"):
        slot_attention(torch.nn.Module(), x, x, x, packing, sliding_window=4)
    with pytest.raises(ValueError, match=r"fp16 and bf16, not torch\.float32"):
        attention._varlen(x, x, x, packing, None, None, None)
    with pytest.raises(ValueError, match="no attention sinks"):
        attention._varlen(x, x, x.half(), packing, None, None, torch.zeros(2))
    monkeypatch.setattr(attention, "_flash_attn", lambda: (False, "told so"))
    flash = Packing.of(torch.tensor([3]), x.device, "flash-attn")
    with pytest.raises(ValueError, match="told so"):
        attention._varlen(x, x, x.half(), flash, None, None, None)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("window", [None, 2])
def test_slot_mask_has_one_offset_per_row(window: int | None, queries: int) -> None:
    rule = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    offset = torch.tensor([0, 4, 2])
    mask = slot_mask(
        batch_size=3,
        q_length=queries,
        kv_length=8,
        q_offset=offset,
        kv_offset=0,
        mask_function=rule,
    )
    assert mask is not None
    assert mask.shape == (3, 1, queries, 8)
    for b in range(3):
        for q in range(queries):
            at = int(offset[b]) + q
            for k in range(8):
                seen = k <= at and (window is None or k > at - window)
                assert mask[b, 0, q, k] == (0 if seen else -torch.inf)


def test_spans_are_where_live_keys_are_neighbours() -> None:
    def with_gap(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & ((key != 2) | (query != 4))

    given = {"batch_size": 3, "q_length": 1, "kv_length": 8, "kv_offset": 0}
    offset = torch.tensor([0, 4, 7])
    rules = {
        causal_mask_function: [[0, 1], [0, 5], [0, 8]],
        sliding_window_causal_mask_function(3): [[0, 1], [2, 5], [5, 8]],
        (lambda batch, head, query, key: (key > query) & (key < 7)): [[1, 7], [5, 7], [0, 0]],
        with_gap: [[0, 1], [0, -1], [0, 8]],  # in one row, which decode_attention makes NaN
    }
    for rule, spans in rules.items():
        mask = span_mask(**given, q_offset=offset, mask_function=rule)
        assert mask is not None
        torch.testing.assert_close(mask, torch.tensor(spans)[:, None, None], rtol=0, atol=0)


def test_the_cache_writes_each_slot_at_its_own_position() -> None:
    cache = SlotCache(1, slots=3, length=6, device=torch.device("cpu"))
    cache.positions.copy_(torch.tensor([0, 2, 4]))
    key = torch.arange(3 * 2 * 2 * 1).view(3, 2, 2, 1).float() + 1
    keys, values = cache.update(key, -key, 0)
    assert keys.shape == (3, 2, 6, 1)
    for slot, at in enumerate([0, 2, 4]):
        torch.testing.assert_close(keys[slot, :, at : at + 2], key[slot])
        torch.testing.assert_close(values[slot, :, at : at + 2], -key[slot])
        assert keys[slot].count_nonzero() == 4
    place = keys.data_ptr()
    cache.positions.sub_(1).clamp_(min=0)
    assert cache.update(key, key, 0)[0].data_ptr() == place


@pytest.mark.parametrize("rotated", ["key", "value", "neither"])
def test_what_autocast_leaves_wide_is_kept_in_16_bits(rotated: str) -> None:
    cache = SlotCache(1, slots=2, length=3, device=torch.device("cpu"))
    states = {name: torch.randn(2, 1, 3, 4) for name in ("key", "value")}
    given = {n: s if n == rotated else s.bfloat16() for n, s in states.items()}
    kept = cache.slot_layers[0].update(given["key"], given["value"])
    for name, there in zip(states, kept, strict=True):
        assert there.dtype == torch.bfloat16
        assert torch.equal(there, states[name].bfloat16())


def test_reach_is_rounded_up_and_bounded() -> None:
    step = REACH_STEP["cpu"]
    cache = SlotCache(1, slots=2, length=step + 5, device=torch.device("cpu"))
    for needed, reach in ((1, step), (step, step), (step + 1, 37)):
        cache.set_reach(needed)
        assert cache.reach == reach == cache.get_mask_sizes(1, 0)[0]
    key = torch.ones(2, 1, 1, 3)
    assert cache.update(key, key, 0)[0].shape[2] == 37

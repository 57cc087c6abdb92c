"""decode_attention against its definition in fp64: spans, groups, sinks, caps, strides, dtypes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fdpg_fast import ops, reference


class Case(NamedTuple):
    """B sequences, H query heads, Hk key heads, T stored tokens, D and E head sizes."""

    b: int
    h: int
    hk: int
    t: int
    d: int
    e: int
    window: bool = False
    softcap: float = 0.0
    sinks: bool = False
    rows: int = 0  # of the cache, which sequences share; 0: one of each
    bias: bool = False

    def __str__(self) -> str:
        return "-".join(str(x) for x in self)


CASES = [
    Case(1, 1, 1, 1, 1, 1),
    Case(3, 4, 4, 7, 8, 8),
    Case(5, 4, 2, 130, 17, 5),  # vectors that are partly past the end; two blocks of keys
    Case(3, 20, 1, 33, 16, 24, window=True),  # more query heads than are taken at a time
    Case(4, 6, 3, 300, 64, 64, window=True, softcap=2.0, sinks=True),
    Case(2, 2, 1, 20, 128, 40, sinks=True),
    Case(0, 2, 1, 20, 8, 8),
    Case(40, 2, 2, 150, 16, 24, sinks=True, rows=3, bias=True),  # more neighbours than are taken
    Case(9, 4, 2, 33, 8, 8, window=True, softcap=2.0, rows=4, bias=True),
]


class Inputs(NamedTuple):
    query: Tensor
    keys: Tensor
    values: Tensor
    end: Tensor
    options: dict[str, Any]

    def to(self, dtype: torch.dtype) -> Inputs:
        tensors = (t.to(dtype) for t in self[:3])
        return Inputs(*tensors, self.end, self.options)


def make(case: Case) -> Inputs:
    torch.manual_seed(case.t)
    b, h, hk, t, d, e = case[:6]
    end = torch.randint(0, t + 1, (b,))
    if b:
        end[-1] = t
    begin = (torch.rand(b) * end).long() if case.window else None
    rows = torch.randint(0, case.rows, (b,)).sort().values if case.rows else torch.arange(b)
    if case.rows:  # some neighbours have the same span, some have not
        end[1::3] = end[::3][: len(end[1::3])]
    options = {
        "begin": begin,
        "rows": rows if case.rows else None,
        "bias": torch.randn(h, t) if case.bias else None,
        "softcap": case.softcap,
        "sinks": torch.randn(h) if case.sinks else None,
    }
    # Keys that are never live are poison; scores far apart make the maximum matter.
    r = case.rows or b
    keys, values = 3 * torch.randn(r, hk, t, d), torch.randn(r, hk, t, e)
    place = torch.arange(t)
    live = place < end[:, None]
    if begin is not None:
        live &= place >= begin[:, None]
    dead = torch.zeros(r, t).index_add(0, rows, live.float()) == 0
    keys.masked_fill_(dead[:, None, :, None], math.nan)
    values.masked_fill_(dead[:, None, :, None], math.nan)
    return Inputs(2 * torch.randn(b, h, d), keys, values, end, options)


def truth(x: Inputs) -> Tensor:
    clean = x._replace(keys=x.keys.nan_to_num(), values=x.values.nan_to_num()).to(torch.float64)
    return reference.decode_attention(*clean[:4], **clean.options)


# Rounding of the inputs' storage is not ours: truth is made of the rounded numbers.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_its_definition(case: Case, dtype: torch.dtype, cpu_isa: str) -> None:
    x = make(case).to(dtype)
    got = ops.decode_attention(*x[:4], **x.options)
    assert got.dtype == dtype
    assert got.shape == (case.b, case.h, case.e)
    torch.testing.assert_close(got.double(), truth(x), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_an_empty_span_gives_zeros() -> None:
    x = make(Case(2, 2, 1, 5, 8, 8, sinks=True))
    out = ops.decode_attention(*x[:3], torch.tensor([0, 5]), sinks=x.options["sinks"])
    assert not out[0].any()
    assert out[1].any()


def test_a_sequence_does_not_depend_on_the_others_nor_on_the_room_behind_it() -> None:
    x = make(Case(5, 4, 2, 130, 17, 5))
    whole = ops.decode_attention(*x[:4])
    for b in range(5):
        alone = (t[b : b + 1] for t in x[:4])
        assert torch.equal(ops.decode_attention(*alone), whole[b : b + 1])
    room = (torch.nn.functional.pad(t, (0, 0, 0, 40), value=math.nan) for t in x[1:3])
    assert torch.equal(ops.decode_attention(x.query, *room, x.end), whole)


def test_rows_are_as_if_each_sequence_had_its_own(cpu_isa: str) -> None:
    x = make(Case(40, 2, 2, 150, 16, 24, rows=3, bias=True))
    rows = x.options.pop("rows")
    shared = ops.decode_attention(*x[:4], rows=rows, **x.options)
    own = ops.decode_attention(x.query, x.keys[rows], x.values[rows], x.end, **x.options)
    assert torch.equal(shared, own)


def test_a_bias_counts_from_the_last_key() -> None:
    """Whatever the room behind it, and however it lies in memory."""
    x = make(Case(5, 4, 2, 130, 17, 5, bias=True))
    whole = ops.decode_attention(*x[:4], bias=x.options["bias"])
    assert not torch.equal(whole, ops.decode_attention(*x[:4]))
    room = (torch.nn.functional.pad(t, (0, 0, 0, 40), value=math.nan) for t in x[1:3])
    bias = torch.nn.functional.pad(x.options["bias"], (40, 0), value=math.nan).t().contiguous().t()
    assert torch.equal(ops.decode_attention(x.query, *room, x.end, bias=bias), whole)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_bias_of_minus_infinity_hides_keys(dtype: torch.dtype, cpu_isa: str) -> None:
    """More of them than are read at a time."""
    x = make(Case(3, 2, 2, 300, 16, 8)).to(dtype)
    x = x._replace(end=torch.tensor([300, 280, 299]))
    keys, values = (t.nan_to_num() for t in x[1:3])
    bias = torch.zeros(2, 300)
    bias[:, :200] = -math.inf
    got = ops.decode_attention(x.query, keys, values, x.end, bias=bias)
    expected = ops.decode_attention(x.query, keys, values, x.end, begin=x.end - 100)
    torch.testing.assert_close(got, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_nothing_is_no_error() -> None:
    for b, h, r, t in ((0, 2, 3, 5), (2, 0, 3, 5), (2, 2, 3, 0), (0, 2, 0, 5)):
        cache = torch.zeros(r, max(h, 1), t, 8)
        rows, end = torch.zeros(b, dtype=torch.int64), torch.zeros(b, dtype=torch.int64)
        query, bias = torch.ones(b, h, 8), torch.ones(h, t)
        out = ops.decode_attention(query, cache, cache, end, rows=rows, bias=bias)
        assert out.shape == (b, h, 8)
        assert not out.any()
    cache, end = torch.zeros(0, 2, 5, 8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"`rows` must be in \[0, 0\), got 0 at sequence 0"):
        ops.decode_attention(torch.ones(2, 2, 8), cache, cache, end, rows=end)


def test_slices_and_transposes_of_a_cache() -> None:
    x = make(Case(3, 4, 2, 9, 8, 8))
    whole = ops.decode_attention(*x[:4])
    wide = torch.full((3, 20, 2, 11), math.nan)  # (B, T, Hk, D), as some caches are
    wide[:, 4:13, :, :8] = x.keys.transpose(1, 2)
    keys = wide.transpose(1, 2)[:, :, 4:13, :8]
    query = x.query.repeat_interleave(2, dim=1)[:, ::2]
    assert torch.equal(ops.decode_attention(query, keys, *x[2:4]), whole)


def test_large_scores() -> None:
    """exp of a score would overflow; exp of its distance to the largest does not."""
    x = make(Case(3, 4, 4, 300, 8, 8)).to(torch.float32)
    x = x._replace(query=100 * x.query)
    torch.testing.assert_close(
        ops.decode_attention(*x[:4]).double(), truth(x), rtol=1e-4, atol=1e-4
    )


def test_appends_each_sequence_at_its_own_position() -> None:
    for q, dtype in ((1, torch.float32), (3, torch.bfloat16), (2, torch.float64)):
        torch.manual_seed(q)
        caches = [torch.randn(5, 2, 9, 7).to(dtype), torch.randn(5, 2, 9, 4).to(dtype)]
        # As a model hands them over: (B, Q, Hk, D), transposed.
        new = [torch.randn(5, q, 2, n).to(dtype).transpose(1, 2) for n in (7, 4)]
        position = torch.tensor([0, 9 - q, 3, 1, 3])
        expected = [cache.clone() for cache in caches]
        reference.cache_append_(*expected, *new, position)
        ops.cache_append_(*caches, *new, position)
        assert all(torch.equal(a, b) for a, b in zip(caches, expected, strict=True))


def test_refuses_to_append_past_the_end() -> None:
    cache, new = torch.zeros(2, 1, 4, 3), torch.zeros(2, 1, 2, 3)
    for bad in (3, -1):
        with pytest.raises(RuntimeError, match=rf"must be in \[0, 2\], got {bad} at sequence 1"):
            ops.cache_append_(cache, cache.clone(), new, new, torch.tensor([0, bad]))
    with pytest.raises(RuntimeError, match="`new_keys` must have shape"):
        ops.cache_append_(cache, cache.clone(), new[..., :2], new, torch.tensor([0, 0]))
    with pytest.raises(RuntimeError, match="`new_values` must be float32, got float64"):
        ops.cache_append_(cache, cache.clone(), new, new.double(), torch.tensor([0, 0]))


def refuse(message: str, **changes: Any) -> None:
    x = make(Case(2, 4, 2, 5, 8, 8))
    arguments = {"query": x.query, "keys": x.keys, "values": x.values, "end": x.end} | changes
    with pytest.raises(RuntimeError) as caught:
        ops.decode_attention(**arguments)
    assert message in str(caught.value)


def test_refusals() -> None:
    keys = torch.zeros(2, 2, 5, 8)
    refuse("`end` must be int64, got int32", end=torch.ones(2).int())
    refuse("0 <= begin <= end <= 5, got [0, 6) at sequence 1", end=torch.tensor([1, 6]))
    refuse(
        "0 <= begin <= end <= 5, got [3, 2) at sequence 0",
        begin=torch.tensor([3, 0]),
        end=torch.tensor([2, 5]),
    )
    refuse("`keys` must have shape [2, 2, 5, 8], got [2, 2, 5, 9]", keys=torch.zeros(2, 2, 5, 9))
    refuse("`values` must be float32, got float64", values=keys.double())
    for bad in (-1, 2):
        rows = torch.tensor([0, bad])
        refuse(f"`rows` must be in [0, 2), got {bad} at sequence 1", rows=rows)
    refuse("`rows` must be int64, got int32", rows=torch.ones(2).int())
    refuse("`bias` must have shape [4, 5], got [4, 6]", bias=torch.zeros(4, 6))
    refuse(
        "divides the 4 of `query`, got 3",
        keys=torch.zeros(2, 3, 5, 8),
        values=torch.zeros(2, 3, 5, 8),
    )
    refuse("contiguous along its last dimension", keys=torch.zeros(2, 2, 8, 5).transpose(2, 3))
    refuse("`softcap` must be at least 0, got -1", softcap=-1.0)

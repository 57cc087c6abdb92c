"""linear_logprob against its matrix products alone and other heads: forward, and with gradients.

FLOPs, by hand. Forward: one product, 2 N V D, and 16 per logit for the softmax, left out. With
gradients: three products, 6 N V D, or, where nothing is kept, the logits once more, 8 N V D.
Bytes: the hidden states and the weight read, once; with gradients, read once more and written as
often; results of 4 N are left out. The CPU reads its weight once per chunk and product instead, and
logits that do not stay in the cache are written and read: no part of what must be moved.
"""

from __future__ import annotations

import pytest
import torch
from conftest import Contest
from heads import (
    DTYPES,
    GRADIENT_BARS,
    MEMORY_BAR,
    PLACES,
    assert_close,
    bars,
    contenders,
    exact,
    floors,
    head,
    with_gradients,
)
from shapes import SHAPES
from torch import Tensor

from fdpg_fast import ops

FORWARD_BAR = 1 / 1.10  # as heads.GRADIENT_BARS, of one product


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "device"), PLACES)
def test_forward(contest: Contest, name: str, device: str, dtype: str) -> None:
    x, shape = head(name, dtype, device), SHAPES[name]
    truth = exact(name, dtype, device)

    def ours() -> Tensor:
        return ops.linear_logprob(x.hidden, x.weight, x.target).logp

    assert_close([ours()], x, truth)
    own = {"the matrix product": FORWARD_BAR} if dtype == "fp32" or device == "cuda" else {}
    with torch.no_grad():
        others, out = contenders(x, truth, lambda way: way(x.hidden, x.weight, x.target))
        contest.run(
            ours,
            {**floors("the matrix product", x), **others},
            bytes_moved=x.hidden.nbytes + x.weight.nbytes,
            flops=2 * shape.rows * shape.vocab * shape.hidden,
            bars=bars(name, device, own),
            memory_bars={},
            shape=f"{shape} D {shape.hidden}",
            dtype=dtype,
            device=device,
            took_no_part=out,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", ["kept", "recomputed"])
@pytest.mark.parametrize(("name", "device"), PLACES)
def test_forward_and_backward(
    contest: Contest, name: str, device: str, keep: str, dtype: str
) -> None:
    """``kept``: within the budget that a call has by itself; ``recomputed``: nothing is kept."""
    x, shape = head(name, dtype, device), SHAPES[name]
    truth = exact(name, dtype, device)
    keep_bytes = None if keep == "kept" else 0

    def logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return ops.linear_logprob(hidden, weight, target, keep_bytes=keep_bytes).logp

    assert_close(with_gradients(logprob, x), x, truth)
    others, out = contenders(x, truth, lambda way: with_gradients(way, x))
    own = {"the three matrix products": GRADIENT_BARS[dtype]} if keep == "kept" else {}
    own_memory = MEMORY_BAR if keep == "recomputed" and dtype == "fp32" else {}
    contest.run(
        lambda: with_gradients(logprob, x),
        {**floors("the three matrix products", x, of_hidden=True, of_weight=True), **others},
        bytes_moved=3 * (x.hidden.nbytes + x.weight.nbytes),
        flops=(6 if keep == "kept" else 8) * shape.rows * shape.vocab * shape.hidden,
        bars=bars(name, device, own),
        memory_bars=own_memory if name == "gpt2" else {},
        shape=f"{shape} D {shape.hidden}",
        dtype=dtype,
        device=device,
        took_no_part=out,
    )

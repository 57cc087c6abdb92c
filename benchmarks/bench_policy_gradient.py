"""policy_gradient against its matrix products alone, and against autograd through other heads.

FLOPs, by hand: three products, 6 N V D; two, 4 N V D, where the head is frozen and needs no
gradient. 30 per logit for softmax and numerators are left out. Bytes: the hidden states and the
weight read, read again for the gradients, and as much written; a frozen head is not written.
"""

from __future__ import annotations

import pytest
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

from fdpg_fast import ops


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", ["learns", "frozen"])
@pytest.mark.parametrize(("name", "device"), PLACES)
def test_policy_gradient(contest: Contest, name: str, device: str, weight: str, dtype: str) -> None:
    x, shape, learns = head(name, dtype, device), SHAPES[name], weight == "learns"
    truth = exact(name, dtype, device)

    def ours() -> ops.PolicyGradient:
        return ops.policy_gradient(
            x.hidden, x.weight, x.target, x.coefficient, lse_hint=hint, need_weight=learns
        )

    hint = None
    hint = ours().lse  # as a sampler has recorded it
    got = ours()
    assert_close([got.logp, got.hidden, got.weight], x, truth)
    others, out = contenders(x, truth, lambda way: with_gradients(way, x, of_weight=learns))
    floor = "the three matrix products" if learns else "the two matrix products"
    contest.run(
        ours,
        {**floors(floor, x, of_hidden=True, of_weight=learns), **others},
        bytes_moved=3 * x.hidden.nbytes + (3 if learns else 2) * x.weight.nbytes,
        flops=(6 if learns else 4) * shape.rows * shape.vocab * shape.hidden,
        bars=bars(name, device, {floor: GRADIENT_BARS[dtype]} if learns else {}),  # none for two
        memory_bars=MEMORY_BAR if name == "gpt2" and dtype == "fp32" else {},
        shape=f"{shape} D {shape.hidden}",
        dtype=dtype,
        device=device,
        took_no_part=out,
    )

"""One token of each sequence attends to its cache: ours against torch's attention over the room.

Lengths are uniform over the room, as they are when slots take new samples while others go on. torch
is told what is live by a mask, as in every static cache of transformers. Then samples of prompts
that share the keys of theirs, as the cross-attention of encoder-decoder models has them: against
products of all samples of a prompt at once, which must know which these are.

Bytes of ours: (D + E) numbers of every live key, once for all samples of a prompt. FLOPs: 2 (D + E)
per live key and query head.
"""

from __future__ import annotations

import pytest
import torch
from conftest import Contest
from shapes import NEEDS_CUDA
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fdpg_fast import ops, reference

# sequences, query heads, key heads, room, head size
SHAPES = {
    "stories": (256, 16, 16, 44, 8),
    "gpt2": (64, 12, 12, 256, 64),
    "llama3_1b": (16, 32, 8, 1024, 64),
    "gpt2_1024": (1024, 12, 12, 96, 64),
    "llama3_1b_256": (256, 32, 8, 1024, 64),
}
PLACES = [
    *((name, "cpu") for name in ("stories", "gpt2", "llama3_1b")),
    *(
        pytest.param(name, "cuda", marks=NEEDS_CUDA)
        for name in ("gpt2_1024", "llama3_1b_256", "llama3_1b")
    ),
]


def products(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention as two batched matrix products, keys not repeated for grouped queries."""
    b, h, d = query.shape
    grouped = query.reshape(b, keys.shape[1], h // keys.shape[1], d) * d**-0.5
    scores = torch.matmul(grouped, keys.transpose(2, 3)) + mask
    return torch.matmul(torch.softmax(scores, -1), values).reshape(b, h, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("name", "device"), PLACES)
def test_decode_attention(contest: Contest, name: str, device: str, dtype: torch.dtype) -> None:
    b, h, hk, t, d = SHAPES[name]
    torch.manual_seed(0)
    query = torch.randn(b, h, d).to(device, dtype)
    keys, values = (torch.randn(b, hk, t, d).to(device, dtype) for _ in range(2))
    end = torch.randint(1, t + 1, (b,)).to(device)
    live = torch.arange(t, device=device) < end[:, None]
    mask = torch.zeros(b, 1, 1, t, dtype=dtype, device=device).masked_fill(
        ~live[:, None, None], -torch.inf
    )

    def sdpa() -> Tensor:
        out = scaled_dot_product_attention(
            query[:, :, None], keys, values, attn_mask=mask, enable_gqa=h != hk
        )
        return out[:, :, 0]

    wide = (x.double() for x in (query, keys, values))
    truth = reference.decode_attention(*wide, end)
    for out in (ops.decode_attention(query, keys, values, end), sdpa()):
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out.double(), truth, rtol=tolerance, atol=tolerance)

    keys_read = int(end.sum()) * hk
    contest.run(
        lambda: ops.decode_attention(query, keys, values, end),
        {
            "sdpa with a mask": sdpa,
            "matrix products": lambda: products(query, keys, values, mask),
        },
        bytes_moved=keys_read * 2 * d * dtype.itemsize,
        flops=keys_read * (h // hk) * 4 * d,
        bars={"sdpa with a mask": 1.0},
        calls=20 if device == "cuda" else 1,
        graph=device == "cuda",
        shape=f"B={b} H={h} Hk={hk} T={t} D={d}",
        dtype=str(dtype).removeprefix("torch."),
        device=device,
    )


# prompts, samples of each, heads, room, head size
SHARED = {"t5_small": (64, 4, 8, 128, 64), "t5_small_16": (16, 16, 8, 512, 64)}
SHARED_PLACES = [
    *((name, "cpu") for name in SHARED),
    *(pytest.param(name, "cuda", marks=NEEDS_CUDA) for name in SHARED),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("name", "device"), SHARED_PLACES)
def test_shared_prompts(contest: Contest, name: str, device: str, dtype: torch.dtype) -> None:
    r, each, h, t, d = SHARED[name]
    torch.manual_seed(0)
    query = torch.randn(r * each, h, d).to(device, dtype)
    keys, values = (torch.randn(r, h, t, d).to(device, dtype) for _ in range(2))
    lengths = torch.randint(t // 2, t + 1, (r,)).to(device)
    rows = torch.arange(r, device=device).repeat_interleave(each)
    end = lengths[rows]
    live = torch.arange(t, device=device) < lengths[:, None]
    mask = torch.zeros(r, 1, 1, t, dtype=dtype, device=device).masked_fill(
        ~live[:, None, None], -torch.inf
    )

    def ours() -> Tensor:
        return ops.decode_attention(query, keys, values, end, rows=rows)

    def by_prompt() -> Tensor:
        folded = query.view(r, each, h, d).transpose(1, 2)
        scores = torch.matmul(folded, keys.transpose(2, 3)) * d**-0.5 + mask
        out = torch.matmul(torch.softmax(scores, -1), values)
        return out.transpose(1, 2).reshape(r * each, h, d)

    own_keys, own_values = keys[rows], values[rows]  # as a cache with a row for each slot has them

    def of_its_own() -> Tensor:
        return ops.decode_attention(query, own_keys, own_values, end)

    truth = reference.decode_attention(
        query.double(), keys.double(), values.double(), end, rows=rows
    )
    for out in (ours(), by_prompt(), of_its_own()):
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out.double(), truth, rtol=tolerance, atol=tolerance)

    keys_read = int(lengths.sum()) * h
    contest.run(
        ours,
        {"products, prompt by prompt": by_prompt, "each with keys of its own": of_its_own},
        bytes_moved=keys_read * 2 * d * dtype.itemsize,
        flops=keys_read * each * 4 * d,
        calls=20 if device == "cuda" else 1,
        graph=device == "cuda",
        shape=f"B={r * each} H={h} R={r} T={t} D={d}",
        dtype=str(dtype).removeprefix("torch."),
        device=device,
    )

"""sample_logprob against PyTorch: a token, its log-prob and the log-sum-exp.

Bytes, by hand: N V logits read, and a block of 1024 of each row again, from the first-level cache;
24 N of keys and 16 N of results are left out. FLOPs: 16 per logit, and 17 per logit of the block.
"""

from __future__ import annotations

import pytest
import torch
from bench_token_logprob import DTYPES, read, rows, warm
from conftest import Contest
from shapes import SHAPES
from torch import Tensor

from fdpg_fast import ops, reference

CPU_SHAPES = ["stories", "gpt2_decode"]
# Name of the way in PyTorch -> shape -> the speed-up asked for, in fp32.
BARS = {
    "softmax + multinomial + gather": {"stories": 45.0, "gpt2_decode": 80.0},
    "softmax + cumsum + searchsorted + gather": {"stories": 2.0, "gpt2_decode": 10.0},
}


def multinomial(logits: Tensor) -> tuple[Tensor, Tensor]:
    p = torch.softmax(logits, -1)
    token = torch.multinomial(p, 1)
    return token, p.gather(-1, token).log()


def inverse_cdf(logits: Tensor) -> tuple[Tensor, Tensor]:
    p = torch.softmax(logits, -1)
    cumulative = p.cumsum(-1)
    token = torch.searchsorted(cumulative, torch.rand(len(p), 1, dtype=p.dtype))
    token.clamp_(max=p.shape[1] - 1)  # rounding may leave the total below the uniform
    return token, p.gather(-1, token).log()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CPU_SHAPES)
def test_sample(contest: Contest, name: str, dtype: str) -> None:
    logits, _ = rows(name, DTYPES[dtype])
    seed = torch.tensor([5])
    ids, position = torch.arange(len(logits)), torch.zeros(len(logits), dtype=torch.long)

    got = ops.sample_logprob(logits, seed, ids, position)
    expected = reference.sample_logprob(logits, seed, ids, position)
    assert int((got.token == expected.token).sum()) >= len(logits) - 2  # ties of rounding
    same = got.token == expected.token
    torch.testing.assert_close(got.logp[same], expected.logp[same], rtol=0, atol=2e-6)

    others = {
        "softmax + multinomial + gather": lambda: multinomial(logits),
        "softmax + cumsum + searchsorted + gather": lambda: inverse_cdf(logits),
    }
    bars = {way: bar[name] for way, bar in BARS.items()}
    inputs = [logits]
    if dtype != "fp32":
        inputs.append(logits.float())
        others["ours in fp32"] = lambda: ops.sample_logprob(inputs[1], seed, ids, position)
        bars = {"ours in fp32": 1.0}
    contest.run(
        lambda: ops.sample_logprob(logits, seed, ids, position),
        {**others, "read": lambda: read(logits)},
        bytes_moved=logits.numel() * logits.element_size(),
        bars=bars,
        prepare=lambda: warm(*inputs),
        shape=str(SHAPES[name]),
        dtype=dtype,
    )

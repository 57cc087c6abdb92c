"""sample_logprob against PyTorch: a token, its log-prob and the log-sum-exp.

Bytes, by hand: N V logits read, and a block of 1024 of each row again, from the first-level cache;
24 N of keys and 16 N of results are left out. FLOPs: 16 per logit, and 17 per logit of the block.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from bench_token_logprob import DTYPES, copies, read, rows, warm
from conftest import Contest
from shapes import SHAPES, places
from torch import Tensor

from fdpg_fast import ops, reference

PLACES = places(cpu=("stories", "gpt2_decode"), cuda=("gpt2_decode", "llama3_decode"))
# On a GPU a call finds its logits in memory: there are more of them than a cache holds.
INPUTS, CALLS = {"cpu": 1, "cuda": 8}, {"cpu": 1, "cuda": 80}
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
    token = torch.searchsorted(cumulative, torch.rand(len(p), 1, dtype=p.dtype, device=p.device))
    token.clamp_(max=p.shape[1] - 1)  # rounding may leave the total below the uniform
    return token, p.gather(-1, token).log()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "device"), PLACES)
def test_sample(contest: Contest, name: str, device: str, dtype: str) -> None:
    logits, target = rows(name, DTYPES[dtype], device)
    seed = torch.tensor([5], device=device)
    ids, position = torch.arange(len(logits), device=device), torch.zeros_like(target)

    got = ops.sample_logprob(logits, seed, ids, position)
    expected = reference.sample_logprob(logits, seed, ids, position)
    assert int((got.token == expected.token).sum()) >= len(logits) - 2  # ties of rounding
    same = got.token == expected.token
    torch.testing.assert_close(got.logp[same], expected.logp[same], rtol=0, atol=2e-6)

    inputs = [logits, *(logits.clone() for _ in range(INPUTS[device] - 1))]
    turn = itertools.cycle(inputs)
    others = {
        "softmax + multinomial + gather": lambda: multinomial(next(turn)),
        "softmax + cumsum + searchsorted + gather": lambda: inverse_cdf(next(turn)),
    }
    if device == "cuda":
        others |= copies(turn, 1)
        bars = {"copy": 1 / 1.3}
    else:
        others["read"] = lambda: read(logits)
        bars = {way: bar[name] for way, bar in BARS.items()}
    warmed = [logits]
    if dtype != "fp32" and device == "cpu":
        warmed.append(logits.float())
        others["ours in fp32"] = lambda: ops.sample_logprob(warmed[1], seed, ids, position)
        bars = {"ours in fp32": 1.0}
    contest.run(
        lambda: ops.sample_logprob(next(turn), seed, ids, position),
        others,
        bytes_moved=logits.numel() * logits.element_size(),
        flops=16 * logits.numel() + 17 * 1024 * len(logits),
        bars=bars,
        prepare=lambda: warm(*warmed),
        calls=CALLS[device],
        graph=device == "cuda",
        memory_bars={},
        shape=str(SHAPES[name]),
        dtype=dtype,
        device=device,
    )

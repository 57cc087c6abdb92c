"""GPT-2's activation of what its layers have after a token of each of 64 or 256 samples: ours
against torch's.

Bytes: every number once in and once out.
"""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import Contest
from torch import nn

from fdpg_fast import ops, reference

SHAPES = {"gpt2": (64, 3072), "stories": (256, 512)}
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", SHAPES)
def test_gelu_tanh(contest: Contest, name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(SHAPES[name]).to(dtype)
    torchs = functools.partial(nn.functional.gelu, x, approximate="tanh")
    truth = reference.gelu_tanh(x.double())
    for out in (ops.gelu_tanh(x), torchs()):
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(out.double(), truth, rtol=tolerance, atol=tolerance)
    contest.run(
        lambda: ops.gelu_tanh(x),
        {"torch": torchs},
        bytes_moved=2 * x.numel() * dtype.itemsize,
        bars={"torch": 1.0},
        calls=20,
        shape=f"{list(x.shape)}",
        dtype=str(dtype).removeprefix("torch."),
    )

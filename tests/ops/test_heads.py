"""Heads beside eager PyTorch in the same dtype, against fp64, on a CPU and on a GPU."""

from __future__ import annotations

import pytest
import torch
from head_cases import CASES, Case, Inputs, make, options, plain
from torch import Tensor

from fdpg_fast import ops

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# And of a size that fills a GPU, with a vocabulary that is no multiple of anything.
SHAPES = [*CASES, Case(700, 64, 5003), Case(700, 64, 5003, bias=True, mask=True, scale=0.3)]


def error(got: Tensor, truth: Tensor) -> float:
    """Root of the mean square."""
    difference = (got.double() - truth).detach()
    return difference.square().mean().sqrt().item() if got.numel() else 0.0


def eager(case: Case, x: Inputs, coefficient: Tensor) -> list[Tensor]:
    """logp, and gradients of its weighted sum."""
    logp = plain(case, x)[0]
    return [logp, *torch.autograd.grad((coefficient.to(logp.dtype) * logp).sum(), x.leaves())]


def ours(case: Case, x: Inputs, coefficient: Tensor, op: str) -> list[Tensor]:
    given = {"bias": x.bias, "mask": x.mask, "chunk": case.chunk, **options(case)}
    if op == "policy_gradient":
        # The hint of a GPU's kernel: of a sampler in 16 bits, say.
        hint = plain(case, x)[1].detach().float()
        found = ops.policy_gradient(
            x.hidden, x.weight, x.target, coefficient, lse_hint=hint, **given
        )
        return [found.logp, *(t for t in found[2:] if t is not None)]
    keep_bytes = 0 if op == "linear_logprob, recomputed" else None
    logp = ops.linear_logprob(x.hidden, x.weight, x.target, keep_bytes=keep_bytes, **given).logp
    return [logp, *torch.autograd.grad((coefficient * logp).sum(), x.leaves())]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["linear_logprob", "linear_logprob, recomputed", "policy_gradient"])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_no_more_than_twice_as_wrong_as_eager(
    case: Case, op: str, dtype: torch.dtype, device: str
) -> None:
    on_cpu = make(case, dtype)
    x = Inputs(*(None if t is None else t.detach().to(device) for t in on_cpu)).to(dtype)
    c = torch.randn(case.n, device=device)
    truth = eager(case, x.to(torch.float64), c)
    for got, other, true in zip(ours(case, x, c, op), eager(case, x, c), truth, strict=True):
        assert error(got, true) <= 2 * error(other, true) + 1e-6

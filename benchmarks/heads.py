"""A language-model head on a named shape: its inputs, what is exact, and its matrix products alone.

What bench_linear_logprob.py and bench_policy_gradient.py share.
N rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import peers
import pytest
import torch
from shapes import SHAPES, Shape, require_products
from torch import Tensor

from fdpg_fast.ops.matmul import product

__all__ = [
    "DTYPES",
    "GRADIENT_BARS",
    "MEMORY_BAR",
    "PLACES",
    "Exact",
    "Head",
    "assert_close",
    "bars",
    "contenders",
    "exact",
    "floors",
    "head",
    "with_gradients",
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# How much of the time of the three products, and of the memory of what everybody writes, ours may
# take; a fraction of a product as a speed-up.
GRADIENT_BARS = {"fp32": 1 / 1.12, "bf16": 1 / 1.25}
CUDA_BARS = {"the matrix product": 1 / 1.15, "the three matrix products": 1 / 1.12}
AND_BYTES = "and bytes of logits"
MEMORY_BAR = {"log_softmax + gather": 0.15}
FEW = 32  # rows of a gradient that are compared

Entry = Callable[[], object]
Product = Callable[..., object]  # of two matrices, into `out`


def _cuda(name: str) -> object:
    """The shape on a GPU; without one, skipped: a contest of it would take a CPU hours."""
    no_gpu = not torch.cuda.is_available()
    shape = SHAPES[name]
    flops = 6e-12 * shape.rows * shape.vocab * shape.hidden
    why = f"needs a CUDA device: {name} is {flops:.2g} TFLOP forward and backward"
    return pytest.param(name, "cuda", marks=pytest.mark.skipif(no_gpu, reason=why))


# Shape and device. On the CPU those whose contest takes minutes at most.
PLACES = [
    ("stories", "cpu"),
    ("gpt2", "cpu"),
    *(_cuda(name) for name in ("gpt2", "gpt2_8k", "llama3_1b", "llama3_8b", "gemma2")),
]


class Head(NamedTuple):
    """``hidden`` [N, D], ``weight`` [V, D]; ``target``, and ``coefficient`` of each logp, [N]."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    coefficient: Tensor


class Exact(NamedTuple):
    """fp64: all of logp, the first FEW rows of d_hidden, the rows ``target[:FEW]`` of d_weight."""

    logp: Tensor
    hidden: Tensor
    weight: Tensor


@functools.lru_cache(maxsize=1)
def head(name: str, dtype: str, device: str) -> Head:
    """Logits of standard deviation 3.5: some 5 nats of entropy at 50257 tokens."""
    require_products(dtype, device)
    shape: Shape = SHAPES[name]
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    hidden = normal(shape.rows, shape.hidden)
    weight = normal(shape.vocab, shape.hidden).mul_(3.5 * shape.hidden**-0.5)
    target = torch.randint(shape.vocab, (shape.rows,), generator=generator, device=device)
    coefficient = normal(shape.rows) / shape.rows
    return Head(hidden.to(DTYPES[dtype]), weight.to(DTYPES[dtype]), target, coefficient)


@functools.lru_cache(maxsize=1)
def exact(name: str, dtype: str, device: str) -> Exact:
    """By formula, not by autograd: d logp / d logits = one-hot - softmax."""
    x = head(name, dtype, device)
    hidden, weight, coefficient = x.hidden.double(), x.weight.double(), x.coefficient.double()
    lse = torch.cat([(h @ weight.t()).logsumexp(-1) for h in hidden.split(128)])
    logp = (hidden * weight[x.target]).sum(-1) - lse
    p = (hidden[:FEW] @ weight.t() - lse[:FEW, None]).exp()
    d_hidden = coefficient[:FEW, None] * (weight[x.target[:FEW]] - p @ weight)
    column = x.target[:FEW]  # so that each has a target among them
    p = (hidden @ weight[column].t() - lse[:, None]).exp()
    one_hot = (x.target[:, None] == column).double()
    return Exact(logp, d_hidden, (coefficient[:, None] * (one_hot - p)).t() @ hidden)


def assert_close(
    got: tuple[Tensor | None, ...] | list[Tensor | None], x: Head, truth: Exact
) -> None:
    """logp and, where they are there, the gradients of hidden and weight.

    A log-prob is off by the rounding of its logits, sums of D products; a gradient by that of its
    dtype, and on CUDA by bf16 numerators, as a share of its largest entry.
    """
    logp, hidden, weight = (*got, None, None)[:3]
    assert logp is not None
    rounding = max(5e-5, 5e-8 * x.hidden.shape[1])
    torch.testing.assert_close(logp.double(), truth.logp, rtol=0, atol=rounding)
    share = 1e-2 if x.hidden.dtype == torch.bfloat16 else 2e-5
    column = x.target[:FEW]
    for grad, true in (
        (None if hidden is None else hidden[:FEW], truth.hidden),
        (None if weight is None else weight[column], truth.weight),
    ):
        if grad is not None:
            torch.testing.assert_close(
                grad.double(), true, rtol=0, atol=share * true.abs().max().item()
            )


# --------------------------------------------------------------------------------------------------
# Contenders


def products(
    x: Head, of_hidden: bool = False, of_weight: bool = False, by: Product = product
) -> Entry:
    """The matrix products alone, into buffers that are there: logits, then the gradients wanted."""
    hidden, weight = x.hidden, x.weight
    # Products of 16 bits have results of 16 bits, but for ours on a CPU.
    wide = None if hidden.is_cuda or by is not product else torch.float32
    logits = hidden.new_empty(len(hidden), len(weight), dtype=wide)
    # The logits stand for their gradient: as long a product.
    numerators = logits if logits.dtype == hidden.dtype else hidden.new_zeros(logits.shape)
    grad_hidden = torch.empty_like(hidden, dtype=wide) if of_hidden else None
    grad_weight = torch.empty_like(weight, dtype=wide) if of_weight else None

    def run() -> None:
        by(hidden, weight.t(), out=logits)
        if grad_hidden is not None:
            by(numerators, weight, out=grad_hidden)
        if grad_weight is not None:
            by(numerators.t(), hidden, out=grad_weight)

    return run


def products_and_bytes(x: Head, of_hidden: bool = False, of_weight: bool = False) -> Entry:
    """And, by a copy, the bytes of logits that must be moved beside them: fp32 logits are written,
    where a product of 16-bit inputs writes 2 bytes, and read; numerators of their gradient, in the
    dtype of the inputs, are written."""
    width = x.hidden.element_size()
    moved = (4 - width) + 4 + (width if of_hidden or of_weight else 0)
    alone = products(x, of_hidden, of_weight)
    copied = len(x.hidden) * len(x.weight) * moved // 2  # a copy moves every byte twice
    room = torch.empty(2, min(copied, 1 << 28), dtype=torch.uint8, device=x.hidden.device)

    def run() -> None:
        alone()
        for begin in range(0, copied, room.shape[1]):
            part = room[:, : copied - begin]
            part[0].copy_(part[1])

    return run


def floors(
    name: str, x: Head, of_hidden: bool = False, of_weight: bool = False
) -> dict[str, Entry]:
    """What ours cannot be faster than: the products that it is made of, named so. On a CPU also
    torch's own, on a GPU also with their bytes."""
    found = {name: products(x, of_hidden, of_weight)}
    if x.hidden.is_cuda:
        found[f"{name} {AND_BYTES}"] = products_and_bytes(x, of_hidden, of_weight)
    else:
        found[f"{name} by torch"] = products(x, of_hidden, of_weight, by=torch.mm)
    return found


def with_gradients(
    logprob: peers.LinearLogprob, x: Head, of_weight: bool = True
) -> tuple[Tensor | None, ...]:
    """logp, and by autograd the gradient of sum_n coefficient[n] logp[n]; of logp's sum if that
    is all it gives, which is as much work."""
    hidden = x.hidden.detach().requires_grad_()
    weight = x.weight.detach().requires_grad_(of_weight)
    logp = logprob(hidden, weight, x.target)
    upstream = x.coefficient.to(logp.dtype) if logp.dim() else None
    grads = torch.autograd.grad(logp, [hidden, weight] if of_weight else [hidden], upstream)
    return logp.detach(), *grads


def contenders(
    x: Head, truth: Exact, run: Callable[[peers.LinearLogprob], object]
) -> tuple[dict[str, Entry], dict[str, str]]:
    """Name -> entry of everybody who gets a value right, and name -> why of who takes no part.

    ``run`` makes of a way to log-probs what is timed.
    """
    entries: dict[str, Entry] = {}
    device = x.hidden.device.type
    _, out = peers.taking_part(peers.LINEAR_KERNELS, device, run)
    for name, way in peers.linear_peers(device).items():
        if name in out:
            continue
        with torch.no_grad():
            got = way(x.hidden, x.weight, x.target).double()
        # 16-bit logits of up to 16 are off by 0.06 nats at worst, their mean by far less.
        mean = got.mean() if got.dim() else got / len(x.hidden)
        torch.testing.assert_close(mean, truth.logp.mean(), rtol=0, atol=2e-2)
        entries[name] = functools.partial(run, way)
    compiled = peers.compiled(peers.logits_and_log_softmax)
    entries["torch.compile of log_softmax + gather"] = functools.partial(run, compiled)
    return entries, out


def bars(name: str, device: str, own: dict[str, float]) -> dict[str, float]:
    """What was asked for: ``own``, on the CPU of gpt2 only; on CUDA of who writes CUDA too."""
    if device == "cpu":
        return own if name == "gpt2" else {}
    others = dict.fromkeys(("liger-kernel", "cut-cross-entropy"), 2.0 if "gpt2" in name else 1.0)
    return {f"{floor} {AND_BYTES}": CUDA_BARS[floor] for floor in own} | others

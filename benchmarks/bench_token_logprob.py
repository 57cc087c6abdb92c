"""token_logprob against PyTorch: forward, and forward with backward in place.

Bytes, by hand. Forward: N V logits read; 8 N of targets and 8 N of results are left out.
Backward: N V logits read and N V gradients written. Forward and backward: 3 N V elements.
FLOPs: 16 per logit forward (an exponential of degree 6, two sums, a maximum), 30 forward and
backward; on the CPU neither memory nor arithmetic waits much for the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import peers
import pytest
import torch
from conftest import Contest
from shapes import SHAPES, places
from torch import Tensor

from fdpg_fast import ops, reference

PLACES = places(
    cpu=("stories", "gpt2_chunk", "gpt2_decode", "gpt2"), cuda=("gpt2_8k", "llama3_8b", "gemma2")
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# In fp32; of the time to read the logits, how much of it ours may be spending.
BARS = {
    "stories": {"log_softmax + gather": 2.0},
    "gpt2_chunk": {"log_softmax + gather": 2.0},
    "gpt2_decode": {"log_softmax + gather": 6.0, "read": 0.6},
    "gpt2": {"log_softmax + gather": 6.0, "read": 0.6},
}
# On a GPU: of the time to copy as many bytes as ours moves; and nobody is faster.
CUDA_BARS = {"copy": 0.92, "torch.compile": 1.0, "quack-kernels": 1.0}
CALLS = {"cpu": 1, "cuda": 10}
BACKWARD_BARS = {"stories": 1.8, "gpt2_chunk": 1.8, "gpt2_decode": 5.0, "gpt2": 5.0}
OP = torch.ops.fdpg.token_logprob
BACKWARD_ = torch.ops.fdpg.token_logprob_backward_


def rows(name: str, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    shape = SHAPES[name]
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(shape.rows, shape.vocab, generator=generator, device=device).mul_(3)
    target = torch.randint(shape.vocab, (shape.rows,), generator=generator, device=device)
    return logits.to(dtype), target


def assert_right(got: Tensor, logits: Tensor, target: Tensor, atol: float) -> None:
    few = slice(0, 32)  # fp64 is slow; rows do not depend on one another
    exact = reference.token_logprob(logits[few].double(), target[few]).logp
    torch.testing.assert_close(got[few].double(), exact, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "device"), PLACES)
def test_forward(contest: Contest, name: str, device: str, dtype: str) -> None:
    logits, target = rows(name, DTYPES[dtype], device)
    assert_right(ops.token_logprob(logits, target).logp, logits, target, 2e-6)
    others = {
        other: lambda function=function: function(logits, target)
        for other, function in peers.TOKEN_LOGPROB.items()
    }
    if device == "cpu":
        others["read"] = lambda: read(logits)
    else:
        others |= copies(itertools.repeat(logits), 1)
    kernels, out = peers.taking_part(peers.TOKEN_KERNELS, device, lambda way: way(logits, target))
    for kernel in kernels:
        assert_right(peers.TOKEN_KERNELS[kernel](logits, target), logits, target, 1e-3)
    others |= kernels
    inputs = [logits]
    if dtype == "fp32" or device == "cuda":
        others["torch.compile"] = lambda: compiled(logits, target)
        compiled = peers.compiled(peers.log_softmax_and_gather)
        bars = BARS.get(name, CUDA_BARS)
    else:
        others["ours in fp32"] = lambda: ops.token_logprob(inputs[1], target)
        inputs.append(logits.float())
        bars = {"ours in fp32": 1.0}
    contest.run(
        lambda: ops.token_logprob(logits, target),
        others,
        bytes_moved=logits.numel() * logits.element_size(),
        flops=16 * logits.numel(),
        bars=bars,
        prepare=lambda: warm(*inputs),
        calls=CALLS[device],
        graph=device == "cuda",
        memory_bars={},
        shape=str(SHAPES[name]),
        dtype=dtype,
        device=device,
        took_no_part=out,
    )


@pytest.mark.parametrize("name", ["stories", "gpt2_decode"])
def test_softcap(contest: Contest, name: str) -> None:
    """Gemma 2's bound inside the kernel, against passes over the logits before it."""
    logits, target = rows(name, torch.float32)
    cap = 30.0
    exact = reference.capped(logits[:32].double(), cap)
    exact = exact.gather(-1, target[:32, None])[:, 0] - exact.logsumexp(-1)
    got = ops.token_logprob(logits, target, softcap=cap).logp[:32]
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-5)
    bound = torch.empty_like(logits)

    def passes() -> Tensor:
        return torch.div(logits, cap, out=bound).tanh_().mul_(cap)

    contest.run(
        lambda: ops.token_logprob(logits, target, softcap=cap),
        {
            "passes, then ours": lambda: ops.token_logprob(passes(), target),
            "passes, then log_softmax + gather": lambda: peers.log_softmax_and_gather(
                passes(), target
            ),
            "ours without a softcap": lambda: ops.token_logprob(logits, target),
        },
        bytes_moved=logits.numel() * logits.element_size(),
        prepare=lambda: warm(logits),
        memory_bars={},
        shape=str(SHAPES[name]),
        dtype="fp32",
        softcap=cap,
    )


def copies(inputs: Iterator[Tensor], moves: int) -> dict[str, Callable[[], object]]:
    """An entry that copies, so reads and writes, as many bytes as ``moves`` reads of an input."""
    rooms: dict[int, Tensor] = {}

    def copy() -> None:
        x = next(inputs)
        half = x.view(-1)[: x.numel() // 2]
        room = rooms.setdefault(x.data_ptr(), torch.empty_like(half))
        for _ in range(moves):
            room.copy_(half)

    return {"copy": copy}


def warm(*inputs: Tensor) -> None:
    """Brings inputs as near as they fit: a last-level cache keeps them after three reads."""
    for x in inputs if inputs[0].device.type == "cpu" else ():
        for _ in range(3):
            read(x)


def read(x: Tensor) -> Tensor:
    """Reads every byte and does next to nothing with it: the sum of 64-bit words."""
    return x.view(-1).view(torch.int64 if x.numel() % 4 == 0 else torch.int16).sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "device"), PLACES)
def test_forward_and_backward(contest: Contest, name: str, device: str, dtype: str) -> None:
    original, target = rows(name, DTYPES[dtype], device)
    logits = original.clone()
    weight = torch.randn(len(target), generator=torch.Generator().manual_seed(1)).to(device)

    def ours() -> None:
        *_, lse = OP(logits, target)
        BACKWARD_(logits, target, lse, None, weight, None, None, 1.0, None)

    def autograd(way: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        leaf = logits.detach().requires_grad_()
        logp = way(leaf, target)
        return torch.autograd.grad(logp, leaf, weight.to(logp.dtype))[0]

    ours()
    leaf = original[:8].double().requires_grad_()
    logp = reference.token_logprob(leaf, target[:8]).logp
    (exact,) = torch.autograd.grad(logp, leaf, weight[:8].double())
    tolerance = {"rtol": 1e-2, "atol": 1e-6} if dtype == "bf16" else {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(logits[:8].double(), exact, **tolerance)
    bars = {"autograd of log_softmax + gather": BACKWARD_BARS.get(name, 1.0)}
    others: dict[str, Callable[[], object]] = {
        "autograd of log_softmax + gather": lambda: autograd(peers.log_softmax_and_gather)
    }
    kernels, out = peers.taking_part(peers.TOKEN_KERNELS, device, autograd)
    others |= kernels
    if device == "cuda":
        others |= copies(itertools.repeat(logits), 3)
        bars |= {name: CUDA_BARS[name] for name in ("copy", "quack-kernels")}
    contest.run(
        ours,
        others,
        bytes_moved=3 * logits.numel() * logits.element_size(),
        flops=30 * logits.numel(),
        bars=bars,
        prepare=lambda: logits.copy_(original),
        calls=CALLS[device],
        graph=device == "cuda",
        memory_bars={},
        shape=str(SHAPES[name]),
        dtype=dtype,
        device=device,
        took_no_part=out,
    )

"""Other people's kernels: which of them are installed, and why the others do not take part.

A peer that is missing is named in the results and in the summary, never passed over in silence.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

__all__ = [
    "LINEAR_LOGPROB",
    "PEERS",
    "TOKEN_KERNELS",
    "TOKEN_LOGPROB",
    "compiled",
    "linear_peers",
    "report",
    "taking_part",
]

T = TypeVar("T")

# Distribution -> (module to import, the part of it that competes with us). All need CUDA.
PEERS = {
    "liger-kernel": ("liger_kernel", "fused linear cross entropy, Triton"),
    "cut-cross-entropy": ("cut_cross_entropy", "linear cross entropy without logits, Triton"),
    "quack-kernels": ("quack", "softmax cross entropy, CuTe DSL"),
    "flash-attn": ("flash_attn", "cross entropy, Triton"),
    "flashinfer-python": ("flashinfer", "sampling from logits, CUDA"),
    "vllm": ("vllm", "an engine that draws, CUDA"),
}


def report() -> dict[str, str]:
    """Peer -> ``available``, or why it is not measured here."""
    found = {}
    for name, (module, what) in PEERS.items():
        if importlib.util.find_spec(module) is None:
            found[name] = f"not installed ({what})"
        elif not torch.cuda.is_available():
            found[name] = f"installed, but needs CUDA ({what})"
        else:
            found[name] = "available"
    return found


def log_softmax_and_gather(logits: Tensor, target: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1).gather(-1, target[:, None])[:, 0]


def gather_minus_logsumexp(logits: Tensor, target: Tensor) -> Tensor:
    """Eager PyTorch without the [N, V] result."""
    return logits.gather(-1, target[:, None])[:, 0] - torch.logsumexp(logits, -1)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return -functional.cross_entropy(logits, target, reduction="none")


def compiled(function: Callable[..., T]) -> Callable[..., T]:
    """``torch.compile`` of one static shape."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def quack_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    from quack.cross_entropy import cross_entropy

    return -cross_entropy(logits, target, reduction="none", inplace_backward=True)


def flash_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return -cross_entropy_loss(logits, target, inplace_backward=True)[0]


TokenLogprob = Callable[[Tensor, Tensor], Tensor]

TOKEN_LOGPROB: dict[str, TokenLogprob] = {
    "log_softmax + gather": log_softmax_and_gather,  # what everybody writes
    "gather - logsumexp": gather_minus_logsumexp,
    "cross_entropy": cross_entropy,
}
# Distribution -> its kernel; with a gradient it is written over the logits.
TOKEN_KERNELS: dict[str, TokenLogprob] = {
    "quack-kernels": quack_cross_entropy,
    "flash-attn": flash_cross_entropy,
}


def installed(kernels: dict[str, T], device: str) -> dict[str, T]:
    """Those of other people's kernels that can be tried on the device."""
    found = report() if device == "cuda" else {}
    return {name: kernel for name, kernel in kernels.items() if found.get(name) == "available"}


def taking_part(
    kernels: dict[str, T], device: str, run: Callable[[T], object]
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Name -> entry of each installed kernel of others that can do it, and name -> why of those
    that cannot: one may know no fp32, not this size, or not this torch. The contest goes on."""
    entries: dict[str, Callable[[], object]] = {}
    out: dict[str, str] = {}
    for name, kernel in installed(kernels, device).items():
        entry = functools.partial(run, kernel)
        try:
            entry()
        except Exception as error:
            out[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"
        else:
            entries[name] = entry
    return entries, out


# --------------------------------------------------------------------------------------------------
# The head: (hidden [N, D], weight [V, D], target [N]) -> logp [N], or its sum


def logits_and_log_softmax(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return log_softmax_and_gather(functional.linear(hidden, weight), target)


def logits_and_logsumexp(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return gather_minus_logsumexp(functional.linear(hidden, weight), target)


def checkpointed_chunks(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """What one writes to save memory: 128 rows at a time, computed again for the gradient."""
    parts = []
    for h, y in zip(hidden.split(128), target.split(128), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(logits_and_log_softmax, h, weight, y, use_reentrant=False))
        else:
            parts.append(logits_and_log_softmax(h, weight, y))
    return torch.cat(parts)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return -functional.linear_cross_entropy(hidden, weight, target, reduction="none")


def chunked_linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return -functional.linear_cross_entropy(
        hidden, weight, target, reduction="none", options=options
    )


def liger(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The sum: not every version weights the gradient of single rows."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return -liger_fused_linear_cross_entropy(hidden, weight, target, reduction="sum")


def cut_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, target, reduction="none")


def quack(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The sum: nothing else is chunked. Not tuned to the machine, which takes minutes a shape."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return -chunked_linear_cross_entropy(hidden, weight, target, reduction="sum", tuned=False)


def flash_attn(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return flash_cross_entropy(functional.linear(hidden, weight), target)


LinearLogprob = Callable[[Tensor, Tensor, Tensor], Tensor]

LINEAR_LOGPROB: dict[str, LinearLogprob] = {
    "log_softmax + gather": logits_and_log_softmax,  # what everybody writes
    "gather - logsumexp": logits_and_logsumexp,
    "log_softmax + gather, checkpointed chunks": checkpointed_chunks,
}
if hasattr(functional, "linear_cross_entropy"):  # torch 2.13
    LINEAR_LOGPROB["F.linear_cross_entropy"] = linear_cross_entropy
    LINEAR_LOGPROB["F.linear_cross_entropy, chunked"] = chunked_linear_cross_entropy

# Distribution -> its head.
LINEAR_KERNELS: dict[str, LinearLogprob] = {
    "liger-kernel": liger,
    "cut-cross-entropy": cut_cross_entropy,
    "quack-kernels": quack,
    "flash-attn": flash_attn,
}


def linear_peers(device: str) -> dict[str, LinearLogprob]:
    """All ways to the log-probs of a head that can be tried on the device."""
    return {**LINEAR_LOGPROB, **installed(LINEAR_KERNELS, device)}

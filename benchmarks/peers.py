"""Other people's kernels: which of them are installed, and why the others do not take part.

A peer that is missing is named in the results and in the summary, never passed over in silence.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["PEERS", "TOKEN_LOGPROB", "compiled", "report"]

# Distribution -> (module to import, the part of it that competes with us). All need CUDA.
PEERS = {
    "liger-kernel": ("liger_kernel", "fused linear cross entropy, Triton"),
    "cut-cross-entropy": ("cut_cross_entropy", "linear cross entropy without logits, Triton"),
    "quack-kernels": ("quack", "softmax cross entropy, CuTe DSL"),
    "flash-attn": ("flash_attn", "cross entropy, Triton"),
    "flashinfer-python": ("flashinfer", "sampling from logits, CUDA"),
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


def compiled(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """``torch.compile`` of one static shape."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


TOKEN_LOGPROB = {
    "log_softmax + gather": log_softmax_and_gather,  # what everybody writes
    "gather - logsumexp": gather_minus_logsumexp,
    "cross_entropy": cross_entropy,
}

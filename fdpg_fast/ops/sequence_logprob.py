"""sequence_logprob: sums over the tokens of sequences of unequal length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fdpg_fast import _build
from fdpg_fast.ops.gradient import refuse_tangent
from fdpg_fast.ops.token_logprob import require_one_device

__all__ = ["sequence_logprob"]

_build.load()


def sequence_logprob(values: Tensor, lengths: Tensor) -> Tensor:
    """sum over t < lengths[b] of values[b, t], in fp64 and in the order of t.

    Args:
        values: ``[B, T]`` fp32 or fp64, such as token log-probabilities; what stands past a
            length is not read. Differentiable.
        lengths: ``[B]`` int64, in [0, T].

    Returns:
        ``[B]`` fp64.

    Raises:
        RuntimeError: a shape, dtype, device, stride or length that the op cannot take.
        NotImplementedError: a derivative of forward mode (jvp) is asked for.
    """
    refuse_tangent("sequence_logprob", "Use a mask and .sum(-1)", values=values)
    if torch.is_grad_enabled() and values.requires_grad:
        result: Tensor = _SequenceLogprob.apply(values, lengths)  # type: ignore[no-untyped-call]
    else:
        result = _OP(values, lengths)
    return result


_OP = torch.ops.fdpg.sequence_logprob.default


@torch.library.register_fake("fdpg::sequence_logprob")
def _fake(values: Tensor, lengths: Tensor) -> Tensor:
    require_one_device("sequence_logprob", values=values, lengths=lengths)
    return values.new_empty(values.shape[0], dtype=torch.float64)


class _SequenceLogprob(torch.autograd.Function):
    """sequence_logprob where a gradient is recorded."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, lengths: Tensor) -> Tensor:
        ctx.tokens, ctx.dtype = values.shape[1], values.dtype
        ctx.save_for_backward(lengths)
        result: Tensor = _OP(values, lengths)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (lengths,) = ctx.saved_tensors
        column = torch.arange(ctx.tokens, device=lengths.device)
        inside = column < lengths[:, None]
        return torch.where(inside, grad[:, None], 0.0).to(ctx.dtype), None

"""token_logprob: log-probabilities of chosen tokens, straight from the logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdpg_fast import _build
from fdpg_fast.ops.gradient import refuse_tangent

__all__ = ["TokenLogprob", "require_one_device", "result_dtype", "token_logprob"]

_build.load()


class TokenLogprob(NamedTuple):
    """What a softmax over the vocabulary says of its targets; all of the targets' shape.

    Attributes:
        logp: log-probability of the target, nats.
        lse: log-sum-exp of the (tempered) logits.
        entropy: of the distribution, nats; None if it was not asked for.
    """

    logp: Tensor
    lse: Tensor
    entropy: Tensor | None


def result_dtype(*inputs: torch.dtype) -> torch.dtype:
    """fp64 if an input is fp64, else fp32: bf16 logits alone cost 0.7 nats per 512 tokens."""
    return torch.float64 if torch.float64 in inputs else torch.float32


def require_one_device(op: str, **tensors: Tensor | None) -> None:
    """Raises ValueError unless all are on the device of the first.

    For fake kernels: they also run where one of the tensors is on the meta device.
    """
    (lead_name, lead), *others = tensors.items()
    for name, tensor in others:
        if lead is not None and tensor is not None and tensor.device != lead.device:
            raise ValueError(
                f"{op}: `{name}` must be on the device of `{lead_name}` ({lead.device}), "
                f"got {tensor.device}"
            )


def token_logprob(
    logits: Tensor,
    target: Tensor,
    *,
    inv_temperature: float = 1.0,
    mask: Tensor | None = None,
    entropy: bool = False,
    softcap: float | None = None,
    inplace_backward: bool = False,
) -> TokenLogprob:
    """Log-probability of each target under softmax(z), in one read of the logits.

        logp = z[target] - lse,   lse = log sum_j exp z_j,   z = logits * inv_temperature
        with a softcap:           z = softcap tanh(logits / softcap) * inv_temperature

    The same as ``log_softmax(z, -1).gather(-1, target)``, without the ``[..., V]`` result.
    Differentiable once in ``logits``, backwards, through all three results. The result does not
    depend on how rows are batched.

    Args:
        logits: ``[..., V]`` fp32, bf16, fp16 or fp64; contiguous along the vocabulary. Entries
            may be -inf. Leading dimensions that do not flatten to one stride are copied.
        target: ``[...]`` int64, in [0, V).
        inv_temperature: 1 / temperature; not differentiated. In [1e-18, 1e18], as a softcap, unless
            logits are fp64.
        mask: ``[...]`` bool; where False, nothing is read, all results are 0 and so is the
            gradient (the target there may be anything).
        entropy: whether to return the entropy too.
        softcap: bounds the logits smoothly (Gemma 2), -inf too: such a token has probability then,
            as in PyTorch. None or 0 for no bound.
        inplace_backward: the gradient overwrites ``logits``, which saves one ``[..., V]`` buffer.
            Only for contiguous logits that nobody else looks at: not a leaf, not saved by another
            function's backward, and gone after one backward pass.

    Returns:
        logp, lse and entropy, each ``[...]``, fp32 (fp64 for fp64 logits).

    Raises:
        ValueError: shapes do not match, or ``inplace_backward`` is not possible.
        RuntimeError: a dtype, device, stride or target that the op cannot take.
        NotImplementedError: a second derivative, or one of forward mode (jvp), is asked for.
    """
    if logits.dim() < 1 or logits.shape[:-1] != target.shape:
        raise ValueError(
            "token_logprob: `target` must have the shape of `logits` without its last dimension, "
            f"{list(logits.shape[:-1])}, got {list(target.shape)}"
        )
    if mask is not None and mask.shape != target.shape:
        raise ValueError(
            f"token_logprob: `mask` must have shape {list(target.shape)}, got {list(mask.shape)}"
        )
    refuse_tangent("token_logprob", "Use log_softmax and gather", logits=logits)
    op: Any = _OP
    if torch.is_grad_enabled() and logits.requires_grad:
        if inplace_backward and (logits.is_leaf or not logits.is_contiguous()):
            what = "a leaf" if logits.is_leaf else f"strides {list(logits.stride())}"
            raise ValueError(
                "token_logprob: `logits` must be a contiguous intermediate result for "
                f"inplace_backward, got {what}. Leave inplace_backward off"
            )
        op = (_InplaceBackward if inplace_backward else _TokenLogprob).apply
    if logits.dim() == 2:
        logp, lse, ent, _ = op(logits, target, inv_temperature, mask, entropy, softcap or 0.0)
        return TokenLogprob(logp, lse, ent if entropy else None)
    shape = target.shape
    logp, lse, ent, _ = op(
        logits.reshape(target.numel(), logits.shape[-1]),
        target.reshape(-1),
        inv_temperature,
        None if mask is None else mask.reshape(-1),
        entropy,
        softcap or 0.0,
    )
    return TokenLogprob(
        logp.reshape(shape), lse.reshape(shape), ent.reshape(shape) if entropy else None
    )


# Not the packets torch.ops.fdpg.X, which look for an overload in every call.
_OP = torch.ops.fdpg.token_logprob.default
_BACKWARD_OP = torch.ops.fdpg.token_logprob_backward.default
_INPLACE_BACKWARD_OP = torch.ops.fdpg.token_logprob_backward_.default


@torch.library.register_fake("fdpg::token_logprob")
def _fake(
    logits: Tensor,
    target: Tensor,
    inv_temperature: float = 1.0,
    mask: Tensor | None = None,
    entropy: bool = False,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    require_one_device("token_logprob", logits=logits, target=target, mask=mask)
    rows, dtype = logits.shape[0], result_dtype(logits.dtype)
    return (
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(rows if entropy else 0, dtype=dtype),
        logits.new_empty(rows, dtype=torch.float64),
    )


@torch.library.register_fake("fdpg::token_logprob_backward")
def _fake_backward(logits: Tensor, *others: Any) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.register_fake("fdpg::token_logprob_backward_")
def _fake_backward_(logits: Tensor, *others: Any) -> None:
    return None


@torch.library.register_fake("fdpg::token_logprob_numerators_")
def _fake_numerators_(logits: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    return logits.new_empty(rows), logits.new_empty(rows), logits.new_empty(rows)


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise NotImplementedError(
        "token_logprob: second derivatives are not implemented. "
        "Use log_softmax and gather where you need them"
    )


torch.library.register_autograd("fdpg::token_logprob_backward", _no_second_derivative)


def _backward_arguments(ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """Of either backward op."""
    logits, target, lse_exact, entropy, mask = ctx.saved_tensors
    grad_logp, grad_lse, grad_entropy, _ = grads
    wanted = grad_logp, grad_lse, None if entropy is None else grad_entropy
    return logits, target, lse_exact, entropy, *wanted, ctx.inv_temperature, mask, ctx.softcap


class _TokenLogprob(torch.autograd.Function):
    """token_logprob where a gradient is recorded.

    Not by torch.library.register_autograd, which every call would go through, recorded or not: as
    long again as all else that a call does before its kernel.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output: tuple[Tensor, ...] = _OP(*inputs)
        logits, target, ctx.inv_temperature, mask, entropy, ctx.softcap = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, output[3], output[2] if entropy else None, mask)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads[:3]):
            return (None,) * 6
        return _BACKWARD_OP(*_backward_arguments(ctx, grads)), None, None, None, None, None


class _InplaceBackward(_TokenLogprob):
    """The same, with its gradient written over the logits."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # A second pass would find gradients where logits were: the version counter, which the
        # next line reads and increment_version moves, makes that an error.
        logits, *others = _backward_arguments(ctx, grads)
        _INPLACE_BACKWARD_OP(logits, *others)
        torch.autograd.graph.increment_version(logits)
        return logits.detach(), None, None, None, None, None

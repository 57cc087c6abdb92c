"""linear_logprob: the language-model head and token_logprob in one, without the [N, V] logits.

    logits = softcap * tanh(scale * (hidden W^T + bias) / softcap)      (no softcap: scale * (...))
    logp   = log softmax(logits * inv_temperature)[target]

What is fused: rows go through in chunks; a chunk's logits are the result of a matrix product in a
buffer that every chunk reuses, and the kernels of token_logprob read it, and overwrite it with its
own gradient, while it is still in the cache. On CPUs whose products are ours logits stay in
registers.

Backward needs what the logits were. Their softmax numerators are kept where they fit a budget, in
the dtype of the products, and it takes three matrix products in all; else a chunk's logits are
computed again, four products, and never more than a chunk is held. Numerators are of no use to the
gradient of a log-sum-exp, which computes logits again, or of the entropy: where that is asked for
fp32 logits are kept. Where the weights of a sum are known beforehand, policy_gradient needs
neither.

Shape legend: N rows (tokens), D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fdpg_fast.ops.gradient import refuse_tangent
from fdpg_fast.ops.linear_head import (
    LinearHead,
    check_head,
    is_traced,
    joined,
    kept_rows,
    multiplies_as_they_are,
    new_rows,
    pick,
    require_in_range,
    spread,
    without_masked,
)
from fdpg_fast.ops.token_logprob import TokenLogprob, result_dtype

__all__ = ["linear_logprob"]

# What a call may keep for its backward pass unless it is told, in bytes.
_KEEP_BYTES = {"cpu": 512 << 20, "cuda": 2 << 30}


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    inv_temperature: float = 1.0,
    mask: Tensor | None = None,
    entropy: bool = False,
    keep_bytes: int | None = None,
    chunk: int | None = None,
) -> TokenLogprob:
    """Log-probability of each target, from the last hidden states and the head's weight.

    Differentiable once in ``hidden``, ``weight`` and ``bias``, through all three results.
    Arithmetic is fp32 whatever the dtypes (fp64 if an input is fp64), except that matrix products
    of bf16 (on CUDA fp16 too) take their inputs as they are and accumulate in fp32, where the
    hardware can. Log-probs are as exact then; gradients are of softmax numerators in 16 bits.

    Without ``entropy`` a row's log-prob has the same bits, whatever other rows, chunks and threads
    there are, on a CPU that makes it in one with its product: in fp32 all with AVX-512, AMD's with
    AVX2 for a head that leaves the caches; in bf16 those with instructions for it. Elsewhere, and
    for gradients, that holds to the rounding of a matrix product, as it does for torch's.

    Args:
        hidden: ``[N, D]`` floating point.
        weight: ``[V, D]``.
        target: ``[N]`` int64, in [0, V).
        bias: ``[V]``.
        scale: multiplies the logits (Cohere; muP).
        softcap: bounds them smoothly (Gemma 2); None for no bound.
        inv_temperature: 1 / temperature, after the softcap. In [1e-18, 1e18], as a softcap, unless
            an input is fp64.
        mask: ``[N]`` bool; rows where it is False give zeros and no gradient. On the CPU they cost
            nothing.
        entropy: whether to return the entropy too.
        keep_bytes: how much may be kept for the backward pass, which then computes no logits again
            (but for the gradient of a log-sum-exp; in 16 bits also of an entropy); 0: nothing.
            None: 512 MiB on the CPU, 2 GiB on a GPU.
        chunk: rows of logits held at a time; None: as many as suit the device. Changes the results
            by no more than the rounding of a matrix product.

    Returns:
        logp, lse and entropy, each ``[N]``, fp32 (fp64 if an input is fp64).

    Raises:
        ValueError: a shape, dtype, device or number that does not fit, or a target out of range
            (on a GPU, which cannot raise, that row's results are NaN).
        NotImplementedError: a second derivative, or one of forward mode (jvp), is asked for.
    """
    chunk = check_head(
        *("linear_logprob", hidden, weight, target, bias),
        *(scale, softcap, inv_temperature, mask, chunk),
    )
    instead = "Use log_softmax and gather of hidden @ weight.t()"
    refuse_tangent("linear_logprob", instead, hidden=hidden, weight=weight, bias=bias)
    learns = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (hidden, weight, bias)
    )
    budget = _KEEP_BYTES.get(hidden.device.type, 0) if keep_bytes is None else keep_bytes
    op: Any = _linear_logprob
    if is_traced(hidden, weight, target, bias, mask):
        op = _OP
    elif learns:
        op = _LinearLogprob.apply
    logp, lse, ent, _, _ = op(
        hidden,
        weight,
        target,
        bias,
        scale,
        softcap,
        inv_temperature,
        mask,
        entropy,
        learns and _kept_bytes(hidden, weight) <= budget,
        chunk,
    )
    return TokenLogprob(logp, lse, ent if entropy else None)


def _kept_bytes(hidden: Tensor, weight: Tensor) -> int:
    return hidden.shape[0] * weight.shape[0] * _kept_dtype(hidden, weight).itemsize


def _kept_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    if multiplies_as_they_are(hidden, weight):
        return hidden.dtype
    return result_dtype(hidden.dtype, weight.dtype)


def _new_kept(hidden: Tensor, weight: Tensor, keep: bool, entropy: bool) -> tuple[Tensor, Tensor]:
    """What backward makes use of, of size 0 where that is nothing.

    Numerators [N, V] and their row scales [N]; with an entropy logits [N, V] and nothing, or
    nothing, where they would be of 16 bits.
    """
    keep = keep and not (entropy and multiplies_as_they_are(hidden, weight))
    rows, dtype = hidden.shape[0] if keep else 0, result_dtype(hidden.dtype, weight.dtype)
    return (
        new_rows(weight, rows, _kept_dtype(hidden, weight)),
        weight.new_empty(0 if entropy else rows, dtype=dtype),
    )


def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    inv_temperature: float,
    mask: Tensor | None,
    entropy: bool,
    keep: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logp, lse, entropy, and what backward makes use of: kept and row_scale."""
    require_in_range("linear_logprob", target, mask, weight.shape[0])
    n = hidden.shape[0]
    kept, row_scale = _new_kept(hidden, weight, keep, entropy)
    rows, mask = kept_rows(mask)  # the first so many rows of what is kept
    if rows is not None:
        hidden, target = hidden[rows], target[rows]
        kept[hidden.shape[0] :] = 0
        row_scale[hidden.shape[0] :] = 0
    head = LinearHead(hidden, weight, bias, scale, chunk)
    cap = softcap or 0.0
    results: list[Sequence[Tensor]] = []
    ones = torch.ones_like(row_scale)
    for c in head.chunks():
        y, m = target[c], None if mask is None else mask[c]
        if row_scale.shape[0]:
            *values, row_scale[c] = head.numerators(
                c, kept[c], y, ones[c], None, inv_temperature, m, cap
            )
        elif entropy:
            z = head.logits(c, out=kept[c] if kept.shape[0] else None)
            values = _LOGPROB_OP(z, y, inv_temperature, m, True, cap)[:3]
        else:
            values = [*head.logprob(c, y, inv_temperature, m, cap)]
        results.append(values)
    logp, lse, *ent = (spread(rows, r, n) for r in joined(results, row_scale, 3))
    return logp, lse, ent[0] if entropy else logp.new_empty(0), kept, row_scale


_LOGPROB_OP = torch.ops.fdpg.token_logprob.default
_GRADIENT_OP = torch.ops.fdpg.token_logprob_backward_.default
_OP = torch.library.custom_op("fdpg::linear_logprob", _linear_logprob, mutates_args=())


@_OP.register_fake
def _fake(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    inv_temperature: float,
    mask: Tensor | None,
    entropy: bool,
    keep: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, dtype = hidden.shape[0], result_dtype(hidden.dtype, weight.dtype)
    return (
        hidden.new_empty(n, dtype=dtype),
        hidden.new_empty(n, dtype=dtype),
        hidden.new_empty(n if entropy else 0, dtype=dtype),
        *_new_kept(hidden, weight, keep, entropy),
    )


def _linear_logprob_backward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    kept: Tensor,
    row_scale: Tensor,
    grad_logp: Tensor | None,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    scale: float,
    softcap: float | None,
    inv_temperature: float,
    mask: Tensor | None,
    chunk: int,
    of_hidden: bool,
    of_weight: bool,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n, hidden_dtype = hidden.shape[0], hidden.dtype
    rows, mask = kept_rows(mask)
    hidden, grad_logp, *per_row = pick(rows, hidden, grad_logp, target, grad_lse, grad_entropy)
    # The gradient of a log-sum-exp needs p at the target, which numerators have rounded away.
    from_numerators = row_scale.shape[0] > 0 and grad_lse is None and grad_logp is not None
    if from_numerators:
        chunk = max(1, hidden.shape[0])  # all that a chunk would hold is there
    head = LinearHead(without_masked(hidden, mask), weight, bias, scale, chunk)
    cap = softcap or 0.0
    at_once = from_numerators and head.low_precision
    grads = head.gradients(of_hidden, of_weight, of_bias, weight.dtype if at_once else None)
    has_logits = kept.shape[0] > 0 and row_scale.shape[0] == 0
    for c in head.chunks():
        if from_numerators:
            row = row_scale[c] * grad_logp
            if mask is not None:  # whatever the upstream gradient is of a row that is left out
                row = row.masked_fill(~mask, 0.0)
            head.backward(c, kept[c], row, *grads, new=True)
            continue
        g0, y, g1, g2, m = (None if t is None else t[c] for t in (grad_logp, *per_row, mask))
        z = head.recall(kept[c]) if has_logits else head.logits(c)
        # Of these logits: unless they were kept they are not forward's, whose product may have
        # added up in another order.
        *_, h, s = _LOGPROB_OP(z, y, inv_temperature, m, g2 is not None, cap)
        _GRADIENT_OP(z, y, s, h, g0, g1, g2, inv_temperature, m, cap)
        head.backward(c, z, None, *grads, new=c.start == 0)
    if of_hidden:
        grads[0] = spread(rows, grads[0], n)
    return (
        grads[0].to(hidden_dtype),
        grads[1].to(weight.dtype),
        grads[2].to(weight.dtype if bias is None else bias.dtype),
    )


_BACKWARD_OP = torch.library.custom_op(
    "fdpg::linear_logprob_backward", _linear_logprob_backward, mutates_args=()
)


@_BACKWARD_OP.register_fake
def _fake_backward(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    of_hidden, of_weight, of_bias = others[-3:]
    return (
        hidden.new_empty(hidden.shape if of_hidden else (0,)),
        weight.new_empty(weight.shape if of_weight else (0,)),
        weight.new_empty(
            weight.shape[0] if of_bias else 0, dtype=weight.dtype if bias is None else bias.dtype
        ),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, target, bias, *numbers = inputs
    ctx.scale, ctx.softcap, ctx.inv_temperature, mask, ctx.entropy, _, ctx.chunk = numbers
    *_, kept, row_scale = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, target, bias, mask, kept, row_scale)


def _backward(ctx: Any, *grads: Tensor | None, op: Any = _BACKWARD_OP) -> tuple[Tensor | None, ...]:
    hidden, weight, target, bias, mask, kept, row_scale = ctx.saved_tensors
    grad_logp, grad_lse, grad_entropy = grads[:3]
    wanted = [bool(ctx.needs_input_grad[i]) for i in (0, 1, 3)]
    result: list[Tensor | None] = [None] * 11
    if grad_logp is None and grad_lse is None and grad_entropy is None:
        return tuple(result)
    of_hidden, of_weight, of_bias = op(
        hidden,
        weight,
        target,
        bias,
        kept,
        row_scale,
        grad_logp,
        grad_lse,
        grad_entropy if ctx.entropy else None,
        ctx.scale,
        ctx.softcap,
        ctx.inv_temperature,
        mask,
        ctx.chunk,
        *wanted,
    )
    for index, grad, want in zip((0, 1, 3), (of_hidden, of_weight, of_bias), wanted, strict=True):
        result[index] = grad if want else None
    return tuple(result)


_OP.register_autograd(_backward, setup_context=_setup_context)


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise NotImplementedError(
        "linear_logprob: second derivatives are not implemented. "
        "Use log_softmax and gather of hidden @ weight.t() where you need them"
    )


_BACKWARD_OP.register_autograd(_no_second_derivative)


class _LinearLogprob(torch.autograd.Function):
    """The same without torch.library."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _linear_logprob(*inputs)
        _setup_context(ctx, inputs, output)  # called by torch it takes as long as all the rest
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # With create_graph by the op, which refuses the next derivative.
        op = _BACKWARD_OP if torch.is_grad_enabled() else _linear_logprob_backward
        return _backward(ctx, *grads, op=op)

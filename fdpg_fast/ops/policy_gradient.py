"""policy_gradient: log-probs of a language-model head, and the gradient of their weighted sum.

On policy, f-DPG knows what each sample is worth before the training forward pass: the sampler has
said log q, the base log a. So the gradient of a chunk's logits is ready as soon as the logits are,
and value and gradients come out of one walk over the rows with the memory of one chunk:

    logits = hidden W^T              one matrix product
    logp, numerators                 one visit of each row, or none: see LinearHead.numerators
    d_hidden, d_weight               two matrix products, the row scales applied to their results

Three products, where autograd through a recomputing head takes four.

Shape legend: N rows (tokens), D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdpg_fast.ops.linear_head import (
    LinearHead,
    check_head,
    is_traced,
    joined,
    kept_rows,
    pick,
    require_in_range,
    spread,
    without_masked,
)
from fdpg_fast.ops.memory import lasting_empty
from fdpg_fast.ops.token_logprob import result_dtype

__all__ = ["PolicyGradient", "policy_gradient"]


class PolicyGradient(NamedTuple):
    """What :func:`policy_gradient` returns, in fp32 (fp64 if an input is fp64), detached.

    Attributes:
        logp: ``[N]`` log-probability of each target, nats.
        lse: ``[N]`` log-sum-exp of each row of (tempered) logits.
        hidden: ``[N, D]`` gradient of sum_n coefficient[n] logp[n]; None if not wanted.
        weight: ``[V, D]`` likewise.
        bias: ``[V]`` likewise; None also without a bias.
    """

    logp: Tensor
    lse: Tensor
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


@torch.no_grad()
def policy_gradient(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    coefficient: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    inv_temperature: float = 1.0,
    mask: Tensor | None = None,
    lse_hint: Tensor | None = None,
    need_hidden: bool = True,
    need_weight: bool = True,
    need_bias: bool = True,
    add_to_weight: Tensor | None = None,
    add_to_bias: Tensor | None = None,
    chunk: int | None = None,
) -> PolicyGradient:
    """logp of each target, and d/d(hidden, weight, bias) of sum_n coefficient[n] logp[n].

    For a loss that is linear in log-probs with weights known beforehand: f-DPG's estimate
    grad D_f(pi || p) = -(1/B) sum_i w_i grad log pi(x_i) (arXiv 2302.08215, Theorem 1) with
    ``coefficient = -w / B``. The gradients are results, not a graph: hand that of ``hidden`` to
    ``hidden.backward``.

    Arithmetic is fp32 whatever the dtypes (fp64 if an input is fp64), except that matrix products
    of bf16 (on CUDA fp16 too) take their inputs as they are and accumulate in fp32, where the
    hardware can. Log-probs are as exact then; gradients are of softmax numerators in 16 bits.

    What :func:`linear_logprob` says of a log-prob's bits holds here too. The gradient of a row of
    ``hidden`` has the same bits, of whatever 4 rows or more it is one, where all products are ours:
    on AMD's CPUs, and in bf16 on those with instructions for it.

    Args:
        hidden: ``[N, D]`` floating point.
        weight: ``[V, D]``.
        target: ``[N]`` int64, in [0, V).
        coefficient: ``[N]``. Where it is 0, logp is computed and nothing else; but 0 times a hidden
            state of NaN or infinity is NaN, as in plain PyTorch: leave such rows out by the mask.
            With fp16 hidden states on a GPU their product is rounded to fp16, of which little is
            left below 6e-5: scale coefficients up, and the gradients down again, by a power of two.
        bias: ``[V]``.
        scale, softcap, inv_temperature: as for :func:`linear_logprob`.
        mask: ``[N]`` bool; rows where it is False give zeros and no gradient.
        lse_hint: ``[N]`` what the log-sum-exp is expected to be, as a sampler recorded it. An
            offset of exponentials, which saves a GPU one read of the logits: the results are exact
            whatever its error.
        need_hidden, need_weight, need_bias: which gradients are wanted.
        add_to_weight, add_to_bias: accumulators, such as ``weight.grad``, contiguous and in the
            dtype of the results: where that gradient is wanted, and there is such a thing, it is
            added to them, and they are returned as ``weight`` and ``bias``.
        chunk: rows of logits held at a time; None: as many as suit the device.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit, or a target out of range
            (on a GPU, which cannot raise, that row's results are NaN).
    """
    op = "policy_gradient"
    chunk = check_head(
        *(op, hidden, weight, target, bias, scale, softcap, inv_temperature, mask, chunk),
        coefficient=coefficient,
        lse_hint=lse_hint,
    )
    if coefficient is None:  # of vectors in general check_head allows it
        raise ValueError(f"{op}: `coefficient` must have shape [{hidden.shape[0]}], got None")
    dtype = result_dtype(hidden.dtype, weight.dtype)
    grads = []  # in which the first chunk of rows writes that of the weight, if there is none yet
    for name, given, like in (
        ("add_to_weight", add_to_weight, weight if need_weight else None),
        ("add_to_bias", add_to_bias, bias if need_bias else None),
    ):
        if like is None or given is None:
            size = (0,) if like is None else tuple(like.shape)
            new = lasting_empty(weight, size, dtype)
            grads.append(new if name == "add_to_weight" else new.zero_())
            continue
        if given.shape != like.shape or given.dtype != dtype or given.device != like.device:
            raise ValueError(
                f"{op}: `{name}` must be {dtype} of shape {list(like.shape)} on {like.device}, got "
                f"{given.dtype} of shape {list(given.shape)} on {given.device}"
            )
        if not given.is_contiguous():
            raise ValueError(
                f"{op}: `{name}` must be contiguous, got strides {list(given.stride())}. "
                "Leave it out, and add what is returned"
            )
        grads.append(given)
    traced = is_traced(hidden, weight, target, coefficient, bias, mask)
    function: Any = _OP if traced else _policy_gradient
    logp, lse, grad_hidden = function(
        hidden,
        weight,
        target,
        coefficient.to(dtype),
        bias,
        scale,
        softcap,
        inv_temperature,
        mask,
        None if lse_hint is None else lse_hint.to(dtype),
        chunk,
        need_hidden,
        add_to_weight is not None,
        *grads,
    )
    return PolicyGradient(
        logp,
        lse,
        grad_hidden if need_hidden else None,
        grads[0] if need_weight else None,
        grads[1] if need_bias and bias is not None else None,
    )


def _policy_gradient(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    coefficient: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    inv_temperature: float,
    mask: Tensor | None,
    lse_hint: Tensor | None,
    chunk: int,
    need_hidden: bool,
    adds_to_weight: bool,
    grad_weight: Tensor,
    grad_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """logp, lse, and the gradient of hidden; adds to the others, of size 0 where not wanted, or
    writes that of the weight."""
    require_in_range("policy_gradient", target, mask, weight.shape[0])
    n = hidden.shape[0]
    rows, mask = kept_rows(mask)
    hidden, target, coefficient, lse_hint = pick(rows, hidden, target, coefficient, lse_hint)
    head = LinearHead(without_masked(hidden, mask), weight, bias, scale, chunk)
    cap = softcap or 0.0
    grads = [head.gradients(need_hidden, False, False)[0], grad_weight, grad_bias]
    if not adds_to_weight and hidden.shape[0] == 0:
        grad_weight.zero_()
    learns = any(grad.numel() for grad in grads)
    numerators = head.new_numerators(min(chunk, hidden.shape[0]) if learns else 0)
    results: list[list[Tensor]] = []
    for c in head.chunks():
        y = target[c]
        m, hint = (None if t is None else t[c] for t in (mask, lse_hint))
        if learns:
            e = numerators[: y.shape[0]]
            *values, row_scale = head.numerators(
                c, e, y, coefficient[c], hint, inv_temperature, m, cap
            )
            head.backward(c, e, row_scale, *grads, new=not adds_to_weight and c.start == 0)
        else:
            values = [*head.logprob(c, y, inv_temperature, m, cap)]
        results.append(values)
    logp, lse = joined(results, coefficient, 2)
    grad_hidden = spread(rows, grads[0], n) if need_hidden else grads[0]
    return spread(rows, logp, n), spread(rows, lse, n), grad_hidden


_OP = torch.library.custom_op(
    "fdpg::policy_gradient", _policy_gradient, mutates_args=("grad_weight", "grad_bias")
)


@_OP.register_fake
def _fake(hidden: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype, need_hidden = result_dtype(hidden.dtype, weight.dtype), others[9]
    return (
        hidden.new_empty(hidden.shape[0], dtype=dtype),
        hidden.new_empty(hidden.shape[0], dtype=dtype),
        hidden.new_empty(hidden.shape if need_hidden else (0,), dtype=dtype),
    )

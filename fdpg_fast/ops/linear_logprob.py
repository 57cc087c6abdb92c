"""linear_logprob: the language-model head and token_logprob in one, without the [N, V] logits.

    logits = softcap * tanh(scale * (hidden W^T + bias) / softcap)      (no softcap: scale * (...))
    logp   = log softmax(logits * inv_temperature)[target]

What is fused: rows go through in chunks; a chunk's logits are the result of a matrix product in a
buffer that every chunk reuses, and the kernels of token_logprob read it, and overwrite it with its
own gradient, while it is still in the cache. What is never held: the logits of more than a chunk.

Two ways to differentiate, both exact:
    linear_logprob           keeps nothing; backward computes each chunk's logits again: four
                             matrix products in all (two forward, if you count the second time).
    weighted_linear_logprob  knows the weights of its sum beforehand, so the gradient is ready as
                             soon as a chunk's logits are: three products, and one softmax less.

Shape legend: N rows (tokens), D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fdpg_fast.ops.token_logprob import TokenLogprob, result_dtype

__all__ = ["linear_logprob", "weighted_linear_logprob"]

# How many bytes of logits a chunk may hold, and how few rows it must not have. CPU: a chunk that
# stays in the second-level cache; but the weight is read once per chunk and product. Forward and
# backward on one AVX-512 core (Xeon, 2 MB L2), ms by rows of a chunk:
#   V 14019, D 128, N 1024:   32: 152   64: 130   128: 124   256: 148   1024: 196
#   V 50257, D 768, N 256:    16: 1916  64: 881   128: 691   256: 685
# A GPU wants products large enough to fill it.
_CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
_LEAST_ROWS = 128
# Rows of the logits buffer start at multiples of this many bytes: one cache line, one AVX-512 load.
_ALIGNMENT = 64


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
    chunk: int | None = None,
) -> TokenLogprob:
    """Log-probability of each target, from the last hidden states and the head's weight.

    Differentiable once in ``hidden``, ``weight`` and ``bias``, through all three results.
    Arithmetic is fp32 whatever the dtypes (fp64 if an input is fp64), except that on CUDA the
    matrix products of bf16 and fp16 take their inputs as they are and accumulate in fp32.

    Args:
        hidden: ``[N, D]`` floating point.
        weight: ``[V, D]``.
        target: ``[N]`` int64, in [0, V).
        bias: ``[V]``.
        scale: multiplies the logits (Cohere; muP).
        softcap: bounds them smoothly (Gemma 2); None for no bound.
        inv_temperature: 1 / temperature, after the softcap.
        mask: ``[N]`` bool; rows where it is False give zeros and no gradient. On the CPU they cost
            nothing.
        entropy: whether to return the entropy too.
        chunk: rows of logits held at a time; None: as many as suit the device. Changes the results
            by no more than the rounding of a matrix product.

    Returns:
        logp, lse and entropy, each ``[N]``, fp32 (fp64 if an input is fp64).

    Raises:
        ValueError: a shape, dtype, device or number that does not fit, or a target out of range
            (on a GPU, which cannot raise, that row's results are NaN).
    """
    chunk = _check("linear_logprob", hidden, weight, target, bias, softcap, mask, chunk)
    logp, lse, ent = _linear_logprob(
        hidden, weight, target, bias, scale, softcap, inv_temperature, mask, entropy, chunk
    )
    return TokenLogprob(logp, lse, ent if entropy else None)


def weighted_linear_logprob(
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
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """sum_n coefficient[n] logp[n], and the logp, where only the sum is differentiable.

    For a loss that is linear in log-probabilities with weights known beforehand, such as the policy
    gradient's: the gradient of each chunk is computed while its logits are there, so backward only
    multiplies. Where no gradient is needed, none is computed.

    Args:
        hidden, weight, target, bias, scale, softcap, inv_temperature, mask, chunk: as for
            :func:`linear_logprob`.
        coefficient: ``[N]``; not differentiated.

    Returns:
        total, ``[]`` fp64, differentiable once in ``hidden``, ``weight`` and ``bias``; and logp,
        ``[N]``, detached.

    Raises:
        As :func:`linear_logprob`.
    """
    op = "weighted_linear_logprob"
    chunk = _check(op, hidden, weight, target, bias, softcap, mask, chunk)
    if coefficient.shape != target.shape:
        raise ValueError(
            f"{op}: `coefficient` must have shape {list(target.shape)}, got "
            f"{list(coefficient.shape)}"
        )
    grad = torch.is_grad_enabled()
    total, logp, _, _, _ = _weighted_linear_logprob(
        hidden,
        weight,
        target,
        coefficient.detach().to(result_dtype(hidden.dtype, weight.dtype)),
        bias,
        scale,
        softcap,
        inv_temperature,
        mask,
        chunk,
        grad and hidden.requires_grad,
        grad and weight.requires_grad,
        grad and bias is not None and bias.requires_grad,
    )
    return total, logp.detach()


def _check(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    mask: Tensor | None,
    chunk: int | None,
) -> int:
    """Raises ValueError for arguments that do not fit together; returns the rows of a chunk."""

    def expect(name: str, what: str, got: object, fits: bool) -> None:
        if not fits:
            raise ValueError(f"{op}: `{name}` must {what}, got {got}")

    for name, matrix in (("hidden", hidden), ("weight", weight)):
        shape = list(matrix.shape)
        expect(name, "be a matrix", f"shape {shape}", matrix.dim() == 2)
        expect(name, "be floating point", matrix.dtype, matrix.dtype.is_floating_point)
    rows, size = hidden.shape
    vocab = weight.shape[0]
    fits = weight.shape[1] == size and vocab > 0
    expect("weight", f"have shape [V, {size}]", f"{list(weight.shape)}", fits)
    expect("target", f"have shape [{rows}]", list(target.shape), target.shape == (rows,))
    if bias is not None:
        expect("bias", f"have shape [{vocab}]", list(bias.shape), bias.shape == (vocab,))
    if mask is not None:
        expect("mask", f"have shape [{rows}]", list(mask.shape), mask.shape == (rows,))
    expect("softcap", "be positive", softcap, softcap is None or softcap > 0)
    expect("chunk", "be at least 1", chunk, chunk is None or chunk >= 1)
    for name, other in (("weight", weight), ("target", target), ("bias", bias), ("mask", mask)):
        if other is not None:
            what = f"be on the device of `hidden` ({hidden.device})"
            expect(name, what, other.device, other.device == hidden.device)
    if chunk is not None:
        return chunk
    width = torch.finfo(result_dtype(hidden.dtype, weight.dtype)).bits // 8 * vocab
    return max(_LEAST_ROWS, _CHUNK_BYTES.get(hidden.device.type, 256 << 20) // width)


# --------------------------------------------------------------------------------------------------
# The head, a chunk at a time


class _Head:
    """Logits of consecutive chunks of rows in one buffer, and the way back from their gradient."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        chunk: int,
    ) -> None:
        self.dtype = result_dtype(hidden.dtype, weight.dtype)
        self.low_precision = _multiplies_as_they_are(hidden, weight)
        self.hidden = hidden if self.low_precision else hidden.to(self.dtype)  # [N, D]
        self.weight = weight if self.low_precision else weight.to(self.dtype)  # [V, D]
        self.bias = None if bias is None else bias.to(self.dtype)
        self.scale, self.softcap, self.chunk = scale, softcap, chunk
        rows, vocab = min(chunk, max(1, len(hidden))), len(weight)
        # torch aligns storage to 64 bytes; with a padded stride so is every row.
        step = _ALIGNMENT // self.dtype.itemsize
        padded = -(-vocab // step) * step
        self.buffer = weight.new_empty((rows, padded), dtype=self.dtype)[:, :vocab]
        self.slope = None if softcap is None else torch.empty_like(self.buffer)

    def chunks(self) -> Iterator[slice]:
        n = self.hidden.shape[0]
        return (slice(i, min(i + self.chunk, n)) for i in range(0, n, self.chunk))

    def logits(self, rows: slice, keep_slope: bool) -> Tensor:
        """[n, V] view of the buffer; what an earlier call returned is overwritten."""
        hidden, weight = self.hidden[rows], self.weight
        out = self.buffer[: rows.stop - rows.start]
        alpha = self.scale if self.softcap is None else self.scale / self.softcap
        if self.low_precision:
            torch.mm(hidden, weight.t(), out_dtype=self.dtype, out=out)
            if self.bias is not None:
                out += self.bias
            if alpha != 1.0:
                out *= alpha
        elif self.bias is None:
            torch.addmm(out, hidden, weight.t(), beta=0.0, alpha=alpha, out=out)
        else:
            torch.addmm(self.bias, hidden, weight.t(), beta=alpha, alpha=alpha, out=out)
        if self.softcap is not None:
            out.tanh_()
            if keep_slope and self.slope is not None:  # 1 - tanh^2
                torch.mul(out, out, out=self.slope[: len(out)]).neg_().add_(1.0)
            out *= self.softcap
        return out

    def backward(
        self,
        rows: slice,
        grad: Tensor,
        grad_hidden: Tensor,
        grad_weight: Tensor,
        grad_bias: Tensor,
    ) -> None:
        """Adds what ``grad``, [n, V] and overwritten, sends back; skips results of size 0."""
        if self.slope is not None:
            grad *= self.slope[: len(grad)]
        hidden, weight, scale = self.hidden[rows], self.weight, self.scale
        if grad_bias.numel():
            grad_bias.add_(grad.sum(0), alpha=scale)
        if self.low_precision:
            grad = grad.to(hidden.dtype)
            if grad_hidden.numel():
                product = torch.mm(grad, weight, out_dtype=self.dtype)
                grad_hidden[rows] = product * scale
            if grad_weight.numel():
                product = torch.mm(grad.t(), hidden, out_dtype=self.dtype)
                grad_weight.add_(product, alpha=scale)
            return
        if grad_hidden.numel():
            out = grad_hidden[rows]
            torch.addmm(out, grad, weight, beta=0.0, alpha=scale, out=out)
        if grad_weight.numel():
            grad_weight.addmm_(grad.t(), hidden, alpha=scale)

    def gradients(self, of_hidden: bool, of_weight: bool, of_bias: bool) -> list[Tensor]:
        """Accumulators of hidden, weight and bias; of size 0 where not wanted."""
        wanted = (
            (of_hidden, self.hidden.shape),
            (of_weight, self.weight.shape),
            (of_bias, self.weight.shape[:1]),
        )
        zeros = self.hidden.new_zeros
        return [zeros(shape if want else (0,), dtype=self.dtype) for want, shape in wanted]


def _multiplies_as_they_are(hidden: Tensor, weight: Tensor) -> bool:
    """A GPU multiplies bf16 into fp32 much faster than fp32, and torch's CPU not at all."""
    return hidden.is_cuda and hidden.dtype == weight.dtype and hidden.dtype.itemsize < 4


def _kept(mask: Tensor | None) -> Tensor | None:
    """[n] rows that a mask keeps, on the CPU; None: all rows go through, masked in the kernel.

    A GPU would have to wait for the count, and its shapes would no longer be static.
    """
    if mask is None or mask.device.type != "cpu" or bool(mask.all()):
        return None
    return mask.nonzero().squeeze(1)


def _require_in_range(op: str, target: Tensor, mask: Tensor | None, vocab: int) -> None:
    """On the CPU, where asking is free; on a GPU the row's results are NaN."""
    if target.device.type != "cpu":
        return
    bad = (target < 0) | (target >= vocab)
    if mask is not None:
        bad &= mask
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"{op}: `target` must be in [0, {vocab}), got {int(target[row])} at row {row}"
        )


def _pick(rows: Tensor | None, *tensors: Tensor | None) -> list[Any]:
    return [t if rows is None or t is None else t[rows] for t in tensors]


def _spread(rows: Tensor | None, values: Tensor, n: int) -> Tensor:
    """[n, ...]: values at ``rows``, zeros elsewhere."""
    if rows is None:
        return values
    return values.new_zeros((n, *values.shape[1:])).index_copy_(0, rows, values)


# --------------------------------------------------------------------------------------------------
# linear_logprob: gradient by recomputation


@torch.library.custom_op("fdpg::linear_logprob", mutates_args=())
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
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    _require_in_range("linear_logprob", target, mask, len(weight))
    n = hidden.shape[0]
    rows = _kept(mask)
    if rows is not None:
        hidden, target, mask = hidden[rows], target[rows], None
    head = _Head(hidden, weight, bias, scale, softcap, chunk)
    results = [hidden.new_empty(len(hidden), dtype=head.dtype) for _ in range(2 + entropy)]
    for c in head.chunks():
        z = head.logits(c, keep_slope=False)
        m = None if mask is None else mask[c]
        values = torch.ops.fdpg.token_logprob(z, target[c], inv_temperature, m, entropy)
        for result, value in zip(results, values, strict=False):
            result[c] = value
    results = [_spread(rows, r, n) for r in results]
    return results[0], results[1], results[2] if entropy else results[0].new_empty(0)


@_linear_logprob.register_fake
def _fake(
    hidden: Tensor, weight: Tensor, target: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    n, dtype, entropy = hidden.shape[0], result_dtype(hidden.dtype, weight.dtype), others[5]
    return (
        hidden.new_empty(n, dtype=dtype),
        hidden.new_empty(n, dtype=dtype),
        hidden.new_empty(n if entropy else 0, dtype=dtype),
    )


@torch.library.custom_op("fdpg::linear_logprob_backward", mutates_args=())
def _linear_logprob_backward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    entropy: Tensor | None,
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
    rows = _kept(mask)
    if rows is not None:
        mask = None
    per_row = _pick(rows, hidden, target, lse, entropy, grad_logp, grad_lse, grad_entropy, mask)
    head = _Head(per_row[0], weight, bias, scale, softcap, chunk)
    grads = head.gradients(of_hidden, of_weight, of_bias)
    for c in head.chunks():
        z = head.logits(c, keep_slope=True)
        y, s, h, g0, g1, g2, m = (None if t is None else t[c] for t in per_row[1:])
        torch.ops.fdpg.token_logprob_backward_(z, y, s, h, g0, g1, g2, inv_temperature, m)
        head.backward(c, z, *grads)
    if of_hidden:
        grads[0] = _spread(rows, grads[0], n)
    return (
        grads[0].to(hidden_dtype),
        grads[1].to(weight.dtype),
        grads[2].to(weight.dtype if bias is None else bias.dtype),
    )


@_linear_logprob_backward.register_fake
def _fake_backward(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_gradients(hidden, weight, bias, *others[-3:])


def _fake_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    of_hidden: bool,
    of_weight: bool,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if of_hidden else (0,)),
        weight.new_empty(weight.shape if of_weight else (0,)),
        weight.new_empty(
            weight.shape[0] if of_bias else 0, dtype=weight.dtype if bias is None else bias.dtype
        ),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, target, bias, *numbers = inputs
    ctx.scale, ctx.softcap, ctx.inv_temperature, mask, entropy, ctx.chunk = numbers
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        hidden, weight, target, bias, output[1], output[2] if entropy else None, mask
    )


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden, weight, target, bias, lse, entropy, mask = ctx.saved_tensors
    wanted = [bool(ctx.needs_input_grad[i]) for i in (0, 1, 3)]
    result: list[Tensor | None] = [None] * 10
    if all(g is None for g in grads):
        return tuple(result)
    of_hidden, of_weight, of_bias = _linear_logprob_backward(
        hidden,
        weight,
        target,
        bias,
        lse,
        entropy,
        grads[0],
        grads[1],
        None if entropy is None else grads[2],
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


_linear_logprob.register_autograd(_backward, setup_context=_setup_context)


# --------------------------------------------------------------------------------------------------
# weighted_linear_logprob: gradient on the way


@torch.library.custom_op("fdpg::weighted_linear_logprob", mutates_args=())
def _weighted_linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    coefficient: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    inv_temperature: float,
    mask: Tensor | None,
    chunk: int,
    of_hidden: bool,
    of_weight: bool,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _require_in_range("weighted_linear_logprob", target, mask, len(weight))
    n, hidden_dtype = hidden.shape[0], hidden.dtype
    rows = _kept(mask)
    if rows is not None:
        mask = None
    hidden, target, coefficient, mask = _pick(rows, hidden, target, coefficient, mask)
    head = _Head(hidden, weight, bias, scale, softcap, chunk)
    grads = head.gradients(of_hidden, of_weight, of_bias)
    logp = hidden.new_empty(len(hidden), dtype=head.dtype)
    for c in head.chunks():
        z, y, m = head.logits(c, keep_slope=True), target[c], None if mask is None else mask[c]
        logp[c], lse, _ = torch.ops.fdpg.token_logprob(z, y, inv_temperature, m, False)
        if of_hidden or of_weight or of_bias:
            torch.ops.fdpg.token_logprob_backward_(
                z, y, lse, None, coefficient[c], None, None, inv_temperature, m
            )
            head.backward(c, z, *grads)
    total = torch.dot(coefficient.double(), logp.double())
    if of_hidden:
        grads[0] = _spread(rows, grads[0], n)
    return (
        total,
        _spread(rows, logp, n),
        grads[0].to(hidden_dtype),
        grads[1].to(weight.dtype),
        grads[2].to(weight.dtype if bias is None else bias.dtype),
    )


@_weighted_linear_logprob.register_fake
def _fake_weighted(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    coefficient: Tensor,
    bias: Tensor | None,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty((), dtype=torch.float64),
        hidden.new_empty(hidden.shape[0], dtype=result_dtype(hidden.dtype, weight.dtype)),
        *_fake_gradients(hidden, weight, bias, *others[-3:]),
    )


def _setup_weighted(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:])


def _backward_weighted(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    result: list[Tensor | None] = [None] * 13
    if grads[0] is not None:
        for index, grad in zip((0, 1, 4), ctx.saved_tensors, strict=True):
            if ctx.needs_input_grad[index]:
                result[index] = grad * grads[0].to(grad.dtype)
    return tuple(result)


_weighted_linear_logprob.register_autograd(_backward_weighted, setup_context=_setup_weighted)

"""The language-model head a chunk of rows at a time: what linear_logprob and policy_gradient share.

    logits = softcap * tanh(scale * (hidden W^T + bias) / softcap)      (no softcap: scale * (...))

What stands before the softcap is the result of a matrix product, of a chunk of rows, in a buffer
that every chunk reuses; a kernel reads it, bounds it, and puts in its place what its gradient is
made of, while it is in the cache. Where the product is our own, one kernel does both, and logits
are nowhere in memory (csrc/cpu/linear_numerators-inl.h).

Shape legend: N rows (tokens), n rows of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from fdpg_fast.ops.matmul import (
    add_product_,
    has_wide_products,
    is_ours,
    may_round,
    packed_once,
    product,
)
from fdpg_fast.ops.memory import lasting_empty
from fdpg_fast.ops.token_logprob import result_dtype

__all__ = [
    "LinearHead",
    "check_head",
    "is_traced",
    "joined",
    "kept_rows",
    "multiplies_as_they_are",
    "new_rows",
    "pick",
    "project",
    "require_in_range",
    "spread",
    "without_masked",
]

# How many bytes of logits a chunk may hold, and how few rows it must not have: the weight is read,
# and packed by the BLAS, once per chunk and product. policy_gradient on two AVX-512 cores (Xeon),
# ms by rows of a chunk; its three products alone take 154 and 682:
#   V 14019, D 128, N 4096:   64: 184   128: 171   256: 158   512: 147
#   V 50257, D 768, N 1024:   128: 921   256: 858   341: 820   512: 825   1024: 797
#   the same in bf16, by AMX:            256: 189   341: 174   512: 156   1024: 161
# On a GPU a share of its memory, up to a bound: bf16, V 128256, D 4096, N 4096 on an H200 (products
# and bytes: 20.2), by MB of a chunk:
#   256: 26.8   512: 22.7   1024: 21.8   4096: 20.8
_CHUNK_BYTES = {"cpu": 28 << 20, "cuda": 1 << 30}
_GPU_SHARE = 1 / 64
_LEAST_ROWS, _LEAST_ROWS_OF_16_BITS = 320, 512
# Products over a vocabulary that is no multiple of so many are slow there, by 7 over GPT-2's 50257
# (H200, bf16): so they are made of one that is over most of it, and one over the rest.
_GRANULE = {"cuda": 16}
# Rows of the logits buffer start at multiples of this many bytes: one cache line, one AVX-512 load.
_ALIGNMENT = 64
# What logits are multiplied by in fp32: csrc/torch/check.h, Arguments::factor_of_logits.
_LEAST_FACTOR, _MOST_FACTOR = 1e-18, 1e18
# How much of the vocabulary is in fp32 at a time where numerators are in 16 bits.
_TILE = 4096


def check_head(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    inv_temperature: float,
    mask: Tensor | None,
    chunk: int | None,
    **per_row: Tensor | None,
) -> int:
    """Raises ValueError for arguments that do not fit together; returns the rows of a chunk.

    ``per_row``: further arguments of shape ``[N]``.
    """

    # On a GPU the time of a small head is that of its Python: nothing is worded that is not said.
    def refuse(name: str, must: str, got: object) -> NoReturn:
        raise ValueError(f"{op}: `{name}` must {must}, got {got}")

    for name, matrix in (("hidden", hidden), ("weight", weight)):
        if matrix.dim() != 2:
            refuse(name, "be a matrix", f"shape {list(matrix.shape)}")
        if not matrix.dtype.is_floating_point:
            refuse(name, "be floating point", matrix.dtype)
    rows, size = hidden.shape
    vocab = weight.shape[0]
    if weight.shape[1] != size:
        refuse("weight", f"have shape [V, {size}]", list(weight.shape))
    if vocab == 0:
        refuse("weight", f"have shape [V, {size}] with V at least 1", list(weight.shape))
    if bias is not None and bias.shape != (vocab,):
        refuse("bias", f"have shape [{vocab}]", list(bias.shape))
    vectors = {"target": target, "mask": mask, **per_row}
    for name, vector in vectors.items():
        if vector is not None and vector.shape != (rows,):
            refuse(name, f"have shape [{rows}]", list(vector.shape))
    if target.dtype != torch.int64:
        refuse("target", "be torch.int64", target.dtype)
    if mask is not None and mask.dtype != torch.bool:
        refuse("mask", "be torch.bool", mask.dtype)
    if not -math.inf < scale < math.inf:
        refuse("scale", "be finite", scale)
    if softcap is not None and not 0 < softcap < math.inf:
        refuse("softcap", "be positive and finite, or None for no bound", softcap)
    if not 0 < inv_temperature < math.inf:
        refuse("inv_temperature", "be positive and finite", inv_temperature)
    dtype = result_dtype(hidden.dtype, weight.dtype)
    if dtype == torch.float32:
        for name, factor in (("softcap", softcap or 1.0), ("inv_temperature", inv_temperature)):
            if not _LEAST_FACTOR <= factor <= _MOST_FACTOR:
                must = f"be in [{_LEAST_FACTOR}, {_MOST_FACTOR}] unless an input is fp64"
                refuse(name, must, factor)
    if chunk is not None and chunk < 1:
        refuse("chunk", "be at least 1", chunk)
    device = hidden.device
    for name, other in {"weight": weight, "bias": bias, **vectors}.items():
        if other is not None and other.device != device:
            refuse(name, f"be on the device of `hidden` ({device})", other.device)
    if chunk is not None:
        return chunk
    width, least = dtype.itemsize * vocab, _LEAST_ROWS
    if device.type == "cpu" and multiplies_as_they_are(hidden, weight):  # there are no logits
        width, least = hidden.dtype.itemsize * vocab, _LEAST_ROWS_OF_16_BITS
    wanted = max(least, _chunk_bytes(device) // width)
    # Of equal size: a short chunk takes nearly as long as a long one.
    chunks = max(1, round(rows / wanted))
    return max(1, -(-rows // chunks))


def _chunk_bytes(device: torch.device) -> int:
    most = _CHUNK_BYTES.get(device.type, 256 << 20)
    if device.type != "cuda":
        return most
    return min(most, int(_GPU_SHARE * torch.cuda.get_device_properties(device).total_memory))


class LinearHead:
    """Logits of consecutive chunks of rows, and the way back from their gradient.

    Logits before the softcap, that is: it is the kernels' affair, and so is its derivative.

    The gradient of the logits is ``row_scale[:, None] * numerators``, as
    ``token_logprob_numerators_`` makes it: a number per row may wait until after the products.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        chunk: int,
    ) -> None:
        self.dtype = result_dtype(hidden.dtype, weight.dtype)
        self.low_precision = multiplies_as_they_are(hidden, weight)
        self.hidden = hidden if self.low_precision else hidden.to(self.dtype)  # [N, D]
        self.weight = weight if self.low_precision else weight.to(self.dtype)  # [V, D]
        self.bias = None if bias is None else bias.to(self.dtype)
        self.scale, self.chunk = scale, chunk
        self._spans = _spans(weight.shape[0], weight.device.type)

    @functools.cached_property
    def buffer(self) -> Tensor:
        """``[chunk, V]``; not made where nobody asks for it."""
        return new_rows(self.weight, min(self.chunk, max(1, self.hidden.shape[0])), self.dtype)

    def chunks(self) -> Iterator[slice]:
        n = self.hidden.shape[0]
        return (slice(i, min(i + self.chunk, n)) for i in range(0, n, self.chunk))

    def logits(self, rows: slice, out: Tensor | None = None) -> Tensor:
        """``[n, V]`` in ``out``, or in memory that the next call overwrites."""
        hidden = self.hidden[rows]
        out = self.buffer[: hidden.shape[0]] if out is None else out
        return project(hidden, self.weight, self.bias, self.scale, out)

    def logprob(
        self,
        rows: slice,
        target: Tensor,
        inv_temperature: float,
        mask: Tensor | None,
        softcap: float,
    ) -> tuple[Tensor, Tensor]:
        """Log-prob of each target and log-sum-exp, ``[n]``."""
        if self._is_fused(rows):
            return self._fused(None, rows, target, None, None, inv_temperature, softcap)[:2]
        z = self.logits(rows)
        logp, lse, *_ = _LOGPROB_OP(z, target, inv_temperature, mask, False, softcap)
        return logp, lse

    def new_numerators(self, rows: int) -> Tensor:
        """``[rows, V]``, of the dtype that :meth:`backward` multiplies."""
        dtype = self.hidden.dtype if self.low_precision else self.dtype
        return new_rows(self.weight, rows, dtype)

    def numerators(
        self,
        rows: slice,
        out: Tensor,
        target: Tensor,
        coefficient: Tensor,
        lse_hint: Tensor | None,
        inv_temperature: float,
        mask: Tensor | None,
        softcap: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Numerators of a chunk in ``out`` ``[n, V]``; log-probs, log-sum-exps and row scales."""
        if self._is_fused(rows):
            return self._fused(out, rows, target, coefficient, lse_hint, inv_temperature, softcap)
        in_place = out.dtype == self.dtype
        z = self.logits(rows, out if in_place else None)
        found: tuple[Tensor, Tensor, Tensor] = _NUMERATORS_OP(
            z,
            None if in_place else out,
            target,
            coefficient,
            lse_hint,
            inv_temperature,
            mask,
            softcap,
        )
        return found

    def _is_fused(self, rows: slice) -> bool:
        return self.hidden.is_cpu and is_ours(self.hidden[rows], self.weight.t(), fused=True)

    def _fused(
        self,
        out: Tensor | None,
        rows: slice,
        target: Tensor,
        coefficient: Tensor | None,
        lse_hint: Tensor | None,
        inv_temperature: float,
        softcap: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = _FUSED_OP(
            out,
            self.hidden[rows],
            self.weight,
            self.bias,
            target,
            coefficient,
            lse_hint,
            self.scale,
            inv_temperature,
            softcap,
            may_round(),
        )
        return found

    def recall(self, kept: Tensor) -> Tensor:
        """What :meth:`logits` gave for a chunk, ``[n, V]`` in the buffer."""
        return self.buffer[: kept.shape[0]].copy_(kept)

    def backward(
        self,
        rows: slice,
        numerators: Tensor,
        row_scale: Tensor | None,
        *grads: Tensor,
        new: bool = False,
    ) -> None:
        """Adds what a chunk sends back to its gradients of hidden, weight and bias.

        Args:
            rows: the chunk.
            numerators: ``[n, V]``.
            row_scale: ``[n]``; None: ones.
            grads: as :meth:`gradients` makes them; those of size 0 are skipped.
            new: there is nothing yet to add to; but for the bias, whose gradient is zeros.
        """
        grad_hidden, grad_weight, grad_bias = grads
        hidden, weight, scale = self.hidden[rows], self.weight, self.scale
        if self.low_precision:
            numerators = numerators.to(hidden.dtype)
        if grad_hidden.numel():
            place = grad_hidden[rows]
            first, *rest = self._spans
            product(numerators[:, first], weight[first], out=place)
            for span in rest:
                add_product_(place, numerators[:, span], weight[span])
            if row_scale is not None:
                place *= row_scale[:, None]
            if scale != 1.0:
                place *= scale
        if row_scale is not None and (grad_weight.numel() or grad_bias.numel()):
            hidden = torch.mul(hidden, row_scale[:, None], out=torch.empty_like(hidden))
        if grad_weight.numel():
            for span in self._spans:
                place, columns = grad_weight[span], numerators[:, span].t()
                if new:
                    product(columns, hidden, scale=scale, out=place)
                else:
                    add_product_(place, columns, hidden, scale)
        if grad_bias.numel():
            if row_scale is None:
                grad_bias.add_(numerators.sum(0, dtype=self.dtype), alpha=scale)
            else:
                # In fp32, which all of them at once would be as large as the logits in.
                for at in range(0, grad_bias.shape[0], _TILE):
                    columns = numerators[:, at : at + _TILE].t().to(self.dtype)
                    grad_bias[at : at + _TILE].addmv_(columns, row_scale, alpha=scale)

    def gradients(
        self,
        of_hidden: bool,
        of_weight: bool,
        of_bias: bool,
        weight_dtype: torch.dtype | None = None,
    ) -> list[Tensor]:
        """Gradients of hidden, weight and bias, which the first chunk writes and the others add to;
        of size 0 where not wanted. ``weight_dtype``: where there is but one chunk, what its sums
        are rounded to."""
        wanted = (
            (of_hidden, self.hidden.shape),
            (of_weight, self.weight.shape),
            (of_bias, self.weight.shape[:1]),
        )
        dtypes = (self.dtype, weight_dtype or self.dtype, self.dtype)
        found = [
            lasting_empty(self.hidden, tuple(shape) if want else (0,), dtype)
            for (want, shape), dtype in zip(wanted, dtypes, strict=True)
        ]
        for grad in found if self.hidden.shape[0] == 0 else found[2:]:
            if grad.numel():
                grad.zero_()
        return found


_LOGPROB_OP = torch.ops.fdpg.token_logprob.default
_NUMERATORS_OP = torch.ops.fdpg.token_logprob_numerators_.default
_FUSED_OP = torch.ops.fdpg.linear_numerators_.default
_MATMUL_OP = torch.ops.fdpg.matmul_.default


@torch.library.register_fake("fdpg::linear_numerators_")
def _fake(
    numerators: Tensor | None, hidden: Tensor, weight: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, n = result_dtype(hidden.dtype, weight.dtype), hidden.shape[0]
    return (
        hidden.new_empty(n, dtype=dtype),
        hidden.new_empty(n, dtype=dtype),
        hidden.new_empty(0 if numerators is None else n, dtype=dtype),
    )


def project(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, out: Tensor
) -> Tensor:
    """``scale * (hidden W^T + bias)``, ``[n, V]`` in ``out``; one dtype, no gradient."""
    if (packed := packed_once(weight)) is not None:
        _MATMUL_OP(out, hidden.to(packed.dtype), packed, bias, scale)
        return out
    for span in _spans(weight.shape[0], weight.device.type):
        part = None if bias is None else bias[span]
        product(hidden, weight[span].t(), part, scale=scale, out=out[:, span])
    return out


def _spans(vocab: int, device_type: str) -> list[slice]:
    """The vocabulary, in stretches that matrix products are fast over, the longest first."""
    even = vocab - vocab % _GRANULE.get(device_type, 1)
    return [slice(a, b) for a, b in ((0, even), (even, vocab)) if a < b]


def new_rows(weight: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """``[rows, V]``; torch aligns storage to 64 bytes, with a padded stride so is every row."""
    vocab, step = weight.shape[0], _ALIGNMENT // dtype.itemsize
    padded = -(-vocab // step) * step
    return lasting_empty(weight, (rows, padded), dtype)[:, :vocab]


def multiplies_as_they_are(hidden: Tensor, weight: Tensor) -> bool:
    """Whether products take inputs of 16 bits as they are, and add them up in fp32."""
    same = hidden.dtype == weight.dtype
    return same and hidden.dtype.itemsize < 4 and has_wide_products(hidden)


def is_traced(*tensors: Tensor | None) -> bool:
    """Whether somebody looks at the ops that run: torch.compile, or a tensor's own class.

    For them a head is one op of torch.library; else its function is called as it is: the way
    through torch.library takes as long as the function does (us, one core at 4 GHz, nothing to
    compute: policy_gradient 160 and 95).
    """
    plain = (Tensor, torch.nn.Parameter)
    return torch.compiler.is_compiling() or any(
        t is not None and type(t) not in plain for t in tensors
    )


def joined(chunks: Sequence[Sequence[Tensor]], like: Tensor, results: int) -> list[Tensor]:
    """Each of the results of consecutive chunks of rows, for all rows; of none as ``like``."""
    if not chunks:
        return [like.new_empty(0) for _ in range(results)]  # torch.library refuses aliases
    return [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*chunks, strict=True)]


def kept_rows(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """On the CPU [n] rows that a mask keeps, None if that is all, and no mask any more; on a GPU,
    which would have to wait for the count, and whose shapes are static, None and the mask."""
    if mask is None or mask.device.type != "cpu":
        return None, mask
    return (None if bool(mask.all()) else mask.nonzero().squeeze(1)), None


def without_masked(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Hidden states with zeros where the mask is False: the product that is the gradient of the
    weight adds a masked row times 0, which is NaN if the row is, or infinite."""
    return hidden if mask is None else hidden.masked_fill(~mask[:, None], 0.0)


def require_in_range(op: str, target: Tensor, mask: Tensor | None, vocab: int) -> None:
    """On the CPU, where asking is free; on a GPU the row's results are NaN."""
    if target.device.type != "cpu":
        return
    bad = target != target.clamp(0, vocab - 1)
    if mask is not None:
        bad &= mask
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"{op}: `target` must be in [0, {vocab}), got {int(target[row])} at row {row}"
        )


def pick(rows: Tensor | None, *tensors: Tensor | None) -> list[Any]:
    """Those rows of each tensor; None: all rows."""
    return [t if rows is None or t is None else t[rows] for t in tensors]


def spread(rows: Tensor | None, values: Tensor, n: int) -> Tensor:
    """[n, ...]: values at ``rows``, zeros elsewhere."""
    if rows is None:
        return values
    return values.new_zeros((n, *values.shape[1:])).index_copy_(0, rows, values)

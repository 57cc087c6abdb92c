"""Decoding with a key-value cache: new tokens are appended, each attends to what is live.

Shape legend: B sequences, H query heads, Hk key heads, R rows of the cache, T room for tokens in
each, Q new ones, D and E head sizes of keys and values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fdpg_fast import _build
from fdpg_fast.ops.gradient import refuse_gradient

__all__ = ["cache_append_", "decode_attention"]

_build.load()


def cache_append_(
    keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, position: Tensor
) -> None:
    """cache[b, :, position[b] + q] = new[b, :, q], for keys and values.

    Args:
        keys, values: ``[B, Hk, T, D]`` and ``[B, Hk, T, E]``, any dtype, written in place.
        new_keys, new_values: ``[B, Hk, Q, D]`` and ``[B, Hk, Q, E]``, of the same dtypes. All four
            contiguous along the last dimension. Not differentiable.
        position: ``[B]`` int64 in [0, T - Q]. Outside of it, a CUDA device leaves the sequence as
            it is.

    Raises:
        RuntimeError: a shape, dtype, device, stride or position that does not fit, or a gradient
            is asked for.
    """
    states = {"keys": keys, "values": values, "new_keys": new_keys, "new_values": new_values}
    refuse_gradient("cache_append_", "Use torch.cat, or torch.no_grad()", **states)
    _APPEND_OP(keys, values, new_keys, new_values, position)


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    end: Tensor,
    *,
    begin: Tensor | None = None,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of one query per sequence over keys [begin, end) of its cache.

        s_t = scale q . k_t,  with a softcap: softcap tanh(scale q . k_t / softcap)
        s_t += bias_{T - end + t}
        out = sum_t softmax(s)_t v_t

    Only live keys are read, in their storage type; sums are fp32 (fp64 for fp64). The result of a
    sequence does not depend on the others, nor on T. Not differentiable.

    Args:
        query: ``[B, H, D]`` fp32, bf16, fp16 or fp64.
        keys, values: ``[R, Hk, T, D]`` and ``[R, Hk, T, E]`` of that dtype, contiguous along the
            last dimension; Hk divides H, and query head h attends to key head h // (H / Hk).
        end, begin: ``[B]`` int64, 0 <= begin <= end <= T; without ``begin``, from 0. A window of W
            tokens is ``begin = end - W``. An empty span gives zeros; one that cannot be, NaN on a
            CUDA device.
        rows: ``[B]`` int64 in [0, R): which row of the cache each sequence reads, as samples of one
            prompt may share its keys; on a CPU neighbours that share one are fastest. Without, R is
            B, and sequence b reads row b. One out of range gives NaN on a CUDA device.
        bias: ``[H, T]``, added to scores by how far a key is from the last one, which has column
            T - 1 (T5).
        scale: ``D ** -0.5`` by default.
        softcap: bounds the scores smoothly (Gemma 2); 0: does not.
        sinks: ``[H]`` scores that take part in the softmax and have no value (gpt-oss).

    Returns:
        ``[B, H, E]``.

    Raises:
        RuntimeError: a shape, dtype, device, stride, span or row that does not fit, or a gradient
            is asked for.
    """
    instead = "Use torch's scaled_dot_product_attention, or torch.no_grad()"
    states = {"query": query, "keys": keys, "values": values, "bias": bias, "sinks": sinks}
    refuse_gradient("decode_attention", instead, **states)
    of_sums = torch.float64 if query.dtype == torch.float64 else torch.float32
    if bias is not None:
        bias = bias.to(of_sums).contiguous()
    if sinks is not None:
        sinks = sinks.to(of_sums)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = _OP(query, keys, values, end, begin, rows, bias, sinks, scale, softcap)
    return out


_OP = torch.ops.fdpg.decode_attention.default
_APPEND_OP = torch.ops.fdpg.cache_append_.default


@torch.library.register_fake("fdpg::decode_attention")
def _fake(query: Tensor, keys: Tensor, values: Tensor, *others: Any) -> Tensor:
    return query.new_empty((*query.shape[:2], values.shape[3]))


@torch.library.register_fake("fdpg::cache_append_")
def _fake_append_(*tensors: Tensor) -> None:
    return None

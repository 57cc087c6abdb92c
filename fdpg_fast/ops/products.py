"""Matrix products in fp32 on a CPU, by the library that is fast there.

torch hands them to MKL, whose AVX-512 code is for Intel's CPUs: AMD's get half of what they can do.
oneDNN, which torch brings too and takes for 16-bit products, asks what a CPU can do and not who
made it. ms on an AMD EPYC with AVX-512, 2 cores:

    [n, k] x [k, m]                     256, 128, 384    256, 128, 14019    64, 768, 3072
    MKL (torch.mm, F.linear)                    0.132               5.34             2.18
    oneDNN                                      0.079               2.28             0.84

So here is a way to the latter, for the products of a head and for the linear layers of a model.
Both are exact to fp32 rounding; what is summed first differs. Which of them is used depends on the
machine and on shapes alone, so two runs on one machine have the same bits.

Shape legend: n rows, k what is summed over, m columns.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fdpg_fast._build import load

__all__ = ["add_product_", "is_worthwhile", "library", "linear", "makes_room", "product", "put"]

# Below so many multiply-adds the way there costs as much as it saves (us, MKL and oneDNN):
#   32 x 128 x 384: 20, 21     256 x 64 x 172: 42, 36     256 x 64 x 512: 93, 59
_LEAST = 1 << 23
# Up to so many numbers a product of the other orientation is added fast, transposed as it is.
_TRANSPOSABLE = 1 << 22


@functools.cache
def library() -> tuple[bool, str]:
    """Whether fp32 products go to oneDNN, and why."""
    if not torch.backends.mkl.is_available():
        return False, "torch's own: this torch has no MKL to stay away from"
    if load().cpu_vendor() != "amd" or not torch.cpu._is_avx512_supported():
        return False, "torch's own: MKL; AMD's CPUs with AVX-512 alone are known to gain by another"
    try:  # it is not one of torch's documented ops
        threes = _by_onednn(torch.ones(2, 3), torch.ones(3, 4), None)
    except (AttributeError, RuntimeError, TypeError):
        return False, "torch's own: MKL; this torch has no way to oneDNN"
    if not bool((threes == 3).all()):
        return False, "torch's own: MKL; oneDNN gives something else"
    return True, "oneDNN: MKL keeps its AVX-512 code for Intel's CPUs"


def makes_room(a: Tensor, b: Tensor) -> bool:
    """Whether ``a b`` goes to oneDNN, whose results are in memory of their own."""
    return (
        library()[0]
        and a.device.type == "cpu"
        and a.dtype == b.dtype == torch.float32
        and len(a) * b.numel() >= _LEAST
        # oneDNN walks over any other layout number by number, a thousand times slower.
        and (b.is_contiguous() or b.t().is_contiguous())
    )


def product(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """``scale (a b + bias)``, ``[n, m]``, of ``a`` ``[n, k]`` and ``b`` ``[k, m]``, without a
    gradient.

    The result is in ``out`` or, where that is faster, in memory of its own: see :func:`put`.
    """
    if makes_room(a, b):
        if scale != 1.0:
            a, bias = a * scale, None if bias is None else bias * scale
        return _by_onednn(a, b, bias)
    if out is None:
        out = a.new_empty(len(a), b.shape[1])
    if bias is None:
        return torch.addmm(out, a, b, beta=0.0, alpha=scale, out=out)
    return torch.addmm(bias, a, b, beta=scale, alpha=scale, out=out)


def add_product_(to: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """Adds ``scale a b``."""
    if to.numel() <= _TRANSPOSABLE and makes_room(b.t(), a.t()):
        to.add_(_by_onednn(b.t(), a.t(), None).t(), alpha=scale)
    else:
        to.addmm_(a, b, alpha=scale)


def put(result: Tensor, out: Tensor) -> Tensor:
    """``out``, with what :func:`product` has returned in it."""
    return out if result.data_ptr() == out.data_ptr() else out.copy_(result)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias``, ``[..., m]``, of ``x`` ``[..., k]`` and ``W`` ``[m, k]``; once
    differentiable."""
    rows = x.reshape(-1, x.shape[-1])
    learns = torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    apply: Any = _Linear.apply
    y: Tensor = apply(rows, weight, bias) if learns else product(rows, weight.t(), bias)
    return y.view(*x.shape[:-1], len(weight))


def is_worthwhile(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`linear` may be faster than torch's own, here and now. A compiler makes choices
    of its own."""
    return (
        x.numel() * len(weight) >= _LEAST
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _by_onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight.t(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        grad_weight = None
        if of_weight:
            # oneDNN copies its left factor if that is transposed: let it be the narrower one.
            if grad.shape[1] <= x.shape[1]:
                grad_weight = product(grad.t(), x)
            else:
                grad_weight = product(x.t(), grad).t()
        return (
            product(grad, weight) if of_x else None,
            grad_weight,
            grad.sum(0) if of_bias else None,
        )

"""Matrix products: torch's, and on a CPU our own where torch's are slow, or do not exist.

torch hands fp32 products to MKL, which is for Intel's CPUs: AMD's with AVX-512 get a quarter to
three quarters of what they can do. oneDNN, which torch takes for 16-bit products, does better on
them, but its results are in memory of its own, and those of 16-bit factors in 16 bits. ``matmul_``
(csrc/cpu/matmul-inl.h) writes fp32 results where they are wanted or adds them to what is there,
whichever way its factors lie, or with one of many products that ``matmul_pack_`` has laid out for
it. ms on an AMD EPYC with AVX-512 and avx512_bf16, 2 cores, [n, k] x [k, m]:

                    342, 768, 50257    64, 768, 3072    256, 128, 384    256, 64, 64
    MKL                         143             1.63            0.123          0.013
    oneDNN                       77             0.68            0.064          0.016
    ours                         56             0.68            0.058          0.009
    oneDNN, bf16                 38             0.44            0.046          0.018
    ours, bf16                   29             0.35            0.034          0.007

On an Intel Xeon MKL is as good as ours in fp32, or better; in bf16, by AMX, 2 cores, by ours with
results in bf16 as oneDNN's are, in fp32, and in bf16 of a weight that is packed:

                    342, 768, 50257    64, 768, 3072    256, 128, 384    1024, 1024, 1024
    oneDNN, bf16               25.2             0.49            0.081                3.26
    ours, bf16                 15.0             0.40            0.067                1.31
    in fp32                    17.8             0.42            0.072                1.67
    packed                     17.9             0.31            0.058                1.29

A sum has an order that depends on k alone, so a row of a product of ours has the same bits whatever
other rows there are. Which of them is used depends on the machine and on shapes.

Shape legend: n rows, k what is summed over, m columns.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fdpg_fast._build import load
from fdpg_fast.ops.token_logprob import require_one_device, result_dtype

__all__ = [
    "add_product_",
    "exact_products",
    "fuses",
    "has_16_bit_products",
    "has_rounded_products",
    "has_wide_products",
    "is_ours",
    "library",
    "linear",
    "may_round",
    "own_products",
    "packed_like",
    "packed_now",
    "packed_once",
    "product",
    "rounded_products",
    "rounding_once",
]

_Packed: TypeAlias = tuple[dict[int, tuple[Tensor, Tensor]], dict[int, Tensor]]

# Below so many multiply-adds the way to ours costs as much as it saves (us, torch's and ours):
#   16 x 64 x 64: 3.9, 3.2     64 x 64 x 64: 5.7, 4.9     32 x 64 x 172: 7.6, 7.2
_LEAST = 1 << 16
# And for so few rows packing the other factor does. Not of a product in one with its log-probs,
# which are ours whatever the rows, and so do not depend on them: see is_ours. Time in units of
# MKL's, GPT-2's head on an Intel Xeon, one core and two, for 1, 2, 3 and 4 rows:
#   logits              1.1-1.3   1.0-1.2   1.1       0.7-0.9
#   from their gradient 2.8-3.8   1.8-2.0   1.6-2.0   1.7-1.9
#   log-probs           1.2-1.4   1.0-1.2   0.8-1.0   0.4
_LEAST_ROWS = 4
# Without AVX-512 MKL is as good where all of the other factor, k x m, stays in the caches (its time
# in units of ours, of 64 and of 256 rows; the least of many):
#   128 x 512: 0.98, 0.80     256 x 768: 1.23, 1.26     768 x 3072: 1.56, 1.33
_LEAST_FACTOR = 1 << 17 if load().cpu_isa() == "avx2" else 0
# Nor are ours better there where rows of the first factor lie across its memory, in the gradient of
# a weight. ms on an AMD EPYC with AVX2, 2 cores, ours and MKL's (the least of some):
#   3072 x 1024 x 768: 39, 28     50257 x 1024 x 768: 693, 475     512 x 4096 x 128: 5.1, 3.6
# and where they do not, [1024, 768] x [768, 50257]: 475, 655.
_TAKES_ACROSS = load().cpu_isa() != "avx2"
# Whether there is a CPU with instructions for products of bf16.
_OURS_ROUNDS: bool = load().has_packed_products()
# Of a thread, for another may be about something else: inside rounded_products, on a CPU where ours
# rounds; and inside rounding_once, also there, what has been packed and the memory for it.
_may_round: ContextVar[bool] = ContextVar("may_round", default=False)
_packed: ContextVar[_Packed | None] = ContextVar("packed", default=None)
_always_ours: ContextVar[bool] = ContextVar("always_ours", default=False)  # inside own_products
_PANEL = 64  # kVocabularyTile


@functools.cache
def library() -> tuple[bool, str]:
    """Whether fp32 products are ours, and why."""
    if not torch.backends.mkl.is_available():
        return False, "torch's own: this torch has no MKL to stay away from"
    if load().cpu_vendor() != "amd" or load().cpu_isa() == "portable":
        return False, "torch's own: MKL; only AMD's CPUs with AVX2 are known to gain by ours"
    return True, "ours: MKL is for Intel's CPUs"


@functools.cache
def fuses() -> bool:
    """Whether a product of ours and what follows it in one are faster than two kernels, even if
    products alone are not. With AVX-512 they are, ms on an Intel Xeon, [1024, 768] x [768, 50257]
    and log-probs of it: 322 by MKL, 281 in one."""
    isa: str = load().cpu_isa()
    return isa.startswith(("avx512", "amx"))


def has_rounded_products() -> bool:
    """Whether there is a CPU here whose bf16 products are ours."""
    return _OURS_ROUNDS


def has_16_bit_products(compute: str) -> bool:
    """Whether torch has products for this CPU of what ``compute``, bf16 or fp16, has layers
    multiply. Its loops for CPUs without take 5 to 150 times as long as fp32."""
    if not torch.backends.mkldnn.is_available():
        return False
    known = torch.ops.mkldnn
    bf16 = compute == "bf16"
    return bool(known._is_mkldnn_bf16_supported() if bf16 else known._is_mkldnn_fp16_supported())


def gpu_has_bf16(device: torch.device) -> bool:
    """Whether this GPU has instructions for bf16; others (T4, V100) emulate it, slowly."""
    with torch.cuda.device(device):  # torch asks of the current one
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def has_wide_products(factor: Tensor) -> bool:
    """Whether 16-bit factors like this one are multiplied as they are into fp32 results: on a GPU,
    and bf16 on a CPU with instructions for it."""
    return factor.is_cuda or (
        factor.dtype == torch.bfloat16 and factor.device.type == "cpu" and _OURS_ROUNDS
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

    The result is fp32 (fp64 if they are fp64), in ``out`` if that is given. Factors of 16 bits are
    for where they have such a product: see :func:`has_wide_products`.
    """
    if out is None:
        out = a.new_empty(a.shape[0], b.shape[1], dtype=result_dtype(a.dtype, b.dtype))
    if is_ours(a, b):
        _OP(out, a, b, bias, scale, False, may_round())
    elif a.dtype != out.dtype:
        if bias is not None:
            out.copy_(bias)
        kept = 0.0 if bias is None else scale
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=kept, alpha=scale, out=out)
    elif bias is None:
        torch.addmm(out, a, b, beta=0.0, alpha=scale, out=out)
    else:
        torch.addmm(bias, a, b, beta=scale, alpha=scale, out=out)
    return out


def add_product_(to: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """Adds ``scale a b`` to ``to``, which is as a result of :func:`product`."""
    if is_ours(a, b):
        _OP(to, a, b, None, scale, True, may_round())
    elif a.dtype != to.dtype:
        torch.addmm(to, a, b, out_dtype=to.dtype, alpha=scale, out=to)
    else:
        to.addmm_(a, b, alpha=scale)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """``x W^T + bias``, ``[..., m]``, of ``x`` ``[..., k]`` and ``W`` ``[m, k]``,
    differentiable. None where it is no faster by ours, or may not be ours."""
    # In small models a layer takes as long as what is asked here: no question twice, and a tensor's
    # len() is a function of Python.
    *outer, k = x.shape
    m = weight.shape[0]
    pays = library()[0] and x.numel() * m >= _LEAST
    if not (pays or _always_ours.get()) or torch.is_autocast_enabled("cpu"):
        return None
    rows, columns = x.reshape(-1, k), weight.t()
    if rows.dtype != torch.float32 or not is_ours(rows, columns):
        return None
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        apply: Any = _Linear.apply
        learnt: Tensor = apply(rows, weight, bias)
        return learnt.view(*outer, m)
    y = rows.new_empty(rows.shape[0], m)
    _OP(y, rows, columns, bias, 1.0, False, may_round())
    return y.view(*outer, m)


@contextlib.contextmanager
def rounded_products(device: torch.device) -> Iterator[None]:
    """Matrix products of fp32 numbers that the hardware may round on the way in, to bf16 on a CPU
    with instructions for it and to TF32 on a GPU; sums and results are fp32, so logits keep their
    last bits. A CPU without gains nothing by it, and does not round.

    No 16-bit copies of the weight are made, which would have to be renewed at every step. On a CPU
    of this thread alone; what torch rounds on a GPU, all threads share.
    """
    if device.type == "cuda":
        with _precision(device, "tf32"):
            yield
        return
    outside = _may_round.set(_OURS_ROUNDS)
    try:
        yield
    finally:
        _may_round.reset(outside)


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Matrix products of fp32 numbers that nothing rounds on the way in, whatever the process has
    asked torch for (``torch.set_float32_matmul_precision``), for all its threads."""
    with _precision(device, "ieee"):
        yield


@contextlib.contextmanager
def _precision(device: torch.device, name: str) -> Iterator[None]:
    backends: Any = torch.backends
    backend = backends.cuda.matmul if device.type == "cuda" else backends.mkldnn.matmul
    before, backend.fp32_precision = backend.fp32_precision, name
    try:
        yield
    finally:
        backend.fp32_precision = before


@contextlib.contextmanager
def own_products() -> Iterator[None]:
    """While this thread is in here all fp32 products on a CPU are ours, whatever they cost: a row
    of one has the same bits whatever other rows there are."""
    outside = _always_ours.set(True)
    try:
        yield
    finally:
        _always_ours.reset(outside)


def may_round() -> bool:
    """Whether ours round fp32 factors, here and now."""
    return _may_round.get()


_OP = torch.ops.fdpg.matmul_.default
_PACK_OP = torch.ops.fdpg.matmul_pack_.default


@torch.library.register_fake("fdpg::matmul_")
def _fake(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    alpha: float = 1.0,
    accumulate: bool = False,
    may_round: bool = False,
) -> None:
    require_one_device("matmul_", a=a, out=out, b=b, bias=bias)


@torch.library.register_fake("fdpg::matmul_pack_")
def _fake_pack(out: Tensor, b: Tensor) -> None:
    require_one_device("matmul_pack_", b=b, out=out)


def packed_like(b: Tensor) -> Tensor:
    """Memory for ``b`` ``[k, m]``, rounded to bf16 and packed: see ``MatmulPackParams``."""
    k, m = b.shape
    return b.new_empty(-(-m // _PANEL), -(-k // 32) * 16, _PANEL, 2, dtype=torch.bfloat16)


@contextlib.contextmanager
def rounding_once(device: torch.device, memory: dict[int, Tensor]) -> Iterator[None]:
    """While this thread is in here weights do not change: :func:`packed_once` keeps what it has
    rounded. On a CPU whose bf16 products are ours.

    ``memory``, empty at first, lends the results of one time to the next: to get it from the system
    takes longer than to fill it.
    """
    found: dict[int, tuple[Tensor, Tensor]] = {}
    outside = _packed.set((found, memory) if device.type == "cpu" and _OURS_ROUNDS else None)
    try:
        yield
        memory.clear()
        memory.update((key, packed) for key, (_, packed) in found.items())
    finally:
        _packed.reset(outside)


def packed_once(weight: Tensor) -> Tensor | None:
    """``weight^T``, of a weight ``[m, k]``, in bf16 and packed, which ``matmul_`` takes for its
    factor ``b``: the same tensor every time, inside :func:`rounding_once`; None outside."""
    known = _packed.get()
    if known is None or weight.dtype != torch.float32:
        return None
    key = weight.data_ptr()  # of the parameter, whatever view of all of it this is
    found = known[0].get(key)
    if found is None or found[0].shape != weight.shape:
        columns = weight.detach().t()
        packed, kept = packed_like(columns), known[1].get(key)
        if kept is not None and kept.shape == packed.shape:
            packed = kept
        _PACK_OP(packed, columns)
        found = known[0][key] = weight, packed
    return found[1]


def packed_now() -> set[int]:
    """The ids of what :func:`packed_once` has given, since :func:`rounding_once` was entered."""
    known = _packed.get()
    return set() if known is None else {id(packed) for _, packed in known[0].values()}


def is_ours(a: Tensor, b: Tensor, *, fused: bool = False) -> bool:
    """Whether the product ``a b`` is one of ours, here and now; ``fused``: with what follows it."""
    if not a.is_cpu or a.dtype != b.dtype:
        return False
    if a.dtype.itemsize == 2:
        return True  # nobody else has a wide product of them
    if a.dtype != torch.float32:
        return False
    # Whether factors are rounded does not depend on how many there are: a sampler's log-probs
    # would differ from the trainer's.
    rows, size = a.shape[0], b.numel()
    pays = size >= _LEAST_FACTOR and (fused or (rows >= _LEAST_ROWS and rows * size >= _LEAST))
    pays = pays and (_TAKES_ACROSS or a.stride(1) == 1)
    pays = pays and (library()[0] or (fused and fuses()))
    return pays or may_round() or _always_ours.get()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight.t(), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        multiply = torch.mm if torch.is_grad_enabled() else product  # with create_graph by torch's
        return (
            multiply(grad, weight) if of_x else None,
            multiply(grad.t(), x) if of_weight else None,
            grad.sum(0) if of_bias else None,
        )

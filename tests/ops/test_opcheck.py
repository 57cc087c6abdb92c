"""torch.library.opcheck on every op: schema, autograd registration, fake kernel, AOT dispatch.

One function per op gives its samples; an op without samples fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fdpg_fast import ops
from fdpg_fast.baselines import BASELINES
from fdpg_fast.divergences import DIVERGENCES
from fdpg_fast.ops.matmul import has_rounded_products, packed_like

Sample = tuple[Any, ...]
SAMPLES: dict[str, Callable[[], Iterator[Sample]]] = {}

N, V, D, B, T, G = 5, 19, 6, 7, 4, 3
INF = math.inf


def samples(make: Callable[[], Iterator[Sample]]) -> Callable[[], Iterator[Sample]]:
    """Registers the samples of the op that the function is named after."""
    SAMPLES[make.__name__] = make
    return make


def normal(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_(grad)


def integers(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape)


def padded(rows: int, columns: int) -> Tensor:
    """Logits whose rows do not touch."""
    return torch.randn(rows, columns + 3)[:, :columns]


@samples
def token_logprob() -> Iterator[Sample]:
    y, mask = integers(V, N), torch.tensor([True, False, True, True, False])
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        yield normal(N, V, dtype=dtype), y, 1.0, None, False
    yield normal(N, V), y, 0.7, mask, True
    yield normal(N, V), y, 0.7, mask, True, 2.0
    yield padded(N, V), y, 1.0, None, True
    yield normal(0, V), integers(V, 0), 1.0, None, True


def _backward_samples() -> Iterator[Sample]:
    y, mask = integers(V, N), torch.tensor([True, False, True, True, False])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        z = normal(N, V, dtype=dtype)
        *_, entropy, lse = torch.ops.fdpg.token_logprob(z, y, 1.0, None, True)
        g = torch.randn_like(entropy)
        yield z, y, lse, None, g, None, None, 1.0, None
        yield z.clone(), y, lse, entropy, g, g, g, 1.0, mask
        yield z.clone(), y, lse, None, g, None, None, 1.3, mask, 2.0


@samples
def token_logprob_backward() -> Iterator[Sample]:
    return _backward_samples()


@samples
def token_logprob_backward_() -> Iterator[Sample]:
    return _backward_samples()


@samples
def sample_logprob() -> Iterator[Sample]:
    ids, positions = torch.arange(N), integers(40, N)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        yield normal(N, V, dtype=dtype), torch.tensor([3]), ids, positions, 1.0
    yield padded(N, V), torch.tensor([-3]), ids, positions, 0.5, 2.0, True


@samples
def gelu_tanh() -> Iterator[Sample]:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        yield (normal(2, V, dtype=dtype),)
    yield (normal(V, 3, 2).permute(2, 0, 1),)


@samples
def matmul_() -> Iterator[Sample]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        yield normal(N, V, dtype=wide), normal(N, D, dtype=dtype), normal(V, D, dtype=dtype).t()
    a, b = normal(D, N).t(), normal(D, V)
    yield normal(N, V), a, b, normal(V), 0.5, True, True
    yield normal(N, V, dtype=torch.bfloat16), a.bfloat16(), b.bfloat16(), normal(V)
    for packed, _ in matmul_pack_():
        yield normal(N, V), a.bfloat16(), packed


@samples
def matmul_pack_() -> Iterator[Sample]:
    if has_rounded_products():  # else there is no such thing
        for b in (normal(D, V), normal(V, D).t()):
            yield packed_like(b), b


@samples
def sequence_logprob() -> Iterator[Sample]:
    for dtype in (torch.float32, torch.float64):
        yield normal(B, T, dtype=dtype), integers(T + 1, B)


def per_sequence() -> tuple[Tensor, ...]:
    """log_pi, log_q, log_score, log_z, prompt; a sample off the support, a prompt without Z."""
    log_pi, log_q, log_score = (normal(B, dtype=torch.float64) for _ in range(3))
    log_score[2] = -INF
    log_z = torch.tensor([0.1, -INF, -0.4], dtype=torch.float64)
    return log_pi, log_q, log_score, log_z, integers(G, B).sort().values


@samples
def log_partition_() -> Iterator[Sample]:
    weight = normal(B, dtype=torch.float64)
    yield ops.new_log_partition(G), weight, integers(G, B)


@samples
def cache_append_() -> Iterator[Sample]:
    for dtype in (torch.float32, torch.bfloat16):
        cache = normal(2, 3, T, D, dtype=dtype), normal(2, 3, T, 2, dtype=dtype)
        for q in (1, 2):
            new = normal(2, 3, q, D, dtype=dtype), normal(2, 3, q, 2, dtype=dtype)
            yield *(t.clone() for t in cache), *new, torch.tensor([0, T - q])


@samples
def decode_attention() -> Iterator[Sample]:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        keys = normal(2, 2, T, 8, dtype=dtype), normal(2, 2, T, D, dtype=dtype)
        end = torch.tensor([T, 2])
        yield normal(2, 4, 8, dtype=dtype), *keys, end, None, None, None, None, 0.3, 0.0
    sinks = normal(4)
    keys = normal(2, 2, T, 8), normal(2, 2, T, D)
    begin, rows = torch.tensor([1, 2]), torch.tensor([1, 1])
    yield normal(2, 4, 8), *keys, end, begin, rows, normal(4, T), sinks, 0.3, 5.0


@samples
def fdiv_weights() -> Iterator[Sample]:
    kl = DIVERGENCES["kl"].id
    for baseline in BASELINES.values():
        state = torch.zeros(2, dtype=torch.float64)
        yield *per_sequence(), kl, 0.0, baseline.id, baseline.default or 0.0, state, INF, INF
    yield *per_sequence(), kl, 0.0, BASELINES["loo"].id, 0.0, None, 2.0, 1.5


@samples
def fdiv_terms() -> Iterator[Sample]:
    for divergence in DIVERGENCES.values():
        log_pi, log_q, log_score, log_z, prompt = per_sequence()
        log_z = log_z.clamp(min=-1.0)  # no Z, no term: NaN, which opcheck holds to be a difference
        yield log_pi, log_q, log_score, log_z, prompt, divergence.id, divergence.default or 0.0


def head(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, target, bias."""
    hidden, weight = normal(N, D, dtype=dtype, grad=True), normal(V, D, dtype=dtype, grad=True)
    return hidden, weight, integers(V, N), normal(V, dtype=dtype, grad=True)


MASK = torch.tensor([True, False, True, True, False])


@samples
def token_logprob_numerators_() -> Iterator[Sample]:
    for dtype in (torch.float32, torch.float64):
        z, y, c = normal(N, V, dtype=dtype), integers(V, N), normal(N, dtype=dtype)
        yield z.clone(), None, y, c, None, 1.3, MASK, 2.0
        yield z.clone(), torch.empty_like(z), y, c, z.logsumexp(-1), 1.0, None
    yield z.float(), z.bfloat16(), y, c.float(), None, 1.0, None


@samples
def linear_numerators_() -> Iterator[Sample]:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        hidden, weight, target, bias = (t.detach() for t in head(dtype))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        c, hint = normal(N, dtype=wide), normal(N, dtype=wide)
        out = torch.empty(N, V + 3, dtype=dtype)[:, :V]
        yield out, hidden, weight, bias.to(wide), target, c, hint, 0.5, 1.3, 3.0, False
        yield None, hidden, weight, None, target, None, None, 1.0, 1.0, 0.0, True


@samples
def linear_logprob() -> Iterator[Sample]:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        hidden, weight, target, bias = head(dtype)
        yield hidden, weight, target, None, 1.0, None, 1.0, None, False, False, 2
        yield hidden, weight, target, bias, 0.5, 3.0, 1.3, MASK, True, True, 2
    nobody = normal(0, D, grad=True), weight.float(), integers(V, 0)
    for entropy in (False, True):
        yield *nobody, None, 1.0, None, 1.0, None, entropy, True, 2


@samples
def linear_logprob_backward() -> Iterator[Sample]:
    hidden, weight, target, bias = (t.detach() for t in head(torch.float32))
    for keep in (False, True):
        logp, _, _, *kept = torch.ops.fdpg.linear_logprob(
            hidden, weight, target, bias, 0.5, 3.0, 1.3, MASK, True, keep, 2
        )
        g = torch.randn_like(logp)
        common = (0.5, 3.0, 1.3, MASK, 2)
        inputs = hidden, weight, target, bias, *kept
        yield *inputs, g, g, g, *common, True, True, True
        yield *inputs, g, None, None, *common, True, False, False


@samples
def policy_gradient() -> Iterator[Sample]:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        hidden, weight, target, bias = (t.detach() for t in head(dtype))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        c, hint = normal(N, dtype=wide), normal(N, dtype=wide)
        none = torch.zeros(0, dtype=wide)
        for adds in (True, False):
            sums = normal(V, D, dtype=wide), normal(V, dtype=wide)
            yield hidden, weight, target, c, bias, 0.5, 3.0, 1.3, MASK, hint, 2, True, adds, *sums
        frozen = (hidden, weight, target, c, None, 1.0, None, 1.0, None, None, 2, False, True)
        yield *frozen, none, none
        nobody = hidden[:0], weight, target[:0], c[:0], None, 1.0, None, 1.0, None, None, 2
        yield *nobody, True, False, normal(V, D, dtype=wide), none


# A GPU has torch's own.
CPU_ONLY = ("matmul_", "matmul_pack_", "linear_numerators_", "gelu_tanh")


def registered() -> list[str]:
    """The ops of the namespace, all of which this file must sample."""
    schemas = torch._C._dispatch_get_all_op_names()
    return sorted({s.split("::")[1].split(".")[0] for s in schemas if s.startswith("fdpg::")})


def moved(sample: Sample, device: str) -> Sample:
    """The sample on a device; leaves stay leaves."""
    return tuple(
        x.detach().to(device).requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
        for x in sample
    )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("op", registered())
def test_opcheck(op: str, device: str) -> None:
    assert op in SAMPLES, f"torch.ops.fdpg.{op} has no samples in {__file__}"
    if device == "cuda" and op in CPU_ONLY:
        pytest.skip(f"{op} has no CUDA kernel: a GPU takes torch's")
    if op == "matmul_pack_" and not has_rounded_products():
        pytest.skip("this CPU has no products of bf16 to pack for")
    torch.manual_seed(0)
    for sample in SAMPLES[op]():
        torch.library.opcheck(getattr(torch.ops.fdpg, op).default, moved(sample, device))

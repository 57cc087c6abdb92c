"""linear_logprob and weighted_linear_logprob against plain PyTorch in fp64."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fdpg_fast import ops


class Case(NamedTuple):
    """Shapes and options of one call; N rows, D hidden, V vocabulary."""

    n: int
    d: int
    v: int
    bias: bool = False
    mask: bool = False
    scale: float = 1.0
    softcap: float | None = None
    inv_temperature: float = 1.0
    chunk: int | None = None

    def __str__(self) -> str:
        return "-".join(str(x) for x in self)


CASES = [
    Case(1, 1, 1),
    Case(7, 5, 7, chunk=1),
    Case(13, 8, 1000, bias=True, chunk=4),
    Case(33, 16, 257, mask=True, chunk=8),
    Case(33, 16, 257, mask=True, bias=True, scale=0.4, softcap=3.0, chunk=33),
    Case(20, 12, 50, softcap=2.0, inv_temperature=1.7, chunk=7),
    Case(20, 12, 50, scale=2.0, inv_temperature=0.5, chunk=100),
    Case(200, 32, 5000, bias=True, mask=True),
    Case(0, 4, 9),
]


class Inputs(NamedTuple):
    hidden: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None
    mask: Tensor | None

    def to(self, dtype: torch.dtype) -> Inputs:
        """Leaves of another dtype with the same values."""
        leaves = [
            None if t is None else t.detach().to(dtype).requires_grad_()
            for t in (self.hidden, self.weight, self.bias)
        ]
        return Inputs(leaves[0], leaves[1], self.target, leaves[2], self.mask)

    def leaves(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]


def make(case: Case, dtype: torch.dtype = torch.float32) -> Inputs:
    torch.manual_seed(case.n)
    mask = torch.rand(case.n) > 0.3 if case.mask else None
    target = torch.randint(case.v, (case.n,))
    if mask is not None:
        target[~mask] = -100  # not looked at
    inputs = Inputs(
        torch.randn(case.n, case.d),
        torch.randn(case.v, case.d),
        target,
        torch.randn(case.v) if case.bias else None,
        mask,
    )
    return inputs.to(dtype)


def options(case: Case) -> dict[str, Any]:
    return {
        "scale": case.scale,
        "softcap": case.softcap,
        "inv_temperature": case.inv_temperature,
    }


def plain(case: Case, x: Inputs) -> list[Tensor]:
    """logp, lse, entropy as one writes them, in the dtype of the inputs."""
    z = x.hidden @ x.weight.t()
    if x.bias is not None:
        z = z + x.bias
    z = z * case.scale
    if case.softcap is not None:
        z = case.softcap * torch.tanh(z / case.softcap)
    z = z * case.inv_temperature
    log_p = z.log_softmax(-1)
    logp = log_p.gather(-1, x.target.clamp(min=0)[:, None])[:, 0]
    results = [logp, z.logsumexp(-1), -(log_p.exp() * log_p).sum(-1)]
    return results if x.mask is None else [torch.where(x.mask, r, 0) for r in results]


def fused(case: Case, x: Inputs) -> list[Tensor]:
    result = ops.linear_logprob(
        x.hidden,
        x.weight,
        x.target,
        bias=x.bias,
        mask=x.mask,
        entropy=True,
        chunk=case.chunk,
        **options(case),
    )
    assert result.entropy is not None
    return [result.logp, result.lse, result.entropy]


def weighted(case: Case, x: Inputs, coefficient: Tensor) -> tuple[Tensor, Tensor]:
    return ops.weighted_linear_logprob(
        x.hidden,
        x.weight,
        x.target,
        coefficient,
        bias=x.bias,
        mask=x.mask,
        chunk=case.chunk,
        **options(case),
    )


def worst(a: list[Tensor], b: list[Tensor]) -> float:
    pairs = [(x.double(), y.double()) for x, y in zip(a, b, strict=True) if x.numel()]
    return max(((x - y).abs().max().item() for x, y in pairs), default=0.0)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_values(case: Case, dtype: torch.dtype) -> None:
    """No further from fp64 than plain PyTorch is; bf16 inputs give fp32 log-probs."""
    x = make(case, dtype)
    truth = plain(case, x.to(torch.float64))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    got, eager = fused(case, x), plain(case, x.to(compute))
    assert all(r.dtype == compute and r.shape == (case.n,) for r in got)
    assert worst(got, truth) <= worst(eager, truth) + (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case: Case) -> None:
    x = make(case)
    c = torch.randn(3, case.n)

    def gradients(results: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
        loss = sum((c[i].to(r.dtype) * r).sum() for i, r in enumerate(results))
        return list(torch.autograd.grad(loss, leaves))

    wide = x.to(torch.float64)
    truth = gradients(plain(case, wide), wide.leaves())
    eager = gradients(plain(case, x), x.leaves())
    got = gradients(fused(case, x), x.leaves())
    assert worst(got, truth) <= 2 * worst(eager, truth) + 1e-6


@pytest.mark.parametrize("case", [c for c in CASES if c.v <= 60 or c.v == 257], ids=str)
def test_gradcheck(case: Case) -> None:
    small = case._replace(n=min(case.n, 5), v=min(case.v, 11), d=min(case.d, 3))
    x = make(small, torch.float64)

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        bias = leaves[2] if small.bias else None
        return tuple(fused(small, Inputs(leaves[0], leaves[1], x.target, bias, x.mask)))

    assert torch.autograd.gradcheck(call, x.leaves())


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weighted_sum(case: Case, dtype: torch.dtype) -> None:
    """The same sum and gradient as by way of linear_logprob, whatever comes from above."""
    x = make(case, dtype)
    c = torch.randn(case.n)
    total, logp = weighted(case, x, c)
    by_way = fused(case, x)[0]
    assert total.dtype == torch.float64
    assert not logp.requires_grad
    torch.testing.assert_close(logp, by_way.detach())
    torch.testing.assert_close(total, (c.double() * by_way.double()).sum())
    got = torch.autograd.grad(3 * total, x.leaves())
    expected = torch.autograd.grad(3 * (c * by_way).sum(), x.leaves())
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)


def test_weighted_gradcheck() -> None:
    case = Case(5, 3, 11, bias=True, mask=True, scale=0.7, softcap=2.0, chunk=2)
    x, c = make(case, torch.float64), torch.randn(5)

    def call(*leaves: Tensor) -> Tensor:
        return weighted(case, Inputs(leaves[0], leaves[1], x.target, leaves[2], x.mask), c)[0]

    assert torch.autograd.gradcheck(call, x.leaves())


def test_no_gradient_is_computed_that_nobody_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(9, 4, 17, bias=True, chunk=4)
    x = make(case)
    frozen = Inputs(x.hidden, x.weight.detach(), x.target, x.bias.detach(), None)
    fused(case, frozen)[0].sum().backward()
    assert x.hidden.grad is not None
    total, _ = weighted(case, frozen, torch.ones(9))
    (grad,) = torch.autograd.grad(total, [x.hidden])
    torch.testing.assert_close(grad, x.hidden.grad)
    with torch.no_grad():
        outputs = torch.ops.fdpg.weighted_linear_logprob(
            *(frozen.hidden, frozen.weight, frozen.target, torch.ones(9), frozen.bias),
            *(1.0, None, 1.0, None, 4, False, False, False),
        )
    assert [t.numel() for t in outputs[2:]] == [0, 0, 0]


def test_never_more_than_a_chunk_of_logits() -> None:
    """The largest thing allocated, forward and backward, is a chunk of logits."""
    n, d, v, chunk = 256, 8, 4096, 16
    x = make(Case(n, d, v))
    with torch.profiler.profile(profile_memory=True, record_shapes=False) as profile:
        case = Case(n, d, v, chunk=chunk)
        fused(case, x)[0].sum().backward()
        weighted(case, x, torch.ones(n))[0].backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 4 * chunk * v


@pytest.mark.parametrize("chunk", [1, 5, 16, 1000])
def test_chunks_change_rounding_only(chunk: int) -> None:
    case = Case(50, 16, 300, bias=True, mask=True)
    x = make(case)
    whole, parts = fused(case, x), fused(case._replace(chunk=chunk), x)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_two_runs_are_equal_bit_for_bit() -> None:
    case = Case(50, 16, 300, bias=True, mask=True, chunk=8)
    x = make(case)

    def run() -> list[Tensor]:
        results = fused(case, x)
        return [*results, *torch.autograd.grad(results[0].sum() + results[2].sum(), x.leaves())]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_strided_hidden() -> None:
    """Hidden states that are a slice of something wider, as models hand them over."""
    case = Case(12, 6, 31, chunk=5)
    x = make(case)
    wide = torch.randn(12, 20)
    wide[:, 3:9] = x.hidden.detach()
    view = x._replace(hidden=wide[:, 3:9])
    for a, b in zip(fused(case, x), fused(case, view), strict=True):
        assert torch.equal(a, b)


def test_compiles_to_one_node() -> None:
    """torch.compile sees one op for the whole head, and the same values."""
    case = Case(10, 6, 31, bias=True, chunk=4)
    x = make(case)
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        seen.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph

    def logp(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.linear_logprob(hidden, weight, x.target, bias=bias, chunk=4).logp

    compiled = torch.compile(logp, fullgraph=True, backend=backend)
    assert torch.equal(compiled(*x.leaves()), logp(*x.leaves()))
    assert [name for name in seen if "getitem" not in name] == ["fdpg.linear_logprob.default"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_low_precision_products_of_a_gpu(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that keeps bf16 inputs as they are, with torch's GPU-only product imitated."""

    def mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        assert a.dtype == b.dtype == torch.bfloat16
        product = a.to(out_dtype) @ b.to(out_dtype)
        return product if out is None else out.copy_(product)

    module = sys.modules["fdpg_fast.ops.linear_logprob"]
    x, c = make(case, torch.bfloat16), torch.randn(case.n)
    expected = fused(case, x)
    expected_grads = torch.autograd.grad((c * expected[0]).sum(), x.leaves())
    monkeypatch.setattr(module, "_multiplies_as_they_are", lambda hidden, weight: True)
    monkeypatch.setattr(torch, "mm", mm)
    got = fused(case, x)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    for total in ((c * got[0]).sum(), weighted(case, x, c)[0]):
        for a, b in zip(torch.autograd.grad(total, x.leaves()), expected_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)  # gradients are rounded to bf16


def test_infinite_bias_removes_a_token() -> None:
    """A vocabulary padded by a bias of -inf: no NaN forward or backward."""
    case = Case(6, 4, 9, bias=True, chunk=4)
    x = make(case)
    x.target.clamp_(max=7)
    with torch.no_grad():
        x.bias[8] = -torch.inf
    result = fused(case, x)
    grads = torch.autograd.grad(result[0].sum() + result[2].sum(), x.leaves())
    assert all(t.isfinite().all() for t in (*result, *grads))
    assert grads[2][8] == 0

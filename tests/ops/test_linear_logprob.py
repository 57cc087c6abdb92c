"""linear_logprob against plain PyTorch in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from head_cases import (
    CASES,
    PRODUCTS,
    Case,
    Inputs,
    keep_bf16,
    make,
    multiply_by,
    options,
    plain,
    results_of_products,
    split_vocabulary,
    worst,
)
from torch import Tensor

from fdpg_fast import ops

# Backward from what forward kept, or from the hidden states again.
KEPT = pytest.mark.parametrize("keep_bytes", [None, 0], ids=["kept", "recomputed"])


def fused(case: Case, x: Inputs, keep_bytes: int | None = None) -> list[Tensor]:
    result = ops.linear_logprob(
        x.hidden,
        x.weight,
        x.target,
        bias=x.bias,
        mask=x.mask,
        entropy=True,
        keep_bytes=keep_bytes,
        chunk=case.chunk,
        **options(case),
    )
    assert result.entropy is not None
    return [result.logp, result.lse, result.entropy]


@pytest.mark.parametrize("whose", ["torch", "ours"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_values(
    case: Case, dtype: torch.dtype, whose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No further from fp64 than plain PyTorch is; bf16 inputs give fp32 log-probs."""
    multiply_by(monkeypatch, whose)
    x = make(case, dtype)
    truth = plain(case, x.to(torch.float64))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    got, eager = fused(case, x), plain(case, x.to(compute))
    assert all(r.dtype == compute and r.shape == (case.n,) for r in got)
    assert worst(got, truth) <= worst(eager, truth) + (1e-12 if dtype == torch.float64 else 1e-5)


@KEPT
@PRODUCTS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(
    case: Case,
    whose: str,
    granule: int,
    keep_bytes: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    multiply_by(monkeypatch, whose)
    split_vocabulary(monkeypatch, granule)
    x = make(case)
    c = torch.randn(3, case.n)

    def gradients(results: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
        loss = sum((c[i].to(r.dtype) * r).sum() for i, r in enumerate(results))
        return list(torch.autograd.grad(loss, leaves))

    wide = x.to(torch.float64)
    truth = gradients(plain(case, wide), wide.leaves())
    eager = gradients(plain(case, x), x.leaves())
    got = gradients(fused(case, x, keep_bytes), x.leaves())
    assert worst(got, truth) <= 2 * worst(eager, truth) + 1e-6


@KEPT
@pytest.mark.parametrize("case", [c for c in CASES if c.v <= 60 or c.v == 257], ids=str)
def test_gradcheck(case: Case, keep_bytes: int | None) -> None:
    small = case._replace(n=min(case.n, 5), v=min(case.v, 11), d=min(case.d, 3))
    x = make(small, torch.float64)

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        bias = leaves[2] if small.bias else None
        inputs = Inputs(leaves[0], leaves[1], x.target, bias, x.mask)
        return tuple(fused(small, inputs, keep_bytes))

    assert torch.autograd.gradcheck(call, x.leaves())


@KEPT
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("learns", ["hidden", "weight", "bias"])
def test_no_gradient_is_computed_that_nobody_needs(
    learns: str, entropy: bool, keep_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = make(Case(9, 4, 17, bias=True))
    given = {name: getattr(x, name).detach() for name in ("hidden", "weight", "bias")}
    given[learns].requires_grad_()
    results = results_of_products(monkeypatch)
    logp = ops.linear_logprob(
        **given, target=x.target, entropy=entropy, keep_bytes=keep_bytes, chunk=4
    ).logp
    logp.sum().backward()
    assert given[learns].grad is not None
    assert any(shape[1] == 4 for shape in results) == (learns != "bias")
    assert any(shape == (17, 4) for shape in results) == (learns == "weight")


def allocated(run: Callable[[], object]) -> int:
    """The largest thing that ``run`` allocates, in bytes."""
    # acc_events: or torch 2.11 warns that only the last cycle's are kept; there is one.
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        run()
    return max(event.cpu_memory_usage for event in profile.events())


def test_never_more_than_a_chunk_of_logits_unless_they_may_be_kept() -> None:
    n, d, v, chunk = 256, 8, 4096, 16
    x, case = make(Case(n, d, v)), Case(n, d, v, chunk=chunk)

    def learn(keep_bytes: int) -> Callable[[], None]:
        return lambda: fused(case, x, keep_bytes)[0].sum().backward()

    logits = 4 * n * v
    assert 0 < allocated(learn(0)) <= 4 * chunk * v
    assert 0 < allocated(learn(logits - 1)) <= 4 * chunk * v
    assert logits <= allocated(learn(logits)) <= logits + 4 * chunk * v
    with torch.no_grad():  # nothing to keep it for
        assert allocated(lambda: fused(case, x, logits)) <= 4 * chunk * v


def test_backward_twice_from_what_was_kept() -> None:
    case = Case(12, 6, 31, softcap=2.0, chunk=5)
    x = make(case)
    logp = fused(case, x)[0].sum()
    first = torch.autograd.grad(logp, x.leaves(), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(logp, x.leaves()), strict=True):
        assert torch.equal(a, b)


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
    """Hidden states that are a slice of something wider, as models hand them over.

    Not bit for bit: on some CPUs the matrix product takes another kernel for another row stride.
    """
    case = Case(12, 6, 31, chunk=5)
    x = make(case)
    wide = torch.randn(12, 20)
    wide[:, 3:9] = x.hidden.detach()
    view = x._replace(hidden=wide[:, 3:9])
    for a, b in zip(fused(case, x), fused(case, view), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["hidden", "weight"])
def test_inputs_that_are_contiguous_nowhere(which: str, dtype: torch.dtype) -> None:
    """Every second column of something: the same numbers, whatever they are multiplied by."""
    case = Case(12, 6, 31, chunk=5)
    x = make(case, dtype)
    twice = getattr(x, which).detach().repeat_interleave(2, 1)
    found = []
    for inputs in (x, x._replace(**{which: twice[:, ::2].requires_grad_()})):
        logp, lse, _ = fused(case, inputs)
        found.append([logp, *torch.autograd.grad(logp.sum() + lse.sum(), inputs.leaves())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


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


@KEPT
@pytest.mark.parametrize("where", ["cpu", "gpu"])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bf16_as_it_is(
    case: Case, entropy: bool, where: str, keep_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of logp alone, from kept numerators, and with those of lse and entropy."""
    x = make(case, torch.bfloat16)
    wide = x.to(torch.float64)
    c = torch.randn(3, case.n)
    wanted = slice(0, 3) if entropy else slice(0, 1)

    def loss(results: list[Tensor]) -> Tensor:
        rows = zip(c[wanted], results[wanted], strict=True)
        return sum(((row.to(r.dtype) * r).sum() for row, r in rows), torch.zeros(()))

    truth = torch.autograd.grad(loss(plain(case, wide)), wide.leaves())
    keep_bf16(monkeypatch, where)
    result = ops.linear_logprob(
        x.hidden,
        x.weight,
        x.target,
        bias=x.bias,
        mask=x.mask,
        entropy=entropy,
        keep_bytes=keep_bytes,
        chunk=case.chunk,
        **options(case),
    )
    got = torch.autograd.grad(loss([r for r in result if r is not None]), x.leaves())
    for a, b in zip(got, truth, strict=True):  # gradients are rounded to bf16
        torch.testing.assert_close(a.double(), b, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("where", ["cpu", "gpu"])
def test_numerators_are_kept_in_16_bits(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    n, d, v = 64, 8, 4096
    x = make(Case(n, d, v), torch.bfloat16)
    keep_bf16(monkeypatch, where)
    logp = ops.linear_logprob(x.hidden, x.weight, x.target, keep_bytes=2 * n * v, chunk=16).logp
    *_, kept, _ = logp.grad_fn.saved_tensors  # type: ignore[union-attr]
    assert kept.dtype == torch.bfloat16
    assert kept.shape == (n, v)


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

"""policy_gradient against autograd of plain PyTorch in fp64, and against linear_logprob."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from head_cases import (
    CASES,
    PRODUCTS,
    Case,
    Inputs,
    keep_bf16,
    keep_masked_rows,
    make,
    multiply_by,
    options,
    plain,
    results_of_products,
    split_vocabulary,
    widen_bf16,
    worst,
)
from torch import Tensor

from fdpg_fast import ops, reference
from fdpg_fast.ops.linear_head import LinearHead, multiplies_as_they_are
from fdpg_fast.ops.memory import LEAST_BYTES


def policy_gradient(
    case: Case, x: Inputs, coefficient: Tensor, **further: Any
) -> ops.PolicyGradient:
    return ops.policy_gradient(
        x.hidden,
        x.weight,
        x.target,
        coefficient,
        bias=x.bias,
        mask=x.mask,
        chunk=case.chunk,
        **options(case),
        **further,
    )


def linear_logprob(case: Case, x: Inputs, **further: Any) -> ops.TokenLogprob:
    return ops.linear_logprob(
        x.hidden,
        x.weight,
        x.target,
        bias=x.bias,
        mask=x.mask,
        chunk=case.chunk,
        **options(case),
        **further,
    )


def gradients(result: ops.PolicyGradient) -> list[Tensor]:
    return [t for t in result[2:] if t is not None]


def by_autograd(case: Case, x: Inputs, coefficient: Tensor) -> list[Tensor]:
    """logp, lse, and the gradients of the leaves."""
    logp, lse, _ = plain(case, x)
    loss = (coefficient.to(logp.dtype) * logp).sum()
    return [logp.detach(), lse.detach(), *torch.autograd.grad(loss, x.leaves())]


@PRODUCTS
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_value_and_gradients(
    case: Case,
    dtype: torch.dtype,
    whose: str,
    granule: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Within twice plain PyTorch's distance from fp64; fp32 even for bf16 inputs."""
    multiply_by(monkeypatch, whose)
    split_vocabulary(monkeypatch, granule)
    widen_bf16(monkeypatch)
    x = make(case, dtype)
    c = torch.randn(case.n)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    truth = by_autograd(case, x.to(torch.float64), c)
    eager = by_autograd(case, x.to(compute), c)
    result = policy_gradient(case, x, c)
    got = [result.logp, result.lse, *gradients(result)]
    assert all(t.dtype == compute and not t.requires_grad for t in got)
    assert worst(got, truth) <= 2 * worst(eager, truth) + (
        1e-13 if dtype == torch.float64 else 1e-6
    )


@pytest.mark.parametrize("needs", list(itertools.product((True, False), repeat=3)))
@pytest.mark.parametrize("bias", [True, False])
def test_says_what_the_definition_says(needs: tuple[bool, bool, bool], bias: bool) -> None:
    case = Case(33, 16, 257, mask=True, bias=bias, scale=0.4, softcap=3.0, inv_temperature=1.3)
    x, c = make(case), torch.randn(33)
    arguments = {
        "bias": x.bias,
        "mask": x.mask,
        "need_hidden": needs[0],
        "need_weight": needs[1],
        "need_bias": needs[2],
        "add_to_weight": torch.randn(257, 16),
        "add_to_bias": torch.randn(257),
        **options(case),
    }
    expected = reference.policy_gradient(x.hidden, x.weight, x.target, c, **arguments)
    got = ops.policy_gradient(x.hidden, x.weight, x.target, c, **arguments)
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_gradient_of_linear_logprob(case: Case) -> None:
    x, c = make(case), torch.randn(case.n)
    logp, lse, _ = linear_logprob(case, x)
    result = policy_gradient(case, x, c)
    assert torch.equal(result.logp, logp.detach())
    assert torch.equal(result.lse, lse.detach())
    expected = torch.autograd.grad((c * logp).sum(), x.leaves())
    for a, b in zip(gradients(result), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("cpu_isa")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_others(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor on chunks and threads, where products are ours: the same bits."""
    matmul = sys.modules["fdpg_fast.ops.matmul"]
    monkeypatch.setattr(matmul, "library", lambda: (True, "the test says so"))
    monkeypatch.setattr(matmul, "_LEAST_FACTOR", 0)
    monkeypatch.setattr(matmul, "_TAKES_ACROSS", True)
    case = Case(37, 70, 1003, bias=True, softcap=3.0)  # many rows more than _LEAST
    x, c = make(case, dtype), torch.randn(37)
    whole = policy_gradient(case, x, c)
    threads = torch.get_num_threads()
    for n, chunk in ((1, 1), (2, None), (3, 2), (4, 4), (9, None), (37, 5)):
        part = Inputs(x.hidden[:n], x.weight, x.target[:n], x.bias, None)
        torch.set_num_threads(1 if n == 9 else threads)
        found = policy_gradient(case._replace(chunk=chunk), part, c[:n])
        alone = linear_logprob(case._replace(chunk=chunk), part)
        torch.set_num_threads(threads)
        for logp, lse in (found[:2], alone[:2]):
            assert torch.equal(logp, whole.logp[:n])
            assert torch.equal(lse, whole.lse[:n])
        if n >= 4 and chunk != 5:  # the last chunk of 5 has 2
            assert torch.equal(found.hidden, whole.hidden[:n])


@pytest.mark.usefixtures("cpu_isa")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("error", [0.0, 0.05, -5.0, 300.0, -torch.inf, torch.nan])
def test_exact_whatever_the_hint(
    error: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the kernel that makes use of it: log-probs in one with their product."""
    multiply_by(monkeypatch, "ours")
    fused, hints = LinearHead._fused, []

    def watched(self: LinearHead, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        hints.append(arguments[4])
        return fused(self, *arguments)

    monkeypatch.setattr(LinearHead, "_fused", watched)
    case = Case(33, 16, 257, mask=True, bias=True, chunk=8)
    x, c = make(case, dtype), torch.randn(33)
    logp, lse, *truth = by_autograd(case, x.to(torch.float64), c)
    found = policy_gradient(case, x, c, lse_hint=lse.float() + error)
    assert len(hints) == 3  # chunks of the rows that are not masked
    assert all(hint is not None for hint in hints)
    values = [found.logp.double(), found.lse.double()]
    torch.testing.assert_close(values, [logp, lse], rtol=1e-6, atol=1e-6)
    tolerance = 2e-2 if dtype == torch.bfloat16 and multiplies_as_they_are(*x[:2]) else 1e-5
    for got, expected in zip(gradients(found), truth, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def test_adds_to_what_is_there() -> None:
    case = Case(33, 16, 257, bias=True, chunk=8)
    x, c = make(case), torch.randn(33)
    fresh = policy_gradient(case, x, c)
    weight, bias = torch.randn(257, 16), torch.randn(257)
    added = policy_gradient(case, x, c, add_to_weight=weight.clone(), add_to_bias=bias.clone())
    torch.testing.assert_close(added.weight, weight + fresh.weight)
    torch.testing.assert_close(added.bias, bias + fresh.bias)


@pytest.mark.parametrize("all_masked", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_new_memory_holds_is_nowhere_in_a_gradient(
    case: Case, all_masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new gradient is written by the first chunk, or is zeros if there is none."""
    x, c = make(case), torch.randn(case.n)
    if all_masked:
        x = x._replace(mask=torch.zeros(case.n, dtype=torch.bool))
    weight = torch.zeros(case.v, case.d)
    expected = gradients(policy_gradient(case, x, c, add_to_weight=weight))
    empty = Tensor.new_empty

    def poisoned(self: Tensor, *size: Any, **options: Any) -> Tensor:
        made = empty(self, *size, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    torch.testing.assert_close(gradients(policy_gradient(case, x, c)), expected)
    for keep_bytes in (None, 0):
        logp = linear_logprob(case, x, keep_bytes=keep_bytes).logp
        found = torch.autograd.grad((c * logp).sum(), x.leaves())
        torch.testing.assert_close(list(found), expected, rtol=1e-5, atol=1e-5)


def test_only_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(9, 4, 17, bias=True, chunk=4)
    x, c = make(case), torch.randn(9)
    every = policy_gradient(case, x, c)
    without_hidden = policy_gradient(case, x, c, need_hidden=False)
    assert without_hidden.hidden is None
    torch.testing.assert_close(gradients(without_hidden), gradients(every)[1:])
    results = results_of_products(monkeypatch)
    frozen = policy_gradient(case, x, c, need_weight=False)
    assert frozen.weight is None
    torch.testing.assert_close([frozen.hidden, frozen.bias], [every.hidden, every.bias])
    assert (17, 4) not in results
    policy_gradient(case, x, c)
    assert (17, 4) in results


def test_coefficient_zero_gives_values_and_no_gradient() -> None:
    case = Case(13, 8, 1000, bias=True, chunk=4)
    x, c = make(case), torch.randn(13)
    c[3] = c[7] = 0
    with torch.no_grad():
        x.hidden[3] *= 1e30  # its numerators would be 0 * inf
    result = policy_gradient(case, x, c)
    assert result.hidden is not None
    assert result.logp[7] < 0
    assert not result.hidden[[3, 7]].any()
    assert all(t.isfinite().all() for t in gradients(result))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["cpu", "gpu"])
def test_what_masked_rows_hold_is_nowhere(
    where: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of padding, that is: NaN and infinity too, in hidden states and in gradients from above."""
    case = Case(33, 16, 257, mask=True, bias=True, chunk=8)
    x, c = make(case, dtype), torch.randn(33)
    if dtype == torch.bfloat16:
        keep_bf16(monkeypatch, where)
    elif where == "gpu":
        multiply_by(monkeypatch, "torch")
        keep_masked_rows(monkeypatch)

    def every() -> list[Tensor]:
        found = [*policy_gradient(case, x, c)]
        for keep_bytes in (None, 0):
            logp, lse, _ = linear_logprob(case, x, keep_bytes=keep_bytes)
            for loss in ((c * logp).sum(), (c * logp).sum() + (c * lse).sum()):
                found += torch.autograd.grad(loss, x.leaves(), retain_graph=True)
        return found

    expected = every()
    bad = (~x.mask).nonzero()[:, 0]
    with torch.no_grad():
        x.hidden[bad[::2]], x.hidden[bad[1::2]] = torch.nan, torch.inf
        c[bad[::2]], c[bad[1::2]] = torch.inf, torch.nan
    for got, clean in zip(every(), expected, strict=True):
        assert torch.equal(got, clean)


@pytest.mark.parametrize("v", [31, LEAST_BYTES // 24 + 1])
def test_compiles_to_one_node(v: int) -> None:
    """torch.compile sees one op for value and gradients, be they small or large."""
    case = Case(10, 6, v, bias=True, mask=True, chunk=4)
    x, c = make(case), torch.randn(10)
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        seen.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph

    def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        return [*policy_gradient(case, x._replace(hidden=hidden, weight=weight, bias=bias), c)]

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    for got, expected in zip(compiled(*x.leaves()), run(*x.leaves()), strict=True):
        assert torch.equal(got, expected)
    assert [name for name in seen if name.startswith("fdpg")] == ["fdpg.policy_gradient.default"]


def test_never_more_than_a_chunk_of_logits() -> None:
    n, d, v, chunk = 256, 8, 4096, 16
    x, case = make(Case(n, d, v)), Case(n, d, v, chunk=chunk)
    # acc_events: or torch 2.11 warns that only the last cycle's are kept; there is one.
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        policy_gradient(case, x, torch.ones(n))
    assert 0 < max(event.cpu_memory_usage for event in profile.events()) <= 4 * chunk * v


def test_two_runs_are_equal_bit_for_bit() -> None:
    case = Case(50, 16, 300, bias=True, mask=True, chunk=8)
    x, c = make(case), torch.randn(50)
    for a, b in zip(policy_gradient(case, x, c), policy_gradient(case, x, c), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("where", ["cpu", "gpu"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bf16_as_it_is(case: Case, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probs are those of fp32 logits all the same."""
    x, c = make(case, torch.bfloat16), torch.randn(case.n)
    truth = by_autograd(case, x.to(torch.float64), c)
    keep_bf16(monkeypatch, where)
    result = policy_gradient(case, x, c)
    for a, b in zip([result.logp, result.lse], truth[:2], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(result), truth[2:], strict=True):
        # Numerators and scaled hidden states are rounded to bf16.
        torch.testing.assert_close(a.double(), b, rtol=0.02, atol=0.02)


REFUSED: list[tuple[Callable[[], object], str]] = [
    (
        lambda: ops.policy_gradient(
            torch.zeros(3, 4),
            torch.zeros(5, 4),
            torch.zeros(3).long(),
            None,  # type: ignore[arg-type]
        ),
        "policy_gradient: `coefficient` must have shape [3], got None",
    ),
    (
        lambda: ops.policy_gradient(
            *(torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3).long(), torch.zeros(3)),
            add_to_weight=torch.zeros(4, 5).t(),
        ),
        "policy_gradient: `add_to_weight` must be contiguous, got strides [1, 5]",
    ),
    (
        lambda: ops.policy_gradient(
            torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3).long(), torch.zeros(2)
        ),
        "policy_gradient: `coefficient` must have shape [3], got [2]",
    ),
    (
        lambda: ops.policy_gradient(
            torch.zeros(3, 4),
            torch.zeros(5, 4),
            torch.zeros(3).long(),
            torch.zeros(3),
            add_to_weight=torch.zeros(5, 4).double(),
        ),
        "policy_gradient: `add_to_weight` must be torch.float32 of shape [5, 4] on cpu, got "
        "torch.float64",
    ),
    (
        lambda: ops.policy_gradient(
            torch.zeros(3, 4), torch.zeros(5, 4), torch.tensor([0, 5, 0]), torch.zeros(3)
        ),
        "policy_gradient: `target` must be in [0, 5), got 5 at row 1",
    ),
    (
        lambda: ops.policy_gradient(
            torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3).int(), torch.zeros(3)
        ),
        "policy_gradient: `target` must be torch.int64, got torch.int32",
    ),
    (
        lambda: ops.policy_gradient(
            *(torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3).long(), torch.zeros(3)),
            mask=torch.ones(3).int(),
        ),
        "policy_gradient: `mask` must be torch.bool, got torch.int32",
    ),
    (
        lambda: ops.policy_gradient(
            *(torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3).long(), torch.zeros(3)),
            inv_temperature=-1.0,
        ),
        "policy_gradient: `inv_temperature` must be positive and finite, got -1.0",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_message(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match="policy_gradient") as caught:
        call()
    assert message in str(caught.value)

"""Heads of a language model, small and awkward, and what they come to in plain PyTorch."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


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


# Whose products they are, and whether they are in two parts, as on a GPU.
PRODUCTS = pytest.mark.parametrize(("whose", "granule"), [("torch", 1), ("torch", 8), ("ours", 1)])


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


def worst(a: list[Tensor], b: list[Tensor]) -> float:
    pairs = [(x.double(), y.double()) for x, y in zip(a, b, strict=True) if x.numel()]
    return max(((x - y).abs().max().item() for x, y in pairs), default=0.0)


def multiply_by(monkeypatch: pytest.MonkeyPatch, whose: str) -> None:
    """Have fp32 products be ours or torch's, whatever this CPU would have, and small ones too."""
    matmul = sys.modules["fdpg_fast.ops.matmul"]
    monkeypatch.setattr(matmul, "library", lambda: (whose == "ours", "the test says so"))
    monkeypatch.setattr(matmul, "fuses", lambda: whose == "ours")
    monkeypatch.setattr(matmul, "_LEAST", 0)
    monkeypatch.setattr(matmul, "_LEAST_ROWS", 0)
    monkeypatch.setattr(matmul, "_LEAST_FACTOR", 0)
    monkeypatch.setattr(matmul, "_TAKES_ACROSS", True)


@contextlib.contextmanager
def calls_of_ours() -> Iterator[list[tuple[int, ...]]]:
    """n, k, m of each product of ours."""
    found: list[tuple[int, ...]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> object:
            if func is torch.ops.fdpg.matmul_.default:
                found.append((*args[1].shape, args[0].shape[1]))
            return func(*args, **(kwargs or {}))

    with Watch():
        yield found


def results_of_products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of what each product of a head is written or added to; not of one in one with its
    log-probs."""
    head, found = sys.modules["fdpg_fast.ops.linear_head"], []
    product, add_product_ = head.product, head.add_product_

    def watched(*factors: Tensor, out: Tensor, **options: Any) -> Tensor:
        found.append(tuple(out.shape))
        return product(*factors, out=out, **options)

    def watched_add_(to: Tensor, *rest: Any) -> None:
        found.append(tuple(to.shape))
        add_product_(to, *rest)

    monkeypatch.setattr(head, "product", watched)
    monkeypatch.setattr(head, "add_product_", watched_add_)
    return found


def keep_bf16(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Take the path that multiplies bf16 inputs as they are: of a CPU, whatever this one has, or of
    a GPU, with torch's GPU-only product imitated."""
    head, matmul = (sys.modules[f"fdpg_fast.ops.{name}"] for name in ("linear_head", "matmul"))
    monkeypatch.setattr(head, "has_wide_products", lambda _: True)
    if where != "gpu":
        return

    narrow = torch.addmm

    def addmm(
        sum_: Tensor,
        a: Tensor,
        b: Tensor,
        *,
        out_dtype: torch.dtype | None = None,
        beta: float = 1.0,
        alpha: float,
        out: Tensor,
        **options: Any,
    ) -> Tensor:
        assert sum_ is out
        if out_dtype is None:  # as on a CPU
            return narrow(sum_, a, b, beta=beta, alpha=alpha, out=out, **options)
        assert not options
        assert a.dtype == b.dtype == torch.bfloat16
        return narrow(sum_, a.to(out_dtype), b.to(out_dtype), beta=beta, alpha=alpha, out=out)

    split_vocabulary(monkeypatch, 16)
    keep_masked_rows(monkeypatch)
    for module in (head, matmul):
        monkeypatch.setattr(module, "is_ours", lambda *_, **__: False)
    monkeypatch.setattr(torch, "addmm", addmm)


def keep_masked_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the path of a GPU, on which masked rows go through the kernels; of those that take a
    mask, so products must be torch's."""
    for op in ("linear_logprob", "policy_gradient"):
        module = sys.modules[f"fdpg_fast.ops.{op}"]
        monkeypatch.setattr(module, "kept_rows", lambda mask: (None, mask))


def split_vocabulary(monkeypatch: pytest.MonkeyPatch, granule: int) -> None:
    """Take the path of a GPU, whose products over the vocabulary are in two parts."""
    monkeypatch.setitem(sys.modules["fdpg_fast.ops.linear_head"]._GRANULE, "cpu", granule)


def widen_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the path of a CPU that has no instructions for bf16."""
    head = sys.modules["fdpg_fast.ops.linear_head"]
    monkeypatch.setattr(head, "has_wide_products", lambda _: False)

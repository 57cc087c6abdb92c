"""Products of our own kernel are products, and go where they are asked for. The kernel's own tests
are in tests/csrc/test_matmul.cpp."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from head_cases import calls_of_ours, keep_bf16, multiply_by
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fdpg_fast import _build
from fdpg_fast.ops import matmul

LAYOUTS = {
    "rows": lambda x: x.contiguous(),
    "columns": lambda x: x.t().contiguous().t(),
    "padded": lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
    "every second": lambda x: x.repeat_interleave(2, 0)[::2],
    "expanded": lambda x: x[:1].expand_as(x),
    "neither": lambda x: x.repeat_interleave(2, 1)[:, ::2],
}


@pytest.fixture
def _ours(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply_by(monkeypatch, "ours")


@pytest.mark.usefixtures("_ours")
@pytest.mark.parametrize("layout_b", LAYOUTS)
@pytest.mark.parametrize("layout_a", LAYOUTS)
@pytest.mark.parametrize("bias", [False, True])
def test_product(bias: bool, layout_a: str, layout_b: str) -> None:
    torch.manual_seed(0)
    a, b = LAYOUTS[layout_a](torch.randn(9, 33)), LAYOUTS[layout_b](torch.randn(33, 70))
    c = torch.randn(70) if bias else None
    truth = -0.3 * (a.double() @ b.double() + (0 if c is None else c.double()))
    out = torch.full((9, 75), torch.nan)[:, :70]
    with calls_of_ours() as calls:
        assert matmul.product(a, b, c, scale=-0.3, out=out) is out
        torch.testing.assert_close(out.double(), truth, rtol=0, atol=4e-5)
        matmul.add_product_(out, a, b, 2.0)
    truth += 2 * (a.double() @ b.double())
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=1e-4)
    assert calls == [(9, 33, 70)] * 2


@pytest.mark.usefixtures("_ours")
def test_doubles_are_torchs() -> None:
    a, b = torch.randn(5, 6, dtype=torch.float64), torch.randn(6, 7, dtype=torch.float64)
    with calls_of_ours() as calls:
        assert torch.equal(matmul.product(a, b), a @ b)
    assert calls == []


@pytest.mark.usefixtures("cpu_isa")
@pytest.mark.parametrize("layout", ["rows", "neither"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_have_wide_products(dtype: torch.dtype, layout: str) -> None:
    """A sum of so many terms would lose most of its digits in 16 bits."""
    torch.manual_seed(0)
    a, b = (LAYOUTS[layout](torch.randn(*size).to(dtype)) for size in ((7, 999), (999, 65)))
    got = matmul.product(a, b)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), a.double() @ b.double(), rtol=0, atol=5e-4)
    rounded = torch.empty(7, 65, dtype=dtype)
    torch.ops.fdpg.matmul_(rounded, a, b)
    assert torch.equal(rounded, got.to(dtype))


@pytest.mark.parametrize("biased", [False, True])
def test_a_scale_is_no_pass_over_the_logits_of_a_gpu(
    biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bias is one, which writes it where the product is added to it."""
    keep_bf16(monkeypatch, "gpu")
    a, b = torch.randn(9, 33).bfloat16(), torch.randn(33, 70).bfloat16()
    bias = torch.randn(70) if biased else None
    out, passes = torch.full((9, 75), torch.nan)[:, :70], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> object:
            kwargs = kwargs or {}
            if any(x is out for x in (*args, *kwargs.values())):
                passes.append(str(func))
            return func(*args, **kwargs)

    with Watch():
        matmul.product(a, b, bias, scale=-0.3, out=out)
    assert passes == [*["aten.copy_.default"] * biased, "aten.addmm.out"]
    truth = -0.3 * (a.double() @ b.double() + (0 if bias is None else bias.double()))
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=4e-5)


@pytest.mark.skipif(not matmul.has_rounded_products(), reason="bf16 products are not ours here")
def test_a_factor_packed_once() -> None:
    """Gives the bits of one that is packed at every call, in memory that the next may have."""
    torch.manual_seed(0)
    weight, a = torch.randn(70, 33), torch.randn(9, 33).bfloat16()
    memory: dict[int, Tensor] = {}
    for _ in range(2):
        expected = torch.empty(9, 70)
        torch.ops.fdpg.matmul_(expected, a, weight.bfloat16().t(), None, 0.5)
        before = [packed.data_ptr() for packed in memory.values()]
        with matmul.rounding_once(weight.device, memory):
            packed = matmul.packed_once(weight)
            assert packed is not None
            assert packed is matmul.packed_once(weight)
            out = torch.full((9, 70), torch.nan)
            torch.ops.fdpg.matmul_(out, a, packed, None, 0.5)
        assert torch.equal(out, expected)
        assert before in ([], [packed.data_ptr()])
        weight.neg_()
    assert matmul.packed_once(weight) is None
    with matmul.rounding_once(weight.device, memory):
        pass
    assert memory == {}  # nobody wanted it
    with pytest.raises(RuntimeError, match=r"matmul_: `b` must have shape \[2, 16, 64, 2\], got"):
        torch.ops.fdpg.matmul_(out, a[:, :32], packed)


@pytest.mark.usefixtures("_ours")
@pytest.mark.parametrize("frozen", ["", "x", "weight", "bias"])
@pytest.mark.parametrize(("k", "m"), [(12, 40), (40, 12)])
def test_linear_and_its_gradient(k: int, m: int, frozen: str) -> None:
    torch.manual_seed(0)
    leaves = {"x": torch.randn(3, 5, k), "weight": torch.randn(m, k), "bias": torch.randn(m)}
    found = {}
    with calls_of_ours() as calls:
        for dtype, function in (
            (torch.float64, nn.functional.linear),
            (torch.float32, nn.functional.linear),
            (torch.float32, matmul.linear),
        ):
            x = {
                name: leaf.to(dtype).detach().requires_grad_(name != frozen)
                for name, leaf in leaves.items()
            }
            y = function(*x.values())
            (y * torch.arange(y.numel(), dtype=dtype).view_as(y).cos()).sum().backward()
            found[function, dtype] = [y, *(leaf.grad for leaf in x.values())]
    truth, eager, got = found.values()
    for t, e, g in zip(truth, eager, got, strict=True):
        assert (t is None) == (g is None)
        if t is not None and e is not None and g is not None:
            error = (g - t).abs().max()
            assert error <= 2 * (e - t).abs().max() + 1e-6
    assert len(calls) == 3 - (frozen in ("x", "weight"))


@pytest.mark.usefixtures("_ours")
def test_second_derivative_of_linear() -> None:
    """A penalty on a gradient is what it is with torch's."""
    torch.manual_seed(0)
    leaves = [torch.randn(6, 8), torch.randn(5, 8), torch.randn(5)]
    found = []
    for function in (nn.functional.linear, matmul.linear):
        x, weight, bias = (leaf.clone().requires_grad_() for leaf in leaves)
        y = function(x, weight, bias).tanh().sum()
        penalty = sum(g.square().sum() for g in torch.autograd.grad(y, x, create_graph=True))
        found.append(torch.autograd.grad(penalty, (x, weight, bias)))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_ours")
def test_linear_without_gradients_or_bias() -> None:
    x, weight = torch.randn(2, 3, 8), torch.randn(5, 8, requires_grad=True)
    with torch.no_grad(), calls_of_ours() as calls:
        y = matmul.linear(x, weight)
    assert y.shape == (2, 3, 5)
    assert not y.requires_grad
    torch.testing.assert_close(y, nn.functional.linear(x, weight))
    assert calls == [(6, 8, 5)]


@pytest.mark.usefixtures("_ours")
def test_bits_depend_neither_on_the_run_nor_on_other_rows_nor_on_threads() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(257, 3000), torch.randn(3000, 999)
    first = matmul.product(a, b)
    assert torch.equal(first, matmul.product(a, b))
    assert torch.equal(first[100:131], matmul.product(a[100:131], b))
    assert torch.equal(first[:, 500:], matmul.product(a, b[:, 500:]))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(first, matmul.product(a, b))
    finally:
        torch.set_num_threads(threads)


def test_products_may_be_rounded_where_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply_by(monkeypatch, "torch")
    rounds = _build.load().cpu_isa() in ("avx512bf16", "amx")
    a, b = torch.randn(8, 30), torch.randn(30, 40)
    exact = a.double() @ b.double()
    rounded = a.bfloat16().double() @ b.bfloat16().double()
    with calls_of_ours() as calls:
        matmul.product(a, b)
        with matmul.rounded_products(a.device):
            got = matmul.product(a, b)
            total = torch.ones(8, 40)
            matmul.add_product_(total, a, b, -1.0)
        torch.testing.assert_close(matmul.product(a, b).double(), exact, rtol=0, atol=2e-5)
    expected = rounded if rounds else exact
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(total.double(), 1 - expected, rtol=0, atol=2e-5)
    assert len(calls) == 2 * rounds


@pytest.mark.skipif(not matmul.has_rounded_products(), reason="bf16 products are not ours here")
def test_only_the_thread_that_says_so_rounds() -> None:
    weight, cpu = torch.randn(5, 6), torch.device("cpu")

    def state() -> tuple[bool, Tensor | None]:
        return matmul.may_round(), matmul.packed_once(weight)

    with ThreadPoolExecutor(1) as other:
        with matmul.rounded_products(cpu), matmul.rounding_once(cpu, {}):
            rounds, packed = state()
            assert rounds
            assert packed is not None
            assert other.submit(state).result() == (False, None)
        assert state() == (False, None)


def test_whose_products_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    decide = matmul.library.__wrapped__

    class Cpu:
        def __init__(self, vendor: str, isa: str = "avx512") -> None:
            self.cpu_vendor, self.cpu_isa = lambda: vendor, lambda: isa

    assert _build.load().cpu_vendor() in ("amd", "intel", "other")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    for name, expected in (("amd", True), ("intel", False), ("other", False)):
        monkeypatch.setattr(matmul, "load", lambda name=name: Cpu(name))
        used, why = decide()
        assert used == expected
        assert why.startswith("ours" if used else "torch's own")
    monkeypatch.setattr(matmul, "load", lambda: Cpu("amd", "avx2"))
    assert decide()[0]
    monkeypatch.setattr(matmul, "load", lambda: Cpu("amd", "portable"))  # told so: FDPG_CPU_ISA
    assert not decide()[0]
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert decide() == (False, "torch's own: this torch has no MKL to stay away from")


@pytest.mark.parametrize("takes", [True, False])
def test_rows_that_lie_across_are_ours_where_that_pays(
    takes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of a weight, but where all products shall be ours."""
    monkeypatch.setattr(matmul, "library", lambda: (True, "the test says so"))
    monkeypatch.setattr(matmul, "_TAKES_ACROSS", takes)
    a, b = torch.ones(500, 600), torch.ones(600, 700)
    across = a.t().contiguous().t()
    assert matmul.is_ours(a, b)
    assert matmul.is_ours(across, b) == takes
    with matmul.own_products():
        assert matmul.is_ours(across, b)


def test_messages() -> None:
    a, b, out = torch.ones(2, 3), torch.ones(3, 4), torch.ones(2, 4)

    def refused(message: str, *arguments: Tensor) -> None:
        with pytest.raises(RuntimeError, match=re.escape("matmul_: " + message)):
            torch.ops.fdpg.matmul_(*arguments)

    refused("`a` must have 2 dimensions, got shape [3]", out, a[0], b)
    refused("`b` must have shape [3, 4], got [2, 4]", out, a, b[:2])
    refused("`out` must have shape [2, 4], got [2, 3]", a, a, b)
    refused("`b` must be float32, got float64", out, a, b.double())
    refused("`out` must be float32, got float64", out.double(), a, b)
    rows = "`out` is written in place: its rows must be contiguous and not overlap, got strides "
    refused(rows + "[1, 2] for shape [2, 4]. Give a new tensor", out.t().contiguous().t(), a, b)
    refused(rows + "[0, 1] for shape [2, 4]. Give a new tensor", out[:1].expand(2, 4), a, b)
    refused("`bias` must have shape [4], got [3]", out, a, b, a[0])
    refused("`a` must be float32 or bfloat16 or float16 or float64, got int64", out, a.long(), b)

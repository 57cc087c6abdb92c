"""Products by oneDNN are products."""

from __future__ import annotations

import pytest
import torch
from head_cases import calls_of_onednn
from torch import Tensor, nn

from fdpg_fast import _build
from fdpg_fast.ops import products

LAYOUTS = {
    "rows": lambda x: x.contiguous(),
    "columns": lambda x: x.t().contiguous().t(),
    "padded": lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
    "every second": lambda x: x.repeat_interleave(2, 0)[::2],
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    return calls_of_onednn(monkeypatch)


@pytest.mark.parametrize("layout_b", LAYOUTS)
@pytest.mark.parametrize("layout_a", LAYOUTS)
@pytest.mark.parametrize("bias", [False, True])
def test_product(bias: bool, layout_a: str, layout_b: str, calls: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    a, b, c = torch.randn(9, 33), torch.randn(33, 70), torch.randn(70) if bias else None
    truth = -0.3 * (a.double() @ b.double() + (0 if c is None else c.double()))
    out = torch.full((9, 70), torch.nan)
    got = products.product(LAYOUTS[layout_a](a), LAYOUTS[layout_b](b), c, scale=-0.3, out=out)
    torch.testing.assert_close(got.double(), truth, rtol=0, atol=2e-5)
    assert products.put(got, out) is out
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=2e-5)
    # In other layouts oneDNN is right, and a thousand times slower.
    assert calls == ([(9, 33, 70)] if layout_b in ("rows", "columns") else [])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_numbers_are_torchs(dtype: torch.dtype, calls: list[tuple[int, ...]]) -> None:
    a, b = torch.randn(5, 6, dtype=dtype), torch.randn(6, 7, dtype=dtype)
    assert torch.equal(products.product(a, b), a @ b)
    assert calls == []


@pytest.mark.parametrize("n", [4, 40])
def test_add_product(n: int, calls: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    a, b, to = torch.randn(21, n), torch.randn(n, 17), torch.randn(21, 17)
    truth = to.double() + 0.7 * (a.double() @ b.double())
    products.add_product_(to, a, b, 0.7)
    torch.testing.assert_close(to.double(), truth, rtol=0, atol=2e-5)
    assert calls == [(17, n, 21)]  # the other way round, where the left factor is a short copy


@pytest.mark.parametrize("frozen", ["", "x", "weight", "bias"])
@pytest.mark.parametrize(("k", "m"), [(12, 40), (40, 12)])
def test_linear_and_its_gradient(k: int, m: int, frozen: str, calls: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    leaves = {"x": torch.randn(3, 5, k), "weight": torch.randn(m, k), "bias": torch.randn(m)}
    found = {}
    for dtype, function in (
        (torch.float64, nn.functional.linear),
        (torch.float32, nn.functional.linear),
        (torch.float32, products.linear),
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


def test_linear_without_gradients_or_bias(calls: list[tuple[int, ...]]) -> None:
    x, weight = torch.randn(2, 3, 8), torch.randn(5, 8, requires_grad=True)
    with torch.no_grad():
        y = products.linear(x, weight)
    assert y.shape == (2, 3, 5)
    assert not y.requires_grad
    torch.testing.assert_close(y, nn.functional.linear(x, weight))
    assert calls == [(6, 8, 5)]


def test_two_runs_are_equal_bit_for_bit(calls: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(257, 300), torch.randn(300, 999)
    first = products.product(a, b)
    assert all(torch.equal(first, products.product(a, b)) for _ in range(5))
    assert len(calls) == 6


def test_which_library_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    decide = products.library.__wrapped__

    class Cpu:
        def __init__(self, vendor: str) -> None:
            self.cpu_vendor = lambda: vendor

    vendor = _build.load().cpu_vendor()
    assert vendor in ("amd", "intel", "other")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    for name, expected in (("amd", True), ("intel", False), ("other", False)):
        monkeypatch.setattr(products, "load", lambda name=name: Cpu(name))
        used, why = decide()
        assert used == expected
        assert ("oneDNN" if used else "MKL") in why
    monkeypatch.setattr(products, "load", lambda: Cpu("amd"))

    def gone(*_: object) -> Tensor:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")

    for broken in (gone, lambda a, b, bias: a @ b + 1):
        with monkeypatch.context() as inner:
            inner.setattr(products, "_by_onednn", broken)
            assert not decide()[0]
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    assert not decide()[0]
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert decide() == (False, "torch's own: this torch has no MKL to stay away from")

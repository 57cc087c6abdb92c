"""Layers that compute by our own kernels are the layers that they were."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from head_cases import calls_of_ours, multiply_by
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from fdpg_fast import layers
from fdpg_fast.layers import choose_layers
from fdpg_fast.ops import matmul

CPU = torch.device("cpu")


@pytest.fixture
def _ours(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply_by(monkeypatch, "ours")


@pytest.fixture
def calls(_ours: None) -> Iterator[list[tuple[int, ...]]]:
    with calls_of_ours() as found:
        yield found


class Two(nn.Module):
    """One layer of each kind, and one that is of none."""

    class Own(nn.Linear):
        pass

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.own = nn.Linear(8, 16), Conv1D(6, 16), self.Own(6, 6)
        self.act = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.down(self.act(self.up(x))))


def test_layers_stay_what_they_are(calls: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    plain = Two()
    chosen = copy.deepcopy(plain)
    choose_layers(chosen, CPU)
    assert isinstance(chosen.up, nn.Linear)
    assert isinstance(chosen.down, Conv1D)
    assert type(chosen.own) is Two.Own  # it may do anything
    x = torch.randn(3, 4, 8)
    torch.testing.assert_close(chosen(x), plain(x))
    assert calls == [(12, 8, 16), (12, 16, 6)]
    assert chosen.state_dict().keys() == plain.state_dict().keys()
    copied = copy.deepcopy(chosen)
    with torch.no_grad():
        copied.up.weight.zero_()
    assert not torch.equal(copied(x), chosen(x))


def test_other_numbers_than_fp32_are_torchs(calls: list[tuple[int, ...]]) -> None:
    plain = Two()
    chosen = copy.deepcopy(plain)
    choose_layers(chosen, CPU)
    x = torch.randn(3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(chosen(x), plain(x))
    torch.testing.assert_close(chosen.double()(x.double()), plain.double()(x.double()))
    assert calls == []


@pytest.mark.parametrize("rounds", [True, False])
def test_weights_are_rounded_once(
    rounds: bool, calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While they do not change: what autocast makes of them, by our product."""
    if rounds and not matmul.has_rounded_products():
        pytest.skip("this CPU has no products of bf16 of ours: they need avx512_bf16")
    monkeypatch.setattr(matmul, "_OURS_ROUNDS", rounds)
    torch.manual_seed(0)
    plain = Two()
    chosen = copy.deepcopy(plain)
    choose_layers(chosen, CPU)
    x = torch.randn(3, 4, 8)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = plain(x)
        with matmul.rounding_once(x.device, memory := {}):
            first = chosen(x)
            chosen.up.weight.zero_()  # against the rules, and not noticed
            second = chosen(x)
        third = chosen(x)
    assert first.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(first, expected, rtol=2e-2, atol=2e-3)
    assert torch.equal(first, second)
    assert len(memory) == (2 if rounds else 0)
    if rounds:
        assert not torch.equal(first, third)
    assert calls == [(12, 8, 16), (12, 16, 6)] * (3 if rounds else 0)


@pytest.mark.usefixtures("_ours")
def test_a_compiler_sees_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, ops = Two(), []
    chosen = copy.deepcopy(plain)
    choose_layers(chosen, CPU)
    x = torch.randn(3, 8)

    def backend(graph: GraphModule, _: object) -> object:
        ops.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(chosen, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), plain(x))
    assert any("linear" in op for op in ops)
    assert not any("fdpg" in op for op in ops)


def test_small_products_go_the_short_way(
    calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "_LEAST", 1000)
    layer = nn.Sequential(nn.Linear(10, 10))
    choose_layers(layer, CPU)
    layer(torch.ones(9, 10)), layer(torch.ones(10, 10))
    assert calls == [(10, 10, 10)]


def test_products_are_torchs_where_those_are_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """But not for who asks for ours, whatever they cost."""
    monkeypatch.setattr(matmul, "_OURS_ROUNDS", False)
    multiply_by(monkeypatch, "torch's")
    plain = Two()
    chosen = copy.deepcopy(plain)
    choose_layers(chosen, CPU)
    x = torch.randn(3, 8)
    with calls_of_ours() as calls:
        torch.testing.assert_close(chosen(x), plain(x))
        assert calls == []
        with matmul.own_products():
            torch.testing.assert_close(chosen(x), plain(x))
        assert calls == [(3, 8, 16), (3, 16, 6)]
        chosen(x)
        assert len(calls) == 2


@pytest.mark.parametrize("name", ["gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_activations(dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Are ours where nothing is learnt, and are what they were."""
    plain = nn.GELU(approximate="tanh") if name == "tanh" else ACT2FN[name]
    chosen = nn.Sequential(copy.deepcopy(plain))
    choose_layers(chosen, CPU)
    assert isinstance(chosen[0], type(plain))
    calls = []
    kernel = layers.ops.gelu_tanh
    monkeypatch.setattr(layers.ops, "gelu_tanh", lambda x: calls.append(x.dtype) or kernel(x))
    x = torch.linspace(-9, 9, 1001).to(dtype).view(7, 11, 13)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, expected = chosen(x), plain(x)
    assert result.dtype == expected.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float64: 1e-14}[dtype]
    torch.testing.assert_close(result, plain(x), rtol=tolerance, atol=tolerance)
    ours = [] if dtype == torch.float64 else [dtype]
    assert calls == ours
    x.requires_grad_()
    with torch.no_grad():
        chosen(x)
    assert calls == 2 * ours
    (grad,) = torch.autograd.grad(chosen(x).sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(plain(x).sum(), x)[0], rtol=0, atol=3e-2)
    assert calls == 2 * ours


def test_other_activations_are_torchs() -> None:
    chosen = nn.Sequential(nn.GELU(), ACT2FN["gelu"], ACT2FN["silu"])
    plain = copy.deepcopy(chosen)
    choose_layers(chosen, CPU)
    x = torch.randn(99)
    assert torch.equal(chosen(x), plain(x))

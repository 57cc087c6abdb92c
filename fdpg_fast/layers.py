"""Layers of a model by faster kernels: torch's for what transformers spells out, and on a CPU our
own, see ``ops/matmul.py`` and ``ops/gelu_tanh.py``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.pytorch_utils import Conv1D

from fdpg_fast import ops
from fdpg_fast.ops.matmul import has_rounded_products, linear, packed_once

__all__ = ["choose_layers"]


def choose_layers(model: nn.Module, device: torch.device) -> None:
    """Let the layers of a model on ``device`` compute by kernels that are faster than their own.

    They stay what they are to whoever looks for them: the class of each becomes one derived from
    its own.
    """
    layers = dict(_ACTIVATIONS)
    if device.type == "cpu":
        layers |= _PRODUCTS
    for module in model.modules():
        if (chosen := layers.get(type(module))) is not None:
            module.__class__ = chosen


def _by_ours(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """``x W^T + bias``, ``W`` ``[m, k]``, or None: where it is no faster by ours."""
    # A compiler makes choices of its own, and would make constants of sizes that are looked at.
    if torch.compiler.is_compiling():
        return None
    if not torch.is_autocast_enabled("cpu"):
        return linear(x, weight, bias)
    if (
        has_rounded_products()
        and not torch.is_grad_enabled()
        and x.is_cpu
        and weight.dtype == torch.float32
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
    ):
        # As autocast would have it: 16-bit factors and results.
        if (columns := packed_once(weight)) is None:
            columns = weight.bfloat16().t()
        *outer, k = x.shape
        rows, m = x.reshape(-1, k).to(torch.bfloat16), weight.shape[0]
        y = rows.new_empty(rows.shape[0], m)
        torch.ops.fdpg.matmul_(y, rows, columns, bias)
        return y.view(*outer, m)
    return None


class _Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        y = _by_ours(input, self.weight, self.bias)
        return nn.functional.linear(input, self.weight, self.bias) if y is None else y


class _Conv1D(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        y = _by_ours(x, self.weight.t(), self.bias)
        result: Tensor = super().forward(x) if y is None else y  # type: ignore[no-untyped-call]
        return result


def _gelu_tanh(x: Tensor) -> Tensor:
    """By ours on a CPU where nothing is learnt; in fp64, which is for truth, torch's."""
    if (
        x.device.type != "cpu"
        or x.dtype == torch.float64
        or (x.requires_grad and torch.is_grad_enabled())
        or torch.compiler.is_compiling()
    ):
        return nn.functional.gelu(x, approximate="tanh")
    return ops.gelu_tanh(x)


class _GELU(nn.GELU):
    def forward(self, input: Tensor) -> Tensor:
        return _gelu_tanh(input) if self.approximate == "tanh" else super().forward(input)


class _GELUTanh(GELUTanh):
    def forward(self, input: Tensor) -> Tensor:
        return _gelu_tanh(input)


class _NewGELU(NewGELUActivation):
    # transformers spells the formula in eight kernels: forward 9.7 -> 4.6 ms and backward
    # 16.5 -> 6.3 ms on [11264, 512] fp32, 2 cores, by torch's one.
    def forward(self, input: Tensor) -> Tensor:
        return _gelu_tanh(input)


_ACTIVATIONS: dict[type[nn.Module], type[nn.Module]] = {
    nn.GELU: _GELU,
    GELUTanh: _GELUTanh,
    NewGELUActivation: _NewGELU,
}
_PRODUCTS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: _Linear, Conv1D: _Conv1D}

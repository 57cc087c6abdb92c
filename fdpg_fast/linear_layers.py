"""Linear layers of a model on a CPU, by our own product where torch's is slow: see
``ops/matmul.py``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fdpg_fast.ops.matmul import has_rounded_products, library, linear, packed_once

__all__ = ["choose_linear_layers"]


def choose_linear_layers(model: nn.Module) -> None:
    """Let the linear layers of a model be products of ours, if torch's own are slower.

    They stay what they are to whoever looks for them: the class of each becomes one derived from
    its own.
    """
    if not (library()[0] or has_rounded_products()):
        return
    for module in model.modules():
        if (chosen := _LAYERS.get(type(module))) is not None:
            module.__class__ = chosen


def _by_ours(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """``x W^T + bias``, ``W`` ``[m, k]``, or None: where it is no faster by ours."""
    # A compiler makes choices of its own, and would make constants of sizes that are looked at.
    if torch.compiler.is_compiling():
        return None
    if (y := linear(x, weight, bias)) is not None:
        return y
    if (
        has_rounded_products()
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and weight.dtype == torch.float32
    ):
        # As autocast would have it: 16-bit factors and results.
        if (columns := packed_once(weight)) is None:
            columns = weight.bfloat16().t()
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        y = rows.new_empty(len(rows), len(weight))
        torch.ops.fdpg.matmul_(y, rows, columns, bias)
        return y.view(*x.shape[:-1], len(weight))
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


_LAYERS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: _Linear, Conv1D: _Conv1D}

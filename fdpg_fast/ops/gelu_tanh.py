"""gelu_tanh: GPT-2's activation, for models that are read and not taught, on a CPU.

torch's takes the tanh of every number; ours one exponential (csrc/cpu/gelu_tanh-inl.h), and is more
accurate: at negative numbers to the last digits, where ``1 + tanh`` has none left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fdpg_fast import _build
from fdpg_fast.ops.gradient import refuse_gradient

__all__ = ["gelu_tanh"]

_build.load()


def gelu_tanh(x: Tensor) -> Tensor:
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, of every number.

    Args:
        x: any shape, fp32, bf16, fp16 or fp64, on a CPU. Not differentiable.

    Returns:
        A contiguous tensor like ``x``: of minus infinity 0, where torch's has NaN.

    Raises:
        RuntimeError: a dtype that does not fit, or a gradient is asked for.
    """
    refuse_gradient("gelu_tanh", "Use torch.nn.functional.gelu, or torch.no_grad()", x=x)
    result: Tensor = _OP(x)
    return result


_OP = torch.ops.fdpg.gelu_tanh.default


@torch.library.register_fake("fdpg::gelu_tanh")
def _fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)

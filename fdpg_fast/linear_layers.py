"""Linear layers of a model on a CPU, by the library that is fast there: see ``ops/matmul.py``."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fdpg_fast.ops.matmul import is_worthwhile, library, linear

__all__ = ["choose_linear_layers"]


def choose_linear_layers(model: nn.Module) -> None:
    """Let the linear layers of a model take their products from where they are fast, if torch's own
    are not.

    They stay what they are to whoever looks for them: the class of each becomes one derived from
    its own.
    """
    if not library()[0]:
        return
    for module in model.modules():
        if (chosen := _LAYERS.get(type(module))) is not None:
            module.__class__ = chosen


class _Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        if is_worthwhile(input, self.weight):
            return linear(input, self.weight, self.bias)
        return nn.functional.linear(input, self.weight, self.bias)


class _Conv1D(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        if is_worthwhile(x, weight := self.weight.t()):
            return linear(x, weight, self.bias)
        result: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return result


_LAYERS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: _Linear, Conv1D: _Conv1D}

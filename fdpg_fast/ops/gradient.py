"""Ops without a gradient say so, where torch would leave it out of what it computes."""

from __future__ import annotations

from torch import Tensor

__all__ = ["refuse_gradient"]


def refuse_gradient(op: str, instead: str, **arguments: Tensor | None) -> None:
    """Raises NotImplementedError if an argument of ``op`` is to get a gradient; ``instead`` is the
    way out. For where torch.is_grad_enabled().

    At the call, not when its result is differentiated: an autograd kernel would be gone through by
    every call, also where nothing is recorded, which takes 12 us.
    """
    for name, tensor in arguments.items():
        if tensor is not None and tensor.requires_grad:
            raise NotImplementedError(
                f"{op}: `{name}` must not require a gradient, of which {op} has none, got "
                f"requires_grad=True. {instead}"
            )

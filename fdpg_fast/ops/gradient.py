"""Ops without a gradient say so, where torch would leave it out of what it computes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["refuse_gradient", "refuse_tangent"]


def refuse_gradient(op: str, instead: str, **arguments: Tensor | None) -> None:
    """Raises NotImplementedError if an argument of ``op`` is to get a gradient, or has a tangent;
    ``instead`` is the way out.

    At the call, not when its result is differentiated: an autograd kernel would be gone through by
    every call, also where nothing is recorded, which takes 12 us.
    """
    refuse_tangent(op, instead, **arguments)
    for name, tensor in arguments.items() if torch.is_grad_enabled() else ():
        if tensor is not None and tensor.requires_grad:
            raise NotImplementedError(
                f"{op}: `{name}` must not require a gradient, of which {op} has none, got "
                f"requires_grad=True. {instead}"
            )


def refuse_tangent(op: str, instead: str, **arguments: Tensor | None) -> None:
    """Raises NotImplementedError if an argument of ``op`` has a tangent of forward-mode autograd,
    which torch would drop, so that the derivative was zero; ``instead`` is the way out.
    """
    # Whatever no_grad says, which is of the other mode. Nobody is in this one: 0.1 us.
    if getattr(forward_ad, "_current_level", 0) < 0:
        return
    for name, tensor in arguments.items():
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{op}: `{name}` must not have a tangent, as {op} has no forward-mode derivative, "
                f"got one. {instead}"
            )

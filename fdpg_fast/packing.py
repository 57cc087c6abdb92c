"""Sequences of unequal length as one row of tokens, one after the other, so that none is padding.

Everything in a transformer but attention treats tokens alike, and so computes no padding; attention
is told where sequences begin. How: while a :class:`Packing` is announced, the mask builders of
``attention.py`` return it where a mask would be, and the model hands it to every layer's attention,
as it is.

Shape legend: b sequences, N tokens of all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Packing", "announced", "current"]

# Not a ContextVar, at which torch.compile would break the model's graph.
_announced: Packing | None = None


@dataclass(frozen=True)
class Packing:
    """Where each sequence lies in the row.

    Attributes:
        lengths: b numbers of tokens, which the host knows.
        boundaries: ``(b + 1,)`` int32 on the device: the first token of each sequence, and N.
        kernel: whose attends within them on a GPU: of ``attention.PACKED_KERNELS``.
        window: a token attends to itself and the ``window - 1`` before it; None: to all before it.
    """

    lengths: tuple[int, ...]
    boundaries: Tensor
    kernel: str = ""
    window: int | None = None

    @classmethod
    def of(cls, lengths: Tensor, device: torch.device, kernel: str = "") -> Packing:
        """Of sequences of ``lengths``, ``(b,)`` int64 on the CPU."""
        boundaries = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        there = boundaries.to(device, non_blocking=True)
        return cls(tuple(lengths.tolist()), there, kernel)

    def within(self, window: int | None) -> Packing:
        """The same for a layer of that window."""
        return dataclasses.replace(self, window=window)


@contextlib.contextmanager
def announced(packing: Packing | None) -> Iterator[None]:
    """Models called within read one packed row; None: rows as usual."""
    global _announced
    before, _announced = _announced, packing
    try:
        yield
    finally:
        _announced = before


def current() -> Packing | None:
    """What is announced."""
    return _announced

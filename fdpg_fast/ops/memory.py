"""Memory of large results that every step asks for again.

A tensor of more than 32 MB, once freed, is the system's again (glibc's malloc), which clears it
page by page for whoever asks next: a tenth of the time of a head's gradients. So a few blocks are
kept for the next who asks, as torch does on a GPU.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["lasting_empty"]

LEAST_BYTES = 32 << 20
"""Smaller ones malloc keeps by itself."""

_ALIGNMENT = 64  # torch's own
# As many as a head has in use: numerators, the gradient of the weight, and one to spare.
_MOST = 3

_Block = np.ndarray[Any, Any]
_spare: dict[int, _Block] = {}  # by address, the oldest first


def lasting_empty(like: Tensor, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """``like.new_empty(size, dtype=dtype)``; on the CPU in memory that outlives the tensor, if it
    is large. numpy asks for huge pages where the system has them."""
    needed = math.prod(size) * dtype.itemsize
    plain = like.is_cpu and type(like) in (Tensor, torch.nn.Parameter)
    if needed < LEAST_BYTES or not plain or torch.compiler.is_compiling():
        return like.new_empty(size, dtype=dtype)
    block = _take(needed + _ALIGNMENT)
    start = -block.ctypes.data % _ALIGNMENT
    lent = block[start : start + needed]
    # The tensor holds on to what it was made of until it is freed.
    weakref.finalize(lent, _give_back, block).atexit = False
    return torch.from_numpy(lent).view(dtype).view(size)


def _take(needed: int) -> _Block:
    fitting = [(len(b), at) for at, b in list(_spare.items()) if needed <= len(b) <= 2 * needed]
    for _, at in sorted(fitting):
        if (block := _spare.pop(at, None)) is not None:  # else another thread has it
            return block
    return np.empty(needed, np.uint8)


def _give_back(block: _Block) -> None:
    _spare[block.ctypes.data] = block
    for at in list(_spare)[:-_MOST]:
        _spare.pop(at, None)

"""Peak extra memory of a call: what it allocates beyond what it is given and what it returns.

Counted from torch's own allocators, as torch.profiler records them, so alike for everybody, CPU and
CUDA: what ours would keep from one call to the next (ops/memory.py) is allocated anew for this.
Not counted: what a BLAS or a C++ kernel keeps to itself in malloc (packed blocks of a matrix,
scratch of a thread), which is small.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fdpg_fast.ops import memory

__all__ = ["peak_extra_bytes"]

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or every profile says on stderr that it began


def peak_extra_bytes(function: Callable[[], object]) -> int:
    """Calls the function once. A first call, which may fill caches, is not the one to measure."""
    cpu = [ProfilerActivity.CPU]
    # acc_events: or torch 2.11 warns that only the last cycle's are kept; there is one.
    with (
        _nothing_lasts(),
        profile(activities=cpu, profile_memory=True, acc_events=True) as recorded,
    ):
        held = function()  # until all is recorded, so that results are the blocks never freed
    del held
    tree = recorded.profiler.kineto_results.experimental_event_tree()
    moves = sorted(_allocations(tree), key=lambda event: event.start_time_ns)
    blocks: list[list[int]] = []  # size, first move, move that freed it or -1
    alive: dict[int, list[int]] = {}
    for i, event in enumerate(moves):
        address, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        if size > 0:
            alive[address] = [size, i, -1]
            blocks.append(alive[address])
        elif address in alive:  # else it was there before the call
            alive.pop(address)[2] = i
    change = [0] * len(moves)
    for size, begin, end in blocks:
        if end >= 0:
            change[begin] += size
            change[end] -= size
    held_now = peak = 0
    for step in change:
        held_now += step
        peak = max(peak, held_now)
    return peak


@contextlib.contextmanager
def _nothing_lasts() -> Iterator[None]:
    before, memory.LEAST_BYTES = memory.LEAST_BYTES, sys.maxsize
    try:
        yield
    finally:
        memory.LEAST_BYTES = before


def _allocations(events: list[Any]) -> Iterator[Any]:
    for event in events:
        if event.tag == torch._C._profiler._EventType.Allocation:
            yield event
        yield from _allocations(event.children)

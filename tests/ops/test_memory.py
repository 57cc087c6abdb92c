"""Huge pages are asked for where they pay, and nowhere else."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from fdpg_fast import _build
from fdpg_fast.ops.memory import in_huge_pages


def flags(address: int) -> list[str]:
    """What the system says of the memory there."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, which says what pages it gives")
def test_large_tensors_ask_for_huge_pages() -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage").is_dir():
        pytest.skip("this kernel has no huge pages on request")
    small, large = torch.empty(1000), torch.empty(64 << 20, dtype=torch.uint8)
    assert in_huge_pages(small) is small
    assert in_huge_pages(large) is large
    assert "hg" in flags(large.data_ptr() + large.nbytes // 2)
    assert large.fill_(3).sum() == 3 * large.nbytes  # and it is memory all the same


def test_advice_is_no_more_than_that() -> None:
    advise = _build.load().advise_huge_pages
    assert not advise(4096, 100)  # no whole page
    assert not advise(1 << 60, 1 << 21)  # no such memory
    assert not advise(0, 0)

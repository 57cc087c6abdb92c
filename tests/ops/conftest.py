"""What the tests of the ops share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fdpg_fast import _build


@pytest.fixture(params=["portable", "avx2", "avx512", "avx512bf16", "amx"])
def cpu_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test through each instruction set of the CPU kernels that this CPU has."""
    compiled = _build.load()
    before = compiled.cpu_isa()
    if not compiled.set_cpu_isa(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    compiled.set_cpu_isa(before)

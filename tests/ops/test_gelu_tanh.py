"""gelu_tanh against its definition in fp64, and against torch's own. The kernel's own tests are in
tests/csrc/test_gelu_tanh.cpp."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fdpg_fast import ops, reference

# Of numbers up to 12, which are rounded once.
TOLERANCE = {torch.float64: 1e-15, torch.float32: 5e-7, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_is_its_definition(dtype: torch.dtype, cpu_isa: str) -> None:
    x = torch.linspace(-12, 12, 9999, dtype=torch.float64).to(dtype).view(9, 1111)
    got = ops.gelu_tanh(x)
    assert got.dtype == dtype
    truth = reference.gelu_tanh(x.double())
    torch.testing.assert_close(got.double(), truth, rtol=0, atol=TOLERANCE[dtype])


def test_is_no_further_off_than_torchs(cpu_isa: str) -> None:
    """Between any two whole numbers, at worst and on average."""
    x = torch.linspace(-8, 8, 1_600_000)
    truth = reference.gelu_tanh(x.double())
    both = ops.gelu_tanh(x), nn.functional.gelu(x, approximate="tanh")
    ours, torchs = ((y.double() - truth).abs().view(16, -1) for y in both)
    assert (ours.amax(1) <= torchs.amax(1)).all()
    assert (ours.mean(1) <= torchs.mean(1)).all()


def test_the_ends(cpu_isa: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        most = torch.finfo(dtype).max
        x = torch.tensor([-math.inf, -most, -20.0, 0.0, 20.0, most, math.inf, math.nan]).to(dtype)
        expected = torch.tensor([0, 0, 0, 0, 20, most, math.inf, math.nan]).to(dtype)
        assert torch.equal(ops.gelu_tanh(x).nan_to_num(nan=-1.0), expected.nan_to_num(nan=-1.0))


def test_any_strides_any_shape_and_threads() -> None:
    torch.manual_seed(0)
    x = torch.randn(70, 30, 40)
    whole = ops.gelu_tanh(x)
    for part in (x.permute(2, 0, 1), x[::3, :, 1:], x[0, 0, 0], x[:0], x[:1].expand(5, -1, -1)):
        got = ops.gelu_tanh(part)
        assert got.is_contiguous()
        assert got.data_ptr() != part.data_ptr() or not part.numel()
        alone = torch.stack([ops.gelu_tanh(y) for y in part.flatten()]) if part.numel() else got
        assert torch.equal(got.flatten(), alone.flatten())
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(ops.gelu_tanh(x), whole)
    finally:
        torch.set_num_threads(threads)


def test_refusal() -> None:
    expected = "gelu_tanh: `x` must be float32 or bfloat16 or float16 or float64, got int64"
    with pytest.raises(RuntimeError, match=expected):
        ops.gelu_tanh(torch.ones(3, dtype=torch.int64))

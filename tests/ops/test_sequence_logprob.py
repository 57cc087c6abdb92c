"""sequence_logprob against the reference: ragged, padded, strided, split, differentiated."""

from __future__ import annotations

import math

import pytest
import torch

from fdpg_fast import ops, reference

OP = torch.ops.fdpg.sequence_logprob.default


def ragged(sequences: int, tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(sequences + tokens)
    values = -3 * torch.rand(sequences, tokens, generator=generator, dtype=dtype)
    lengths = torch.randint(0, tokens + 1, (sequences,), generator=generator)
    return values, lengths


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0, 5), (1, 0), (1, 1), (7, 13), (111, 1000)])
def test_agrees_with_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    values, lengths = ragged(*shape, dtype)
    got = ops.sequence_logprob(values, lengths)
    assert got.dtype == torch.float64
    torch.testing.assert_close(
        got, reference.sequence_logprob(values, lengths), rtol=1e-14, atol=1e-12
    )


def test_padding_is_not_read() -> None:
    values, lengths = ragged(7, 13, torch.float32)
    inside = torch.arange(13) < lengths[:, None]
    for padding in (math.nan, -math.inf, 1e30):
        padded = torch.where(inside, values, padding)
        assert torch.equal(
            ops.sequence_logprob(padded, lengths), ops.sequence_logprob(values, lengths)
        )


def test_batch_stride_and_width_change_no_bit() -> None:
    values, lengths = ragged(111, 57, torch.float32)
    whole = ops.sequence_logprob(values, lengths)
    assert torch.equal(whole, ops.sequence_logprob(values, lengths))
    pieces = zip(values.split(10), lengths.split(10), strict=True)
    parts = [ops.sequence_logprob(v, n) for v, n in pieces]
    assert torch.equal(whole, torch.cat(parts))
    wide = torch.nn.functional.pad(values, (0, 20), value=math.nan)
    assert torch.equal(whole, ops.sequence_logprob(wide, lengths))
    assert torch.equal(whole, ops.sequence_logprob(wide[:, :57], lengths))  # row stride 77
    order = torch.randperm(111)
    assert torch.equal(whole[order], ops.sequence_logprob(values[order], lengths[order]))


def test_gradient() -> None:
    values, lengths = ragged(5, 6, torch.float64)
    values.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: ops.sequence_logprob(v, lengths), values)
    in_float = values.detach().float().requires_grad_()
    ops.sequence_logprob(in_float, lengths).sum().backward()
    assert in_float.grad is not None
    assert torch.equal(in_float.grad, (torch.arange(6) < lengths[:, None]).float())


def test_opcheck() -> None:
    values, lengths = ragged(5, 6, torch.float32)
    torch.library.opcheck(OP, (values, lengths))
    torch.library.opcheck(OP, (values.detach().double(), lengths))


@pytest.mark.parametrize(
    ("values", "lengths", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([1, 4]), r"`lengths` must be in \[0, 3\], got 4 at"),
        (torch.zeros(2, 3), torch.tensor([-1, 3]), r"got -1 at sequence 0"),
        (torch.zeros(2, 3), torch.tensor([1]), r"`lengths`"),
        (torch.zeros(2, 3), torch.tensor([1.0, 2.0]), r"`lengths`"),
        (torch.zeros(6), torch.tensor([1, 2]), r"`values`"),
        (torch.zeros(2, 3, dtype=torch.float16), torch.tensor([1, 2]), r"`values`"),
        (torch.zeros(3, 2).T, torch.tensor([1, 2]), r"`values` must be contiguous along tokens"),
    ],
)
def test_messages(values: torch.Tensor, lengths: torch.Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"sequence_logprob: .*{message}"):
        ops.sequence_logprob(values, lengths)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
def test_compiles_whole() -> None:
    values, lengths = torch.randn(2, 4, requires_grad=True), torch.tensor([3, 1])
    compiled = torch.compile(ops.sequence_logprob, fullgraph=True, backend="aot_eager")
    got = compiled(values, lengths)
    assert torch.equal(got, ops.sequence_logprob(values, lengths))
    (grad,) = torch.autograd.grad(got.sum(), values)
    assert grad.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]

"""token_logprob against fp64, with eager PyTorch as the yardstick of accuracy.

Sizes: 1, below one vector, ragged, the story models' vocabulary, GPT-2's.
"""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fdpg_fast import _build, ops, reference

OP = torch.ops.fdpg.token_logprob.default
BACKWARD = torch.ops.fdpg.token_logprob_backward.default
BACKWARD_ = torch.ops.fdpg.token_logprob_backward_.default
SIZES = [1, 7, 1000, 14019, 50257]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
RESULTS = ["logp", "lse", "entropy"]


def rows(
    n: int, vocab: int, dtype: torch.dtype = torch.float32, deviation: float = 3.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Logits ``[n, vocab]`` like a language model's, every other row with a clear favourite."""
    generator = torch.Generator().manual_seed(seed + n + vocab)
    logits = deviation * torch.randn(n, vocab, generator=generator, dtype=torch.float64)
    target = torch.randint(vocab, (n,), generator=generator)
    favourite = torch.randint(vocab, (n,), generator=generator)
    logits[torch.arange(0, n, 2), favourite[::2]] += 8 * deviation
    target[::4] = favourite[::4]
    return logits.to(dtype), target


def eager(logits: Tensor, target: Tensor, **options: Any) -> ops.TokenLogprob:
    """What people write, in fp32 (fp64 for fp64 logits)."""
    return ops.TokenLogprob(*reference.token_logprob(logits, target, entropy=True, **options))


def truth(logits: Tensor, target: Tensor, **options: Any) -> ops.TokenLogprob:
    return eager(logits.double(), target, **options)


def fused(logits: Tensor, target: Tensor, **options: Any) -> ops.TokenLogprob:
    return ops.token_logprob(logits, target, entropy=True, **options)


def error(got: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; infinite where one is finite and the other is not."""
    same = (got == expected) | (got.isnan() & expected.isnan())
    gap = torch.where(same, 0.0, (got.double() - expected.double()).abs())
    return float(gap.nan_to_num(nan=math.inf).max()) if gap.numel() else 0.0


# --------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("inv_temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", SIZES)
def test_no_less_accurate_than_eager(
    vocab: int, dtype: torch.dtype, inv_temperature: float, cpu_isa: str
) -> None:
    logits, target = rows(9, vocab, dtype)
    got = fused(logits, target, inv_temperature=inv_temperature)
    plain = eager(logits, target, inv_temperature=inv_temperature)
    exact = truth(logits, target, inv_temperature=inv_temperature)
    for name in RESULTS:
        value, expected = getattr(got, name), getattr(exact, name)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        allowed = error(getattr(plain, name), expected) + 1e-5
        assert error(value, expected) <= allowed, name
        # And our own promise: one rounding of the result and 4e-7 besides.
        unit = 1e-15 if dtype == torch.float64 else 6e-8
        if inv_temperature == 1.0:
            assert error(value, expected) <= unit * (float(expected.abs().max()) + 7), name


@pytest.mark.parametrize("softcap", [30.0, 5.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [7, 1000, 14019])
def test_softcap_no_less_accurate_than_eager(
    vocab: int, dtype: torch.dtype, softcap: float, cpu_isa: str
) -> None:
    logits, target = rows(9, vocab, dtype)
    options = {"softcap": softcap, "inv_temperature": 0.7}
    got = fused(logits, target, **options)
    plain, exact = (of(logits, target, **options) for of in (eager, truth))
    for name in RESULTS:
        value, expected = getattr(got, name), getattr(exact, name)
        # tanh's rounding, as eager's; the truth is fp64 itself.
        own = 4e-14 if dtype == torch.float64 else softcap * 2e-7
        assert error(value, expected) <= error(getattr(plain, name), expected) + own, name
    # Nothing but what stands in place of the logits.
    by_hand = fused(softcap * torch.tanh(logits.double() / softcap), target, inv_temperature=0.7)
    assert error(got.logp, by_hand.logp) <= 3 * own + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_softcap_bounds_infinity(dtype: torch.dtype, cpu_isa: str) -> None:
    """As in PyTorch: a logit of -inf is -softcap, one of +inf is softcap; NaN is told."""
    logits, target = rows(4, 3000, dtype)
    logits[0, ::2] = -math.inf
    logits[1] = -math.inf
    logits[2, 1234] = math.inf
    logits[3, 17] = math.nan
    target[:3] = torch.tensor([0, 2999, 1234])
    got = fused(logits, target, softcap=4.0)
    exact = truth(logits, target, softcap=4.0)
    for name in RESULTS:
        assert getattr(exact, name)[:3].isfinite().all()
        assert error(getattr(got, name), getattr(exact, name)) <= 5e-6, name
    grad = gradient(logits[:3], target[:3], WEIGHTS["all"][:, :3], fused, softcap=4.0)
    assert (grad[logits[:3].isinf()] == 0).all()
    assert grad.isfinite().all()


def test_accuracy_does_not_suffer_from_an_offset() -> None:
    """GPT-2's logits lie near -100; a log-prob is a small difference of large numbers there."""
    logits, target = rows(16, 50257)
    shifted = (logits - 100.0).round(decimals=0)  # exact in fp32, so the truth is the same row's
    got, exact = fused(shifted, target), truth(shifted, target)
    assert error(got.logp, exact.logp) <= 6e-8 * float(exact.logp.abs().max()) + 4e-7
    assert error(got.entropy, exact.entropy) <= 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_infinity_is_a_value(dtype: torch.dtype, cpu_isa: str) -> None:
    """A masked vocabulary: allowed tokens only in a later block, or nowhere."""
    logits, _ = rows(4, 3000, dtype)
    logits[0, logits[0] < 0] = -math.inf
    logits[1, :2500] = -math.inf
    logits[2] = -math.inf
    logits[2, 1234] = 3.0
    logits[3] = -math.inf
    target = torch.tensor([0, 2999, 1234, 5])
    target[0] = (logits[0] == -math.inf).nonzero()[0, 0]
    got, exact = fused(logits, target), truth(logits, target)
    assert got.logp[0] == -math.inf
    assert got.logp[2] == 0
    assert got.entropy is not None
    assert got.entropy[2] == 0
    assert got.logp[3].isnan()
    assert got.lse[3] == -math.inf
    for name in RESULTS[:2]:
        assert error(getattr(got, name), getattr(exact, name)) <= 1e-5
    assert exact.entropy is not None
    assert error(got.entropy[:3], exact.entropy[:3]) <= 1e-5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 5, 1500, 2999])
def test_nan_and_infinity_are_told(bad: float, place: int, cpu_isa: str) -> None:
    logits, target = rows(3, 3000)
    clean = fused(logits, target)
    logits[1, place] = bad
    target[1] = 7
    got = fused(logits, target)
    assert got.logp[1].isnan()
    assert got.lse[1].isnan()
    for row in (0, 2):  # the neighbours
        assert got.logp[row] == clean.logp[row]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inv_temperature", [1.0, 0.7])
def test_extreme_magnitudes(dtype: torch.dtype, inv_temperature: float, cpu_isa: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (1e4 * (2 * torch.rand(6, 1000, generator=generator) - 1)).to(dtype)
    logits[0] = 1e4
    logits[1] = -1e4
    logits[2], logits[2, 500] = -1e4, 1e4
    logits[3] = torch.linspace(-1e4, 1e4, 1000)
    logits[4] = torch.linspace(1e4, -1e4, 1000)
    target = logits.float().argmax(-1)
    target[5] = 17
    got = fused(logits, target, inv_temperature=inv_temperature)
    exact = truth(logits, target, inv_temperature=inv_temperature)
    assert error(got.logp[:5], exact.logp[:5]) <= 1e-5
    torch.testing.assert_close(got.logp.double(), exact.logp.double(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(got.lse.double(), exact.lse.double(), rtol=1e-6, atol=1e-5)
    assert got.entropy is not None
    torch.testing.assert_close(got.entropy.double(), exact.entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", [-1e10, torch.finfo(torch.float32).min])
def test_a_number_in_place_of_minus_infinity(mask: float, dtype: torch.dtype, cpu_isa: str) -> None:
    """A temperature rounds it by more than an exponential can hold, or overflows."""
    logits, target = rows(4, 3000, dtype)
    logits[:, :1500] = max(mask, torch.finfo(dtype).min)
    target = 1500 + target // 2
    for inv_temperature in (1.0, 0.7, 1 / 0.7):
        got = fused(logits, target, inv_temperature=inv_temperature)
        kept = fused(logits[:, 1500:], target - 1500, inv_temperature=inv_temperature)
        for name in RESULTS:
            assert error(getattr(got, name), getattr(kept, name).double()) <= 2e-6, name


# --------------------------------------------------------------------------------------------------
# Shapes, masks, batches


def test_empty_batch_and_leading_dimensions() -> None:
    for name, value in (
        fused(torch.zeros(0, 50), torch.zeros(0, dtype=torch.long))._asdict().items()
    ):
        assert value.shape == (0,), name
    logits, target = rows(24, 77)
    flat = fused(logits, target)
    folded = fused(logits.view(2, 3, 4, 77), target.view(2, 3, 4))
    for name in RESULTS:
        assert torch.equal(getattr(folded, name).flatten(), getattr(flat, name))
    one = fused(logits[0], target[0])
    assert one.logp.shape == ()
    assert one.logp == flat.logp[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", SIZES)
def test_padding_is_not_read(vocab: int, dtype: torch.dtype, cpu_isa: str) -> None:
    """Rows in a wider buffer, as a head with a padded vocabulary makes them."""
    logits, target = rows(5, vocab, dtype)
    wide = torch.full((5, vocab + 47), math.nan, dtype=dtype)
    wide[:, :vocab] = logits
    dense, padded = fused(logits, target), fused(wide[:, :vocab], target)
    for name in RESULTS:
        assert torch.equal(getattr(dense, name), getattr(padded, name))
    every_other = fused(torch.stack([logits, wide[:, :vocab] * 0], dim=1)[:, 0], target)
    assert torch.equal(every_other.logp, dense.logp)


def test_masked_rows_are_not_read(cpu_isa: str) -> None:
    logits, target = rows(6, 1000)
    mask = torch.tensor([True, False, True, False, True, False])
    clean = fused(logits, target)
    poisoned = logits.clone()
    poisoned[~mask] = math.nan
    bad_target = torch.where(mask, target, torch.tensor([0, -1, 0, 1 << 40, 0, 1000]))
    poisoned.requires_grad_()
    got = fused(poisoned, bad_target, mask=mask)
    for name in RESULTS:
        value = getattr(got, name)
        assert torch.equal(value, torch.where(mask, getattr(clean, name), 0.0)), name
    got.logp.sum().backward()
    assert poisoned.grad is not None
    assert torch.equal(poisoned.grad[~mask], torch.zeros(3, 1000))
    assert (poisoned.grad[mask] != 0).any(dim=1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_batch(dtype: torch.dtype, cpu_isa: str) -> None:
    logits, target = rows(17, 14019, dtype)
    whole, again = fused(logits, target), fused(logits, target)
    order = torch.randperm(17, generator=torch.Generator().manual_seed(0))
    moved = fused(logits[order], target[order])
    alone = [fused(logits[i : i + 1], target[i : i + 1]) for i in range(17)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = fused(logits, target)
    finally:
        torch.set_num_threads(threads)
    for name in RESULTS:
        value = getattr(whole, name)
        assert torch.equal(value, getattr(again, name)), name
        assert torch.equal(value, getattr(single, name)), name
        assert torch.equal(value[order], getattr(moved, name)), name
        assert torch.equal(value, torch.cat([getattr(one, name) for one in alone])), name
    plain = ops.token_logprob(logits, target)  # without the entropy
    assert plain.entropy is None
    assert error(plain.logp, whole.logp) <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", SIZES)
def test_instruction_sets_agree(vocab: int, dtype: torch.dtype, cpu_isa: str) -> None:
    logits, target = rows(5, vocab, dtype)
    here = fused(logits, target)
    compiled = _build.load()
    compiled.set_cpu_isa("portable")
    portable = fused(logits, target)
    compiled.set_cpu_isa(cpu_isa)
    for name in RESULTS:
        a, b = getattr(here, name), getattr(portable, name)
        unit = 1e-15 if dtype == torch.float64 else 1.2e-7
        assert error(a, b) <= unit * (float(b.abs().max()) + 4), name


# --------------------------------------------------------------------------------------------------
# Gradients


def gradient(logits: Tensor, target: Tensor, weights: Tensor, op: Any, **options: Any) -> Tensor:
    """Of a weighted sum of all three results, with weights ``[3, N]`` (zero: left out)."""
    leaf = logits.detach().clone().requires_grad_()
    got = op(leaf, target, **options)
    total = torch.zeros((), dtype=got.logp.dtype)
    for weight, value in zip(weights, got, strict=True):
        if weight.any():
            total = total + (weight.to(value.dtype) * value).sum()
    (grad,) = torch.autograd.grad(total, leaf)
    return grad


WEIGHTS = {
    "logp": torch.tensor([[1.0, -0.5, 2.0, 1.0, -3.0], [0] * 5, [0] * 5]),
    "lse": torch.tensor([[0] * 5, [1.0, -0.5, 2.0, 1.0, -3.0], [0] * 5]),
    "all": torch.tensor([[1.0, -1, 2, 0, 1], [0.5, 0, 1, -1, 1], [0.25, 1, 0.5, -0.5, 2]]),
}


@pytest.mark.parametrize("softcap", [None, 10.0])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES[:3])  # fp64 has nothing wider; see test_gradcheck
@pytest.mark.parametrize("vocab", [7, 1000, 14019])
def test_gradient_within_twice_the_error_of_eager(
    vocab: int, dtype: torch.dtype, weights: str, softcap: float | None, cpu_isa: str
) -> None:
    n = 60 if vocab <= 1000 else 20  # enough for the largest error to be no accident
    logits, target = rows(n, vocab, dtype)
    if dtype != torch.float16 and softcap is None:
        logits[n // 2 :] -= 100  # a log-sum-exp that fp32 rounds by 4e-6
    w = WEIGHTS[weights].repeat(1, n // 5)
    exact = gradient(logits.double(), target, w, truth, softcap=softcap)
    got = gradient(logits, target, w, fused, softcap=softcap)
    plain = gradient(logits, target, w, eager, softcap=softcap)
    assert got.dtype == dtype
    assert error(got, exact) <= 2 * error(plain, exact) + torch.finfo(dtype).eps / 8


def test_gradient_at_one_token_and_at_minus_infinity(cpu_isa: str) -> None:
    one = gradient(torch.randn(5, 1), torch.zeros(5, dtype=torch.long), WEIGHTS["all"], fused)
    torch.testing.assert_close(one, WEIGHTS["all"][1][:, None], rtol=0, atol=1e-6)
    logits, target = rows(5, 1000)
    logits[:, ::3] = -math.inf
    target = target // 3 * 3 + 1
    got = gradient(logits, target, WEIGHTS["all"], fused)
    assert torch.equal(got[:, ::3], torch.zeros(5, 334))
    exact = gradient(logits.double(), target, WEIGHTS["all"], truth)
    finite = exact.isfinite()
    assert error(got[finite], exact[finite]) <= 1e-5


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("inv_temperature", [1.0, 0.6])
def test_gradcheck(inv_temperature: float, softcap: float | None) -> None:
    logits, target = rows(4, 9, torch.float64, deviation=1.0)
    logits.requires_grad_()
    mask = torch.tensor([True, True, False, True])
    for some in (None, mask):
        assert torch.autograd.gradcheck(
            lambda z, some=some: tuple(
                fused(z, target, inv_temperature=inv_temperature, mask=some, softcap=softcap)
            ),
            logits,
        )


@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("vocab", SIZES)
def test_in_place_gives_the_same_bits(
    vocab: int, weights: str, dtype: torch.dtype, softcap: float, cpu_isa: str
) -> None:
    logits, target = rows(5, vocab, dtype)
    mask = torch.tensor([True, True, False, True, True])
    logp, _, entropy, lse_exact = OP(logits, target, 0.9, mask, True, softcap)
    g = WEIGHTS[weights].to(logp.dtype)
    grads = [row if row.any() else None for row in g]
    common = (target, lse_exact, entropy, *grads, 0.9, mask, softcap)
    out = BACKWARD(logits, *common)
    buffer = torch.full((5, vocab + 9), 42.0, dtype=dtype)
    inside = buffer[:, :vocab]
    inside.copy_(logits)
    BACKWARD_(inside, *common)
    assert torch.equal(inside, out)
    assert torch.equal(out, BACKWARD(logits, *common))
    assert (buffer[:, vocab:] == 42).all()


def test_inplace_backward_through_autograd() -> None:
    leaf, target = rows(5, 1000)
    leaf.requires_grad_()
    plain = leaf * 2.0
    overwritten = leaf * 2.0
    (expected,) = torch.autograd.grad(fused(plain, target, softcap=5.0).logp.sum(), leaf)
    logp = fused(overwritten, target, softcap=5.0, inplace_backward=True).logp.sum()
    (got,) = torch.autograd.grad(logp, leaf, retain_graph=True)
    assert torch.equal(got, expected)
    assert torch.equal(overwritten.detach(), expected / 2.0)  # where the logits were
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(logp, leaf)
    with pytest.raises(ValueError, match="must be a contiguous intermediate result"):
        fused(leaf, target, inplace_backward=True)


def test_rows_without_gradient_are_not_read(cpu_isa: str) -> None:
    logits, target = rows(4, 1000)
    lse = OP(logits, target, 1.0, None, False)[3]
    logits[2] = math.nan
    g = torch.tensor([1.0, -1.0, 0.0, 2.0])
    out = BACKWARD(logits, target, lse, None, g, None, None, 1.0, None)
    assert torch.equal(out[2], torch.zeros(1000))
    assert out.isfinite().all()
    # Each row of d logp / d logits sums to zero.
    assert float(out.sum(dim=1).abs().max()) <= 1e-5


def test_rows_more_than_two_to_the_31_apart() -> None:
    """Two rows at the ends of 4 GiB, of which little is touched."""
    near, target = rows(2, 1000, torch.bfloat16)
    stride = 2**31 + 8
    far = torch.empty(stride + 1000, dtype=torch.bfloat16).as_strided((2, 1000), (stride, 1))
    far.copy_(near)
    expected, got = OP(near, target, 1.0), OP(far, target, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    ids = torch.arange(2)
    drawn = [ops.sample_logprob(x, 0, ids, ids) for x in (near, far)]
    assert torch.equal(drawn[0].token, drawn[1].token)
    g = torch.ones(2)
    for logits in (near, far):
        BACKWARD_(logits, target, expected[3], None, g, None, None, 1.0, None)
    assert torch.equal(near, far)


# --------------------------------------------------------------------------------------------------
# As an op


def test_opcheck() -> None:
    logits, target = rows(4, 33, torch.bfloat16)
    mask = torch.tensor([True, False, True, True])
    torch.library.opcheck(OP, (logits.float(), target))
    torch.library.opcheck(OP, (logits, target, 0.5, mask, True))
    entropy, lse = OP(logits, target, 1.0, mask, True)[2:]
    g = torch.ones(4)
    for backward in (BACKWARD, BACKWARD_):
        torch.library.opcheck(backward, (logits, target, lse, entropy, g, None, g, 1.0, mask))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_whole(inplace: bool) -> None:
    """Without a break of the graph, to the same values and gradients."""
    logits, target = rows(6, 33)
    logits, target = logits.view(2, 3, 33), target.view(2, 3)
    mask = torch.tensor([[True, False, True], [True, True, False]])

    def loss(x: Tensor) -> Tensor:
        z = x * 1.5
        r = ops.token_logprob(
            z, target, mask=mask, entropy=True, softcap=3.0, inplace_backward=inplace
        )
        return (r.logp + 0.3 * r.entropy).sum() + r.lse.mean()

    found = []
    for way in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x = logits.clone().requires_grad_()
        value = way(x)
        found.append((value, *torch.autograd.grad(value, x)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][1].abs().max() > 0.01


LOGITS, TARGET = torch.zeros(2, 3), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [
        (LOGITS, torch.tensor([0, 3]), r"`target` must be in \[0, 3\), got 3 at row 1"),
        (LOGITS, torch.tensor([-100, 1]), r"`target` must be in \[0, 3\), got -100 at row 0"),
        (LOGITS, TARGET.int(), r"`target` must be int64, got int32"),
        (LOGITS.long(), TARGET, r"`logits` must be float32 or .*, got int64|Long"),
        (torch.zeros(3, 2).t(), TARGET, r"`logits` must be contiguous along vocab"),
    ],
)
def test_messages(logits: Tensor, target: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match="token_logprob: " + message):
        ops.token_logprob(logits, target)


@pytest.mark.parametrize("inv_temperature", [0.0, -1.0, math.nan, math.inf])
def test_temperature_messages(inv_temperature: float) -> None:
    message = r"`inv_temperature` must be positive and finite, got"
    with pytest.raises(RuntimeError, match="token_logprob: " + message):
        ops.token_logprob(LOGITS, TARGET, inv_temperature=inv_temperature)
    with pytest.raises(RuntimeError, match="sample_logprob: " + message):
        ops.sample_logprob(LOGITS, 0, TARGET, TARGET, inv_temperature=inv_temperature)


@pytest.mark.parametrize("softcap", [-1.0, math.nan, math.inf])
def test_softcap_messages(softcap: float) -> None:
    message = r"`softcap` must be positive and finite, got"
    with pytest.raises(RuntimeError, match="token_logprob: " + message):
        ops.token_logprob(LOGITS, TARGET, softcap=softcap)
    with pytest.raises(RuntimeError, match="sample_logprob: " + message):
        ops.sample_logprob(LOGITS, 0, TARGET, TARGET, softcap=softcap)


@pytest.mark.parametrize("name", ["inv_temperature", "softcap"])
@pytest.mark.parametrize("factor", [1e39, 1.1e18, 0.9e-18, 1e-46])
def test_factors_that_fp32_has_no_room_for(name: str, factor: float) -> None:
    must = f"`{name}` must be in [1e-18, 1e+18] where `logits` is not float64, got {factor:g}"
    message = re.escape(must)
    with pytest.raises(RuntimeError, match="token_logprob: " + message):
        ops.token_logprob(LOGITS.bfloat16(), TARGET, **{name: factor})
    with pytest.raises(RuntimeError, match="sample_logprob: " + message):
        ops.sample_logprob(LOGITS, 0, TARGET, TARGET, **{name: factor})
    assert ops.token_logprob(LOGITS.double(), TARGET, **{name: factor}).logp.isfinite().all()


@pytest.mark.parametrize("inv_temperature", [1e18, 1e-18])
@pytest.mark.parametrize("softcap", [None, 1e18, 1e-18])
def test_room_for_the_others(inv_temperature: float, softcap: float | None, cpu_isa: str) -> None:
    logits = torch.tensor([[1e19, -2.0, 20.3, -3e38], [1.0, -2.0, 20.3, -1e19]])
    logits, target = logits.requires_grad_(), torch.tensor([0, 2])
    options = {"inv_temperature": inv_temperature, "softcap": softcap}
    found = ops.token_logprob(logits, target, entropy=True, **options)
    assert all(t is not None and t.isfinite().all() for t in found)
    (grad,) = torch.autograd.grad(found.logp.sum() + found.entropy.sum(), logits)
    assert grad.isfinite().all()
    drawn = ops.sample_logprob(logits, 0, target, target, **options)
    assert drawn.lse.isfinite().all()


def test_shape_messages() -> None:
    with pytest.raises(ValueError, match="token_logprob: `target` must have the shape"):
        ops.token_logprob(LOGITS, torch.tensor([0]))
    with pytest.raises(ValueError, match="token_logprob: `mask` must have shape"):
        ops.token_logprob(LOGITS, TARGET, mask=torch.tensor([True]))

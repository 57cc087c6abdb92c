"""sample_logprob: the inverse of the cumulative distribution, the law, the tail, the key."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from fdpg_fast import _build, ops, reference

OP = torch.ops.fdpg.sample_logprob.default
SIZES = [1, 7, 1000, 14019, 50257]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def rows(n: int, vocab: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(n + vocab)
    return (3 * torch.randn(n, vocab, generator=generator)).to(dtype)


def key(n: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Sample ids and positions of n rows."""
    return torch.arange(first, first + n), torch.arange(n) % 5


def draw_many(row: Tensor, draws: int, *, seed: int = 0, inv_temperature: float = 1.0) -> Tensor:
    """Tokens of ``draws`` draws from one row of logits ``[1, V]``."""
    step = min(draws, 4_000_000 // row.shape[1])
    logits = row.repeat(step, 1)
    tokens = []
    for ids in torch.arange(draws).split(step):
        drawn = ops.sample_logprob(
            logits[: len(ids)], seed, ids // 3, ids % 3, inv_temperature=inv_temperature
        )
        tokens.append(drawn.token)
    return torch.cat(tokens)


def goodness_of_fit(tokens: Tensor, p: Tensor, least: float = 20) -> float:
    """p-value of a chi-squared test; tokens are sorted by probability and binned to ``least``."""
    order = p.argsort()
    expected, seen = p[order] * len(tokens), tokens.bincount(minlength=len(p)).double()[order]
    bins = (expected.cumsum(0) / least).ceil()
    bins = bins.clamp(max=float(bins[-1]) - 1).long()
    f_exp = torch.zeros(int(bins[-1]) + 1, dtype=torch.float64).index_add_(0, bins, expected)
    f_obs = torch.zeros_like(f_exp).index_add_(0, bins, seen)
    kept = f_exp > 0
    return float(stats.chisquare(f_obs[kept], f_exp[kept]).pvalue)


# --------------------------------------------------------------------------------------------------
# The random numbers


def test_philox_known_answers() -> None:
    """kat_vectors of Random123 1.14, philox4x32 with 10 rounds."""
    known = [
        ("00000000 00000000 00000000 00000000", "00000000 00000000",
         "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
         "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ]  # fmt: skip
    for counter, k, answer in known:
        words = [torch.tensor([int(word, 16)]) for word in counter.split()]
        k0, k1 = (int(word, 16) for word in k.split())
        got = reference.philox4x32_10(words, (k0, k1))
        assert [int(word) for word in got] == [int(word, 16) for word in answer.split()]


def test_the_kernel_draws_by_the_same_numbers(cpu_isa: str) -> None:
    """Equal logits make the token the uniform number itself, in steps of 1/V."""
    ids = torch.tensor([0, 1, 2**31, 2**32, 2**40 + 1, -1, 2**63 - 1, 7])
    position = torch.tensor([0, 5, 2**33, 1, 0, -1, 2**62, 3])
    for seed in (0, 1, -1, 2**63 - 1, -(2**63), 2**32):
        u = reference.random_uniform(seed, ids, position)
        assert ((u > 0) & (u < 1)).all()
        got = ops.sample_logprob(torch.zeros(8, 50257), seed, ids, position)
        assert torch.equal(got.token, (u * 50257).long())
        torch.testing.assert_close(got.logp, torch.full((8,), -math.log(50257)))


def test_uniforms_are_uniform() -> None:
    u = reference.random_uniform(3, torch.arange(1 << 18) % 512, torch.arange(1 << 18) // 512)
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-4
    # Neighbours in either part of the counter are independent.
    grid = u.view(512, 512) - 0.5
    for shifted in (grid.roll(1, 0), grid.roll(1, 1)):
        assert abs(float((grid * shifted).mean())) < 5 / 12 / 512


# --------------------------------------------------------------------------------------------------
# Draws


@pytest.mark.parametrize(("inv_temperature", "softcap"), [(1.0, None), (0.7, None), (1.3, 6.0)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", SIZES)
def test_inverts_the_cumulative_distribution(
    vocab: int, dtype: torch.dtype, inv_temperature: float, softcap: float | None, cpu_isa: str
) -> None:
    logits, (ids, position) = rows(30, vocab, dtype), key(30)
    options = {"inv_temperature": inv_temperature, "softcap": softcap}
    got = ops.sample_logprob(logits, 9, ids, position, entropy=True, **options)
    z = reference.capped(logits.double(), softcap) * inv_temperature
    assert ((got.token >= 0) & (got.token < vocab)).all()
    log_p = torch.log_softmax(z, -1)
    expected = log_p.gather(1, got.token[:, None])[:, 0]
    tight = {"rtol": 1e-7, "atol": 1e-6 if softcap is None else 3e-6}
    torch.testing.assert_close(got.logp.double(), expected, **tight)
    torch.testing.assert_close(got.lse.double(), torch.logsumexp(z, -1), **tight)
    exact = -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(got.entropy.double(), exact, rtol=1e-6, atol=4e-6)
    # The uniform lies in the token's interval of the distribution, up to rounding of its ends.
    u = reference.random_uniform(9, ids, position)
    above = log_p.exp().cumsum(-1).gather(1, got.token[:, None])[:, 0]
    assert (u <= above + 1e-6).all()
    assert (u >= above - expected.exp() - 1e-6).all()
    # So nearly all tokens are the reference's.
    same = reference.sample_logprob(logits, 9, ids, position, entropy=True, **options)
    assert (same.token == got.token).sum() >= 29
    torch.testing.assert_close(same.entropy.double(), exact, rtol=1e-6, atol=1e-6)
    # And without an entropy they are the same.
    bare = ops.sample_logprob(logits, 9, ids, position, **options)
    assert bare.entropy is None
    assert torch.equal(bare.token, got.token)
    assert torch.equal(bare.logp, got.logp)


@pytest.mark.parametrize("inv_temperature", [1.0, 0.5])
def test_law(inv_temperature: float, cpu_isa: str) -> None:
    """Chi-squared, 10^6 draws; probabilities off by 6 % show."""
    logits = rows(1, 300) * 0.5
    tokens = draw_many(logits, 1_000_000, inv_temperature=inv_temperature)
    p = torch.softmax(logits[0].double() * inv_temperature, -1)
    assert goodness_of_fit(tokens, p) > 1e-4
    skewed = p * torch.where(torch.arange(300) % 10 == 0, 1.06, 1.0)
    assert goodness_of_fit(tokens, skewed / skewed.sum()) < 1e-4  # the test can fail


def test_law_over_many_blocks() -> None:
    tokens = draw_many(rows(1, 14019), 50_000)
    assert goodness_of_fit(tokens, torch.softmax(rows(1, 14019)[0].double(), -1)) > 1e-4


@pytest.mark.parametrize("place", [0, 1023, 4000, 7999])
def test_tail(place: int) -> None:
    """One likely token, and 7999 that share 3e-4: 30 hits expected in 10^5 draws.

    Each has probability 4e-8, less than the spacing of fp32 numbers near 1: a search through an
    fp32 cumulative sum, or -log(-log u) of an fp32 u, would find too few behind the likely one.
    (tests/csrc/test_sample_logprob.cpp goes to 2e-9.)
    """
    logits = torch.full((1, 8000), math.log(3e-4 / 7999))
    logits[0, place] = 0.0
    tokens = draw_many(logits, 100_000, seed=5)
    rare = tokens[tokens != place]
    assert 30 - 4 * 5.5 < len(rare) < 30 + 4 * 5.5
    share, n = place / 7999, len(rare)
    assert abs(int((rare < place).sum()) - share * n) <= 4 * math.sqrt(n * share * (1 - share))


def test_tail_that_gumbels_in_fp32_do_not_reach() -> None:
    """50256 tokens that share 3e-4: where the exponential race in fp32 draws none in 10^5, and 30
    are expected.

    Each has log-prob -18.9, and no -log(-log u) of an fp32 u is above 16.6. Of n such u only the
    largest can win; it is the largest of n real ones, cut to a multiple of 2^-24.
    """
    draws, n = 100_000, 50256
    log_p = math.log(3e-4 / n)
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(2, draws, generator=generator, dtype=torch.float64)
    largest = ((uniform[0].log() / n).exp() * 2**24).floor() / 2**24
    race = torch.stack((largest, uniform[1])).float().log().neg().log().neg()
    assert int((log_p + race[0] > race[1]).sum()) == 0

    logits = torch.full((1, n + 1), log_p)
    logits[0, 0] = 0.0
    rare = int((draw_many(logits, draws, seed=3) > 0).sum())
    assert 30 - 4 * 5.5 < rare < 30 + 4 * 5.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_never_a_token_of_probability_zero(dtype: torch.dtype, cpu_isa: str) -> None:
    logits = rows(2000, 2500, dtype)
    allowed = torch.zeros(2500, dtype=torch.bool)
    allowed[[3, 700, 701, 2499]] = True
    logits[:, ~allowed] = -math.inf
    ids, position = key(2000)
    got = ops.sample_logprob(logits, 0, ids, position)
    assert allowed[got.token].all()
    assert got.token.unique().tolist() == [3, 700, 701, 2499]
    for only in (0, 1024, 2499):
        one = torch.full((50, 2500), -math.inf, dtype=dtype)
        one[:, only] = -5.0
        got = ops.sample_logprob(one, 0, ids[:50], position[:50])
        assert (got.token == only).all()
        assert (got.logp == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_cannot_be_sampled(dtype: torch.dtype, cpu_isa: str) -> None:
    logits, (ids, position) = rows(6, 2500, dtype), key(6)
    clean = ops.sample_logprob(logits, 0, ids, position)
    logits[1] = -math.inf
    logits[2, 2400] = math.nan
    logits[3, 0] = math.inf
    logits[4] = math.nan
    got = ops.sample_logprob(logits, 0, ids, position)
    assert got.token[1:5].tolist() == [0, 0, 0, 0]
    assert got.logp[1:5].isnan().all()
    assert got.lse[1:5].isnan().all()
    for row in (0, 5):
        assert got.token[row] == clean.token[row]
        assert got.logp[row] == clean.logp[row]


# --------------------------------------------------------------------------------------------------
# The key, the batch, the instruction set


@pytest.mark.parametrize("dtype", DTYPES)
def test_draws_do_not_depend_on_the_batch(dtype: torch.dtype, cpu_isa: str) -> None:
    logits, (ids, position) = rows(40, 5001, dtype), key(40, first=1000)
    whole = ops.sample_logprob(logits, 3, ids, position)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    moved = ops.sample_logprob(logits[order], 3, ids[order], position[order])
    wide = torch.full((40, 5001 + 13), math.nan, dtype=dtype)
    wide[:, :5001] = logits
    parts = [
        ops.sample_logprob(wide[i : i + 7, :5001], 3, ids[i : i + 7], position[i : i + 7])
        for i in range(0, 40, 7)
    ]
    for name in ("token", "logp", "lse"):
        value = getattr(whole, name)
        assert torch.equal(value[order], getattr(moved, name))
        assert torch.equal(value, torch.cat([getattr(part, name) for part in parts]))


def test_every_part_of_the_key_counts() -> None:
    logits = rows(1, 1000).repeat(200, 1)
    ids, position = torch.arange(200), torch.zeros(200).long()
    base = ops.sample_logprob(logits, 3, ids, position).token
    assert torch.equal(base, ops.sample_logprob(logits, torch.tensor([3]), ids, position).token)
    assert len(base.unique()) > 30
    for seed, i, t in [(4, ids, position), (3, ids + 200, position), (3, ids, position + 1)]:
        other = ops.sample_logprob(logits, seed, i, t).token
        chance = torch.softmax(logits[0], -1).square().sum()  # that two draws agree
        assert float((other == base).double().mean()) < float(chance) + 0.12


@pytest.mark.parametrize("softcap", [None, 6.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", SIZES)
def test_records_what_scoring_says(
    vocab: int, dtype: torch.dtype, softcap: float | None, cpu_isa: str
) -> None:
    """To the bit: a sampler's log q and a trainer's log pi of the same logits are equal."""
    logits, (ids, position) = rows(9, vocab, dtype), key(9)
    options = {"inv_temperature": 0.9, "softcap": softcap}
    drawn = ops.sample_logprob(logits, 1, ids, position, **options)
    scored = ops.token_logprob(logits, drawn.token, **options)
    assert torch.equal(drawn.logp, scored.logp)
    assert torch.equal(drawn.lse, scored.lse)


@pytest.mark.parametrize("vocab", [1000, 50257])
def test_instruction_sets_agree_up_to_ties(vocab: int, cpu_isa: str) -> None:
    logits, (ids, position) = rows(300, vocab), key(300)
    here = ops.sample_logprob(logits, 1, ids, position)
    compiled = _build.load()
    compiled.set_cpu_isa("portable")
    portable = ops.sample_logprob(logits, 1, ids, position)
    compiled.set_cpu_isa(cpu_isa)
    same = here.token == portable.token
    assert int(same.sum()) >= 299
    torch.testing.assert_close(here.logp[same], portable.logp[same], rtol=3e-7, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# As an op


def test_opcheck_and_empty_batch() -> None:
    ids, position = key(4)
    torch.library.opcheck(OP, (rows(4, 33), torch.tensor([1]), ids, position))
    torch.library.opcheck(OP, (rows(4, 33, torch.bfloat16), torch.tensor([1]), ids, position, 0.5))
    none = torch.zeros(0, dtype=torch.long)
    empty = ops.sample_logprob(torch.zeros(0, 9), 0, none, none, entropy=True)
    assert [value.shape for value in empty] == [(0,)] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3).long(), 0, torch.arange(2), torch.arange(2)), "`logits` must be"),
        ((torch.zeros(2, 3), 0, torch.arange(3), torch.arange(2)), "`sample_id` must have shape"),
        ((torch.zeros(2, 3), 0, torch.arange(2), torch.arange(2.0)), "`position` must be int64"),
        ((torch.zeros(2, 0), 0, torch.arange(2), torch.arange(2)), "`logits` has an empty vocab"),
    ],
)
def test_messages(arguments: tuple[Tensor, int, Tensor, Tensor], message: str) -> None:
    with pytest.raises(RuntimeError, match="sample_logprob: " + message):
        ops.sample_logprob(*arguments)

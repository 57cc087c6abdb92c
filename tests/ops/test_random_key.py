"""random_key: one int64 per (seed, step, stream)."""

from __future__ import annotations

import itertools

import pytest
import torch

from fdpg_fast import ops


def splitmix64(state: int) -> int:
    """The next output of Vigna's splitmix64.c."""
    mask = 2**64 - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_is_splitmix64_chained_over_the_words() -> None:
    """Its definition: a run that is resumed by a later version draws the same samples."""
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the published first output of seed 0
    for words in ((0, 0, 0), (1, 2, 3), (-1, 10**6, 1000), (2**70, 0, 1)):
        key = 0
        for word in words:
            key = splitmix64(key ^ (word % 2**64))
        assert ops.random_key(*words) % 2**64 == key


def test_keys_differ_and_fit_a_tensor() -> None:
    words = list(itertools.product(range(-3, 30), range(60), range(5)))
    keys = torch.tensor([ops.random_key(*w) for w in words], dtype=torch.int64)
    assert len(keys.unique()) == len(words)
    # Every bit is a coin: 9900 keys, so a fair one is within 5 standard errors.
    bits = (keys[:, None] >> torch.arange(64)) & 1
    assert ((bits.double().mean(0) - 0.5).abs() < 5 * 0.5 / len(words) ** 0.5).all()


def test_stream_is_training_unless_said() -> None:
    assert ops.random_key(5, 7) == ops.random_key(5, 7, 0)
    assert ops.random_key(5, 7) != ops.random_key(7, 5)


def test_a_step_before_the_first_is_refused() -> None:
    with pytest.raises(ValueError, match="random_key: `step` must be at least 0, got -1"):
        ops.random_key(5, -1)

"""log_partition_ against the reference: streamed, split, extreme, unbiased."""

from __future__ import annotations

import math

import pytest
import torch

from fdpg_fast import ops, reference

OP = torch.ops.fdpg.log_partition_.default
ZERO = -math.inf


def weights(count: int, prompts: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    log_weight = 5 * torch.randn(count, generator=generator, dtype=torch.float64)
    log_weight[torch.rand(count, generator=generator) < 0.2] = ZERO
    return log_weight, torch.randint(0, prompts, (count,), generator=generator)


@pytest.mark.parametrize(("count", "prompts"), [(0, 3), (1, 1), (7, 5), (1000, 7)])
def test_agrees_with_reference(count: int, prompts: int) -> None:
    got, expected = ops.new_log_partition(prompts), reference.new_log_partition(prompts)
    assert torch.equal(got, expected)
    for log_weight, prompt in zip(*(x.split(300) for x in weights(count, prompts)), strict=True):
        ops.log_partition_(got, log_weight, prompt)
        reference.log_partition_(expected, log_weight, prompt)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_splitting_changes_no_bit() -> None:
    log_weight, prompt = weights(1000, 7)
    whole, parts = ops.new_log_partition(7), ops.new_log_partition(7)
    ops.log_partition_(whole, log_weight, prompt)
    for some_weight, some_prompt in zip(log_weight.split(111), prompt.split(111), strict=True):
        ops.log_partition_(parts, some_weight, some_prompt)
    assert torch.equal(whole, parts)


def test_prompts_do_not_touch_each_other() -> None:
    log_weight, prompt = weights(100, 4)
    together, alone = ops.new_log_partition(4), ops.new_log_partition(4)
    ops.log_partition_(together, log_weight, prompt)
    for g in range(4):
        ops.log_partition_(alone, log_weight[prompt == g], prompt[prompt == g])
    assert torch.equal(together, alone)


def test_effective_sample_size_by_hand() -> None:
    """Weights 1, 1, 2, 0: Z = 1 and ESS = 16 / 6."""
    state = ops.new_log_partition(1)
    log_weight = torch.tensor([0.0, 0.0, math.log(2), ZERO], dtype=torch.float64)
    ops.log_partition_(state, log_weight, torch.zeros(4, dtype=torch.int64))
    log_sum, log_square, count = state[0].tolist()
    assert log_sum - math.log(count) == pytest.approx(0.0, abs=1e-15)
    assert math.exp(2 * log_sum - log_square) == pytest.approx(16 / 6)


def test_weights_beyond_double() -> None:
    state = ops.new_log_partition(1)
    ops.log_partition_(
        state, torch.tensor([-3000.0, 3000.0, 3000.0]).double(), torch.zeros(3).long()
    )
    assert state[0].tolist() == pytest.approx([3000 + math.log(2), 6000 + math.log(2), 3])


def test_opcheck() -> None:
    log_weight, prompt = weights(10, 3)
    torch.library.opcheck(OP, (ops.new_log_partition(3), log_weight, prompt))


@pytest.mark.parametrize(
    ("log_weight", "prompt", "message"),
    [
        (torch.zeros(2).double(), torch.tensor([0, 3]), r"`prompt` must be in \[0, 3\), got 3"),
        (torch.zeros(2).double(), torch.tensor([-1, 0]), r"got -1 at sample 0"),
        (torch.zeros(2), torch.tensor([0, 1]), r"`log_weight`"),
        (torch.zeros(2).double(), torch.tensor([0]), r"`prompt`"),
        (torch.zeros(2, 1).double(), torch.tensor([0]), r"`log_weight`"),
    ],
)
def test_messages_and_an_untouched_state(
    log_weight: torch.Tensor, prompt: torch.Tensor, message: str
) -> None:
    state = ops.new_log_partition(3)
    with pytest.raises(RuntimeError, match=f"log_partition_: .*{message}"):
        ops.log_partition_(state, log_weight, prompt)
    assert torch.equal(state, ops.new_log_partition(3))


def test_state_must_be_what_new_log_partition_makes() -> None:
    with pytest.raises(RuntimeError, match=r"log_partition_: .*`state`"):
        ops.log_partition_(torch.zeros(3, 2).double(), torch.zeros(1).double(), torch.tensor([0]))

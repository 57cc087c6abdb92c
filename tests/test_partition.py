from __future__ import annotations

import math

import pytest
import torch
from toy_language import TEXTS, ToyModel, toy_model

from fdpg_fast.partition import FEW, Partition, PartitionError, warning_of_few
from fdpg_fast.scorers import contains
from fdpg_fast.targets import Base

DOG = contains("dog")


@pytest.fixture
def base() -> Base:
    return Base(toy_model(prompts=3, seed=2))


def exact_z(base: Base) -> torch.Tensor:
    return base.model.log_prob.exp() @ DOG(TEXTS)


def log_weights(rollout, target) -> torch.Tensor:
    return (target.log_score(rollout) - rollout.log_q).view(len(rollout.prompts), -1)


def test_running_is_the_mean_over_all_samples(base):
    target, q = base * DOG, toy_model(prompts=3, seed=3)
    partition = Partition(3)
    rollouts = [q.draw(50, seed, prompts=3) for seed in range(4)]
    for rollout in rollouts:
        log_z = partition.update(rollout, target.log_score(rollout))
    weights = torch.cat([log_weights(r, target) for r in rollouts], dim=1).exp()
    torch.testing.assert_close(log_z, weights.mean(1).log())
    torch.testing.assert_close(partition.ess, weights.sum(1) ** 2 / (weights**2).sum(1))
    standard_error = weights.std(1) / math.sqrt(200) / weights.mean(1)
    torch.testing.assert_close(partition.standard_error, standard_error)


def test_batch_forgets_earlier_steps(base):
    target, partition = base * DOG, Partition(3, "batch")
    for seed in range(2):
        rollout = base.model.draw(50, seed, prompts=3)
        log_z = partition.update(rollout, target.log_score(rollout))
    torch.testing.assert_close(log_z, log_weights(rollout, target).exp().mean(1).log())
    assert partition.state[:, 2].tolist() == [50.0] * 3


def test_frozen_only_counts_the_samples_before(base):
    target, partition = base * DOG, Partition(3, "frozen")
    before = [base.model.draw(50, seed, prompts=3) for seed in range(2)]
    for rollout in before:
        partition.freeze(rollout, target.log_score(rollout))
    later = base.model.draw(50, 7, prompts=3)
    log_z = partition.update(later, target.log_score(later))
    weights = torch.cat([log_weights(r, target) for r in before], dim=1).exp()
    torch.testing.assert_close(log_z, weights.mean(1).log())


def test_frozen_without_an_estimate_names_the_prompt(base):
    rollout = base.model.draw(5, 0, prompts=3)
    with pytest.raises(PartitionError, match=r"never estimated for prompt 0, 'prompt 0'.*freeze"):
        Partition(3, "frozen").update(rollout, rollout.log_q)


def test_pooling_over_a_moving_proposal_is_unbiased(base):
    """Each run pools three steps, each of another q; the mean over runs is the exact Z."""
    target, exact = base * DOG, exact_z(base)
    proposals = [ToyModel(base.model.log_prob + t * DOG(TEXTS)) for t in (0.0, 1.0, 3.0)]
    estimates, standardised = [], []
    for seed in range(300):
        partition = Partition(3)
        for step, q in enumerate(proposals):
            rollout = q.draw(8, 10 * seed + step, prompts=3)
            log_z = partition.update(rollout, target.log_score(rollout))
        estimates.append(log_z.exp())
        standardised.append((log_z - exact.log()) / partition.standard_error)
    mean = torch.stack(estimates).mean(0)
    error = torch.stack(estimates).std(0) / math.sqrt(300)
    assert ((mean - exact).abs() < 4 * error).all()
    # And the standard error is of the right size.
    assert 0.7 < torch.stack(standardised).std().item() < 1.5


def test_prompts_are_found_by_their_ids(base):
    """A step sees some of the prompts, in any order; the rest keep their state."""
    target, partition = base * DOG, Partition(3)
    all_three = base.model.draw(20, 0, prompts=3)
    partition.update(all_three, target.log_score(all_three))
    kept = partition.state[1].clone()
    two = base.model.draw(20, 1, prompts=2)
    object.__setattr__(two.prompts, "ids", torch.tensor([2, 0]))
    log_score = target.log_score(two)
    log_z = partition.update(two, log_score)
    assert torch.equal(partition.state[1], kept)
    assert partition.state[:, 2].tolist() == [40.0, 20.0, 40.0]
    expected = partition.state[[2, 0], 0] - math.log(40)
    assert torch.equal(log_z, expected)
    assert partition.standard_error.shape == (2,)


def test_zero_so_far_is_visible(base):
    rollout = base.model.draw(10, 0, prompts=3)
    log_score = rollout.log_q.clone()
    log_score[:10] = -math.inf
    partition = Partition(3)
    log_z = partition.update(rollout, log_score)
    assert log_z.tolist() == pytest.approx([-math.inf, 0.0, 0.0])
    assert partition.ess.tolist() == pytest.approx([0.0, 10.0, 10.0])
    assert partition.standard_error.tolist() == pytest.approx([math.inf, 0.0, 0.0], abs=1e-7)


def test_one_sample_says_nothing_of_its_error(base):
    rollout = base.model.draw(1, 0, prompts=3)
    partition = Partition(3)
    partition.update(rollout, rollout.log_q)
    assert partition.standard_error.tolist() == [math.inf] * 3


def test_state_round_trip(base):
    target, one = base * DOG, Partition(3, "frozen")
    rollout = base.model.draw(30, 0, prompts=3)
    one.freeze(rollout, target.log_score(rollout))
    other = Partition(3, "frozen")
    other.load_state_dict({name: value.clone() for name, value in one.state_dict().items()})
    expected = one.update(rollout, target.log_score(rollout))
    assert torch.equal(other.update(rollout, target.log_score(rollout)), expected)
    with pytest.raises(PartitionError, match="log Z of 4 prompts"):
        Partition(4).load_state_dict(one.state_dict())


def test_unknown_mode():
    with pytest.raises(PartitionError, match="running"):
        Partition(1, "moving")


def test_few_samples_of_many_prompts_are_warned_of():
    assert warning_of_few(FEW, 1000) is warning_of_few(2, 1) is None
    assert "63 samples of each of 2 prompts are few" in warning_of_few(FEW - 1, 2)
    assert "1 sample of each" in warning_of_few(1, 2)

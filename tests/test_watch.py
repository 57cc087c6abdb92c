"""Warnings of runs that go wrong while every number is still finite."""

from __future__ import annotations

import math
from typing import Any

from fdpg_fast.watch import Watch

GOOD = {
    "kl_to_base": 4.0,
    "kl_to_base_se": 0.2,
    "kl_target_base": 3.7,
    "n_used": 256.0,
    "n_off_support": 100.0,
    "weight_abs_max": 2.0,
}


def warnings(*records: dict[str, Any], steps: int = 100) -> list[str]:
    watch = Watch(steps)
    return [
        warning
        for step, record in enumerate(records, start=1)
        for warning in watch.look({"step": step, **GOOD, **record})
    ]


def test_a_good_run_is_left_alone() -> None:
    assert warnings(*[{}] * 50) == []


def test_a_runaway_is_said_after_five_steps_and_again_after_twenty_five() -> None:
    said = warnings(*[{"kl_to_base": 300.0}] * 40)
    assert [text.split(":")[0] for text in said] == ["step 5", "step 30"]
    assert "300.0 nats" in said[0]
    assert "3.7" in said[0]
    assert "learning rate" in said[0]


def test_one_far_step_is_chance() -> None:
    assert warnings(*([{"kl_to_base": 300.0}] * 4 + [{}]) * 5) == []


def test_a_runaway_that_has_lost_the_target_is_still_one() -> None:
    lost = {"kl_to_base": 300.0, "kl_target_base": math.nan, "n_off_support": 256.0}
    said = warnings({}, *[lost] * 6)
    assert len(said) == 1
    assert "running away" in said[0]


def test_nothing_to_learn_from_is_said() -> None:
    said = warnings(*[{"kl_target_base": math.nan, "n_used": 0.0, "n_off_support": 0.0}] * 6)
    assert len(said) == 1
    assert "no sample was possible" in said[0]


def test_a_run_too_short_for_patience_says_that_there_was_nothing_to_learn_from() -> None:
    nothing = {"kl_target_base": math.nan, "n_used": 0.0, "n_off_support": 0.0}
    for steps in (1, 2, 4):
        (said,) = warnings(*[nothing] * steps, steps=steps)
        assert said.startswith(f"step {steps}: no sample was possible")
        assert warnings({}, *[nothing] * (steps - 1), steps=steps) == []
    assert warnings(*[{"kl_to_base": 300.0}] * 4, steps=4) == []  # those may be chance


def test_weights_that_are_all_zero_are_said() -> None:
    """Not where no sample was possible: that is another trouble."""
    said = warnings(*[{"weight_abs_max": 0.0}] * 6)
    assert len(said) == 1
    assert said[0].startswith("step 5: every sample had weight 0")
    (said,) = warnings(*[{"weight_abs_max": 0.0, "n_off_support": 256.0}] * 6)
    assert "no sample was possible" in said


def test_a_negative_kl_is_said() -> None:
    said = warnings(*[{"kl_to_base": -3.0}] * 5)
    assert "never negative" in said[0]

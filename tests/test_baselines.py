"""Baselines by name: parsing, messages, state. Their effect on gradients: test_enumerated.py."""

from __future__ import annotations

import pytest
import torch

from fdpg_fast.baselines import BASELINES, Baseline, describe_baselines
from fdpg_fast.divergences import DIVERGENCES, Divergence


@pytest.mark.parametrize("text", [*BASELINES, "ema(0.5)"])
def test_text_round_trips(text: str) -> None:
    baseline = Baseline.parse(text)
    assert Baseline.parse(str(baseline)) == baseline
    assert baseline.id == list(BASELINES).index(baseline.name)


def test_defaults_and_state() -> None:
    assert Baseline.parse("ema").param == 0.99
    assert Baseline.parse("loo").param is None
    state = Baseline.parse("ema").new_state()
    assert state is not None
    assert state.dtype == torch.float64
    assert state.tolist() == [0.0, 0.0]
    assert Baseline.parse("loo").new_state() is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lo", "unknown 'lo'. Did you mean 'loo'?"),
        ("analitic", "Did you mean 'analytic'"),
        ("xyz", "Known baselines: none, mean, loo, ema, analytic"),
        ("ema(1)", "the parameter of ema must be strictly between 0 and 1, got 1"),
        ("ema(0)", "strictly between 0 and 1"),
        ("ema(fast)", "expected a number in ema(...)"),
        ("loo(2)", "loo takes no parameter"),
    ],
)
def test_messages(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^baseline: ") as error:
        Baseline.parse(text)
    assert message in str(error.value)


def test_help_has_a_line_per_baseline() -> None:
    lines = describe_baselines().splitlines()
    assert [line.split("(")[0].split()[0] for line in lines] == list(BASELINES)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_analytic_is_for_kl_alone(name: str) -> None:
    divergence = Divergence.parse(name)
    Baseline.parse("loo").require_valid_for(divergence)
    if name == "kl":
        Baseline.parse("analytic").require_valid_for(divergence)
    else:
        with pytest.raises(ValueError, match=r"analytic is the exact mean reward of kl only"):
            Baseline.parse("analytic").require_valid_for(divergence)

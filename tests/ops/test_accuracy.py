"""How wrong a sequence's log-prob is, ours and others': benchmarks/README.md has the table."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]


class Measured(NamedTuple):
    """The table's module, sequences, and how wrong each form is on them."""

    accuracy: ModuleType
    batch: list[tuple[Tensor, Tensor]]
    errors: dict[str, Any]


@pytest.fixture(scope="module")
def measured() -> Measured:
    """By the functions that print the table, which is not on the path of tests."""
    path = ROOT / "benchmarks" / "accuracy.py"
    spec = importlib.util.spec_from_file_location("accuracy", path)
    assert spec is not None
    assert spec.loader is not None
    accuracy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(accuracy)
    batch = list(accuracy.sequences(6, vocab=14019))
    return Measured(accuracy, batch, accuracy.errors(batch))


def test_sequences_are_like_text(measured: Measured) -> None:
    """Of one nat of entropy or of nine, rounding would say something else."""
    for logits, _ in measured.batch[:1]:
        entropy = torch.distributions.Categorical(logits=logits.double()).entropy().mean()
        assert 3 < entropy < 4


def test_error_of_a_token_and_of_a_sequence(measured: Measured, cpu_isa: str) -> None:
    """On every instruction set: no worse than eager in fp32, and far from what 16 bits leave."""
    ours = measured.accuracy.errors(measured.batch, {"ours": measured.accuracy.ours})["ours"]
    for name in ("`log_softmax`, fp32 logits", "target - logsumexp, fp32 logits (TRL)"):
        assert ours.token <= measured.errors[name].token, name
    assert ours.sequence <= measured.errors["`log_softmax`, fp32 logits"].sequence
    for bits in ("fp16", "bf16"):
        names = [n for n in measured.errors if n.startswith(f"{bits} logits")]
        assert names
        assert all(ours.sequence < 1e-3 * measured.errors[n].sequence for n in names)


def test_16_bit_logits_lose_what_their_rounding_loses(measured: Measured) -> None:
    """From bf16 logits, ours adds nothing to their rounding."""
    rounded = measured.errors["bf16 logits, then fp32 (Liger, bf16 model)"].sequence
    ours = measured.errors["`token_logprob`, bf16 logits"].sequence
    assert ours == pytest.approx(rounded, rel=1e-3)
    assert (
        rounded < measured.errors["bf16 logits, `log_softmax` in bf16 (TRL, bf16 model)"].sequence
    )

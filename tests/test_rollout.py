"""A rollout can be cut to some of its samples and stays consistent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import batch, language_model

from fdpg_fast.sampler import Sampler

TESTS = Path(__file__).parent

pytestmark = pytest.mark.usefixtures("one_thread")


def test_select_keeps_prompts_and_order() -> None:
    model = language_model("gpt2", eos_ids=range(6))
    rollout = Sampler(8).draw(model, batch([7, 3], [9]), 5, key=0)
    part = rollout.select(torch.tensor([8, 2]))
    assert len(part) == 2
    assert part.prompts is rollout.prompts
    assert part.prompt_texts == ("9", "7 3")
    assert part.texts == (rollout.texts[8], rollout.texts[2])
    assert part.sample_ids.tolist() == [8, 2]
    torch.testing.assert_close(part.log_q, rollout.log_q[[8, 2]])
    torch.testing.assert_close(
        model.token_logprob(part), model.token_logprob(rollout)[[8, 2]], rtol=0, atol=1e-5
    )


def test_a_rollout_is_itself_and_says_what_it_holds_in_a_line() -> None:
    model, sampler = language_model("gpt2"), Sampler(8)
    one, same = (sampler.draw(model, batch([7, 3], [9]), 5, key=0) for _ in range(2))
    assert one in [same, one]
    assert one != same
    assert repr(one) == "Rollout(10 samples of 2 prompts, up to 8 tokens)"


def test_what_is_looked_at_is_of_all_prompts() -> None:
    rollout = Sampler(1).draw(language_model("gpt2"), batch([7], [9], [3], [5]), 5, key=0)
    for count, expected in ((2, "7 3"), (4, "7 9 3 5"), (0, "")):
        assert [rollout.prompt_texts[row] for row in rollout.spread(count)] == expected.split()
    assert rollout.spread(99) == list(range(20))


# ---- a draw shared by processes ----------------------------------------------------------------


def test_another_process_draws_the_same_samples(tmp_path: Path) -> None:
    """Of 16, the last 8 by their numbers alone, in memory that has seen no others."""
    model = language_model("gpt2", eos_ids=range(6))
    whole = Sampler(20, batch_size=5).draw(model, batch([7, 3, 9]), 16, key=3)
    there = """
import sys, torch
from families import batch, language_model
from fdpg_fast.sampler import Sampler

model = language_model("gpt2", eos_ids=range(6))
part = Sampler(20, batch_size=5).draw(model, batch([7, 3, 9]), 8, key=3, first_sample_id=8)
kept = ("sample_ids", "tokens", "lengths", "finish", "token_logprob")
torch.save({name: getattr(part, name) for name in kept}, sys.argv[1])
"""
    path = os.pathsep.join((str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")))
    subprocess.run(
        [sys.executable, "-c", there, str(tmp_path / "part.pt")],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    part = torch.load(tmp_path / "part.pt")
    logp = part.pop("token_logprob")
    assert part["sample_ids"].tolist() == list(range(8, 16))
    assert len(set(part["lengths"].tolist())) > 2
    for name, values in part.items():
        assert torch.equal(values, getattr(whole, name)[8:]), name
    torch.testing.assert_close(logp, whole.token_logprob[8:], rtol=0, atol=1e-5)

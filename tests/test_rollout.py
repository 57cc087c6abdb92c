"""A rollout can be cut to some of its samples and stays consistent."""

from __future__ import annotations

import pytest
import torch
from families import batch, language_model

from fdpg_fast.sampler import Sampler

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


def test_what_is_looked_at_is_of_all_prompts() -> None:
    rollout = Sampler(1).draw(language_model("gpt2"), batch([7], [9], [3], [5]), 5, key=0)
    for count, expected in ((2, "7 3"), (4, "7 9 3 5"), (0, "")):
        assert [rollout.prompt_texts[row] for row in rollout.spread(count)] == expected.split()
    assert rollout.spread(99) == list(range(20))

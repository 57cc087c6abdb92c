"""Deterministic draws: the same bits whatever is drawn with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import batch, language_model
from torch import Tensor

from fdpg_fast import Config, sampler
from fdpg_fast.building import sampler_of
from fdpg_fast.models import LanguageModel
from fdpg_fast.rollout import Rollout
from fdpg_fast.sampler import DETERMINISTIC_SLOTS, Sampler

pytestmark = pytest.mark.usefixtures("one_thread")

EOS = tuple(range(6))
PROMPTS = ([7, 3], [9], [1, 2, 3, 4, 5, 6, 7], [8] * 17)
EACH = DETERMINISTIC_SLOTS // 2 + 3  # samples of a prompt: all of them are refilled
FAMILIES = ["gpt2", "llama", "opt", "gpt_neox", "mistral", "qwen2", "qwen3", "phi"]
FAMILIES += ["gemma2", "gemma3_text", "cohere", "granite", "t5", "t5_gated", "bart"]
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


def drawn(model: LanguageModel, *prompts: list[int], each: int = EACH, first: int = 0) -> Rollout:
    return Sampler(20, deterministic=True).draw(
        model, batch(*prompts), each, key=5, first_sample_id=first
    )


def bits(rollout: Rollout, rows: slice = slice(None)) -> list[Tensor]:
    longest = int(rollout.prompt_lengths[rows].max()) + 20
    values = (rollout.token_logprob, rollout.lse, rollout.log_q, rollout.finish)
    return [rollout.tokens[rows, :longest], *[x[rows] for x in values]]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(map(torch.equal, left, right))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_bits_are_those_of_other_company(family: str, compute: Any, device: str) -> None:
    """Of one sample, of a few and of more than there are slots; beside other prompts and not."""
    model = language_model(family, eos_ids=EOS, compute=compute, device=device)
    together = drawn(model, *PROMPTS)
    assert set(together.finish.tolist()) == {0, 1}  # some are refilled early, some late
    for g, prompt in enumerate(PROMPTS):
        for each, first in ((1, 5), (9, 20), (EACH, 0)):
            rows = slice(EACH * g + first, EACH * g + first + each)
            alone = drawn(model, prompt, each=each, first=rows.start)
            assert same(bits(alone), bits(together, rows)), (g, each)


@pytest.mark.parametrize(("count", "width"), [(2, 3072), (3, 1100)])
def test_the_bits_are_those_of_other_threads(count: int, width: int) -> None:
    """In layers that are divided among them: MKL would add up a long sum in as many parts, and
    torch compute the rest of each thread's share, where there is one, in another way."""
    changes = {"hidden_size": 64, "intermediate_size": width}
    model = language_model("llama", eos_ids=EOS, changes=changes)
    one = drawn(model, *PROMPTS)
    torch.set_num_threads(count)
    few = drawn(model, *PROMPTS)
    assert torch.get_num_threads() == count
    assert same(bits(few), bits(one))


def test_the_bits_are_those_of_steps_that_are_not_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model("llama", eos_ids=EOS)
    replayed = drawn(model, *PROMPTS)
    monkeypatch.setattr(sampler, "_can_be_replayed", lambda decoder, steps: False)
    assert same(bits(drawn(model, *PROMPTS)), bits(replayed))


def test_they_are_samples_as_others_are() -> None:
    """Of the same random numbers: the same but for rounding."""
    model = language_model("gpt2", eos_ids=EOS)
    found = drawn(model, *PROMPTS)
    usual = Sampler(20).draw(model, batch(*PROMPTS), EACH, key=5)
    same_tokens = (found.tokens == usual.tokens).all(1)
    assert same_tokens.float().mean() > 0.98
    torch.testing.assert_close(found.log_q[same_tokens], usual.log_q[same_tokens])


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("umt5", "attends by sdpa"),
        ("t5", "has experts"),
        ("falcon", "attends by sdpa"),
        ("mixtral", "has experts"),
        ("phimoe", "has experts"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*without a key-value cache:RuntimeWarning")
def test_models_whose_texts_touch_are_refused(family: str, why: str) -> None:
    changes = {"num_experts": 8} if family == "t5" else {}  # as a Switch is one
    model = language_model(family, changes=changes)
    with pytest.raises(ValueError, match=f"`deterministic` needs a model .*{why}"):
        Sampler(8, deterministic=True).draw(model, batch([3]), 2, key=1)


def test_compiled_models_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model("gpt2")
    monkeypatch.setattr(LanguageModel, "is_compiled", True)
    with pytest.raises(ValueError, match="which is compiled"):
        Sampler(8, deterministic=True).draw(model, batch([3]), 2, key=1)


def test_a_config_asks_for_it() -> None:
    assert not sampler_of(Config()).deterministic
    assert sampler_of(Config().replace(deterministic=True)).deterministic

"""A language of a few texts, one token each, so that every expectation can be written out."""

from __future__ import annotations

import torch
from torch import Tensor

from fdpg_fast.rollout import Finish, PromptBatch, Rollout

TEXTS = (
    "the dog ran",
    "a cat sat",
    "she saw the dog",
    "she ran",
    "he and she sat",
    "nothing",
    "the dog and the cat",
    "he ran",
)


class ToyModel:
    """A table of probabilities: prompt x text.

    Args:
        logits: ``(G, X)``, any numbers; one row serves every prompt.
    """

    def __init__(self, logits: Tensor, texts: tuple[str, ...] = TEXTS) -> None:
        self.log_prob = logits.double().log_softmax(-1)
        self.texts = texts
        self.calls = 0

    def sequence_logprob(self, rollout: Rollout) -> Tensor:
        self.calls += 1
        prompt = rollout.prompts.ids[rollout.prompt_index]
        return self.log_prob[prompt, rollout.tokens[:, 1]]

    def rollout(self, texts: Tensor, prompt_index: Tensor, prompts: int = 1) -> Rollout:
        """The samples ``texts`` (B,), indices, as if drawn from this model."""
        count = len(texts)
        batch = PromptBatch(
            torch.arange(prompts), ((0,),) * prompts, tuple(f"prompt {g}" for g in range(prompts))
        )
        log_q = self.log_prob[prompt_index, texts]
        return Rollout(
            tokens=torch.stack([torch.zeros_like(texts), texts], dim=1),
            prompt_lengths=torch.ones(count, dtype=torch.int64),
            lengths=torch.ones(count, dtype=torch.int64),
            prompt_index=prompt_index,
            sample_ids=torch.arange(count),
            token_logprob=log_q[:, None].float(),
            lse=torch.zeros(count, 1),
            log_q=log_q,
            finish=torch.full((count,), Finish.EOS, dtype=torch.int8),
            prompts=batch,
            texts=tuple(self.texts[i] for i in texts.tolist()),
        )

    def draw(self, per_prompt: int, seed: int, prompts: int = 1) -> Rollout:
        """``per_prompt`` independent samples of each prompt."""
        generator = torch.Generator().manual_seed(seed)
        probabilities = self.log_prob[:prompts].exp()
        texts = torch.multinomial(probabilities, per_prompt, True, generator=generator)
        return self.rollout(
            texts.flatten(), torch.arange(prompts).repeat_interleave(per_prompt), prompts
        )

    def everything(self, prompts: int = 1) -> Rollout:
        """Every text of every prompt once."""
        count = len(self.texts)
        return self.rollout(
            torch.arange(count).repeat(prompts),
            torch.arange(prompts).repeat_interleave(count),
            prompts,
        )


def toy_model(prompts: int = 1, seed: int = 0) -> ToyModel:
    generator = torch.Generator().manual_seed(seed)
    return ToyModel(torch.randn(prompts, len(TEXTS), generator=generator))

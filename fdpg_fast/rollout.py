"""Rollout: what a sampler returns and everything after it reads.

Shape legend: B samples, G prompts, P prompt tokens (longest), S sampled tokens (maximum),
T = P + S.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

__all__ = ["Finish", "PromptBatch", "Rollout", "Texts"]


class Finish(enum.IntEnum):
    """Why a sample ended."""

    LENGTH = 0  # cut off
    EOS = 1  # an end-of-text token, which belongs to it
    STOP = 2  # the caller's stop function was true of it


@dataclass(frozen=True)
class PromptBatch:
    """The prompts of one step.

    Attributes:
        ids: ``(G,)`` int64 on the CPU, each prompt's row in the prompt set (and in the store of
            log Z).
        tokens: G tuples of token ids, none of them empty.
        texts: G texts as the user wrote them.
    """

    ids: Tensor
    tokens: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.tokens)


class Texts(Sequence[str]):
    """The texts of samples, decoded when one of them is asked for."""

    def __init__(
        self,
        decode: Callable[[Sequence[Sequence[int]]], Sequence[str]],
        tokens: Tensor,
        prompt_lengths: Tensor,
        lengths: Tensor,
    ) -> None:
        self._decode, self._samples = decode, (tokens, prompt_lengths, lengths)

    @functools.cached_property
    def _texts(self) -> tuple[str, ...]:
        rows, starts, lengths = (x.tolist() for x in self._samples)
        return tuple(
            self._decode([row[s : s + n] for row, s, n in zip(rows, starts, lengths, strict=True)])
        )

    def __len__(self) -> int:
        return len(self._samples[0])

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        return self._texts[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, eq=False, repr=False)  # not number by number
class Rollout:
    """Samples x ~ q, grouped by prompt, with what q said of them.

    A row of ``tokens`` is the prompt, then the sample, then padding (on the right). A sample ends
    at its first end-of-text token, which belongs to it, or where a stop function says so, or is cut
    off at S tokens. Masks are made from lengths, never by comparing with a padding id.

    Attributes:
        tokens: ``(B, T)`` int64.
        prompt_lengths: ``(B,)`` int64, >= 1.
        lengths: ``(B,)`` int64, sampled tokens, 1..S, end-of-text included.
        prompt_index: ``(B,)`` int64, 0..G-1, non-decreasing: which of ``prompts`` each sample
            continues.
        sample_ids: ``(B,)`` int64, unique within the step; with (seed, step) it keys the draw.
        token_logprob: ``(B, S)`` fp32, log q of each sampled token as sampled, 0 past the length.
        lse: ``(B, S)`` fp32, the log-sum-exp of the logits it was drawn from, 0 past the length.
        log_q: ``(B,)`` fp64, log q(x | prompt): the sum of ``token_logprob``.
        finish: ``(B,)`` int8, a :class:`Finish`: why it ended.
        prompts: the G prompts.
        texts: B decoded samples, without the prompt and without special tokens; those of a sampler
            are decoded when somebody asks for one.
    """

    tokens: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    prompt_index: Tensor
    sample_ids: Tensor
    token_logprob: Tensor
    lse: Tensor
    log_q: Tensor
    finish: Tensor
    prompts: PromptBatch
    texts: Sequence[str]

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __repr__(self) -> str:
        count, longest = len(self.prompts), self.token_logprob.shape[1]
        return f"Rollout({len(self)} samples of {count} prompts, up to {longest} tokens)"

    @property
    def finished(self) -> Tensor:
        """``(B,)`` bool: ended by itself, not cut off by length."""
        return self.finish != Finish.LENGTH

    @property
    def prompt_texts(self) -> tuple[str, ...]:
        """B texts: the prompt of each sample."""
        return tuple(self.prompts.texts[g] for g in self.prompt_index.tolist())

    def spread(self, count: int) -> list[int]:
        """Rows of ``count`` samples to look at, of as many prompts as there are; or all rows."""
        count = min(count, len(self))
        return [at * len(self) // count for at in range(count)]

    def select(self, rows: Tensor) -> Rollout:
        """The samples at ``rows`` (int64 indices), all G prompts kept."""
        picked = {
            f.name: getattr(self, f.name)[rows]
            for f in dataclasses.fields(self)
            if isinstance(getattr(self, f.name), torch.Tensor)
        }
        texts = tuple(self.texts[i] for i in rows.tolist())
        return dataclasses.replace(self, **picked, texts=texts)

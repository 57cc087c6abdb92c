"""Prompts, and which of them come at which step: a function of the step alone.

So a run that is stopped and resumed, or that has other processes beside it, sees the same prompts.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fdpg_fast.rollout import PromptBatch

if TYPE_CHECKING:
    from fdpg_fast.models import LanguageModel

__all__ = ["PromptError", "Prompts", "as_setting", "read_texts"]


class PromptError(ValueError):
    """Prompts that cannot be used; the message names the prompt and the way out."""


class Prompts:
    """A set of prompts, visited ``per_step`` at a time.

    Every epoch visits each prompt once, in an order of its own if ``shuffle``. When the number of
    prompts is no multiple of ``per_step``, the last step of an epoch is filled up from its first.

    Args:
        texts: the prompts as the user wrote them.
        encode: text to token ids, as ``LanguageModel.encode``.
        per_step: G, prompts in each batch; no more than there are prompts.
        shuffle: a new order every epoch; else the given one.
        seed: of the orders.

    Raises:
        PromptError: no prompts, a prompt without tokens, or ``per_step`` out of range.
    """

    def __init__(
        self,
        texts: Sequence[str],
        encode: Callable[[str], Sequence[int]],
        *,
        per_step: int = 1,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        self.texts = tuple(texts)
        if not self.texts:
            raise PromptError("prompts: expected at least one, got none")
        if not 1 <= per_step <= len(self.texts):
            raise PromptError(
                f"prompts: expected prompts_per_step in 1..{len(self.texts)} (the number of "
                f"prompts), got {per_step}. More samples of a prompt: samples_per_prompt."
            )
        self.tokens = tuple(tuple(encode(text)) for text in self.texts)
        for number, (text, tokens) in enumerate(zip(self.texts, self.tokens, strict=True)):
            if not tokens:
                raise PromptError(f"prompts: prompt {number}, {text!r}, has no tokens")
        self.per_step, self.shuffle, self.seed = per_step, shuffle, seed

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str] | Sequence[str] | None,
        model: LanguageModel,
        per_step: int = 1,
        *,
        max_new_tokens: int = 0,
        shuffle: bool = True,
        seed: int = 0,
    ) -> Prompts:
        """Read prompts from what a user gives.

        Args:
            source: None or ``""``: one empty prompt, that is the model's ``bos_prompt``; a text; a
                path of a ``.txt`` file (a prompt per line) or ``.jsonl`` file (objects with a
                ``"prompt"``); or a list of texts.
            model: gives tokenizer, context length and vocabulary.
            per_step: prompts in each batch.
            max_new_tokens: sample length that must fit behind every prompt.
            shuffle: visit them in a new order every epoch.
            seed: of the orders.

        Raises:
            PromptError: names the prompt or the line, and what is wrong with it.
        """
        texts = read_texts(source)

        def encode(text: str) -> Sequence[int]:
            return model.encode(text) if text else model.bos_prompt

        prompts = cls(texts, encode, per_step=per_step, shuffle=shuffle, seed=seed)
        for number, (text, tokens) in enumerate(zip(prompts.texts, prompts.tokens, strict=True)):
            if max_new_tokens > model.room(len(tokens)):
                raise PromptError(
                    f"prompts: prompt {number}, {_short(text)}, of {len(tokens)} tokens and "
                    f"{max_new_tokens} new ones do not fit the {model.context_length} tokens that "
                    f"{model.name} can read. Shorten it, or set a smaller max_new_tokens."
                )
            outside = [token for token in tokens if not 0 <= token < model.vocab_size]
            if outside:
                raise PromptError(
                    f"prompts: prompt {number}, {_short(text)}, has token id {outside[0]}, "
                    f"expected 0..{model.vocab_size - 1}: the tokenizer does not belong to "
                    f"{model.name}."
                )
        return prompts

    def __len__(self) -> int:
        return len(self.texts)

    def batch(self, step: int) -> PromptBatch:
        """The prompts of a step, a pure function of it; ``step`` counts from 0."""
        if step < 0:
            raise ValueError(f"prompts: `step` must be at least 0, got {step}")
        count = len(self)
        epoch, place = divmod(step, -(-count // self.per_step))
        if self.shuffle:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % (1 << 63))
            order = torch.randperm(count, generator=generator)
        else:
            order = torch.arange(count)
        places = torch.arange(place * self.per_step, (place + 1) * self.per_step)
        return self._pick(order[places % count])

    def all(self) -> PromptBatch:
        """Every prompt, in the given order."""
        return self._pick(torch.arange(len(self)))

    def some(self, count: int, seed: int) -> PromptBatch:
        """``count`` of them at random, or all of them if there are no more."""
        generator = torch.Generator().manual_seed(seed % (1 << 63))
        return self._pick(torch.randperm(len(self), generator=generator)[:count])

    def _pick(self, ids: torch.Tensor) -> PromptBatch:
        rows = ids.tolist()
        return PromptBatch(
            ids=ids,
            tokens=tuple(self.tokens[i] for i in rows),
            texts=tuple(self.texts[i] for i in rows),
        )


def as_setting(source: str | os.PathLike[str] | Sequence[str]) -> str | list[str]:
    """What :meth:`Prompts.load` takes, in the types of a config, where a path is a text.

    Raises:
        PromptError: a path whose text would be taken for a prompt.
    """
    if isinstance(source, os.PathLike):
        return str(_known_kind(source))
    return source if isinstance(source, str) else _listed(source)


def _listed(source: Sequence[str]) -> list[str]:
    try:
        return list(source)
    except TypeError as error:
        raise PromptError(
            f"prompts: expected a text, a path or a list of texts, got {source!r}"
        ) from error


def read_texts(source: str | os.PathLike[str] | Sequence[str] | None) -> list[str]:
    """The texts of what :meth:`Prompts.load` takes.

    Raises:
        PromptError: a file that cannot be read, or a text that cannot be a prompt.
    """
    if source is None or source == "":
        return [""]
    if not isinstance(source, (str, os.PathLike)):
        texts = _listed(source)
        for number, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise PromptError(
                    f"prompts: prompt {number} of the list must be a text, got {text!r}. For no "
                    "prompt at all leave prompts empty."
                )
        return texts
    readable = isinstance(source, os.PathLike) or Path(source).suffix in READERS
    named = readable or FILE_NAME.fullmatch(os.fspath(source))
    if not named and not os.path.isfile(source):  # a text may be too long to ask Path
        return [str(source)]
    path = _known_kind(source)
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows writes a mark before the text
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(
            f"prompts: cannot read {path}: {error}. Check the path; if a run's prompts have "
            "moved, say where to in its config.yaml."
        ) from error
    if not text:
        raise PromptError(f"prompts: {path} is empty")
    # Not splitlines, which ends lines also where a text may go on, as JSON does at U+2028.
    lines = text.removesuffix("\n").split("\n")
    return [READERS[path.suffix](line, f"{path}, line {n}") for n, line in enumerate(lines, 1)]


def _known_kind(source: str | os.PathLike[str]) -> Path:
    path = Path(source)
    if path.suffix not in READERS:
        raise PromptError(
            f"prompts: {path}: expected a text, or one of {', '.join(READERS)}. For the name as a "
            "prompt, make it a line of a .txt file; a config or Python may have it in a list: "
            f"[{os.fspath(source)!r}]"
        )
    return path


def _text_line(line: str, where: str) -> str:
    if not line.strip():
        raise PromptError(f"prompts: {where} is empty. Remove the line.")
    return line


def _json_line(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise PromptError(f"prompts: {where} is not JSON: {error}") from error
    text = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise PromptError(f'prompts: {where}: expected {{"prompt": "some text"}}, got {line[:80]}')
    return text


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


# What is taken for a file's name even where there is no such file: one word with an ending.
FILE_NAME = re.compile(r"\S+\.[A-Za-z]\w*")

# File kinds that prompts are read from: ending -> what a line means.
READERS: dict[str, Callable[[str, str], str]] = {".txt": _text_line, ".jsonl": _json_line}

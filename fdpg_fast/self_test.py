"""The self-test at load: a model's fast paths against its own plain forward pass, on that model.

What is done about a path that differs is for :class:`fdpg_fast.models.LanguageModel` to say; here
differences are measured, in nats of log-probs.

Shape legend: t tokens of one text, b texts, W tokens of the longest, V vocabulary, D hidden size.
"""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fdpg_fast.attention import SlotCache, SlotDecoder
from fdpg_fast.packing import Packing
from fdpg_fast.pretrained import ModelError

if TYPE_CHECKING:
    from fdpg_fast.models import LanguageModel

__all__ = ["PACKING_TOLERANCE", "SelfTest", "difference", "packing_error", "require"]

# Nats that packed and single texts may differ by on average. A token of another text in sight makes
# it 0.2 (the OPT of the tests); bf16 itself is 0.003 from fp32 there, fp16 0.0004.
PACKING_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}

# Where layers see a window only, if it is no longer than this, the self-test decodes so many tokens
# past it: four forward passes of one text at load.
LONGEST_WINDOW, BEYOND = {"cpu": 1024, "cuda": 4096}, 8


def difference(logits: Tensor, reference: Tensor, softcap: float | None) -> float:
    """Largest difference in nats of log-probs from ``logits``, yet to be capped, and from
    ``reference``; NaN counts as infinite."""
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    distance = (torch.log_softmax(logits, -1) - torch.log_softmax(reference, -1)).abs().max()
    return float(distance.nan_to_num(nan=torch.inf))


def require(model: str, path: str, error: float, tolerance: float) -> None:
    """Raise a :class:`ModelError` unless ``error`` is within ``tolerance``, both in nats."""
    if not error <= tolerance:
        raise ModelError(
            f"{model}: {path} differs from the model's own forward pass by {error:.2g} nats "
            f"(tolerance {tolerance:.2g}). Reload it with attention='eager'; if it stays, this "
            "family cannot be trained here."
        )


class SelfTest:
    """Some random texts of unequal length, and what the model itself says of them.

    Made and used in fp32 and without gradients: what is compared is the computation, not its
    rounding.

    Attributes:
        rows: the texts.
        reference: their logits ``(t, V)``, by transformers' own attention, each text alone.
        tolerance: nats; fp32 rounding grows with the logits (2.7e-5 nats at logits of 30), while
            wrong masks or positions show as 0.1 nats and more.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.rows = self.texts()
        with model.stock_attention():
            self.reference = [self.plain_logits(row) for row in self.rows]
        largest = max(float(logits.abs().max()) for logits in self.reference)
        self.tolerance = 1e-4 + 1e-5 * largest

    def measure(self) -> dict[str, float]:
        """The difference that each path in use makes, and the tolerance.

        Raises:
            ModelError: one is above the tolerance.
        """
        found = {"tolerance": self.tolerance, "scoring": self.scoring_error()}
        if self.model.head is not None:
            found["head"] = self.head_error()
        if self.model.has_cache:
            found["decoding"] = self.decoding_error()
        for path, error in found.items():
            require(self.model.name, path, error, self.tolerance)
        return found

    def require_causal(self) -> None:
        """What the model says of the beginning of a text must not depend on the rest of it."""
        # More than half of a text: the self-test's encoders read another prompt for less.
        texts = zip(self.rows, self.reference, strict=True)
        row, logits = max(texts, key=lambda pair: len(pair[0]))
        begun = row[: len(row) // 2 + 1]
        error = difference(self.plain_logits(begun), logits[: len(begun)], None)
        if self.tolerance < error < math.inf:
            raise ModelError(
                f"{self.model.name}: what it says of a token depends on what comes after it, by "
                f"{error:.2g} nats here: such a model gives no log-prob of a text. Way out: a "
                f"model that reads from left to right, as {self.model.auto_class} of transformers "
                "loads"
            )

    # --- differences, in nats -------------------------------------------------------------------

    def head_error(self) -> float:
        """Of logits from hidden states, each text alone."""
        return max(
            difference(self.model.logits(self.hidden([row])[0]), logits, self.model.softcap)
            for row, logits in zip(self.rows, self.reference, strict=True)
        )

    def scoring_error(self) -> float:
        """Of texts padded on the right to one length."""
        states = self.hidden(self.rows)
        return max(
            difference(self.model.logits(states[i, : len(row)]), logits, self.model.softcap)
            for i, (row, logits) in enumerate(zip(self.rows, self.reference, strict=True))
        )

    def decoding_error(self) -> float:
        """Of prompts of unequal length, and the rest of each text token by token; and of the last
        tokens of a text that is longer than a sliding window, if there is one."""
        return max(self._slots_error(), self._window_error())

    def _slots_error(self) -> float:
        model, rows = self.model, self.rows
        longest = max(len(row) for row in rows)
        slots = SlotDecoder(model, SlotCache(model.layers, len(rows), longest, model.device))
        prompts = [row[: 1 + i * len(row) // len(rows)] for i, row in enumerate(rows)]
        slots.prefill(prompts, [1] * len(prompts))
        index = torch.arange(len(rows))
        slots.assign(index, index)
        place = [len(prompt) - 1 for prompt in prompts]
        worst = 0.0
        while any(at < len(row) for at, row in zip(place, rows, strict=True)):
            live = [at < len(row) for at, row in zip(place, rows, strict=True)]
            tokens = [row[min(at, len(row) - 1)] for at, row in zip(place, rows, strict=True)]
            reach = max(at + 1 for at, alive in zip(place, live, strict=True) if alive)
            logits = slots.step(torch.tensor(tokens, device=model.device), reach)
            for i, alive in enumerate(live):
                if alive:
                    error = difference(logits[i], self.reference[i][place[i]], model.softcap)
                    worst = max(worst, error)
                    place[i] += 1
            slots.positions.add_(torch.tensor(live, device=model.device))
            slots.positions.clamp_(max=longest - 1)
        return worst

    def _window_error(self) -> float:
        model = self.model
        if not (row := long_text(model)):
            return 0.0
        with model.stock_attention():
            ids = torch.tensor([row], device=model.device)
            reference = model.model(input_ids=ids, use_cache=False, logits_to_keep=BEYOND).logits[0]
        slots = SlotDecoder(model, SlotCache(model.layers, 1, len(row), model.device))
        slots.prefill([row[: 1 - BEYOND]], [1])
        slots.assign(torch.tensor([0]), torch.tensor([0]))
        worst = 0.0
        for place, expected in enumerate(reference.float(), len(row) - BEYOND):
            logits = slots.step(torch.tensor([row[place]], device=model.device), place + 1)
            worst = max(worst, difference(logits[0], expected, model.softcap))
            slots.positions.add_(1)
        return worst

    # --- what a kind of model has its own way to do ---------------------------------------------

    def texts(self) -> list[list[int]]:
        """Random ones of unequal length."""
        return short_texts(self.model)

    def plain_forward(self, row: list[int]) -> Any:
        """What transformers says of one text."""
        ids = torch.tensor([row], device=self.model.device)
        return self.model.model(input_ids=ids, use_cache=False)

    def hidden(self, rows: list[list[int]]) -> Tensor:
        """The hidden states ``(b, W, D)`` of texts padded on the right."""
        return _hidden(self.model, rows)

    def plain_logits(self, row: list[int]) -> Tensor:
        """The logits ``(t, V)`` of one text, fp32."""
        logits = getattr(self.plain_forward(row), "logits", None)
        expected = [1, len(row), self.model.vocab_size]
        got = None if logits is None else list(logits.shape)
        if logits is None or got != expected:
            raise ModelError(
                f"{self.model.name}: expected logits of shape {expected} for {len(row)} tokens, "
                f"got {got}: log-probs need an output layer over the vocabulary. Way out: a model "
                f"as {self.model.auto_class} of transformers loads it"
            )
        plain: Tensor = logits[0].float()
        return plain


@torch.no_grad()
def packing_error(model: LanguageModel, kernel: str) -> float:
    """Mean difference of log-probs between texts packed, by ``kernel``, and each alone, in the
    model's compute: a kernel for packed sequences may know half precision only."""
    # Two windows, for one key of many is less than half precision sees.
    texts, long = short_texts(model), long_text(model, windows=2)
    rows = [*texts, long] if long else texts
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.tensor([[i for row in rows for i in row]], device=model.device)
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None].to(model.device)
    packing = Packing.of(lengths, model.device, kernel)
    packed = model.hidden(tokens, positions, packing=packing)[0].split(lengths.tolist())
    alone = [_hidden(model, [row])[0] for row in rows]

    def mean(ours: Tensor, theirs: Tensor) -> float:
        one, other = (torch.log_softmax(model.logits(states), -1) for states in (ours, theirs))
        return float((one - other).abs().mean().nan_to_num(nan=torch.inf))

    short = mean(*(torch.cat(states[: len(texts)]) for states in (packed, alone)))
    if not long:
        return short
    # Apart, or the others, to whom a window is nothing, would make it small.
    return max(short, mean(packed[-1][-BEYOND:], alone[-1][-BEYOND:]))


def short_texts(model: LanguageModel) -> list[list[int]]:
    """Four random texts of unequal length."""
    generator = torch.Generator().manual_seed(0)
    longest = min(12, model.context_length)
    return [
        torch.randint(model.vocab_size, (max(1, longest - cut),), generator=generator).tolist()
        for cut in (3, 0, 5, 8)
    ]


def long_text(model: LanguageModel, windows: int = 1) -> list[int]:
    """A random text that is longer than so many windows of the model's layers, as far as its
    context goes; empty: there is no window, or it would be too long."""
    window = getattr(model.model.config.get_text_config(decoder=True), "sliding_window", None)
    if not isinstance(window, int) or window > LONGEST_WINDOW[model.device.type]:
        return []
    if window + BEYOND > model.context_length:
        return []
    if "logits_to_keep" not in inspect.signature(model.model.forward).parameters:
        return []  # those of all its tokens may be gigabytes
    generator = torch.Generator().manual_seed(1)
    length = min(windows * window + BEYOND, model.context_length)
    return torch.randint(model.vocab_size, (length,), generator=generator).tolist()


def padded(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Texts padded on the right, and positions, both ``(b, W)``."""
    width = max(len(row) for row in rows)
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    return tokens, torch.arange(width, device=device).expand(len(rows), -1)


def _hidden(model: LanguageModel, rows: list[list[int]]) -> Tensor:
    return model.hidden(*padded(rows, model.device))

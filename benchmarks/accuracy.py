"""How wrong a sequence's log-prob is, by the way its tokens' are computed: the README's table.

    python benchmarks/accuracy.py

Every form is given the same fp32 logits, and the truth is fp64 of those. Tokens are drawn from
their own distribution, as samples are; logits are a product of hidden states N(0, 1) and a weight
whose scale gives 3.6 to 3.9 nats of entropy. What other libraries do is written down here as
formulas, by what they round and where. All sums over tokens are fp64: a sum in fp32 would add its
own error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fdpg_fast import ops

__all__ = ["FORMS", "TOKENS", "Error", "errors", "sequences", "table"]

TOKENS = 512  # of a sequence
# Logits of deviation s = sqrt(2 (log V - this)). That would be the entropy, log V - s^2 / 2, of a
# softmax over so many that no one stands out; of 14,019 and 50,257 it is 3.6 and 3.9 nats.
PEAKED = 1.7
HIDDEN = 256

Form = Callable[[Tensor, Tensor], Tensor]  # logits [T, V] fp32, target [T] -> logp [T]


# --------------------------------------------------------------------------------------------------
# The forms


def log_softmax(logits: Tensor, target: Tensor) -> Tensor:
    """Rounded to the dtype of the logits: TRL's selective_log_softmax of 16-bit ones, by rows."""
    return torch.log_softmax(logits, -1).gather(-1, target[:, None])[:, 0]


def target_minus_logsumexp(logits: Tensor, target: Tensor) -> Tensor:
    """TRL's selective_log_softmax of fp32 logits; Liger's loss, which its kernel sums in fp32."""
    return logits.gather(-1, target[:, None])[:, 0] - torch.logsumexp(logits, -1)


def exact(logits: Tensor, target: Tensor) -> Tensor:
    return log_softmax(logits.double(), target)


def ours(logits: Tensor, target: Tensor) -> Tensor:
    return ops.token_logprob(logits, target).logp


FORMS: dict[str, Form] = {
    "`token_logprob`, fp32 logits": ours,
    "`log_softmax`, fp32 logits": log_softmax,
    "target - logsumexp, fp32 logits (TRL)": target_minus_logsumexp,
    # Liger's products leave logits in the dtype of the model; its kernel reads them into fp32.
    "fp16 logits, then fp32 (Liger, fp16 model)": lambda z, y: target_minus_logsumexp(
        z.half().float(), y
    ),
    "bf16 logits, then fp32 (Liger, bf16 model)": lambda z, y: target_minus_logsumexp(
        z.bfloat16().float(), y
    ),
    "`token_logprob`, bf16 logits": lambda z, y: ours(z.bfloat16(), y),
    "bf16 logits, `log_softmax` in bf16 (TRL, bf16 model)": lambda z, y: log_softmax(
        z.bfloat16(), y
    ),
}


# --------------------------------------------------------------------------------------------------
# Sequences, and how far off their log-probs are


def sequences(count: int, vocab: int, offset: float = 0.0) -> Iterator[tuple[Tensor, Tensor]]:
    """``count`` times logits [TOKENS, vocab] and targets [TOKENS].

    Args:
        offset: added to all logits, which changes no probability, but what 16 bits leave of them.
    """
    generator = torch.Generator().manual_seed(0)
    deviation = math.sqrt(2 * (math.log(vocab) - PEAKED))
    weight = torch.randn(vocab, HIDDEN, generator=generator) * (deviation / math.sqrt(HIDDEN))
    for _ in range(count):
        logits = torch.randn(TOKENS, HIDDEN, generator=generator) @ weight.t() + offset
        target = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        yield logits, target


class Error(NamedTuple):
    """Root mean squares, in nats: of a token's log-prob over tokens, of a sequence's over them."""

    token: float
    sequence: float


def errors(
    batch: Iterable[tuple[Tensor, Tensor]], forms: dict[str, Form] = FORMS
) -> dict[str, Error]:
    """Form -> how wrong it is on the batch."""
    # MKL sets up its exponential in the first call of a process. Where that call is on two threads,
    # one of them was in one run of ten off by 1e-4, and so would be whichever form came first.
    torch.ones(1).exp()
    off: dict[str, list[Tensor]] = {name: [] for name in forms}
    for logits, target in batch:
        truth = exact(logits, target)
        for name, form in forms.items():
            off[name].append(form(logits, target).double() - truth)

    def rms(values: Tensor) -> float:
        return values.square().mean().sqrt().item()

    stacked = {name: torch.stack(values) for name, values in off.items()}
    return {name: Error(rms(e), rms(e.sum(1))) for name, e in stacked.items()}


def table(count: int = 32) -> str:
    cases = {
        "V 14019": (14019, 0.0),
        "V 50257": (50257, 0.0),
        "V 50257, logits around -80": (50257, -80.0),  # where GPT-2's lie
    }
    columns = {title: errors(sequences(count, *case)) for title, case in cases.items()}
    rows = [
        f"| {form} | "
        + " | ".join(f"{column[form].sequence:.1e}" for column in columns.values())
        + " |"
        for form in FORMS
    ]
    return "\n".join(
        [f"| form | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|", *rows]
    )


if __name__ == "__main__":
    print(table())

"""The baselines that make the gradient less noisy, by name.

Each is subtracted from the rewards and leaves the expected gradient as it is, off policy too. The
formulas are in ``csrc/include/fdpg/baseline.h``, whose list this module reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fdpg_fast import choices
from fdpg_fast._build import load
from fdpg_fast.divergences import Divergence

__all__ = ["BASELINES", "Baseline", "describe_baselines"]

_ROWS = load().baselines()

BASELINES = choices.read(_ROWS)
"""The compiled baselines by name, in the order of their ids."""


@dataclass(frozen=True)
class Baseline:
    """A baseline. Make one by `parse`; ``str(baseline)`` is text that `parse` reads back.

    Attributes:
        name: ``loo``, ``mean``, ``ema``, ``analytic``, ``none``.
        id: its place in the compiled list.
        param: its parameter (the decay of ``ema``), None if it takes none.
        keeps_state: True if it learns from earlier batches; then `new_state` is passed to every
            call of ``fdiv_weights`` and saved with a checkpoint.
        meaning: one line.
    """

    name: str
    id: int
    param: float | None
    keeps_state: bool
    meaning: str

    @staticmethod
    def parse(text: str) -> Baseline:
        """``"loo"``, ``"ema(0.99)"``; a parameter that is left out takes its default.

        Raises:
            ValueError: unknown name (the message has the nearest and the list), a parameter where
                none is taken, or one out of its range.
        """
        choice, param = choices.parse(text, BASELINES, kind="baseline", plural="baselines")
        keeps_state = bool(_ROWS[choice.id]["keeps_state"])
        return Baseline(choice.name, choice.id, param, keeps_state, choice.meaning)

    def require_valid_for(self, divergence: Divergence) -> None:
        """Raises ValueError where this baseline is not exact: ``analytic`` with other than kl."""
        if self.name == "analytic" and divergence.name != "kl":
            raise ValueError(
                f"baseline: analytic is the exact mean reward of kl only, got divergence "
                f"{divergence}. Use loo, or divergence kl"
            )

    def new_state(self, device: torch.device | str = "cpu") -> Tensor | None:
        """``(2,)`` fp64 zeros for a baseline that keeps state, else None."""
        return torch.zeros(2, dtype=torch.float64, device=device) if self.keeps_state else None

    def __str__(self) -> str:
        return choices.write(self.name, self.param)


def describe_baselines() -> str:
    """One line per baseline, for ``--help``."""
    return choices.describe(BASELINES)

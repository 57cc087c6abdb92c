"""log Z per prompt: the normaliser that turns P into p, estimated by importance sampling.

    Z_c = E_{x~q(.|c)} [ P(x|c) / q(x|c) ]          (f-DPG, arXiv 2302.08215, Algorithm 1)

All of it is done in log space and stays on the device. Every sample knows the q that it was drawn
from, so the mean over the samples of many steps is unbiased while q moves; what an early, poor q
contributes is noise that later samples dilute. A Z that is off by a factor only rescales the
gradient of kl, but moves what tv and js aim at: hence the standard error.

Legend: B samples, G prompts of a rollout, N prompts of the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from fdpg_fast import ops
from fdpg_fast.rollout import Rollout

__all__ = ["Partition", "PartitionError", "warning_of_few"]

# Samples of each of many prompts below which people are warned. KL(p || a) of the arithmetic
# recipe reads 0.8 nats with 4 of each, 1.4 with 16 and 1.8 with 64, where 2.4 is exact.
FEW = 64

Mode = Literal["running", "batch", "frozen"]


class PartitionError(ValueError):
    """A log Z that was asked for before it exists, or a state of another run."""


def warning_of_few(each: int, prompts: int) -> str | None:
    """What to tell of measuring by ``each`` samples of each of ``prompts``, if they are few.

    Every prompt's Z is a mean in a denominator, off by a share that falls with its own samples,
    while the standard error shown falls with those of all prompts.
    """
    if prompts < 2 or each >= FEW:
        return None
    return (
        f"{each} sample{'s' * (each > 1)} of each of {prompts} prompts are few: divergences read "
        "too low, by more than the errors say."
    )


class Partition:
    """Estimates of log Z for the N prompts of a run.

    Args:
        prompts: N.
        mode: ``running``: all samples so far; ``batch``: those of the current step; ``frozen``:
            those given to :meth:`freeze` before training, and nothing after it.
        device: where the samples are.
    """

    def __init__(
        self, prompts: int, mode: Mode = "running", device: torch.device | str = "cpu"
    ) -> None:
        if mode not in get_args(Mode):
            raise PartitionError(
                f"partition: `mode` expected running | batch | frozen, got {mode!r}"
            )
        self.mode: Mode = mode
        # (N, 3): log sum w, log sum w^2, samples
        self.state = ops.new_log_partition(prompts, device)
        self._rows = torch.arange(0, device=device)  # of the last update's prompts
        self._frozen: set[int] = set()

    def update(self, rollout: Rollout, log_score: Tensor) -> Tensor:
        """Take in B samples, and say what Z is now.

        Args:
            rollout: x ~ q with their ``log_q``.
            log_score: ``(B,)`` fp64, log P(x).

        Returns:
            ``(G,)`` fp64 log Z of ``rollout.prompts``, in order; -inf for a prompt none of whose
            samples had P(x) > 0 yet.

        Raises:
            PartitionError: the mode is ``frozen`` and :meth:`freeze` has not seen a prompt.
        """
        if self.mode == "frozen":
            unseen = [i for i in rollout.prompts.ids.tolist() if i not in self._frozen]
            if unseen:
                text = rollout.prompts.texts[rollout.prompts.ids.tolist().index(unseen[0])]
                raise PartitionError(
                    f"partition: log Z is frozen, but was never estimated for prompt {unseen[0]}, "
                    f"{text!r}. Call freeze with samples of the base for every prompt first"
                )
        rows = self._rows_of(rollout)
        if self.mode == "batch":
            self.state[rows] = ops.new_log_partition(1, self.state.device)
        if self.mode != "frozen":
            self._add(rollout, log_score)
        self._rows = rows
        return self._log_z()

    def freeze(self, rollout: Rollout, log_score: Tensor) -> None:
        """Take in samples of the base before training; for ``frozen``, all that ever counts.

        For ``running`` they are a head start. May be called again with more samples.
        """
        self._add(rollout, log_score)
        self._frozen.update(rollout.prompts.ids.tolist())

    @property
    def ess(self) -> Tensor:
        """``(G,)`` fp64: effective samples, (sum w)^2 / sum w^2, of the last update's prompts."""
        log_sum, log_sum_squares, _ = self.state[self._rows].unbind(1)
        return torch.where(log_sum > -math.inf, (2 * log_sum - log_sum_squares).exp(), 0.0)

    @property
    def standard_error(self) -> Tensor:
        """``(G,)`` fp64: of log Z, for the last update's prompts; inf where it cannot be told.

        That of the mean of w over its mean (delta method): sqrt((n / ess - 1) / (n - 1)).
        """
        count = self.state[self._rows, 2]
        known = (self.ess > 0) & (count > 1)
        variance = (count / self.ess - 1).clamp(min=0) / (count - 1)
        return torch.where(known, variance.sqrt(), math.inf)

    def state_dict(self) -> dict[str, Tensor]:
        """Plain tensors, for a checkpoint."""
        frozen = torch.tensor(sorted(self._frozen), dtype=torch.int64)
        return {"log_partition": self.state, "frozen_prompts": frozen}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state_dict` gave.

        Raises:
            PartitionError: it is of a run with another number of prompts.
        """
        saved = state["log_partition"]
        if saved.shape != self.state.shape:
            raise PartitionError(
                f"partition: expected the log Z of {len(self.state)} prompts, got a state of "
                f"shape {list(saved.shape)}: it belongs to a run with other prompts"
            )
        self.state.copy_(saved)
        self._frozen = set(state["frozen_prompts"].tolist())

    def _rows_of(self, rollout: Rollout) -> Tensor:
        return rollout.prompts.ids.to(self.state.device, non_blocking=True)

    def _add(self, rollout: Rollout, log_score: Tensor) -> None:
        rows = self._rows_of(rollout)[rollout.prompt_index]
        ops.log_partition_(self.state, log_score - rollout.log_q, rows)

    def _log_z(self) -> Tensor:
        log_sum, _, count = self.state[self._rows].unbind(1)
        return log_sum - count.clamp(min=1).log()

"""What is measured of a batch of samples: the numbers of a training step and of an evaluation.

Everything is a tensor on the device of the samples; nothing is read back. Samples x ~ q speak for
the policy pi with the weight pi/q (which is one on policy), and for the target p with the weight
p/q = P / (Z q), normalised over the samples of each prompt.

Legend: B samples, G prompts, S sampled tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fdpg_fast import metrics
from fdpg_fast.rollout import Rollout
from fdpg_fast.targets import Scores

__all__ = ["measure"]


def measure(
    rollout: Rollout, scores: Scores, log_pi: Tensor, log_z: Tensor, log_z_se: Tensor
) -> dict[str, Tensor]:
    """Numbers of the policy, and of the target as far as these samples tell.

    Args:
        rollout: B samples of q.
        scores: what the target says of them.
        log_pi: ``(B,)`` fp64, log pi of each.
        log_z: ``(G,)`` fp64, of each prompt of the rollout.
        log_z_se: ``(G,)`` fp64, its standard error.

    Returns:
        Name -> scalar. ``NAME_se`` is the standard error of ``NAME``; ``moment: F`` is the mean of
        the feature F under pi, ``target_moment: F`` under p.
    """
    ratio = (log_pi - rollout.log_q).exp()
    lengths = rollout.lengths.double()
    numbers: dict[str, Tensor] = {}

    for name, (value, error) in metrics.divergence_estimates(
        log_pi, rollout.log_q, scores.log_score, log_z, rollout.prompt_index
    ).items():
        numbers[name], numbers[f"{name}_se"] = value, error

    def add(name: str, values: Tensor, error_name: str = "") -> None:
        weighted = ratio * values
        numbers[name] = weighted.mean()
        error = weighted.std() if len(weighted) > 1 else torch.full_like(weighted[0], torch.nan)
        numbers[error_name or f"{name}_se"] = error / len(weighted) ** 0.5

    add("kl_to_base", log_pi - scores.log_base)
    add("entropy", -log_pi)
    add("length", lengths)
    add("finished", rollout.finished.double())
    numbers["entropy_per_token"] = -(ratio * log_pi).sum() / (ratio * lengths).sum()
    target = _Target(rollout, scores, log_z)
    numbers["kl_target_base"] = target.kl_to_base()
    for name, values in scores.features.items():
        add(f"moment: {name}", values, f"moment_se: {name}")
        numbers[f"target_moment: {name}"] = target.mean(values)
    numbers["log_z"], numbers["log_z_se"] = log_z.mean(), log_z_se.mean()
    return numbers


class _Target:
    """Means under p, by self-normalised importance sampling within each prompt."""

    def __init__(self, rollout: Rollout, scores: Scores, log_z: Tensor) -> None:
        self._prompt, self._log_z = rollout.prompt_index, log_z
        self._log_excess = scores.log_score - scores.log_base  # log P/a
        log_weight = scores.log_score - rollout.log_q
        top = torch.full_like(log_z, -torch.inf)
        top = top.scatter_reduce(0, self._prompt, log_weight, "amax")
        self._weight = (log_weight - top[self._prompt]).exp()  # NaN where a prompt has no support

    def by_prompt(self, values: Tensor) -> Tensor:
        """``(G,)``; NaN for a prompt none of whose samples is possible."""
        # Off the support the value may be infinite, and counts for nothing.
        weighted = torch.where(self._weight > 0, self._weight * values, 0.0)
        zeros = torch.zeros_like(self._log_z)
        total = zeros.index_add(0, self._prompt, self._weight)
        return zeros.index_add(0, self._prompt, weighted) / total

    def mean(self, values: Tensor) -> Tensor:
        return self.by_prompt(values).nanmean()

    def kl_to_base(self) -> Tensor:
        """KL(p || a) = E_p[log P/a] - log Z; -log Z for a target of conditions alone."""
        return (self.by_prompt(self._log_excess) - self._log_z).nanmean()

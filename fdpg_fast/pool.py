"""Several models against one target, all measured on the samples of all of them.

A model that has collapsed cannot tell from its own samples what it misses: the terms of KL(p || pi)
that matter lie where it hardly ever goes. So the samples of M models (the base among them) are
pooled, and every model is measured on the whole pool, as drawn from the mixture

    q(x) = (1/M) sum_m pi_m(x)          (the balance heuristic of Veach and Guibas, 1995)

No weight can run away: pi_m / q <= M whatever pi_m is, and p / q <= M p / a. Z is one number for
all of them, the mean of P / q over the pool. All columns of a table made from it, and all rows too,
come from the same samples.

The models draw with the same random numbers, so a draw gives M samples that may be much alike, and
counts as one in every standard error. Those of divergences, and of the target's entropy, include
what Z is uncertain by.

Legend: M models, B samples of each, G prompts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fdpg_fast import ops
from fdpg_fast.divergences import Divergence
from fdpg_fast.metrics import Mean, Measures, log_mean_exp, measure_target, with_plug_ins
from fdpg_fast.rollout import Rollout
from fdpg_fast.targets import Scores

__all__ = ["Pool"]


class Pool:
    """The samples of M models, and what each of the models and the target says of all of them.

    Args:
        rollouts: of each model, of the same prompts and with the same random numbers: B samples.
        scores: what the target says of each of them.
        log_prob: ``(M, M B)`` fp64, what each model (rows) says of all samples, rollout by rollout.

    Attributes:
        rollouts, log_prob: as given.
        of_rollouts: the scores, as given.
        rollout: the M B samples as one, with the mixture's ``log_q``; prompts come again in each
            model's part of it.
        scores: of those.
        log_z: ``(G,)`` fp64.
        log_z_se: 0-d, standard error of the mean of ``log_z`` over the prompts that have one.
    """

    def __init__(
        self, rollouts: Sequence[Rollout], scores: Sequence[Scores], log_prob: Tensor
    ) -> None:
        models, prompts = len(rollouts), len(rollouts[0].prompts)
        self.rollouts, self.of_rollouts, self.log_prob = rollouts, scores, log_prob
        self.rollout = _joined(rollouts, log_prob.logsumexp(0) - math.log(models))
        self.scores = _joined_scores(scores)
        self._prompt = self.rollout.prompt_index
        log_weight = self.scores.log_score - self.rollout.log_q
        self.log_z = log_mean_exp(log_weight, self._prompt, prompts)
        self._mean = Mean(self._prompt, prompts, use=self.log_z > -math.inf, replicas=models)
        # p/q, whose mean over a prompt is one; a prompt without a target has none.
        ratio = (log_weight - self.log_z[self._prompt]).exp()
        self._excess = torch.where(self._has_target, ratio - 1, 0.0)
        self.log_z_se = self._mean(self._excess)[1]

    @property
    def _has_target(self) -> Tensor:
        return self.log_z[self._prompt] > -math.inf

    def divergences(self, model: int, which: Sequence[Divergence]) -> Measures:
        """D_f(pi || p) of one model for each f, named by ``str(f)``, each with ``_se``.

        Infinite where f'(inf) is and the model, or any other, was seen off the target's support.
        """
        measures: Measures = {}
        for f in which:
            value, error = self._divergence(self.log_prob[model], f)
            measures |= {str(f): value, f"{f}_se": error}
        return measures

    def target(self) -> Measures:
        """What :func:`fdpg_fast.metrics.measure_target` says of p itself, and ``log_z``.

        An entropy is the mean of -log p, and its error includes what Z is uncertain by.
        """
        measures = measure_target(
            self.rollout, self.scores, self.log_z, replicas=len(self.log_prob)
        )
        measures["entropy_se"] = self._surprise_error(torch.zeros_like(self._excess))
        even = measures["entropy_per_token"] * self.rollout.lengths  # a sample's share
        measures["entropy_per_token_se"] = self._surprise_error(even) / measures["length"]
        known = torch.where(self._mean.use, self.log_z, 0.0).sum() / self._mean.use.sum()
        return measures | {"log_z": known, "log_z_se": self.log_z_se}

    def _surprise_error(self, less: Tensor) -> Tensor:
        """The standard error of the mean under p of -log p(x) ``less`` a number for each sample."""
        ratio = torch.where(self._has_target, self._excess + 1, 0.0)
        surprise = self.log_z[self._prompt] - self.scores.log_score - less

        def terms(z: float) -> Tensor:
            return torch.where(ratio > 0, ratio * math.exp(-z) * (surprise + z), 0.0)

        return self._mean(with_plug_ins(terms, [self._excess], self._mean, self._prompt))[1]

    def _divergence(self, log_pi: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
        def terms(z: float) -> Tensor:
            return ops.fdiv_terms(
                log_pi,
                self.rollout.log_q,
                self.scores.log_score,
                self.log_z + z,
                self._prompt,
                divergence=divergence,
            )

        return self._mean(with_plug_ins(terms, [self._excess], self._mean, self._prompt))


def _joined(rollouts: Sequence[Rollout], log_q: Tensor) -> Rollout:
    """The samples of all rollouts, which are of the same prompts, one rollout after the other."""
    tensors: dict[str, Any] = {
        field.name: torch.cat([getattr(rollout, field.name) for rollout in rollouts])
        for field in dataclasses.fields(Rollout)
        if isinstance(getattr(rollouts[0], field.name), Tensor)
    }
    tensors["log_q"] = log_q
    texts = tuple(text for rollout in rollouts for text in rollout.texts)
    return dataclasses.replace(rollouts[0], **tensors, texts=texts)


def _joined_scores(scores: Sequence[Scores]) -> Scores:
    return Scores(
        log_base=torch.cat([one.log_base for one in scores]),
        log_score=torch.cat([one.log_score for one in scores]),
        features={
            name: torch.cat([one.features[name] for one in scores]) for name in scores[0].features
        },
    )

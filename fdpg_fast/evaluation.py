"""Measures a tuned model against its base on fresh samples of both.

Base and policy are sampled with the same random numbers, so that their samples can be read side by
side, and measured with the same Z: of all training samples and of these.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from fdpg_fast import metrics, ops
from fdpg_fast.measurement import measure
from fdpg_fast.models import LanguageModel
from fdpg_fast.partition import Partition
from fdpg_fast.prompts import Prompts
from fdpg_fast.rollout import PromptBatch
from fdpg_fast.sampler import Sampler
from fdpg_fast.targets import Target

__all__ = ["STREAM", "evaluate"]

STREAM = 1000  # of random numbers (ops.random_key), far from those of training
TEXTS = 16  # samples kept for reading


def evaluate(
    policy: LanguageModel,
    target: Target,
    prompts: Prompts,
    sampler: Sampler,
    partition: Partition,
    *,
    samples: int,
    seed: int,
) -> dict[str, Any]:
    """Numbers of base and policy, and some samples of each.

    Args:
        policy: the tuned model.
        target: what it was tuned to; its base is what it is compared with.
        prompts: all of them are used, or the first ``samples`` of them.
        sampler: draws.
        partition: the log Z of training; not changed.
        samples: of each model, over all prompts.
        seed: of the samples.

    Returns:
        JSON types: ``base`` and ``tuned`` map a name to ``[value, standard error or None]``,
        ``target`` to what is known of the target itself; ``goals`` are the moments asked for;
        ``texts`` are some prompts and samples.
    """
    batch = _first(prompts.all(), samples)
    each = -(-samples // len(batch))
    key = ops.random_key(seed, 0, STREAM)
    models = {"base": target.base.model, "tuned": policy}
    rollouts = {name: sampler.draw(model, batch, each, key) for name, model in models.items()}
    scores = {name: target.score(rollout) for name, rollout in rollouts.items()}
    pooled = copy.deepcopy(partition)
    for name, rollout in rollouts.items():
        log_z = pooled.update(rollout, scores[name].log_score)
    log_z_se = pooled.standard_error(batch.ids)

    measured: dict[str, dict[str, Any]] = {}
    for name, rollout in rollouts.items():
        numbers = measure(rollout, scores[name], rollout.log_q, log_z, log_z_se)
        values = {key: value.item() for key, value in numbers.items()}
        measured[name] = {
            key: [value, values.get(_error_name(key))]
            for key, value in values.items()
            if not _is_error(key)
        } | {key: [value, None] for key, value in _of_texts(rollout.texts).items()}
    # The tuned model's samples are the nearest to the target's, and so tell most of it.
    known = {"kl_to_base": measured["tuned"]["kl_target_base"]}
    for name in scores["tuned"].features:
        known[f"moment: {name}"] = measured["tuned"][f"target_moment: {name}"]
    return {
        "samples": each * len(batch),
        "seed": seed,
        "goals": target.moments,
        "target": known,
        **measured,
        "texts": {
            "prompt": rollouts["tuned"].prompt_texts[:TEXTS],
            **{name: rollout.texts[:TEXTS] for name, rollout in rollouts.items()},
        },
    }


def _first(batch: PromptBatch, count: int) -> PromptBatch:
    return PromptBatch(batch.ids[:count], batch.tokens[:count], batch.texts[:count])


def _of_texts(texts: Sequence[str]) -> dict[str, float]:
    """Diversity, as the papers of the family report it."""
    return {
        **{f"distinct_{n}": metrics.distinct_n(texts, n) for n in (1, 2, 3)},
        "self_bleu": metrics.self_bleu(texts),
    }


def _error_name(key: str) -> str:
    return key.replace("moment: ", "moment_se: ", 1) if ": " in key else f"{key}_se"


def _is_error(key: str) -> bool:
    return key.endswith("_se") or key.startswith("moment_se: ")

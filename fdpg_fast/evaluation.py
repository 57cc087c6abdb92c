"""Measures a tuned model against its base on fresh samples of both.

Base and policy are sampled with the same random numbers, so that their samples can be read side by
side, and measured with the same Z: of all training samples and of these.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fdpg_fast import checkpoint, metrics, ops
from fdpg_fast.building import prompts_of, sampler_of, target_of, tuned_of
from fdpg_fast.config import RunConfig
from fdpg_fast.models import LanguageModel
from fdpg_fast.partition import Partition
from fdpg_fast.prompts import Prompts
from fdpg_fast.report import model_card, write_report
from fdpg_fast.rollout import PromptBatch
from fdpg_fast.run_directory import RunDirectory
from fdpg_fast.sampler import Sampler
from fdpg_fast.targets import Target

__all__ = [
    "STREAM",
    "TEXTS",
    "draw_texts",
    "evaluate",
    "evaluate_run",
    "first_prompts",
    "with_errors",
]

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
    batch = first_prompts(prompts.all(), samples)
    each = -(-samples // len(batch))
    key = ops.random_key(seed, 0, STREAM)
    models = {"base": target.base.model, "tuned": policy}
    rollouts = {name: sampler.draw(model, batch, each, key) for name, model in models.items()}
    scores = {name: target.score(rollout) for name, rollout in rollouts.items()}
    pooled = copy.deepcopy(partition)
    if pooled.mode == "batch":
        pooled.mode = "running"  # all of these samples, not the last of them
    for name, rollout in rollouts.items():
        log_z = pooled.update(rollout, scores[name].log_score)
    log_z_se = pooled.standard_error

    measured = {}
    for name, rollout in rollouts.items():
        of_model = metrics.measure(rollout, scores[name], rollout.log_q, log_z, log_z_se)
        of_texts = metrics.measure_texts(rollout.texts)
        measured[name] = {
            **with_errors(of_model),
            **with_errors(metrics.pass_at_powers(rollout, scores[name], target.verdicts)),
            **{key: [value, None] for key, value in of_texts.items()},
        }
    # The tuned model's samples are the nearest to the target's, and so tell most of it.
    of_target = metrics.measure_target(rollouts["tuned"], scores["tuned"], log_z)
    return {
        "samples": each * len(batch),
        "seed": seed,
        "goals": target.moments,
        "target": with_errors(of_target),
        **measured,
        "texts": {
            "prompt": rollouts["tuned"].prompt_texts[:TEXTS],
            **{name: rollout.texts[:TEXTS] for name, rollout in rollouts.items()},
        },
    }


def first_prompts(batch: PromptBatch, count: int) -> PromptBatch:
    """``count`` prompts of a batch, or all it has."""
    return PromptBatch(batch.ids[:count], batch.tokens[:count], batch.texts[:count])


def with_errors(numbers: Mapping[str, Tensor]) -> dict[str, list[float | None]]:
    """Measures as JSON has them: name -> [value, standard error or None]."""
    plain = {name: value.item() for name, value in numbers.items()}
    errors = {name: "_se: ".join(name.split(": ", 1)) for name in plain if ": " in name}
    errors |= {name: f"{name}_se" for name in plain if ": " not in name}
    return {
        name: [value, plain.get(errors[name])]
        for name, value in plain.items()
        if name not in errors.values()
    }


def evaluate_run(run: RunDirectory, *, samples: int | None, seed: int) -> dict[str, Any]:
    """Measures the tuned model in a run's folder, and writes evaluation.json, card and report.

    Args:
        run: its folder.
        samples: fresh samples of each model; None: as many as the run's config says.
        seed: of the samples.

    Raises:
        RunDirectoryError: the run has no model yet.
        ConfigError: its target was built in Python.
    """
    run.require_model()
    config = run.config()
    target = target_of(config)
    target.load_state_dict(run.read_facts().get("lambdas", {}))
    prompts = prompts_of(config, target.base.model)
    partition = Partition(len(prompts), config.objective.log_z, target.base.model.device)
    newest = checkpoint.latest(run.checkpoints)
    if newest is not None:
        partition.load_state_dict(checkpoint.load(newest).tensors["state"])
    evaluation = evaluate(
        tuned_of(config, run.model, target.base.model),
        target,
        prompts,
        sampler_of(config),
        partition,
        samples=samples or config.run.evaluation_samples or RunConfig().evaluation_samples,
        seed=seed,
    )
    run.write_json(run.evaluation, evaluation)
    run.write_text(run.card, model_card(run))
    write_report([run], run.report)
    return evaluation


def draw_texts(
    run: RunDirectory,
    *,
    prompt: str | None,
    count: int,
    max_new_tokens: int | None,
    seed: int | None,
) -> list[tuple[str, str]]:
    """Samples of a run's tuned model.

    Args:
        run: its folder.
        prompt: what they continue; None: the run's own prompts, ``count`` of them if it has many.
        count: samples.
        max_new_tokens: longest sample; None: as in training.
        seed: for the same samples again; None: new ones.

    Returns:
        Pairs (prompt, sample).

    Raises:
        RunDirectoryError: the run has no model yet.
    """
    run.require_model()
    config = run.config()
    model = tuned_of(config, run.model)
    longest = max_new_tokens or config.sampling.max_new_tokens
    source = config.prompts.source if prompt is None else prompt
    number = secrets.randbits(32) if seed is None else seed
    picked = Prompts.load(source, model, max_new_tokens=longest).some(count, number)
    each = -(-count // len(picked))
    key = ops.random_key(number, 0, STREAM + 1)
    rollout = sampler_of(config, max_new_tokens=longest).draw(model, picked, each, key)
    return list(zip(rollout.prompt_texts, rollout.texts, strict=True))[:count]

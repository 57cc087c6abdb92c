"""Measures a tuned model against its base on fresh samples of both.

Base and policy are sampled with the same random numbers, so that their samples can be read side by
side; divergences and log Z are measured on the samples of both together (:mod:`fdpg_fast.pool`).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fdpg_fast import metrics, ops
from fdpg_fast.building import prompts_of, sampler_of, target_of, tuned_of
from fdpg_fast.divergences import Divergence
from fdpg_fast.models import LanguageModel
from fdpg_fast.partition import warning_of_few
from fdpg_fast.pool import Pool
from fdpg_fast.prompts import Prompts
from fdpg_fast.report import write_card, write_report
from fdpg_fast.rollout import PromptBatch, Rollout
from fdpg_fast.run_directory import RunDirectory
from fdpg_fast.sampler import Sampler
from fdpg_fast.targets import Target

__all__ = [
    "STREAM",
    "draw_pool",
    "draw_texts",
    "evaluate",
    "evaluate_run",
    "measure_model",
    "measured_for",
    "texts_of",
    "with_errors",
]

STREAM = 1000  # of random numbers (ops.random_key), far from those of training
TEXTS = 16  # samples kept for reading


def evaluate(
    policy: LanguageModel,
    target: Target,
    prompts: Prompts,
    sampler: Sampler,
    *,
    samples: int,
    seed: int,
    divergence: Divergence | None = None,
) -> dict[str, Any]:
    """Numbers of base and policy, and some samples of each.

    Args:
        policy: the tuned model.
        target: what it was tuned to; its base is what it is compared with.
        prompts: all of them are used, or the first ``samples`` of them.
        sampler: draws.
        samples: of each model, over all prompts.
        seed: of the samples.
        divergence: what was minimised, which is measured beside those of the paper.

    Returns:
        JSON types: ``base`` and ``tuned`` map a name to ``[value, standard error or None]``,
        ``target`` to what is known of the target itself; ``goals`` are the moments asked for;
        ``divergence`` is the name of the one given; ``texts`` are some prompts and samples.
    """
    which = metrics.PAPER if divergence is None else measured_for(divergence)
    pool = draw_pool([lambda: policy], target, prompts, sampler, samples=samples, seed=seed)
    names = ("base", "tuned")
    return {
        "samples": len(pool.rollouts[0]),
        "seed": seed,
        "goals": target.moments,
        "divergence": None if divergence is None else str(divergence),
        "target": with_errors(pool.target()),
        **{name: measure_model(pool, at, target, which) for at, name in enumerate(names)},
        "texts": texts_of(dict(zip(names, pool.rollouts, strict=True))),
    }


def draw_pool(
    tuned: Sequence[Callable[[], LanguageModel]],
    target: Target,
    prompts: Prompts,
    sampler: Sampler,
    *,
    samples: int,
    seed: int,
    note: Callable[[str], None] = lambda text: None,
) -> Pool:
    """Fresh samples of the base and of tuned models, and what each model says of all of them.

    Args:
        tuned: load the tuned models, each twice: they need not fit into memory together.
        target: gives the base, which is the pool's first model, and scores.
        prompts: all of them are used, or the first ``samples`` of them.
        sampler: draws.
        samples: of each model, over all prompts.
        seed: of the samples.
        note: is told what is being done.
    """
    batch = prompts.all()
    batch = PromptBatch(batch.ids[:samples], batch.tokens[:samples], batch.texts[:samples])
    each = -(-samples // len(batch))
    if few := warning_of_few(each, len(batch)):
        note(f"{few} Way out: more samples")
    key = ops.random_key(seed, 0, STREAM)
    models = [lambda: target.base.model, *tuned]
    rollouts, scores = [], []
    for number, load in enumerate(models, start=1):
        note(f"sampling model {number} of {len(models)}")
        rollouts.append(sampler.draw(load(), batch, each, key))
        scores.append(target.score(rollouts[-1]))
    said = [torch.cat([one.log_base for one in scores])]
    for number, load in enumerate(tuned, start=2):
        note(f"scoring by model {number} of {len(models)}")
        said.append(_log_prob(load(), rollouts, own=number - 1))
    return Pool(rollouts, scores, torch.stack(said))


def _log_prob(model: LanguageModel, rollouts: Sequence[Rollout], own: int) -> Tensor:
    """``(M B,)`` what a model says of all samples; of its own it has said it when it drew them."""
    return torch.cat(
        [r.log_q if at == own else model.sequence_logprob(r) for at, r in enumerate(rollouts)]
    )


def measure_model(
    pool: Pool, number: int, target: Target, which: Sequence[Divergence] = metrics.PAPER
) -> dict[str, list[float | None]]:
    """One model: its divergences on the pool, all else on its own samples."""
    rollout, scores = pool.rollouts[number], pool.of_rollouts[number]
    unknown = torch.zeros_like(pool.log_z)
    measures = metrics.measure(rollout, scores, rollout.log_q, pool.log_z, unknown)
    for name in ("log_z", "log_z_se", "kl_target_base"):  # of the pool, not of this model
        del measures[name]
    measures |= pool.divergences(number, which)
    measures |= metrics.pass_at_powers(rollout, scores, target.verdicts)
    measures["ess"] = metrics.measure_target(rollout, scores, pool.log_z)["ess"]
    texts = metrics.measure_texts(rollout.texts)
    return {**with_errors(measures), **{name: [value, None] for name, value in texts.items()}}


def measured_for(*minimised: Divergence) -> tuple[Divergence, ...]:
    """The divergences of the paper, and those that were minimised, each once."""
    return tuple(dict.fromkeys((*metrics.PAPER, *minimised)))


def texts_of(rollouts: Mapping[str, Rollout]) -> dict[str, list[str]]:
    """Some prompts, and what each model made of them with the same random numbers."""
    first = next(iter(rollouts.values()))
    rows, prompts = first.spread(TEXTS), first.prompt_texts
    return {
        "prompt": [prompts[row] for row in rows],
        **{name: [rollout.texts[row] for row in rows] for name, rollout in rollouts.items()},
    }


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


def evaluate_run(run: RunDirectory, *, samples: int | None, seed: int | None) -> dict[str, Any]:
    """Measures the tuned model in a run's folder, and writes evaluation.json, card and report.

    Args:
        run: its folder.
        samples: fresh samples of each model; None: as many as the run's config says.
        seed: of the samples; None: one more than that of what was measured last.

    Raises:
        RunDirectoryError: the run has no model yet.
        ConfigError: its target was built in Python.
    """
    run.require_model()
    config = run.config()
    target = target_of(config)
    target.load_state_dict(run.read_facts().get("lambdas", {}))
    if seed is None:
        before = run.read_json(run.evaluation)
        seed = config.run.seed if before is None else before["seed"] + 1
    evaluation = evaluate(
        tuned_of(config, run.model, target.base.model),
        target,
        prompts_of(config, target.base.model),
        sampler_of(config),
        samples=samples or config.samples_to_measure,
        seed=seed,
        divergence=run.minimised(),
    )
    run.write_json(run.evaluation, evaluation)
    write_card(run)
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

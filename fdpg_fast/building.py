"""Makes the parts of a run out of its config: models, target, prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fdpg_fast import adapters
from fdpg_fast.config import Config, ConfigError
from fdpg_fast.models import LanguageModel
from fdpg_fast.prompts import Prompts, read_texts
from fdpg_fast.sampler import Sampler
from fdpg_fast.scorers import ScorerError, load_function
from fdpg_fast.targets import Base, Target, TargetError, from_spec

__all__ = [
    "load",
    "model_of",
    "policy_of",
    "prompts_of",
    "require_possible",
    "sampler_of",
    "target_of",
    "tuned_of",
]


def load(name_or_path: str = "", **settings: Any) -> Base:
    """A language model as the base a(x) of targets; the policy will start as a copy of it.

    Args:
        name_or_path: Hugging Face name or local folder; empty: the small story model inside the
            package.
        settings: of :meth:`LanguageModel.load`: device, compute, attention, trust_remote_code,
            activation_checkpointing, eos_ids.

    Raises:
        ModelError: it cannot be found or used; the message says what to do.
    """
    return Base(LanguageModel.load(name_or_path, **settings))


def model_of(config: Config, name_or_path: str | Path) -> LanguageModel:
    """A model, loaded as the config says models are loaded."""
    settings = dataclasses.asdict(config.model)
    del settings["name"]
    return LanguageModel.load(name_or_path, **settings)


def policy_of(config: Config, base: LanguageModel) -> LanguageModel:
    """The model that learns, before it has: a copy of the base, or an adapter on its weights.

    Raises:
        AdapterError: the adapter cannot be made.
    """
    if config.adapter.peft == "none":
        return base.trainable_copy()
    return base.with_adapter(**dataclasses.asdict(config.adapter), seed=config.run.seed)


def tuned_of(config: Config, folder: Path, base: LanguageModel | None = None) -> LanguageModel:
    """The model that a run has saved; an adapter shares the weights of ``base``, if given."""
    if config.adapter.peft == "none":
        return model_of(config, folder)
    return (base or model_of(config, config.model.name)).with_saved_adapter(folder)


def require_possible(config: Config) -> None:
    """Refuses what can be refused without the model, which may take minutes to load.

    Raises:
        AdapterError, ConfigError, PromptError: as the part itself would.
    """
    read_texts(config.prompts.source)
    sampler_of(config)
    if config.adapter.peft != "none":
        adapters.config_class(config.adapter.peft)


def target_of(config: Config, accept: Callable[[Target], object] | None = None) -> Target:
    """The target of a run, over its base; moments are not fitted yet.

    Args:
        config: the run's.
        accept: is shown the target before the model is loaded, and may raise.

    Raises:
        ConfigError: the target was built in Python.
        ModelError, TargetError, ScorerError: a part of it cannot be made.
    """
    if config.target.built_in_python is not None:
        raise ConfigError(
            f"config: the target of this run, {config.target.built_in_python}, was built in "
            "Python. Way out: build it there again, and use Trainer(target, ..., resume=True)"
        )
    base = Base(None)
    target = from_spec(config.target.spec(), base, _folder(config))
    if accept is not None:
        accept(target)
    base.model = model_of(config, config.model.name)
    return target


def describes(config: Config, target: Target) -> bool:
    """Whether what ``config`` says of a target is this one."""
    if not (spec := config.target.spec()):
        return False
    try:
        said = from_spec(spec, Base(None), _folder(config))
    except (TargetError, ScorerError):  # of files that have moved, say
        return False
    mine, given = ((of.describe(fitted=False), of.moments) for of in (said, target))
    return mine == given


def sampler_of(
    config: Config,
    *,
    max_new_tokens: int | None = None,
    stop: Callable[[str], bool] | None = None,
) -> Sampler:
    """What draws the samples of a run, in training and after it.

    Args:
        config: the run's.
        max_new_tokens: longest sample; None: as in training.
        stop: what ends them early; None: what the config names.

    Raises:
        ConfigError: the config names no function that can be found, or one that it cannot hold.
    """
    sampling = config.sampling
    if stop is None and sampling.stop_in_python is not None:
        raise ConfigError(
            f"config: samples of this run end where a Python function, {sampling.stop_in_python}, "
            "says, which its folder does not hold. Way out: to go on with it, Trainer(stop=..., "
            "resume=True); to sample or measure, put the function in a file, and in the run's "
            "config.yaml set stop: FILE.py:FUNCTION and stop_in_python: null"
        )
    if stop is None and sampling.stop is not None:
        try:
            stop = load_function(sampling.stop, _folder(config))
        except ScorerError as error:
            raise ConfigError(f"config: `sampling.stop`: {error}") from error
    return Sampler(
        max_new_tokens or sampling.max_new_tokens,
        sampling.sampler_batch,
        stop=stop,
        deterministic=sampling.deterministic,
    )


def prompts_of(config: Config, model: LanguageModel) -> Prompts:
    """The prompts of a run.

    Raises:
        PromptError: one of them cannot be used.
    """
    return Prompts.load(
        config.prompts.source,
        model,
        per_step=config.prompts.prompts_per_step,
        shuffle=config.prompts.shuffle,
        seed=config.run.seed,
        max_new_tokens=config.sampling.max_new_tokens,
    )


def _folder(config: Config) -> Path | None:
    """Where relative names of files are looked up first."""
    return Path(config.target.folder) if config.target.folder else None

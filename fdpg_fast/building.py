"""Makes the parts of a run out of its config: models, target, prompts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from fdpg_fast.config import Config, ConfigError
from fdpg_fast.models import LanguageModel
from fdpg_fast.prompts import Prompts
from fdpg_fast.targets import Base, Target, from_spec

__all__ = ["load", "model_of", "policy_of", "prompts_of", "target_of", "tuned_of"]


def load(name_or_path: str = "", **settings: Any) -> Base:
    """A language model as the base a(x) of targets; the policy will start as a copy of it.

    Args:
        name_or_path: Hugging Face name or local folder; empty: the small story model inside the
            package.
        settings: of :meth:`LanguageModel.load`: device, compute, attention, trust_remote_code,
            activation_checkpointing.

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


def target_of(config: Config) -> Target:
    """The target of a run, over its base; moments are not fitted yet.

    Raises:
        ConfigError: the target was built in Python.
        ModelError, TargetError, ScorerError: a part of it cannot be made.
    """
    if config.target.built_in_python is not None:
        raise ConfigError(
            f"config: the target of this run, {config.target.built_in_python}, was built in "
            "Python. Way out: build it there again, and use Trainer(target, ..., resume=True)"
        )
    base = Base(model_of(config, config.model.name))
    folder = Path(config.target.folder) if config.target.folder else None
    return from_spec(config.target.spec(), base, folder)


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

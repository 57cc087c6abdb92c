"""Tune a language model toward any distribution you can describe, by f-divergence policy gradient.

import fdpg_fast as fdpg

base = fdpg.load("gpt2")
target = base.constrain({fdpg.contains("amazing"): 1.0})
trainer = fdpg.Trainer(target, divergence="js", prompts="Once upon a time", out="runs/amazing")
trainer.train()
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from fdpg_fast._version import __version__

if TYPE_CHECKING:
    from fdpg_fast import ops
    from fdpg_fast.baselines import Baseline
    from fdpg_fast.building import load
    from fdpg_fast.checkpoint import CheckpointError
    from fdpg_fast.config import Config, ConfigError
    from fdpg_fast.divergences import Divergence
    from fdpg_fast.models import LanguageModel, ModelError
    from fdpg_fast.moment_fit import FitError, FitReport
    from fdpg_fast.partition import Partition, PartitionError
    from fdpg_fast.prompts import PromptError, Prompts
    from fdpg_fast.rollout import Finish, PromptBatch, Rollout
    from fdpg_fast.run_directory import RunDirectoryError
    from fdpg_fast.sampler import Sampler, SamplingError
    from fdpg_fast.scorers import (
        Scorer,
        ScorerError,
        classifier,
        compiles,
        contains,
        equation,
        function,
        length,
        lexicon,
        mentions,
        regex,
        words,
    )
    from fdpg_fast.targets import Base, Target, TargetError
    from fdpg_fast.trainer import Trainer, TrainingError

__all__ = [
    "Base",
    "Baseline",
    "CheckpointError",
    "Config",
    "ConfigError",
    "Divergence",
    "Finish",
    "FitError",
    "FitReport",
    "LanguageModel",
    "ModelError",
    "Partition",
    "PartitionError",
    "PromptBatch",
    "PromptError",
    "Prompts",
    "Rollout",
    "RunDirectoryError",
    "Sampler",
    "SamplingError",
    "Scorer",
    "ScorerError",
    "Target",
    "TargetError",
    "Trainer",
    "TrainingError",
    "__version__",
    "classifier",
    "compiles",
    "contains",
    "equation",
    "function",
    "length",
    "lexicon",
    "load",
    "mentions",
    "ops",
    "regex",
    "words",
]

# Threads that wait for each other spin 300,000 times by default, and beside one other busy process
# a step of 1.4 s took 7 to 37 s on 2 cores; with a short spin it takes 4. Read when torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Imported when first asked for, so that `fdpg --help` does not wait for torch and transformers, and
# a compiled module that is missing or stale is an error of the command that needs it.
_MODULES = {
    "baselines": ["Baseline"],
    "building": ["load"],
    "checkpoint": ["CheckpointError"],
    "config": ["Config", "ConfigError"],
    "divergences": ["Divergence"],
    "models": ["LanguageModel", "ModelError"],
    "moment_fit": ["FitError", "FitReport"],
    "ops": ["ops"],
    "partition": ["Partition", "PartitionError"],
    "prompts": ["PromptError", "Prompts"],
    "rollout": ["Finish", "PromptBatch", "Rollout"],
    "run_directory": ["RunDirectoryError"],
    "sampler": ["Sampler", "SamplingError"],
    "scorers": [
        *("Scorer", "ScorerError"),
        *("classifier", "compiles", "contains", "equation", "function", "length", "lexicon"),
        *("mentions", "regex", "words"),
    ],
    "targets": ["Base", "Target", "TargetError"],
    "trainer": ["Trainer", "TrainingError"],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fdpg_fast' has no attribute {name!r}")
    module = importlib.import_module(f"fdpg_fast.{_HOME[name]}")
    return module if name == _HOME[name] else getattr(module, name)


def __dir__() -> list[str]:
    return __all__
